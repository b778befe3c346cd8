//! Tasks and their documents, as flags name them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use pricket::{Hub, Task};

use crate::Bar;

/// A built-in task, or one that a file describes.
pub(crate) fn task(name: &str) -> anyhow::Result<Task> {
    let is_file = Path::new(name).extension().is_some_and(|end| end == "toml" || end == "yaml" || end == "yml");
    Ok(if is_file { Task::from_file(name)? } else { Task::named(name)? })
}

/// The files of the documents that a task is asked of.
pub(crate) fn documents(data: Option<&Path>, task: &Task) -> anyhow::Result<Vec<PathBuf>> {
    files(data, task, task.split())
}

/// The files that `shots` examples are drawn from: none where no example is wanted, or where the task has its own.
pub(crate) fn examples(data: Option<&Path>, task: &Task, shots: Option<usize>) -> anyhow::Result<Vec<PathBuf>> {
    if task.shots(shots) == 0 || task.has_samples() {
        return Ok(Vec::new());
    }
    files(data, task, task.examples_split().unwrap_or(task.split()))
}

/// Those of a directory; those that the task's file names, or of the task's dataset on the Hub, where no directory is given.
fn files(data: Option<&Path>, task: &Task, split: &str) -> anyhow::Result<Vec<PathBuf>> {
    let Some(data) = data else {
        if let Some(files) = task.files(split) {
            return Ok(files.to_vec());
        }
        let fetched = pricket::text::fetch_documents(task, split, &Hub::from_env()?, &Bar::default());
        return fetched.with_context(|| format!("the documents of task {} (--data names a directory)", task.name()));
    };
    let names = ["jsonl", "parquet"].map(|end| data.join(format!("{}.{split}.{end}", task.name())));
    match names.iter().find(|path| path.is_file()) {
        Some(path) => Ok(vec![path.clone()]),
        None => bail!(
            "{}: no such file, nor .parquet; expected the documents of task {} there",
            names[0].display(),
            task.name()
        ),
    }
}
