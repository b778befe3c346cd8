//! Tasks in the sense of lm-evaluation-harness: what is asked of a model about a document, and the figure that comes of it.

mod builtin;
mod evaluate;
mod report;
mod template;

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

pub use evaluate::{EvalOptions, Figure, Outcome, Sample, evaluate};
pub use report::results_json;

use crate::{Error, Result};

/// How a task asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskKind {
    /// Which of several continuations is the likeliest.
    MultipleChoice,
    /// How likely one continuation is, and whether it is what the model would write.
    Loglikelihood,
    /// How likely a whole text is.
    Perplexity,
}

/// What is computed of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    /// Share of documents whose likeliest choice is right; of one continuation, that it is what greedy decoding writes.
    Acc,
    /// As [`Metric::Acc`], the likelihood divided by the characters of the choice.
    AccNorm,
    /// `exp` of the mean negative log-likelihood of the continuations.
    Perplexity,
    /// `exp` of the negative log-likelihood of all texts, by their words.
    WordPerplexity,
    /// By their bytes.
    BytePerplexity,
    /// The logarithm of it to the base of two.
    BitsPerByte,
}

impl Metric {
    /// Its name in the harness.
    pub const fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::Perplexity => "perplexity",
            Metric::WordPerplexity => "word_perplexity",
            Metric::BytePerplexity => "byte_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
        }
    }

    /// Whether more of it is better.
    pub const fn higher_is_better(self) -> bool {
        matches!(self, Metric::Acc | Metric::AccNorm)
    }
}

/// A document as a task asks about it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Asked {
    Choices(Choices),
    Continuation { context: String, continuation: String },
    Text { text: String, words: usize, bytes: usize },
}

/// A question with several answers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Choices {
    /// One for all, or one for each.
    pub(crate) contexts: Vec<String>,
    /// As many as there are choices, or one after each of several contexts; with the space before it.
    pub(crate) continuations: Vec<String>,
    /// Characters of each choice.
    pub(crate) lengths: Vec<usize>,
    /// The right one.
    pub(crate) answer: usize,
}

type Ask = Arc<dyn Fn(&Value) -> Result<Asked, String> + Send + Sync>;

/// A task: how documents become requests, and what is computed of the answers.
#[derive(Clone)]
pub struct Task {
    name: String,
    version: f64,
    kind: TaskKind,
    metrics: Vec<Metric>,
    /// Whether it is asked of the split `test`; of `validation` otherwise.
    has_test: bool,
    has_train: bool,
    /// Where the Hub has its documents: repository, configuration.
    dataset: Option<(String, Option<String>)>,
    /// Definition of the task: the text of its file, or the name and version of a built-in task.
    definition: String,
    ask: Ask,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Task({} {}, {:?})", self.name, self.version, self.kind)
    }
}

impl Task {
    /// The names of the built-in tasks.
    pub fn names() -> Vec<&'static str> {
        builtin::NAMES.to_vec()
    }

    /// A built-in task.
    ///
    /// # Errors
    /// [`Error::Input`], with the names there are.
    pub fn named(name: &str) -> Result<Self> {
        builtin::task(name).ok_or_else(|| {
            Error::Input(format!("there is no task {name:?}; use {}, or a file of your own", Self::names().join(", ")))
        })
    }

    /// A task of one's own, described in TOML: see `docs/tasks.md`.
    ///
    /// # Errors
    /// [`Error::Input`], naming the file and what is wrong in it.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
        template::parse(&text).map_err(wrong)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version of what it asks: figures of different versions are not to be compared.
    pub fn version(&self) -> f64 {
        self.version
    }

    /// The text that defines it: two tasks with the same definition ask the same.
    pub fn definition(&self) -> &str {
        &self.definition
    }

    /// How it asks.
    pub fn kind(&self) -> TaskKind {
        self.kind
    }

    /// What is computed of it.
    pub fn metrics(&self) -> &[Metric] {
        &self.metrics
    }

    /// The split that it is asked of: `test` or `validation`.
    pub fn split(&self) -> &'static str {
        if self.has_test { "test" } else { "validation" }
    }

    /// The split that examples are taken from, if there is one of their own.
    pub fn examples_split(&self) -> Option<&'static str> {
        self.has_train.then_some("train")
    }

    /// The repository of the Hub that holds its documents, and the configuration of it.
    pub fn dataset(&self) -> Option<(&str, Option<&str>)> {
        self.dataset.as_ref().map(|(repo, config)| (repo.as_str(), config.as_deref()))
    }

    fn ask(&self, document: &Value, number: usize) -> Result<Asked> {
        (self.ask)(document).map_err(|what| Error::Input(format!("task {}, document {number}: {what}", self.name)))
    }
}
