//! Building blocks that decoder families share, on candle: weights loaded by name, linear layers that keep their
//! weights as stored, norms, rotary positions, attention and recurrences with a state, and taps on the residual stream.
//!
//! A family reads its configuration, loads layers through a [`Weights`] cursor over any [`pricket_weights::Store`], and
//! connects them in its [`Block`]. A [`Decoder`] of such blocks implements [`CausalLm`], the only interface that the
//! rest of pricket uses.
//!
//! A [`Context`] holds everything that changes from call to call: the [`State`] of the rows, the [`Span`]s to read, the
//! precision and the [`Taps`]. Family code mentions no device, no data type and no state. The module [`ops`] alone
//! chooses between fused and plain operations.
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::{Device, Tensor};
//! use pricket_nn::{Names, Weights};
//! use pricket_weights::{Dtype, Random};
//!
//! // A layer with random f16 weights, applied to f32 activations.
//! let store = Arc::new(Random::new(Dtype::F16, 0));
//! let weights = Weights::as_stored(store, Names::default());
//! let dense = weights.pp("attention").linear("dense", 8, 4, true)?;
//! let x = Tensor::ones((1, 3, 8), candle_core::DType::F32, &Device::Cpu)?;
//! assert_eq!(dense.forward(&x)?.dims(), [1, 3, 4]);
//! assert_eq!(weights.elements(), 8 * 4 + 4);
//! # Ok::<(), pricket_nn::Error>(())
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

mod activation;
mod alibi;
mod attend;
mod attention;
pub mod config;
mod context;
mod decoder;
mod deferred;
mod error;
mod family;
mod init;
mod known;
mod layer;
mod layers;
mod linear;
mod loss;
mod mlp;
mod names;
pub mod ops;
mod options;
mod pass;
mod plain_decoder;
mod plan;
mod reordered;
mod rotary;
mod sampling;
mod state;
mod step;
mod tap;
mod weights;

pub use activation::Activation;
pub use alibi::Alibi;
pub use attention::{Attention, Qkv};
pub use context::Context;
pub use decoder::{Block, CausalLm, Decoder, ModelInfo, Sizes, residual};
pub use error::{Error, Result};
pub use family::{Family, FusedRows, KnownTokenizer, ShapeOf};
pub use init::{Init, Initialization};
pub use layer::Layer;
pub use layers::{Embedding, Norm};
pub use linear::{Adapter, Dropout, EmbeddingAndHead, Linear, RowOrder};
pub use mlp::Mlp;
pub use names::Names;
pub use ops::BlockType;
pub use options::{FourBitQuantization, LoadOptions, Quantization, Storage, Trainable};
pub use pass::Span;
pub use plain_decoder::PlainDecoder;
pub use plan::{BlockPlan, ModelPlan, Residual};
pub use pricket_progress::{NoProgress, Progress};
/// Re-exported for the crates that use weights through this one.
pub use pricket_weights::{
    Bytes, Dtype, Entry, Error as StoreError, GgmlBody, GgmlLayout, GgmlType, Result as StoreResult, Store, clip,
    parse_json, stand_in,
};
pub use reordered::Reordered;
pub use rotary::Rotary;
pub use sampling::SamplingParams;
pub use state::{CacheType, State};
pub use step::{Admission, Choice, ChoiceInput, MAX_STEP, RowId, RowStep, StepDecoder};
pub use tap::{Recording, Site, Taps};
pub use weights::{Parameter, Weights};
