//! Whole-product tests, one program so that they link once.

mod common;

/// The crates depend on each other as docs/architecture.md says, and keep to their own business.
mod layering;

/// VarBuilders, tokenizers and repositories of other crates, in and out.
mod interop;

/// What the original implementations answered.
mod golden;

/// Conversions between forms, quantizing, what GGUF and GGML files leave open.
mod formats;

/// Damaged and malicious files.
mod hostile;

/// Files that are easily read wrong.
mod odd_input;

/// Parameter counts of the published shapes.
mod shapes;

/// State, packed rows, taps and gradients.
mod properties;

/// Operations against their plain twins.
mod twins;

/// Families that nothing else knows, plans, decoders, losses and adapters.
mod seams;

/// What only some families have: checkpoints without a configuration, rows in pairs, recurrences.
#[cfg(feature = "train")]
mod families;

/// Models of candle-transformers beside ours.
#[cfg(feature = "candle-transformers")]
mod candle_twins;

/// Log-likelihoods, tasks, slices.
mod scoring;

/// Pictures of figures.
#[cfg(feature = "plots")]
mod plots;

/// Documents of tasks, and where they come from.
#[cfg(feature = "parquet")]
mod documents;

/// The notebooks' cells.
#[cfg(feature = "plots")]
mod notebooks;

/// Figures over training steps.
mod sweep;

/// The embedded checkpoint and its training steps.
mod tiny;

/// Task files of lm-evaluation-harness, options of tasks.
mod task_files;

/// Tokenizing, streaming, stop strings, sampling.
mod text;

/// Loading and running within the memory that the file takes.
mod memory;

/// What a decoding step asks of the allocator.
mod allocations;

/// Prompts far beyond what a model was trained for.
mod long;

/// Prompt formats and conversations.
mod chat;

/// What is known of every published checkpoint.
mod cards;

/// Instruction paths, threads, rounded activations.
mod kernels;

/// A Hub with repositories, and a cache.
mod world;

/// Models by their ids: a server that speaks the Hub's protocol, its steps and single tensors.
mod hub;

/// Requests through a proxy.
mod proxy;

/// Which revisions hold what.
mod audit;

/// Adapters, gradients and runs.
#[cfg(feature = "train")]
mod training;

/// The examples as a user runs them.
mod examples;
