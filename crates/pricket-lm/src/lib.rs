//! Text generation and scoring with causal language models of any family: tokenizers, sampling, batched generation,
//! conversation prompts, log-probabilities and evaluation tasks.
//!
//! Everything works on the trait [`pricket_nn::CausalLm`]:
//!
//! - [`Engine`] runs [`Request`]s in one batch, which they join and leave at any time. Each has its own sampling
//!   parameters, seed and stop rules. [`Generation`] is an engine with a fixed batch of prompts.
//! - [`token_logprobs`] scores a text.
//! - [`Tokenizer`] and [`TextStream`] turn ids into text and never emit part of a UTF-8 character.
//! - [`PromptFormat`] lays out a conversation as the prompt that a chat model was tuned on.
//!
//! ```
//! # use std::sync::Arc;
//! # use pricket_nn::Weights;
//! # let config = pricket_gpt_neox::Config::from_json(&serde_json::json!({
//! #     "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}))?;
//! # let store = Arc::new(pricket_weights::Random::new(pricket_weights::Dtype::F32, 0));
//! # let weights = Weights::as_stored(store, pricket_gpt_neox::NAMES);
//! # let model: Arc<dyn pricket_nn::CausalLm> = Arc::new(pricket_gpt_neox::load(&config, &weights)?);
//! use pricket_lm::{GenerateOptions, Generation, Request, token_logprobs};
//! // Two prompts of different lengths, four tokens each.
//! let requests = [vec![5, 6, 7], vec![9]].map(|ids| Request::new(ids, GenerateOptions { max_tokens: 4, ..Default::default() }));
//! let mut generation = Generation::new(model.clone(), requests.to_vec())?;
//! let mut rows = vec![Vec::new(); 2];
//! while let Some(tokens) = generation.step()? {
//!     for token in tokens {
//!         rows[token.row].push(token.id);
//!     }
//! }
//! assert_eq!((rows[0].len(), rows[1].len()), (4, 4));
//! assert_eq!(token_logprobs(&*model, &rows[0])?.len(), 3);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

mod compare;
mod diagnose;
mod documents;
mod engine;
mod error;
mod generate;
mod head;
mod loglikelihood;
mod prompt;
mod python;
mod sampling;
mod score;
mod sentencepiece;
mod sentencepiece_text;
mod slices;
mod tasks;
mod text;
mod tokenizer;
mod tokenizer_file;
mod vocabulary;

pub use compare::{Comparison, compare};
pub use documents::{Documents, Place, read_text, read_utf8};
pub use engine::{
    Engine, EngineOptions, FinishReason, GenerateOptions, ModelId, Request, RequestId, Score, Speculation,
    SpeculationOptions, Update,
};
pub use error::{Error, Result};
pub use generate::{Generation, Token};
pub use loglikelihood::{Continuation, Loglikelihood, ScoreOptions, loglikelihoods};
/// A generated token, and sampling parameters, in the form that decoders take.
pub use pricket_nn::{Choice, SamplingParams};
pub use prompt::{PromptFormat, Role, Turn};
pub use sampling::Sampler;
pub use score::{ScoredToken, check_finite, loss, text_logprobs, token_logprobs};
pub use sentencepiece_text::Pieces;
pub use slices::{SliceLoss, slice_losses};
pub use tasks::{EvalOptions, Figure, Limit, Metric, Outcome, Sample, Task, TaskKind, Written, evaluate, results_json};
pub use text::TextStream;
pub use tokenizer::{TextDecoder, Tokenizer};
pub use vocabulary::Vocabulary;
