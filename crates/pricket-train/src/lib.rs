//! Fine-tunes and trains causal language models on one machine.
//!
//! - [`Lora`] is a LoRA adapter. It is read from PEFT's files or created for a [`Base`], trained, and written in PEFT's
//!   format.
//! - [`add_gradients`] computes gradients. With [`Checkpointing::PerBlock`], its memory hardly grows with the number of
//!   blocks.
//! - [`Optimizer`] and [`Schedule`] compute the same values as torch, transformers, composer and llm-foundry.
//! - [`Trainer`] is the training loop. An interrupted run resumes from its last checkpoint with the same results.
//!
//! ```
//! use std::sync::Arc;
//! use pricket_gpt_neox::{Config, NAMES, load};
//! use pricket_nn::Weights;
//! use pricket_train::{Base, Lora, LoraConfig, TrainTarget, Sample, TrainOptions, Trainer};
//! use pricket_weights::{Dtype, Random};
//!
//! let config = Config::from_json(&serde_json::json!({
//!     "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
//!     "intermediate_size": 128, "hidden_act": "gelu", "max_position_embeddings": 64,
//! }))?;
//! let model = load(&config, &Weights::as_stored(Arc::new(Random::new(Dtype::F32, 0)), NAMES))?;
//! let base = Base::new(Arc::new(model), NAMES);
//!
//! let lora = Lora::new(LoraConfig::default(), &base, 0)?;
//! let samples = vec![Sample::new(vec![5, 6, 7, 8])?, Sample::response(&[1, 2], &[3, 4])?];
//! let tuned = lora.train(&base, 0)?;
//! let options = TrainOptions { batch: 2, ..TrainOptions::new(20, 1e-2) };
//! let mut trainer = Trainer::new(TrainTarget::Adapter(Box::new(lora)), tuned, samples, options)?;
//! let first = trainer.advance()?.loss;
//! let mut last = first;
//! while !trainer.is_done() {
//!     last = trainer.advance()?.loss;
//! }
//! assert!(last < first);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod base;
mod combine;
mod config;
mod data;
mod error;
mod estimate;
mod files;
mod gradients;
mod lora;
mod optimizer;
mod random;
mod recipe;
mod sample;
mod schedule;
mod targets;
mod trainer;
mod untrained;

pub use base::Base;
pub use config::{Bias, Initial, LoraConfig, Select};
pub use data::{Dataset, DatasetOptions, Record, Skipped, Statistics, best_fit, read_records};
pub use error::{Error, Result};
pub use estimate::TrainMemory;
pub use gradients::{Checkpointing, Gradients, add_gradients, losses};
pub use lora::{Lora, Tuned};
pub use optimizer::{Optimizer, OptimizerConfig, Rule};
pub use recipe::Recipe;
pub use sample::Sample;
pub use schedule::{Decay, Schedule};
pub use trainer::{Best, Evaluation, Normalization, StepReport, TrainOptions, TrainTarget, Trainer};
pub use untrained::Untrained;
