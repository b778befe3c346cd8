//! Tasks and their documents, as flags name them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use pricket::{Hub, Task};

use crate::Bar;

/// A built-in task, or one of the user's own.
pub(crate) fn task(name: &str) -> anyhow::Result<Task> {
    let is_file = Path::new(name).extension().is_some_and(|extension| extension == "toml");
    Ok(if is_file { Task::from_file(name)? } else { Task::named(name)? })
}

/// The files of the documents that a task is asked of.
pub(crate) fn documents(data: Option<&Path>, task: &Task) -> anyhow::Result<Vec<PathBuf>> {
    files(data, task, task.split())
}

/// The files that examples are drawn from.
pub(crate) fn examples(data: Option<&Path>, task: &Task) -> anyhow::Result<Vec<PathBuf>> {
    files(data, task, task.examples_split().unwrap_or(task.split()))
}

/// Those of a directory; of the task's dataset on the Hub where none is given.
fn files(data: Option<&Path>, task: &Task, split: &str) -> anyhow::Result<Vec<PathBuf>> {
    let Some(data) = data else {
        let fetched = pricket::fetch_documents(task, split, &Hub::from_env()?, &Bar::default());
        return fetched.with_context(|| format!("the documents of task {} (--data names a directory)", task.name()));
    };
    let names = ["jsonl", "parquet"].map(|end| data.join(format!("{}.{split}.{end}", task.name())));
    match names.iter().find(|path| path.is_file()) {
        Some(path) => Ok(vec![path.clone()]),
        None => bail!(
            "{}: no such file, nor .parquet; the documents of task {} belong there",
            names[0].display(),
            task.name()
        ),
    }
}
