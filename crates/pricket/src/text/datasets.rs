//! Fetching the documents of tasks and training data from datasets on the Hub.

use std::path::{Path, PathBuf};

use pricket_hub::{Hub, Listed, ModelId, RepoId};
use pricket_lm::Task;
use pricket_nn::Progress;

use crate::loading::repository::{RenamedProgress, explained};
use crate::{Error, Result};

/// The branch with the Hub's conversion of a dataset to parquet. All datasets have the layout
/// `CONFIGURATION/SPLIT/0000.parquet` there.
const CONVERTED: &str = "refs/convert/parquet";

/// Fetches the documents of a task's split (`test`, `validation`, `train`) from its dataset on the Hub. Returns the
/// verified files in the cache, in order.
///
/// The branch `refs/convert/parquet`, to which the Hub converts datasets, is tried first. Then `main` is searched for
/// parquet or JSON lines files whose paths name the split and the configuration. Code from a repository is never
/// executed, so a dataset that consists of a script has no files on `main`.
///
/// # Errors
/// Returns [`Error::Documents`] if the task names no dataset or the split is ambiguous, [`Error::NotFound`] if no file
/// belongs to the split, and otherwise the errors of [`crate::loading::fetch`].
pub fn fetch_documents(task: &Task, split: &str, hub: &Hub, progress: &dyn Progress) -> Result<Vec<PathBuf>> {
    let Some((repo, config)) = task.dataset() else {
        return Err(Error::Documents(format!("task {} names no dataset of the Hub; pass its documents", task.name())));
    };
    let repo: RepoId = format!("datasets/{repo}").parse()?;
    let telling = RenamedProgress::new(progress, format!("fetching {split} of {}", task.name()));
    fetch_split(&repo, &[CONVERTED, "main"], config, split, hub, &telling)
}

/// Fetches a split of a dataset of the Hub, such as `databricks/databricks-dolly-15k`. Returns the verified files in the
/// cache, in order.
///
/// `dataset` may name a configuration after `:` and a revision after `@`, as in `owner/name:configuration@revision`.
/// Without a revision, files are looked for as by [`fetch_documents`]. If no file of the repository names a split and it
/// has only one data file, that file is the split `train`.
///
/// # Errors
/// Returns [`Error::Hub`] if `dataset` is not a valid id, [`Error::Documents`] if the split is ambiguous,
/// [`Error::NotFound`] if no file belongs to the split, and otherwise the errors of [`crate::loading::fetch`].
pub fn fetch_dataset(dataset: &str, split: &str, hub: &Hub, progress: &dyn Progress) -> Result<Vec<PathBuf>> {
    let (name, revision) = match dataset.split_once('@') {
        Some((name, revision)) => (name, Some(revision)),
        None => (dataset, None),
    };
    let (repo, config) = match name.split_once(':') {
        Some((repo, config)) => (repo, Some(config)),
        None => (name, None),
    };
    let repo = repo.strip_prefix("datasets/").unwrap_or(repo);
    let repo: RepoId = format!("datasets/{repo}").parse()?;
    let telling = RenamedProgress::new(progress, format!("fetching {split} of {dataset}"));
    let revisions = revision.map_or(vec![CONVERTED, "main"], |revision| vec![revision]);
    fetch_split(&repo, &revisions, config, split, hub, &telling)
}

