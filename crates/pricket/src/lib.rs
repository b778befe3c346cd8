//! A Candle-based model zoo for open decoder language models: GPT-NeoX and Pythia, MPT, LLaMA, RWKV-4,
//! RedPajama-INCITE.
//!
//! | module | purpose |
//! |---|---|
//! | [`loading`] | resolves a name or path and loads the model |
//! | [`text`] | generation, conversations, scores |
//! | [`suites`] | published models, their training steps, audits |
//! | [`sweep`] | measurements over training |
//! | [`convert`] | conversion to other formats and types |
//! | [`interop`] | candle programs, `VarBuilder`, `tokenizers`, `hf_hub` |
//! | [`hub`], [`weights`], [`nn`], [`lm`], `train`, `plots` | the underlying crates |
//!
//! [`load`] returns a [`Pricket`]: an owned handle that takes text and returns text, and is cheap to clone. The layers
//! below it are public: [`Pricket::model`] returns a [`CausalLm`], whose residual stream can be scored, probed and
//! patched block by block.
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
//! Code from a repository is never executed. The model family is read from the configuration, not from file names.
//! An invalid file gives an [`Error`] that names it.

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod convert;
mod error;
pub mod interop;
pub mod loading;
#[cfg(feature = "plots")]
pub mod notebook;
pub mod suites;
pub mod sweep;
mod task;
pub mod text;

pub use error::{Error, Result};
pub use loading::{Loader, Source, inspect, load, tiny};
pub use suites::checkpoints;
pub use sweep::Sweep;
pub use text::{Completion, Conversation, Pricket, Stream};

pub use candle_core as candle;
pub use candle_nn;
pub use pricket_hub::{self as hub, Hub};
pub use pricket_lm::{
    self as lm, EvalOptions, FinishReason, GenerateOptions, SamplingParams, ScoreOptions, ScoredToken, Task,
};
pub use pricket_nn::{self as nn, CausalLm, Context, Recording, Site, Taps};
#[cfg(feature = "plots")]
pub use pricket_plots as plots;
#[cfg(feature = "train")]
pub use pricket_train as train;
pub use pricket_weights as weights;

/// Compiles the programs in these pages as doctests, and runs those that need no network.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../../README.md")]
    struct Readme;
    #[doc = include_str!("../../../docs/recipes.md")]
    struct Recipes;
    #[doc = include_str!("../../../docs/interop.md")]
    struct Interop;
}

/// Common imports for programs and notebooks.
pub mod prelude {
    pub use crate::convert::{ConvertOptions, Target};
    pub use crate::hub::Steps;
    pub use crate::loading::{
        ActivationPrecision, BlockType, CacheType, Dtype, Inspection, NoProgress, Precision, Progress, Quantization,
    };
    pub use crate::nn::State;
    #[cfg(feature = "plots")]
    pub use crate::notebook::Tabular;
    pub use crate::sweep::Measure;
    pub use crate::text::{Comparison, PromptFormat, Tokenizer, Turn};
    pub use crate::{
        CausalLm, Completion, Context, Conversation, EvalOptions, FinishReason, GenerateOptions, Hub, Loader, Pricket,
        Recording, SamplingParams, ScoreOptions, ScoredToken, Site, Source, Sweep, Taps, Task, checkpoints, inspect,
        load, tiny,
    };
}
