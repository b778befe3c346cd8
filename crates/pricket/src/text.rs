//! Text generation, conversations and scores.

pub(crate) mod conversation;
pub(crate) mod datasets;
pub(crate) mod handle;
pub(crate) mod prompts;

pub use conversation::{Conversation, Reply};
pub use datasets::{fetch_dataset, fetch_documents};
pub use handle::{Completion, Pricket, Stream};
pub use prompts::{prompt_format, prompt_formats};

pub use pricket_lm::{
    Comparison, Engine, EngineOptions, EvalOptions, FinishReason, GenerateOptions, Generation, PromptFormat, Request,
    Role, SamplingParams, ScoreOptions, ScoredToken, Speculation, SpeculationOptions, Task, Tokenizer, Turn,
};
