//! Tasks as in lm-evaluation-harness: the requests that a task makes of a model for each document, and the metrics
//! computed from the answers.

mod builtin;
mod evaluate;
mod harness;
mod jinja;
mod report;
mod template;
mod yaml;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

pub use evaluate::{EvalOptions, Figure, Limit, Outcome, Sample, evaluate};
pub use report::results_json;

use crate::{Error, Result};

/// The kind of requests of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskKind {
    /// Several continuations; the model chooses the most likely one.
    MultipleChoice,
    /// One continuation: its likelihood, and whether greedy decoding produces it.
    Loglikelihood,
    /// The likelihood of a whole text.
    Perplexity,
}

impl TaskKind {
    /// Returns the metrics of a task that names none.
    const fn defaults(self) -> &'static [Metric] {
        match self {
            TaskKind::MultipleChoice => &[Metric::Acc, Metric::AccNorm],
            TaskKind::Loglikelihood => &[Metric::Perplexity, Metric::Acc],
            TaskKind::Perplexity => &[Metric::WordPerplexity, Metric::BytePerplexity, Metric::BitsPerByte],
        }
    }

    /// Returns all metrics that a task of this kind can have.
    const fn metrics(self) -> &'static [Metric] {
        match self {
            TaskKind::MultipleChoice => &[Metric::Acc, Metric::AccNorm, Metric::AccBytes],
            other => other.defaults(),
        }
    }
}

/// A metric of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    /// Accuracy: the share of documents whose most likely choice is correct. For one continuation, the share that
    /// greedy decoding produces.
    Acc,
    /// Accuracy with the log-likelihood divided by the number of characters of the choice.
    AccNorm,
    /// Accuracy with the log-likelihood divided by the number of UTF-8 bytes of the choice.
    AccBytes,
    /// Perplexity: `exp` of the mean negative log-likelihood of the continuations.
    Perplexity,
    /// `exp` of the negative log-likelihood of all texts per word.
    WordPerplexity,
    /// `exp` of the negative log-likelihood of all texts per byte.
    BytePerplexity,
    /// Negative log-likelihood in bits per byte.
    BitsPerByte,
}

impl Metric {
    /// Returns the name of the metric in the harness.
    pub const fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::AccBytes => "acc_bytes",
            Metric::Perplexity => "perplexity",
            Metric::WordPerplexity => "word_perplexity",
            Metric::BytePerplexity => "byte_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
        }
    }

    /// Returns whether a higher value is better.
    pub const fn higher_is_better(self) -> bool {
        matches!(self, Metric::Acc | Metric::AccNorm | Metric::AccBytes)
    }

    /// Returns the harness's name for the way the values of documents are combined.
    const fn aggregation(self) -> &'static str {
        match self {
            Metric::Acc | Metric::AccNorm | Metric::AccBytes => "mean",
            Metric::Perplexity => "perplexity",
            Metric::WordPerplexity | Metric::BytePerplexity => "weighted_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
        }
    }

    /// Returns the metric with this name, if a task of this kind can have it.
    fn named(name: &str, kind: TaskKind) -> Result<Self, String> {
        let found = kind.metrics().iter().copied().find(|metric| metric.name() == name);
        found.ok_or_else(|| {
            let names: Vec<_> = kind.metrics().iter().map(|metric| metric.name()).collect();
            format!("{name:?} is not a metric of this kind of task; expected one of {}", names.join(", "))
        })
    }
}

/// The requests of a task for one document.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Asked {
    Choices(Choices),
    Continuation { context: String, continuation: String },
    Text { text: String, words: usize, bytes: usize },
}

/// A question with several answers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Choices {
    /// One context for all choices, or one for each.
    pub(crate) contexts: Vec<String>,
    /// One continuation for each choice, or one for each of several contexts. Each includes the space before it.
    pub(crate) continuations: Vec<String>,
    /// The length of each choice.
    pub(crate) lengths: Vec<Length>,
    /// Indices of the correct choices; most tasks have one.
    pub(crate) answers: Vec<usize>,
}

impl Choices {
    /// Makes a question of one context, with `delimiter` before each choice.
    fn new(contexts: Vec<String>, delimiter: &str, choices: &[String], answers: Vec<usize>) -> Self {
        let continuations = choices.iter().map(|choice| format!("{delimiter}{choice}")).collect();
        Self {
            contexts,
            continuations,
            lengths: choices.iter().map(|choice| choice.as_str().into()).collect(),
            answers,
        }
    }
}

/// The length of a choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Length {
    pub(crate) chars: usize,
    pub(crate) bytes: usize,
}

impl From<&str> for Length {
    fn from(text: &str) -> Self {
        Self { chars: text.chars().count(), bytes: text.len() }
    }
}

/// Returns the texts of a JSON list of texts.
fn texts(list: &Value) -> Option<Vec<String>> {
    list.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

type Ask = Arc<dyn Fn(&Value) -> Result<Asked, String> + Send + Sync>;

type Describe = Arc<dyn Fn(&Value) -> Result<String, String> + Send + Sync>;

/// The way examples are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sampler {
    /// At random for each document. With `spare`, one more is drawn, and the question itself is left out.
    Random { spare: bool },
    /// The first examples. With `spare`, the question itself is left out.
    First { spare: bool },
}

