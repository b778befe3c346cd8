//! Tasks and their documents, as flags name them.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use pricket::Task;

/// A built-in task, or one of the user's own.
pub(crate) fn task(name: &str) -> anyhow::Result<Task> {
    let is_file = Path::new(name).extension().is_some_and(|extension| extension == "toml");
    Ok(if is_file { Task::from_file(name)? } else { Task::named(name)? })
}

/// The file of the documents that a task is asked of.
pub(crate) fn documents(data: &Path, task: &Task) -> anyhow::Result<PathBuf> {
    file(data, task, task.split())
}

/// The file that examples are drawn from.
pub(crate) fn examples(data: &Path, task: &Task) -> anyhow::Result<PathBuf> {
    file(data, task, task.examples_split().unwrap_or(task.split()))
}

fn file(data: &Path, task: &Task, split: &str) -> anyhow::Result<PathBuf> {
    let path = data.join(format!("{}.{split}.jsonl", task.name()));
    ensure!(path.is_file(), "{}: no such file; the documents of task {} belong there", path.display(), task.name());
    Ok(path)
}
