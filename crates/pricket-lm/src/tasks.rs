//! Evaluation tasks in the sense of lm-evaluation-harness.
//!
//! A [`Task`] turns each document into requests to a model and computes [`Metric`]s from the answers. Tasks are built
//! in ([`Task::named`]) or read from a file ([`Task::from_file`]). [`evaluate()`] runs a task.

mod builtin;
mod evaluate;
mod generation;
mod harness;
mod jinja;
mod report;
mod template;
mod yaml;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

pub use evaluate::{EvalOptions, Figure, Limit, Outcome, Sample, Written, evaluate};
pub use report::results_json;

use generation::{Generation, Targets};

use crate::{Error, Result};

/// Type of the requests that a task makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskKind {
    /// Compares the log-likelihoods of several continuations.
    MultipleChoice,
    /// Scores one continuation and checks whether greedy decoding would produce it.
    Loglikelihood,
    /// Scores a whole text.
    Perplexity,
    /// Lets the model write an answer and compares it with the correct ones.
    Generation,
}

impl TaskKind {
    /// Returns the metrics of a task whose definition names no metrics.
    const fn defaults(self) -> &'static [Metric] {
        match self {
            TaskKind::MultipleChoice => &[Metric::Acc, Metric::AccNorm],
            TaskKind::Loglikelihood => &[Metric::Perplexity, Metric::Acc],
            TaskKind::Perplexity => &[Metric::WordPerplexity, Metric::BytePerplexity, Metric::BitsPerByte],
            TaskKind::Generation => &[Metric::ExactMatch],
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

/// Metric of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    /// Accuracy: the share of documents whose most likely choice is correct. For [`TaskKind::Loglikelihood`], the share
    /// of documents whose continuation is the output of greedy decoding.
    Acc,
    /// Accuracy with each log-likelihood divided by the number of characters of the choice.
    AccNorm,
    /// Accuracy with each log-likelihood divided by the number of UTF-8 bytes of the choice.
    AccBytes,
    /// `exp` of the mean negative log-likelihood of the continuations.
    Perplexity,
    /// `exp` of the total negative log-likelihood of all texts, divided by their total number of words.
    WordPerplexity,
    /// `exp` of the total negative log-likelihood of all texts, divided by their total number of UTF-8 bytes.
    BytePerplexity,
    /// Base-2 logarithm of [`Metric::BytePerplexity`].
    BitsPerByte,
    /// Share of the documents whose written answer is equal to a correct one.
    ExactMatch,
    /// [`Metric::ExactMatch`] after the normalization of DROP (Dua et al. 2019, arXiv:1903.00161).
    Em,
    /// Mean of the harmonic means of precision and recall of the words of an answer, as in DROP.
    F1,
}

impl Metric {
    /// Returns the name of the metric in lm-evaluation-harness.
    pub const fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::AccBytes => "acc_bytes",
            Metric::Perplexity => "perplexity",
            Metric::WordPerplexity => "word_perplexity",
            Metric::BytePerplexity => "byte_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
            Metric::ExactMatch => "exact_match",
            Metric::Em => "em",
            Metric::F1 => "f1",
        }
    }

    /// Returns whether higher values are better.
    pub const fn higher_is_better(self) -> bool {
        self.is_mean()
    }

    /// Returns whether the value is the mean of the values of the documents.
    const fn is_mean(self) -> bool {
        matches!(self, Metric::Acc | Metric::AccNorm | Metric::AccBytes | Metric::ExactMatch | Metric::Em | Metric::F1)
    }

    /// Returns the harness's name for the aggregation of the per-document values.
    const fn aggregation(self) -> &'static str {
        match self {
            Metric::Acc | Metric::AccNorm | Metric::AccBytes | Metric::ExactMatch | Metric::Em | Metric::F1 => "mean",
            Metric::Perplexity => "perplexity",
            Metric::WordPerplexity | Metric::BytePerplexity => "weighted_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
        }
    }

    /// Returns the metric with the given name, or a message if a task of this kind cannot have it.
    fn named(name: &str, kind: TaskKind) -> Result<Self, String> {
        let found = kind.metrics().iter().copied().find(|metric| metric.name() == name);
        found.ok_or_else(|| {
            let names: Vec<_> = kind.metrics().iter().map(|metric| metric.name()).collect();
            format!("{name:?} is not a metric of this kind of task; expected one of {}", names.join(", "))
        })
    }
}

/// Requests that a task makes for one document.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Asked {
    Choices(Choices),
    Continuation {
        context: String,
        continuation: String,
    },
    Text {
        text: String,
        words: usize,
        bytes: usize,
    },
    /// A question to answer in writing. `example` is the answer of a few-shot example.
    Question {
        context: String,
        targets: Targets,
        example: String,
    },
}

/// Multiple-choice question.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Choices {
    /// One context for all choices, or one context per choice.
    pub(crate) contexts: Vec<String>,
    /// One continuation per choice, or one after each of several contexts. Each includes its leading delimiter.
    pub(crate) continuations: Vec<String>,
    /// Length of each choice.
    pub(crate) lengths: Vec<Length>,
    /// Indices of the correct choices. Most tasks have exactly one.
    pub(crate) answers: Vec<usize>,
}

