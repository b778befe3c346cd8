//! Tasks and their documents, from flags.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use pricket::{Hub, Task};

use crate::Bar;

/// Returns a built-in task by name, or reads the file of a task.
pub(crate) fn task(name: &str) -> anyhow::Result<Task> {
    let is_file = Path::new(name).extension().is_some_and(|end| end == "toml" || end == "yaml" || end == "yml");
    Ok(if is_file { Task::from_file(name)? } else { Task::named(name)? })
}

/// Returns the files with the documents of a task.
pub(crate) fn documents(data: Option<&Path>, task: &Task) -> anyhow::Result<Vec<PathBuf>> {
    files(data, task, task.split())
}

/// Returns the files from which `shots` examples are drawn. There are none without examples, or if the task defines its
/// own examples.
pub(crate) fn examples(data: Option<&Path>, task: &Task, shots: Option<usize>) -> anyhow::Result<Vec<PathBuf>> {
    if task.shots(shots) == 0 || task.has_samples() {
        return Ok(Vec::new());
    }
    files(data, task, task.examples_split().unwrap_or(task.split()))
}

/// Returns the files of a task's split: from a directory, from the paths in the task's file, or fetched from the Hub.
fn files(data: Option<&Path>, task: &Task, split: &str) -> anyhow::Result<Vec<PathBuf>> {
    let Some(data) = data else {
        if let Some(files) = task.files(split) {
            return Ok(files.to_vec());
        }
        let fetched = pricket::text::fetch_documents(task, split, &Hub::from_env()?, &Bar::default());
        return fetched.with_context(|| format!("fetching the documents of task {}; see --data", task.name()));
    };
    let names = ["jsonl", "parquet"].map(|end| data.join(format!("{}.{split}.{end}", task.name())));
    match names.iter().find(|path| path.is_file()) {
        Some(path) => Ok(vec![path.clone()]),
        None => bail!(
            "{}: file not found; expected the documents of task {} there, as .jsonl or .parquet",
            names[0].display(),
            task.name()
        ),
    }
}
