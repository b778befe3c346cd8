//! Published models and their training steps: model cards, published scores, and audits of repositories, recipes of
//! fine-tuning.
//!
//! ```
//! let card = pricket::suites::card("EleutherAI/pythia-70m").expect("a card");
//! assert_eq!(card.checkpoints.as_ref().map_or(0, |pattern| pattern.steps().len()), 154);
//! ```

pub(crate) mod audit;
pub(crate) mod cards;
pub(crate) mod checkpoints;
pub(crate) mod published;
#[cfg(feature = "train")]
pub(crate) mod recipes;
pub(crate) mod remote;
pub(crate) mod shapes;

pub use audit::{Audit, AuditOptions, Audited, Finding, FindingKind, audit};
pub use cards::{Card, Known, KnownKind, StepPattern, card, cards};
pub use checkpoints::{Checkpoint, Checkpoints, checkpoints};
pub use published::{Published, published};
#[cfg(feature = "train")]
pub use recipes::{recipe, recipes};
pub use remote::{Tensors, tensors};
pub use shapes::{published_config, published_shapes};