/// Fetches a split from the first of `revisions` that has files of it.
fn fetch_split(
    repo: &RepoId,
    revisions: &[&str],
    config: Option<&str>,
    split: &str,
    hub: &Hub,
    progress: &dyn Progress,
) -> Result<Vec<PathBuf>> {
    let mut seen = Vec::new();
    for &revision in revisions {
        let id = ModelId::new(repo.clone(), revision)?;
        let commit = match hub.resolve(&id, progress) {
            // The Hub does not convert every dataset.
            Err(pricket_hub::Error::Revision { .. } | pricket_hub::Error::Offline { .. }) if revision == CONVERTED => {
                continue;
            }
            answer => answer.map_err(|e| explained(e, &id, None))?,
        };
        let listing = hub.files(repo, &commit, progress).map_err(|e| explained(e, &id, None))?.files;
        let mut wanted: Vec<Listed> =
            listing.iter().filter(|file| is_part(&file.path, config, split)).cloned().collect();
        if wanted.is_empty() && split == "train" && config.is_none() {
            let mut readable = listing.iter().filter(|file| is_readable(Path::new(&file.path)));
            if let (Some(only), None) = (readable.next(), readable.next())
                && !names_split(&only.path)
            {
                wanted.push(only.clone());
            }
        }
        if wanted.is_empty() {
            seen.extend(listing.into_iter().map(|file| file.path));
            continue;
        }
        // The same documents may also exist as JSON lines.
        let is_parquet = |file: &Listed| file.path.ends_with(".parquet");
        if wanted.iter().any(is_parquet) {
            wanted.retain(is_parquet);
        }
        wanted.sort_by(|a, b| a.path.cmp(&b.path));
        let folder = |file: &Listed| Path::new(&file.path).parent().map(Path::to_owned);
        if let Some(other) = wanted.iter().find(|file| folder(file) != folder(&wanted[0])) {
            let what = format!("the split {split} is ambiguous: found at {} and at {}", wanted[0].path, other.path);
            return Err(Error::Documents(format!("{repo}: {what}")));
        }
        let whole = hub.fetch(&id, &commit, &wanted, &listing, progress).map_err(|e| explained(e, &id, None))?;
        return Ok(wanted.iter().map(|file| whole.directory.join(&file.path)).collect());
    }
    let names: Vec<&str> = seen.iter().take(12).map(String::as_str).collect();
    let what = match (&names[..], config) {
        ([], _) => "the repository lists no files".to_owned(),
        (names, Some(config)) => {
            format!("no file for split {split} of configuration {config}; the files are {}", names.join(", "))
        }
        (names, None) => format!("no file for split {split}; the files are {}", names.join(", ")),
    };
    Err(Error::NotFound { path: repo.to_string().into(), what })
}

/// Returns whether a path names a split other than `train`.
fn names_split(path: &str) -> bool {
    const SPLITS: [&str; 6] = ["test", "validation", "valid", "val", "dev", "eval"];
    path.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| SPLITS.contains(&word))
}

/// Returns whether a file has a format that [`Documents`](pricket_lm::Documents) reads.
fn is_readable(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "parquet" || end == "jsonl")
}

/// Returns whether a file is part of a split of a configuration. Datasets with a single configuration call it `default`
/// or do not name it.
fn is_part(path: &str, config: Option<&str>, split: &str) -> bool {
    let path = Path::new(path);
    let Some(stem) = path.file_stem().and_then(|stem| stem.to_str()).filter(|_| is_readable(path)) else {
        return false;
    };
    let folders: Vec<&str> = path.parent().into_iter().flat_map(Path::iter).filter_map(|part| part.to_str()).collect();
    let of_split = stem == split || stem.starts_with(&format!("{split}-")) || folders.last() == Some(&split);
    let of_config = match config.filter(|&config| config != "default") {
        Some(config) => folders.contains(&config),
        None => folders.iter().all(|folder| ["default", "data", split].contains(folder)),
    };
    of_split && of_config
}

#[cfg(test)]
mod tests {
    use super::is_part;

    #[test]
    fn files_are_told_by_their_names() {
        for (path, config, split, expected) in [
            ("default/test/0000.parquet", None, "test", true),
            ("default/test/0000.parquet", Some("default"), "test", true),
            ("default/validation/0000.parquet", None, "test", false),
            ("winogrande_xl/train/0000.parquet", Some("winogrande_xl"), "train", true),
            ("winogrande_l/train/0000.parquet", Some("winogrande_xl"), "train", false),
            ("winogrande_xl/train-00000-of-00001.parquet", Some("winogrande_xl"), "train", true),
            ("data/validation-00000-of-00001.parquet", None, "validation", true),
            ("test.jsonl", None, "test", true),
            ("ARC-Easy/test-00000-of-00001.parquet", None, "test", false),
            ("test.py", None, "test", false),
            ("data/latest-1.parquet", None, "test", false),
        ] {
            assert_eq!(is_part(path, config, split), expected, "{path} {config:?} {split}");
        }
    }
}
