//! Measures: the quantities that a sweep computes for each checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pricket_hub::Digest;
use pricket_lm::{EvalOptions, Task, TaskKind};
use serde_json::{Value, json};

/// A measure that a sweep computes for each checkpoint.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "a sweep has a few")]
pub enum Measure {
    /// A task over local documents. Its metrics are named `TASK/METRIC`.
    Task {
        /// The task.
        task: Task,
        /// Files of its documents, JSON lines or parquet.
        documents: Vec<PathBuf>,
        /// Files from which few-shot examples are drawn, if any.
        examples: Vec<PathBuf>,
    },
    /// The loss of every slice of a JSON lines file: `SLICE/loss` in nats per token, and `SLICE/bits_per_byte`.
    Slices(PathBuf),
    /// The loss of a plain text file: `NAME/loss` in nats per token, `NAME/perplexity` (`exp` of the loss), and
    /// `NAME/bits_per_byte`. NAME is the file name without its extension. Every token is scored, in windows, and the
    /// first one after `<|endoftext|>`.
    TextFile(PathBuf),
    /// The loss of a text: `NAME/loss` in nats per token, and `NAME/bits_per_byte`.
    Text {
        /// Name of the text.
        name: String,
        /// The text.
        text: String,
    },
}

/// Metrics of a slice.
pub(crate) const SLICE_METRICS: [&str; 2] = ["loss", "bits_per_byte"];

/// Metrics of a plain text file.
pub(crate) const TEXT_METRICS: [&str; 3] = ["loss", "perplexity", "bits_per_byte"];

/// Returns the name of a file without its extension and the extension of its compression.
pub(crate) fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    name.rsplit_once('.').map_or(name, |(stem, _)| if stem.is_empty() { name } else { stem }).to_owned()
}

impl Measure {
    /// Returns the names of the metrics; `None` if they depend on the documents.
    pub(crate) fn metrics(&self) -> Option<Vec<String>> {
        match self {
            Measure::Task { task, .. } => {
                Some(task.figure_names().iter().map(|figure| format!("{}/{figure}", task.name())).collect())
            }
            Measure::Text { name, .. } => Some(SLICE_METRICS.iter().map(|metric| format!("{name}/{metric}")).collect()),
            Measure::TextFile(path) => {
                Some(TEXT_METRICS.iter().map(|metric| format!("{}/{metric}", stem(path))).collect())
            }
            Measure::Slices(_) => None,
        }
    }

    /// Returns whether the measure scores whole texts in windows.
    pub(crate) fn has_windows(&self) -> bool {
        match self {
            Measure::Task { task, .. } => task.kind() == TaskKind::Perplexity,
            Measure::Text { .. } | Measure::TextFile(_) | Measure::Slices(_) => true,
        }
    }

    /// Returns the name of the measure in its rows.
    pub(crate) fn name(&self) -> String {
        match self {
            Measure::Task { task, .. } => format!("task {}", task.name()),
            Measure::Slices(path) => format!("slices {}", path.display()),
            Measure::TextFile(path) => format!("text file {}", path.display()),
            Measure::Text { name, .. } => format!("text {name}"),
        }
    }

    /// Returns the settings key of its rows. If it changes, the checkpoint is measured again.
    pub(crate) fn settings(&self, options: &EvalOptions, setup: &BTreeMap<String, String>) -> Value {
        let bytes = |path: &Path| std::fs::metadata(path).map(|meta| meta.len()).ok();
        let mut settings = match self {
            Measure::Task { task, documents, .. } => {
                let version =
                    task.version().parse::<f64>().map_or_else(|_| json!(task.version()), |number| json!(number));
                let limit = options.limit.map(pricket_lm::Limit::to_json);
                let shots = task.shots(options.shots);
                json!({"version": version, "shots": shots, "limit": limit, "bytes": documents.iter().map(|path| bytes(path)).sum::<Option<u64>>()})
            }
            Measure::Slices(path) | Measure::TextFile(path) => {
                json!({"file": path.file_name().map(|name| name.to_string_lossy()), "bytes": bytes(path)})
            }
            Measure::Text { text, .. } => {
                json!({"sha256": Digest::Sha256(String::new()).of(text.as_bytes()).hex()})
            }
        };
        if let Some(length) = options.score.max_length {
            settings["max_length"] = json!(length);
        }
        if let Some(stride) = options.score.stride.filter(|_| self.has_windows()) {
            settings["stride"] = json!(stride);
        }
        if options.seed != EvalOptions::default().seed {
            settings["seed"] = json!(options.seed);
        }
        if !setup.is_empty() {
            settings["setup"] = json!(setup);
        }
        settings
    }
}
