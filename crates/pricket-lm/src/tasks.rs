//! Tasks in the sense of lm-evaluation-harness: what is asked of a model about a document, and the figure that comes of it.

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

impl TaskKind {
    /// The metrics of a task that names none.
    const fn defaults(self) -> &'static [Metric] {
        match self {
            TaskKind::MultipleChoice => &[Metric::Acc, Metric::AccNorm],
            TaskKind::Loglikelihood => &[Metric::Perplexity, Metric::Acc],
            TaskKind::Perplexity => &[Metric::WordPerplexity, Metric::BytePerplexity, Metric::BitsPerByte],
        }
    }

    /// All metrics that such a task can have.
    const fn metrics(self) -> &'static [Metric] {
        match self {
            TaskKind::MultipleChoice => &[Metric::Acc, Metric::AccNorm, Metric::AccBytes],
            other => other.defaults(),
        }
    }
}

/// What is computed of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    /// Share of documents whose likeliest choice is right; of one continuation, that it is what greedy decoding writes.
    Acc,
    /// As [`Metric::Acc`], the log-likelihood divided by the characters of the choice.
    AccNorm,
    /// As [`Metric::Acc`], the log-likelihood divided by the UTF-8 bytes of the choice.
    AccBytes,
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
            Metric::AccBytes => "acc_bytes",
            Metric::Perplexity => "perplexity",
            Metric::WordPerplexity => "word_perplexity",
            Metric::BytePerplexity => "byte_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
        }
    }

    /// Whether more of it is better.
    pub const fn higher_is_better(self) -> bool {
        matches!(self, Metric::Acc | Metric::AccNorm | Metric::AccBytes)
    }

    /// The name that the harness gives to the way its values are put together.
    const fn aggregation(self) -> &'static str {
        match self {
            Metric::Acc | Metric::AccNorm | Metric::AccBytes => "mean",
            Metric::Perplexity => "perplexity",
            Metric::WordPerplexity | Metric::BytePerplexity => "weighted_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
        }
    }

    /// The metric of a name, if a task of this kind can have it.
    fn named(name: &str, kind: TaskKind) -> Result<Self, String> {
        let found = kind.metrics().iter().copied().find(|metric| metric.name() == name);
        found.ok_or_else(|| {
            let names: Vec<_> = kind.metrics().iter().map(|metric| metric.name()).collect();
            format!("{name:?} is not a metric of this kind of task; expected one of {}", names.join(", "))
        })
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
    /// The length of each choice.
    pub(crate) lengths: Vec<Length>,
    /// The numbers of the right ones: one, for most tasks.
    pub(crate) answers: Vec<usize>,
}

impl Choices {
    /// A question of one context, with `delimiter` before each choice.
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

/// The texts of a list of texts.
fn texts(list: &Value) -> Option<Vec<String>> {
    list.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

type Ask = Arc<dyn Fn(&Value) -> Result<Asked, String> + Send + Sync>;

type Describe = Arc<dyn Fn(&Value) -> Result<String, String> + Send + Sync>;

/// How examples are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sampler {
    /// At random for each document. With `spare`, one more is drawn, and the document that is asked about is left out.
    Random { spare: bool },
    /// The first ones. With `spare`, the document that is asked about is left out.
    First { spare: bool },
}

/// How a prompt is put together from a description, examples and a question.
#[derive(Clone)]
pub(crate) struct Layout {
    /// A text before the examples.
    pub(crate) describe: Option<Describe>,
    /// The text between an example's question and its answer.
    pub(crate) target_delimiter: String,
    /// The text after each example.
    pub(crate) example_delimiter: String,
}

impl Default for Layout {
    fn default() -> Self {
        Self { describe: None, target_delimiter: " ".into(), example_delimiter: "\n\n".into() }
    }
}

/// A task: how documents become requests, and what is computed of the answers.
#[derive(Clone)]
pub struct Task {
    name: String,
    /// A number, for most tasks.
    version: Value,
    kind: TaskKind,
    metrics: Vec<Metric>,
    /// The split that is asked about.
    split: String,
    /// The split that examples come from, if it is another one.
    examples_split: Option<String>,
    /// Examples that the definition holds.
    samples: Option<Vec<Value>>,
    sampler: Sampler,
    layout: Layout,
    /// Examples before each question, where the caller asks for none.
    shots: Option<usize>,
    /// Where the definition says that its documents are: files of each split.
    files: Option<BTreeMap<String, Vec<PathBuf>>>,
    /// Where the Hub has its documents: repository, configuration.
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

    /// A task that a file describes: YAML as lm-evaluation-harness has it, or TOML; see `docs/tasks.md`.
    ///
    /// No Python is executed: a file that names a function (`!function utils.process_docs`) is refused, unless the function is
    /// one of the harness's that a built-in task computes.
    ///
    /// # Errors
    /// [`Error::Input`], naming the file and what is wrong in it.
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
        // Its results and documents are files of this name.
        let is_name = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']);
        if !is_name(&task.name) || task.name.contains(char::is_control) {
            return Err(wrong(format!("the task's name {:?} cannot be part of a file's name", task.name)));
        }
        Ok(task)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the version of its definition; figures of different versions are not comparable. Empty if it has none.
    pub fn version(&self) -> String {
        match &self.version {
            Value::Number(number) => number.as_f64().unwrap_or_default().to_string(),
            Value::String(text) => text.clone(),
            _ => String::new(),
        }
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

    /// Returns the split that it is asked of, such as `test` or `validation`.
    pub fn split(&self) -> &str {
        &self.split
    }

    /// Returns the split that examples are taken from, if it is another one.
    pub fn examples_split(&self) -> Option<&str> {
        self.examples_split.as_deref()
    }

    /// Returns the number of examples before each question: `asked`, else the number of the definition, else 0. Where the definition
    /// says 0, the harness ignores `asked`, and so does this.
    pub fn shots(&self, asked: Option<usize>) -> usize {
        match (asked, self.shots) {
            (_, Some(0)) => 0,
            (asked, own) => asked.or(own).unwrap_or(0),
        }
    }

    /// Whether the definition itself holds the examples.
    pub fn has_samples(&self) -> bool {
        self.samples.is_some()
    }

    /// Returns the files of a split, where the definition names files: `dataset_kwargs.data_files` of the harness.
    pub fn files(&self, split: &str) -> Option<&[PathBuf]> {
        self.files.as_ref()?.get(split).map(Vec::as_slice)
    }

    /// The repository of the Hub that holds its documents, and the configuration of it.
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
