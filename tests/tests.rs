//! Tests of the whole product. They form one program, so that they link once.

mod common;

/// Dependencies between crates and modules, as docs/architecture.md describes them.
mod layering;

/// Exchange of VarBuilders, tokenizers and repositories with other crates.
mod interop;

/// Golden cases: outputs of the original implementations.
mod golden;

/// Conversions between formats, quantizing, and ambiguities of GGUF and GGML files.
mod formats;

/// Damaged and malicious files.
mod hostile;

/// Files that are easily misread.
mod odd_input;

/// Parameter counts of the published shapes.
mod shapes;

/// State, packed rows, taps and gradients.
mod properties;

/// Fused operations compared with their plain twins.
mod twins;

/// Interfaces with families that only tests have: plans, decoders, losses and adapters.
mod seams;

/// Requests that join and leave a batch, kept states, draft models.
mod engine;

/// Features of single families: checkpoints without a configuration, rows in pairs, recurrences.
#[cfg(feature = "train")]
mod families;

/// Comparison with models of candle-transformers.
#[cfg(feature = "candle-transformers")]
mod candle_twins;

/// Log-likelihoods, tasks, slices.
mod scoring;

/// Plots.
#[cfg(feature = "plots")]
mod plots;

/// Documents of tasks and their sources.
#[cfg(feature = "parquet")]
mod documents;

/// Code cells of the notebooks.
#[cfg(feature = "plots")]
mod notebooks;

/// Sweeps over training steps.
mod sweep;

/// The embedded models and their training steps.
mod tiny;

/// Task files of lm-evaluation-harness, and task options.
mod task_files;

/// Tokenizing, streaming, stop strings, sampling.
mod text;

/// Memory of loading, running and training.
mod memory;

/// Allocations of a decoding step.
mod allocations;

/// Prompts far beyond the trained length.
mod long;

/// Prompt formats and conversations.
mod chat;

/// Cards of the published checkpoints.
mod cards;

/// Instruction sets, threads, rounded activations.
mod kernels;

/// A test server with repositories, and a cache.
mod world;

/// Models by their ids, from a server with the protocol of the Hub: steps and single tensors.
mod hub;

/// Requests through a proxy.
mod proxy;

/// Audits of the revisions of a repository.
mod audit;

/// Adapters, gradients and training runs.
#[cfg(feature = "train")]
mod training;

/// The example `finetune`.
#[cfg(feature = "train")]
mod finetune;

/// The examples as a user runs them.
mod examples;

/// The documents: commands, links and the table of contents.
mod docs;
