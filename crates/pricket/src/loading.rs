//! Finding and loading models: [`Source`] names a model, [`Loader`] loads it, and [`inspect()`] reads its headers only.
//!
//! ```
//! let inspection = pricket::inspect(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny@step64"))?;
//! let model = pricket::Loader::tiny().threads(1).load()?;
//! assert_eq!(inspection.info.map(|info| info.parameters), Some(model.info().parameters));
//! # Ok::<(), pricket::Error>(())
//! ```

#[cfg(feature = "train")]
pub(crate) mod adapters;
pub(crate) mod changes;
pub(crate) mod containers;
pub(crate) mod device;
pub(crate) mod embedded;
pub(crate) mod family;
pub(crate) mod forms;
pub(crate) mod inspect;
pub(crate) mod load;
pub(crate) mod memory;
pub(crate) mod open;
pub(crate) mod opened;
pub(crate) mod pool;
pub(crate) mod provenance;
pub(crate) mod qkv;
pub(crate) mod repository;
pub(crate) mod small_files;
pub(crate) mod source;

pub use containers::{ggml_layouts, open_weights};
pub use device::device;
pub use family::add_family;
pub use inspect::{Inspection, TensorInfo, TypeSummary, inspect};
pub use load::{Loader, Precision, load, tiny};
pub use memory::{Estimate, available_memory, estimate, used_memory};
pub use pool::default_threads;
pub use provenance::{Provenance, SourceFile};
pub use qkv::QkvOrder;
pub use repository::{Fetched, fetch};
pub use source::Source;

pub use pricket_nn::ops::{ActivationPrecision, BlockType};
pub use pricket_nn::{CacheType, NoProgress, Progress, Quantization};
pub use pricket_weights::Dtype;
