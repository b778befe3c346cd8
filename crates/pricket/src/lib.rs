//! pricket: a Candle-based model zoo for the open decoder families that research still stands on.
//!
//! [`load`] gives a [`Pricket`]: an owned handle with text in and text out, cheap to clone. What lies below it is public
//! too: [`Pricket::model`] is a [`CausalLm`], a residual stream that can be scored, probed and patched step by step.
//!
//! ```
//! use pricket::{GenerateOptions, SamplingParams};
//!
//! let pricket = pricket::tiny()?; // or pricket::load("EleutherAI/pythia-410m@step3000")?
//! let options = GenerateOptions {
//!     max_tokens: 24,
//!     sampling: SamplingParams { temperature: 0.8, top_p: 0.95, ..SamplingParams::default() },
//!     seed: 7,
//!     ..Default::default()
//! };
//! for piece in pricket.stream("My fellow citizens,", &options)? {
//!     print!("{}", piece?);
//! }
//! let scored = pricket.logprobs("The Congress of the United States")?;
//! assert!(scored.last().unwrap().logprob > -0.5, "States follows United");
//! # Ok::<(), pricket::Error>(())
//! ```
//!
//! No code of a repository is ever executed, nothing is guessed from a file's name, and a bad file gives an
//! [`Error`] that names it.

#[cfg(feature = "train")]
mod adapters;
mod audit;
mod cards;
mod changes;
mod checkpoints;
mod containers;
mod conversation;
mod convert;
mod datasets;
mod device;
mod embedded;
mod error;
mod family;
mod forms;
mod handle;
mod inputs;
mod inspect;
mod load;
mod memory;
#[cfg(feature = "plots")]
pub mod notebook;
mod open;
mod opened;
#[cfg(feature = "plots")]
pub mod plots;
mod pool;
mod prompts;
mod provenance;
mod published;
mod qkv;
mod remote;
mod repository;
mod results;
mod shapes;
mod shard;
mod small_files;
mod source;
mod sweep;
mod task;

pub use candle_core as candle;
pub use candle_nn;

pub use audit::{Audit, AuditOptions, Audited, Finding, FindingKind, audit};
pub use cards::{Card, Known, KnownKind, StepPattern, card, cards};
pub use checkpoints::{Checkpoint, Checkpoints, checkpoints};
pub use containers::{ggml_layouts, open_weights};
pub use conversation::{Conversation, Reply};
pub use convert::{ConvertOptions, Converted, Target};
pub use datasets::fetch_documents;
pub use device::device;
pub use error::{Error, Result};
pub use family::add_family;
pub use handle::{Completion, FinishReason, GenerateOptions, Pricket, ScoredToken, Stream};
pub use inspect::{Inspection, TensorInfo, TypeSummary, inspect};
pub use load::{Loader, Precision, load, tiny};
pub use memory::{Estimate, available_memory, estimate};
pub use pool::default_threads;
pub use prompts::{prompt_format, prompt_formats};
pub use provenance::{Provenance, SourceFile};
pub use published::{Published, published};
pub use qkv::QkvOrder;
pub use remote::{Tensors, tensors};
pub use repository::{Fetched, fetch};
pub use shapes::{published_config, published_shapes};
pub use shard::Shard;
pub use source::Source;
pub use sweep::{Measure, Sweep, Swept};

pub use pricket_hub::{self as hub, Hub, Steps};
pub use pricket_lm::{
    self as lm, Comparison, EvalOptions, PromptFormat, Role, SamplingParams, ScoreOptions, Task, Tokenizer, Turn,
};
pub use pricket_nn::ops::{Activations, BlockType, keep_freed_memory};
pub use pricket_nn::{
    self as nn, CacheType, CausalLm, Context, ModelInfo, Parameter, Progress, Quantisation, Recording, Silent, Site,
    State, Taps,
};
#[cfg(feature = "train")]
pub use pricket_train as train;
pub use pricket_weights::{self as weights, Dtype};

/// The programs of these pages are compiled, and run where they need no network.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../../README.md")]
    struct Readme;
    #[doc = include_str!("../../../docs/recipes.md")]
    struct Recipes;
}

/// What a program or a notebook mostly needs.
pub mod prelude {
    #[cfg(feature = "plots")]
    pub use crate::notebook::Tabular;
    pub use crate::{
        Activations, BlockType, CacheType, CausalLm, Comparison, Completion, Context, Conversation, ConvertOptions,
        Dtype, EvalOptions, FinishReason, GenerateOptions, Hub, Inspection, Loader, Measure, Precision, Pricket,
        Progress, PromptFormat, Quantisation, Recording, SamplingParams, ScoreOptions, ScoredToken, Silent, Site,
        Source, State, Steps, Sweep, Taps, Target, Task, Tokenizer, Turn, checkpoints, inspect, load, tiny,
    };
}
