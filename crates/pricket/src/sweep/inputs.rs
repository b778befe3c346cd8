//! Hashes of the inputs of a sweep: tasks, documents and weights. A row is kept only if its hashes match.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pricket_hub::{Digest, NoProgress};
use serde_json::{Value, json};

use crate::Result;
use crate::loading::provenance::Provenance;
use crate::sweep::measure::Measure;

/// Hashes of document files. Each is computed once.
#[derive(Default)]
pub(crate) struct Hashes(BTreeMap<PathBuf, Value>);

impl Hashes {
    fn of(&mut self, path: &Path) -> Result<Value> {
        if let Some(known) = self.0.get(path) {
            return Ok(known.clone());
        }
        // A pipe can be read only once, so it has no hash and never matches an earlier row.
        let hash = if path.is_file() { json!(Digest::sha256_of(path, &NoProgress)?.hex()) } else { Value::Null };
        self.0.insert(path.to_owned(), hash.clone());
        Ok(hash)
    }

    fn all(&mut self, paths: &[PathBuf]) -> Result<Vec<Value>> {
        paths.iter().map(|path| self.of(path)).collect()
    }

    /// Returns the hashes of a measure's definition, documents and examples as JSON.
    pub(crate) fn measure(&mut self, measure: &Measure, shots: Option<usize>) -> Result<Value> {
        let hash = |text: &str| Digest::Sha256(String::new()).of(text.as_bytes()).hex().to_owned();
        Ok(match measure {
            Measure::Task { task, documents, examples } => {
                let examples = if task.shots(shots) > 0 { self.all(examples)? } else { Vec::new() };
                json!({"definition": hash(task.definition()), "documents": self.all(documents)?, "examples": examples})
            }
            Measure::Slices(path) | Measure::TextFile(path) => json!({"documents": [self.of(path)?]}),
            Measure::Text { text, .. } => json!({"documents": [hash(text)]}),
        })
    }
}

/// Returns the identity of a checkpoint: the commit in a repository, or one hash over all files of a local model.
pub(crate) fn identity(provenance: &Provenance) -> Value {
    if let Some(commit) = &provenance.commit {
        return json!({ "commit": commit });
    }
    let mut files: Vec<String> = provenance
        .files
        .iter()
        .filter_map(|file| Some(format!("{} {}\n", file.path, file.digest.as_ref()?.hex())))
        .collect();
    files.sort();
    json!({"files": Digest::Sha256(String::new()).of(files.concat().as_bytes()).hex()})
}

/// Returns a stamp of the last change of each local file. If size and stamp of a file equal those in a row, the hash in
/// the row is still valid.
pub(crate) fn stamps(provenance: &Provenance) -> Value {
    let directory = provenance.directory.clone().unwrap_or_default();
    let stamp = |path: &str| Some((path.to_owned(), json!(stamp(&directory.join(path))?)));
    if provenance.commit.is_some() {
        return Value::Null;
    }
    provenance.files.iter().filter_map(|file| stamp(&file.path)).collect()
}

fn stamp(path: &Path) -> Option<String> {
    let meta = std::fs::metadata(path).ok()?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        // Uses the change time, which programs cannot set, instead of the modification time.
        Some(format!("{}.{:09} {}", meta.ctime(), meta.ctime_nsec(), meta.ino()))
    }
    #[cfg(not(unix))]
    {
        let since = meta.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
        Some(format!("{}.{:09}", since.as_secs(), since.subsec_nanos()))
    }
}

/// Returns the current identity of a local checkpoint with the files of `provenance`. For files unchanged since `row`,
/// uses the hashes of `row`.
pub(crate) fn current(mut provenance: Provenance, row: &Value) -> Option<Value> {
    let known = row["provenance"]["files"].as_array()?;
    let directory = provenance.directory.clone()?;
    for file in &mut provenance.files {
        let same = |known: &&Value| known["path"] == file.path.as_str() && known["bytes"] == file.bytes;
        let known = known.iter().find(same).and_then(|known| known["sha256"].as_str());
        let unchanged = stamp(&directory.join(&file.path)).is_some_and(|stamp| row["stamps"][&file.path] == stamp);
        file.digest = known.filter(|_| unchanged).map(|hex| Digest::Sha256(hex.to_owned())).or(file.digest.take());
    }
    Some(identity(&provenance.hashed().ok()?))
}