/// The parts from which a prompt is made: description, examples, question.
#[derive(Clone)]
pub(crate) struct Layout {
    /// Text before the examples.
    pub(crate) describe: Option<Describe>,
    /// Text between the question of an example and its answer.
    pub(crate) target_delimiter: String,
    /// Text after each example.
    pub(crate) example_delimiter: String,
}

impl Default for Layout {
    fn default() -> Self {
        Self { describe: None, target_delimiter: " ".into(), example_delimiter: "\n\n".into() }
    }
}

/// A task: it converts documents to requests and computes metrics from the answers.
#[derive(Clone)]
pub struct Task {
    name: String,
    /// Version; a number for most tasks.
    version: Value,
    kind: TaskKind,
    metrics: Vec<Metric>,
    /// The split that is evaluated.
    split: String,
    /// The split of the examples, if it is another one.
    examples_split: Option<String>,
    /// Examples in the definition itself.
    samples: Option<Vec<Value>>,
    sampler: Sampler,
    layout: Layout,
    /// Number of examples before each question, if the caller gives none.
    shots: Option<usize>,
    /// Files of each split, if the definition names them.
    files: Option<BTreeMap<String, Vec<PathBuf>>>,
    /// Repository of the documents on the Hub, and its configuration.
    dataset: Option<(String, Option<String>)>,
    /// Definition of the task: the text of its file, or the name and version of a built-in task.
    definition: String,
    ask: Ask,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Task({} {:?}, {:?})", self.name, self.version(), self.kind)
    }
}

impl Task {
    /// Returns the names of the built-in tasks.
    pub fn names() -> Vec<&'static str> {
        builtin::NAMES.to_vec()
    }

    /// Returns a built-in task.
    ///
    /// # Errors
    /// Returns [`Error::Input`] with the known names if there is no such task.
    pub fn named(name: &str) -> Result<Self> {
        builtin::task(name).ok_or_else(|| {
            Error::Input(format!("there is no task {name:?}; use {}, or a file of your own", Self::names().join(", ")))
        })
    }

    /// Reads a task from a file: YAML in the format of lm-evaluation-harness, or TOML; see `docs/tasks.md`.
    ///
    /// Python is never executed. A file that names a function (`!function utils.process_docs`) is refused, unless a
    /// built-in task computes the same as that function of the harness.
    ///
    /// # Errors
    /// Returns [`Error::Input`] with the file and the fault.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let task = match path.extension().and_then(|extension| extension.to_str()) {
            Some("yaml" | "yml") => harness::parse(path),
            Some("toml") => {
                std::fs::read_to_string(path).map_err(|e| e.to_string()).and_then(|text| template::parse(&text))
            }
            _ => Err("expected a name that ends in .yaml, .yml or .toml".into()),
        };
        let task = task.map_err(wrong)?;
        // Names of result files and document files contain the task's name.
        let is_name = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']);
        if !is_name(&task.name) || task.name.contains(char::is_control) {
            return Err(wrong(format!("the task's name {:?} cannot be part of a file's name", task.name)));
        }
        Ok(task)
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the version of the definition, empty if it has none. Figures of different versions are not comparable.
    pub fn version(&self) -> String {
        match &self.version {
            Value::Number(number) => number.as_f64().unwrap_or_default().to_string(),
            Value::String(text) => text.clone(),
            _ => String::new(),
        }
    }

    /// Returns the text of the definition. Tasks with the same definition make the same requests.
    pub fn definition(&self) -> &str {
        &self.definition
    }

    /// Returns the kind of requests.
    pub fn kind(&self) -> TaskKind {
        self.kind
    }

    /// Returns the metrics.
    pub fn metrics(&self) -> &[Metric] {
        &self.metrics
    }

    /// Returns the split that is evaluated, such as `test` or `validation`.
    pub fn split(&self) -> &str {
        &self.split
    }

    /// Returns the split of the examples, if it is another one.
    pub fn examples_split(&self) -> Option<&str> {
        self.examples_split.as_deref()
    }

    /// Returns the number of examples before each question: `asked`, or the number of the definition, or 0. If the
    /// definition says 0, `asked` is ignored, as in the harness.
    pub fn shots(&self, asked: Option<usize>) -> usize {
        match (asked, self.shots) {
            (_, Some(0)) => 0,
            (asked, own) => asked.or(own).unwrap_or(0),
        }
    }

    /// Returns whether the definition itself contains the examples.
    pub fn has_samples(&self) -> bool {
        self.samples.is_some()
    }

    /// Returns the files of a split, if the definition names files (`dataset_kwargs.data_files` of the harness).
    pub fn files(&self, split: &str) -> Option<&[PathBuf]> {
        self.files.as_ref()?.get(split).map(Vec::as_slice)
    }

    /// Returns the Hub repository of the documents, and its configuration.
    pub fn dataset(&self) -> Option<(&str, Option<&str>)> {
        self.dataset.as_ref().map(|(repo, config)| (repo.as_str(), config.as_deref()))
    }

    fn ask(&self, document: &Value, number: usize) -> Result<Asked> {
        (self.ask)(document).map_err(|what| self.wrong(number, &what))
    }

    fn wrong(&self, number: usize, what: &str) -> Error {
        Error::Input(format!("task {}, document {number}: {what}", self.name))
    }
}
