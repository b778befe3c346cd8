//! Result files of sweeps: JSON lines. The rows of a measure are written and read as a unit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::loading::forms::is_weight_file;
use crate::suites::checkpoints::{Checkpoint, Checkpoints};
use crate::{Error, Result};

/// Contents of a result file.
#[derive(Default)]
pub(crate) struct Results {
    /// Rows of complete measures.
    pub(crate) rows: Vec<Value>,
    /// Number of bytes up to the end of the last complete measure.
    pub(crate) whole: usize,
    /// Number of rows of an incomplete measure.
    pub(crate) torn: usize,
}

/// Parses the bytes of a result file. If a run was killed while writing, the last line may be incomplete, or the last
/// measure may lack rows.
pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Results> {
    let (mut results, mut at, mut pending) = (Results::default(), 0, Vec::new());
    for (number, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
        at += line.len();
        if line.last() != Some(&b'\n') {
            results.torn += 1;
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let wrong = |e: serde_json::Error| {
            let what = e.to_string();
            let what = what.split(" at line ").next().unwrap_or_default();
            Error::Malformed {
                origin: format!("{}, line {}", path.display(), number + 1),
                what: format!("not a row of a sweep: {what}"),
            }
        };
        let row: Value = pricket_weights::parse_json(line).map_err(wrong)?;
        let last = row["part"][0] == row["part"][1];
        pending.push(row);
        if last {
            results.whole = at;
            results.rows.append(&mut pending);
        }
    }
    results.torn += pending.len();
    Ok(results)
}

/// Number of existing rows of a measure.
pub(crate) struct There {
    pub(crate) rows: usize,
    /// Number of rows without hashes of their inputs.
    pub(crate) unproven: usize,
}

/// Conditions under which existing rows of a measure are kept.
pub(crate) struct Wanted {
    /// Metrics; `None` if they depend on the documents.
    pub(crate) metrics: Option<Vec<String>>,
    pub(crate) settings: Value,
    /// Whether the rows must have hashes of their inputs.
    pub(crate) needs_hashes: bool,
}

/// An open result file.
pub(crate) struct Rows {
    path: PathBuf,
    file: File,
    /// Maps model and revision to the newest row of each pair of metric and settings.
    found: BTreeMap<(String, String), BTreeMap<(String, String), Value>>,
    /// Number of rows of an incomplete measure, which were removed.
    pub(crate) torn: usize,
}

impl Rows {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |error: std::io::Error| Error::Io { path: path.into(), error };
        // A device or a pipe cannot be read to its end.
        if std::fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
            return Err(Error::Output { path: path.into(), what: ": not a regular file, so it cannot hold results" });
        }
        let mut file = File::options().read(true).append(true).create(true).open(path).map_err(io)?;
        file.try_lock().map_err(|e| match e {
            std::fs::TryLockError::WouldBlock => {
                Error::Output { path: path.into(), what: ": another sweep writes to it" }
            }
            std::fs::TryLockError::Error(e) => io(e),
        })?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(io)?;
        let results = parse(path, &text)?;
        let mut rows = Self { path: path.into(), file, found: BTreeMap::new(), torn: results.torn };
        results.rows.iter().for_each(|row| rows.note(row));
        if results.whole < text.len() {
            rows.file.set_len(results.whole as u64).map_err(io)?;
            rows.file.seek(SeekFrom::End(0)).map_err(io)?;
        }
        Ok(rows)
    }

    fn note(&mut self, row: &Value) {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        if !row["metric"].is_null() {
            let of_revision = self.found.entry((text("model"), text("revision"))).or_default();
            of_revision.insert((text("metric"), key(&row["settings"])), row.clone());
        }
    }

    pub(crate) fn newest(&self, model: &Checkpoints, at: &Checkpoint) -> Option<&BTreeMap<(String, String), Value>> {
        self.found.get(&(model.model.clone(), at.revision.clone()))
    }

    /// Counts the rows of a measure, if all exist and were computed from the same inputs.
    pub(crate) fn there(
        &self,
        model: &Checkpoints,
        at: &Checkpoint,
        wanted: &Wanted,
        inputs: &Value,
        weights: Option<&Value>,
    ) -> Option<There> {
        let (found, settings) = (self.newest(model, at)?, &wanted.settings);
        let is_null = |values: &Value| values.as_array().is_some_and(|hashes| hashes.contains(&Value::Null));
        let same = |row: &&Value| {
            let hashed = &row["inputs"];
            let (is_proven, weights) = (hashed.is_object(), weights.unwrap_or(&Value::Null));
            let equal = ["definition", "documents", "examples"].iter().all(|key| hashed[key] == inputs[key])
                && !is_null(&inputs["documents"])
                && !is_null(&inputs["examples"])
                && hashed["weights"] == *weights;
            row["settings"] == *settings && if is_proven { equal } else { !wanted.needs_hashes }
        };
        let rows: Vec<&Value> = match &wanted.metrics {
            Some(metrics) => {
                let of = |metric: &String| found.get(&(metric.clone(), key(settings))).filter(same);
                metrics.iter().map(of).collect::<Option<_>>()?
            }
            None => found.values().filter(same).collect(),
        };
        let unproven = rows.iter().filter(|row| !row["inputs"].is_object()).count();
        (!rows.is_empty()).then_some(There { rows: rows.len(), unproven })
    }

    /// Appends all rows of a measure in one write, and syncs the file.
    pub(crate) fn append(&mut self, mut rows: Vec<Value>, tell: &mut impl FnMut(&Value)) -> Result<()> {
        let count = rows.len();
        rows.iter_mut().enumerate().for_each(|(i, row)| row["part"] = json!([i + 1, count]));
        let lines: String = rows.iter().flat_map(|row| [row.to_string(), "\n".into()]).collect();
        let written = self.file.write_all(lines.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|error| Error::Io { path: self.path.clone(), error })?;
        for row in &rows {
            self.note(row);
            tell(row);
        }
        Ok(())
    }

    /// Returns warnings about revisions of a model with identical weight files. step0 and step1 are exempt, because
    /// they are equal in every published suite.
    pub(crate) fn twins(&self) -> Vec<String> {
        let usual = |revisions: &BTreeSet<String>| revisions.iter().all(|r| r == "step0" || r == "step1");
        let mut by_weights: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
        for ((model, revision), rows) in &self.found {
            // Rows of one revision may come from several runs.
            for weights in rows.values().filter_map(weights_of) {
                by_weights.entry((model.clone(), weights)).or_default().insert(revision.clone());
            }
        }
        let twins = by_weights.iter().filter(|(_, revisions)| revisions.len() > 1 && !usual(revisions));
        let told = |((model, _), revisions): (&(String, String), &BTreeSet<String>)| {
            let names: Vec<&str> = revisions.iter().map(String::as_str).collect();
            format!("{model}: {} hold the same weights, so not all of the names are correct", names.join(" and "))
        };
        twins.map(told).collect()
    }
}

/// Formats settings as a key that does not depend on their order.
fn key(settings: &Value) -> String {
    let Some(entries) = settings.as_object() else { return settings.to_string() };
    let mut entries: Vec<String> = entries.iter().map(|(name, value)| format!("{name:?}: {}", key(value))).collect();
    entries.sort();
    entries.join(", ")
}

/// Returns the hashes of the weight files in a row.
fn weights_of(row: &Value) -> Option<String> {
    let files = row["provenance"]["files"].as_array()?;
    let is_weights = |file: &&Value| file["path"].as_str().is_some_and(is_weight_file);
    let hashes: Vec<&str> = files.iter().filter(is_weights).filter_map(|file| file["sha256"].as_str()).collect();
    (!hashes.is_empty()).then(|| hashes.join(" "))
}