impl Choices {
    /// Creates a question, with `delimiter` before each choice.
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

/// Length of a choice, used to normalize its log-likelihood.
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

/// Returns the strings of a JSON array, or `None` if the value is anything else.
fn texts(list: &Value) -> Option<Vec<String>> {
    list.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

type Ask = Arc<dyn Fn(&Value) -> Result<Asked, String> + Send + Sync>;

type Describe = Arc<dyn Fn(&Value) -> Result<String, String> + Send + Sync>;

/// Selection of the few-shot examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sampler {
    /// Random examples for each document. With `spare`, one more is drawn and the evaluated document is left out.
    Random { spare: bool },
    /// The first examples of the split. With `spare`, the evaluated document is left out.
    First { spare: bool },
}

/// Layout of a prompt: description, examples and question.
#[derive(Clone)]
pub(crate) struct Layout {
    /// Computes the text before the examples.
    pub(crate) describe: Option<Describe>,
    /// Text between an example's question and its answer.
    pub(crate) target_delimiter: String,
    /// Text after each example.
    pub(crate) example_delimiter: String,
}

impl Default for Layout {
    fn default() -> Self {
        Self { describe: None, target_delimiter: " ".into(), example_delimiter: "\n\n".into() }
    }
}

/// Evaluation task: turns documents into requests to a model and names the metrics of the answers.
#[derive(Clone)]
pub struct Task {
    name: String,
    /// Version of the definition. A number for most tasks.
    version: Value,
    kind: TaskKind,
    metrics: Vec<Metric>,
    /// Split that is evaluated.
    split: String,
    /// Split of the few-shot examples, if it differs from `split`.
    examples_split: Option<String>,
    /// Few-shot examples listed in the definition.
    samples: Option<Vec<Value>>,
    sampler: Sampler,
    layout: Layout,
    /// Default number of few-shot examples.
    shots: Option<usize>,
    /// Document files of each split, if the definition names files.
    files: Option<BTreeMap<String, Vec<PathBuf>>>,
    /// Repository on the Hub that holds the documents, and its configuration.
    dataset: Option<(String, Option<String>)>,
    /// How answers are generated and scored, for [`TaskKind::Generation`].
    generation: Option<Arc<Generation>>,
    /// Text of the task file, or the name and version of a built-in task.
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
    /// Returns [`Error::Input`], listing the built-in tasks, if none has this name.
    pub fn named(name: &str) -> Result<Self> {
        builtin::task(name).ok_or_else(|| {
            Error::Input(format!(
                "unknown task {name:?}; expected {}, or the path of a task file",
                Self::names().join(", ")
            ))
        })
    }

    /// Reads a task from a file: YAML in the format of lm-evaluation-harness, or TOML. `docs/tasks.md` describes both.
    ///
    /// No Python is executed. A file that names a function (`!function utils.process_docs`) is rejected, unless it is a
    /// harness function that a built-in task implements.
    ///
    /// # Errors
    /// Returns [`Error::Input`], naming the file and the fault, if the file cannot be read or is not a valid task.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let task = match path.extension().and_then(|extension| extension.to_str()) {
            Some("yaml" | "yml") => harness::parse(path),
            Some("toml") => {
                std::fs::read_to_string(path).map_err(|e| e.to_string()).and_then(|text| template::parse(&text))
            }
            _ => Err("unknown extension of a task file; expected .yaml, .yml or .toml".into()),
        };
        let task = task.map_err(wrong)?;
        // The task name becomes part of the names of result and document files.
        let is_name = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']);
        if !is_name(&task.name) || task.name.contains(char::is_control) {
            return Err(wrong(format!("the task name {:?} cannot be part of a file name", task.name)));
        }
        Ok(task)
    }

    /// Returns the name of the task.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the version of the definition, or an empty string if it has none. Results of different versions are not
    /// comparable.
    pub fn version(&self) -> String {
        match &self.version {
            Value::Number(number) => number.as_f64().unwrap_or_default().to_string(),
            Value::String(text) => text.clone(),
            _ => String::new(),
        }
    }

    /// Returns the text that defines the task. Two tasks with equal definitions make the same requests.
    pub fn definition(&self) -> &str {
        &self.definition
    }

    /// Returns the kind of the task.
    pub fn kind(&self) -> TaskKind {
        self.kind
    }

    /// Returns the metrics of the task.
    pub fn metrics(&self) -> &[Metric] {
        &self.metrics
    }

    /// Returns the names of the figures of an outcome ([`Figure::name`]), in their order.
    pub fn figure_names(&self) -> Vec<String> {
        let filters = self
            .generation
            .as_ref()
            .map_or_else(Vec::new, |generation| generation.filters.iter().map(|(name, _)| name.as_str()).collect());
        let filters = if filters.is_empty() { vec!["none"] } else { filters };
        let of_filter =
            |filter: &str| self.metrics.iter().map(|&metric| evaluate::figure_name(metric, filter)).collect();
        filters.into_iter().flat_map(|filter| -> Vec<String> { of_filter(filter) }).collect()
    }

    /// Returns the split that is evaluated, such as `test` or `validation`.
    pub fn split(&self) -> &str {
        &self.split
    }

    /// Returns the split of the few-shot examples, if it differs from [`Task::split`].
    pub fn examples_split(&self) -> Option<&str> {
        self.examples_split.as_deref()
    }

    /// Returns the number of few-shot examples before each question: `asked`, else the number of the definition, else
    /// 0. As in the harness, a definition with 0 overrides `asked`.
    pub fn shots(&self, asked: Option<usize>) -> usize {
        match (asked, self.shots) {
            (_, Some(0)) => 0,
            (asked, own) => asked.or(own).unwrap_or(0),
        }
    }

    /// Returns whether the definition lists the few-shot examples itself.
    pub fn has_samples(&self) -> bool {
        self.samples.is_some()
    }

    /// Returns the files of a split if the definition names files (`dataset_kwargs.data_files` in the harness).
    pub fn files(&self, split: &str) -> Option<&[PathBuf]> {
        self.files.as_ref()?.get(split).map(Vec::as_slice)
    }

    /// Returns the repository on the Hub that holds the documents, and its configuration.
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
