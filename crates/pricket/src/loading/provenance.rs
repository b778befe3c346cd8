//! Provenance of a model: repository, commit, files with their hashes, license.

use std::path::{Path, PathBuf};

use pricket_hub::{Digest, Listed, NoProgress, RepoId, is_commit};
use serde_json::{Value, json};

use crate::Result;
use crate::suites::cards::card;

/// Origin of a model. Result files contain it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Provenance {
    /// The repository as `owner/name`, if the model came from one.
    pub repo: Option<String>,
    /// The requested branch, tag or commit.
    pub revision: Option<String>,
    /// The commit that the revision resolved to.
    pub commit: Option<String>,
    /// The directory that contains the files.
    pub directory: Option<PathBuf>,
    /// Files of weights, configuration and tokenizer.
    pub files: Vec<SourceFile>,
    /// License in the Hub's spelling, if the model card or the repository names it.
    pub license: Option<String>,
}

/// A file that a model was loaded from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceFile {
    /// Path in the repository or directory.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Hash from the commit's listing or from the name of the cached blob, if known without reading the file;
    /// [`Provenance::hashed`] computes missing hashes.
    ///
    /// Files that pricket fetched were compared with this hash. [`Cache::verify`] verifies files that other programs
    /// fetched.
    ///
    /// [`Cache::verify`]: crate::hub::Cache::verify
    pub digest: Option<Digest>,
}

impl Provenance {
    /// Returns the provenance of files in a directory. Snapshots in a Hub cache are recognized.
    pub(crate) fn of_directory(directory: &Path, files: &[PathBuf]) -> Self {
        let file = |path: &PathBuf| {
            // A file in a Hub cache links to a blob whose name is its hash. Names of other link targets are not hashes.
            let target = std::fs::read_link(path).ok();
            let is_blob =
                |target: &&Path| target.parent().and_then(Path::file_name).is_some_and(|name| name == "blobs");
            let blob = target.as_deref().filter(is_blob).and_then(Path::file_name);
            let blob = blob.and_then(|name| Digest::from_hex(name.to_str()?));
            Some(SourceFile {
                path: path.strip_prefix(directory).unwrap_or(path).to_string_lossy().into_owned(),
                bytes: std::fs::metadata(path).ok()?.len(),
                digest: blob,
            })
        };
        let (repo, commit) = snapshot_of(directory).map_or((None, None), |(repo, commit)| (Some(repo), Some(commit)));
        Self {
            license: repo.as_deref().and_then(license_of).or_else(|| license_in(&directory.join("README.md"))),
            repo,
            revision: commit.clone(),
            commit,
            directory: Some(directory.into()),
            files: files.iter().filter_map(file).collect(),
        }
    }

    /// Returns the provenance of files of a commit.
    pub(crate) fn of_repository(
        repo: &RepoId,
        revision: &str,
        commit: &str,
        directory: &Path,
        files: &[Listed],
    ) -> Self {
        let file =
            |file: &Listed| SourceFile { path: file.path.clone(), bytes: file.size, digest: file.digest.clone() };
        Self {
            repo: Some(repo.to_string()),
            revision: Some(revision.into()),
            commit: Some(commit.into()),
            directory: Some(directory.into()),
            files: files.iter().map(file).collect(),
            license: license_of(repo.as_str()).or_else(|| license_in(&directory.join("README.md"))),
        }
    }

    /// Returns the provenance of files that are compiled into the program.
    pub(crate) fn of_embedded(files: &[(&str, &[u8])]) -> Self {
        let file = |(path, bytes): &(&str, &[u8])| SourceFile {
            path: (*path).to_owned(),
            bytes: bytes.len() as u64,
            digest: Some(Digest::Sha256(String::new()).of(bytes)),
        };
        Self { files: files.iter().map(file).collect(), license: Some("mit or apache-2.0".into()), ..Self::default() }
    }

    /// Records that the file `by` is used instead of the files with these names.
    pub(crate) fn replace(&mut self, names: &[&str], by: &Path) {
        self.files.retain(|file| !names.contains(&file.path.as_str()));
        let bytes = std::fs::metadata(by).map_or(0, |meta| meta.len());
        let path = std::path::absolute(by).unwrap_or_else(|_| by.to_owned()).to_string_lossy().into_owned();
        self.files.push(SourceFile { path, bytes, digest: None });
    }

    /// Returns the provenance with the hash of every file. Reads the files whose hash is not known.
    ///
    /// # Errors
    /// Returns [`crate::Error::Io`] if a file can no longer be read.
    pub fn hashed(mut self) -> Result<Self> {
        // Joining keeps absolute paths unchanged.
        let directory = self.directory.clone().unwrap_or_default();
        for file in self.files.iter_mut().filter(|file| file.digest.is_none()) {
            file.digest = Some(Digest::sha256_of(&directory.join(&file.path), &NoProgress)?);
        }
        Ok(self)
    }

    /// Returns `owner/name@revision`, or the directory for local models.
    pub fn name(&self) -> String {
        match (&self.repo, &self.revision) {
            (Some(repo), Some(revision)) => format!("{repo}@{revision}"),
            (Some(repo), None) => repo.clone(),
            _ => {
                self.directory.as_ref().map_or("the embedded model".into(), |directory| directory.display().to_string())
            }
        }
    }

    /// Returns the provenance as JSON, the form used in result files.
    pub fn to_json(&self) -> Value {
        let files: Vec<Value> = self
            .files
            .iter()
            .map(|file| {
                let (kind, hex) = match &file.digest {
                    Some(Digest::Sha256(hex)) => ("sha256", Some(hex)),
                    Some(Digest::GitBlob(hex)) => ("git_blob", Some(hex)),
                    None => ("sha256", None),
                };
                json!({ "path": file.path, "bytes": file.bytes, kind: hex })
            })
            .collect();
        json!({
            "repo": self.repo, "revision": self.revision, "commit": self.commit, "license": self.license,
            "directory": self.directory, "files": files,
        })
    }
}

/// Returns repository and commit of a directory `.../models--owner--name/snapshots/COMMIT`.
fn snapshot_of(directory: &Path) -> Option<(String, String)> {
    let absolute = std::path::absolute(directory).ok()?;
    let commit = absolute.file_name()?.to_str()?.to_owned();
    let snapshots = absolute.parent()?;
    let folder = snapshots.parent()?.file_name()?.to_str()?;
    let repo = RepoId::from_folder(folder)?;
    (is_commit(&commit) && snapshots.ends_with("snapshots")).then(|| (repo.to_string(), commit))
}

fn license_of(repo: &str) -> Option<String> {
    card(repo).map(|card| card.license.clone())
}

/// Returns the value of `license:` in the front matter of a README.
fn license_in(readme: &Path) -> Option<String> {
    let small = std::fs::metadata(readme).is_ok_and(|meta| meta.is_file() && meta.len() < 1 << 20);
    let text = small.then(|| std::fs::read_to_string(readme).ok()).flatten()?;
    let front = text.strip_prefix("---")?.split("\n---").next()?.to_owned();
    let license = front.lines().find_map(|line| line.strip_prefix("license:"))?.trim();
    let license = license.trim_matches(['"', '\'']);
    (!license.is_empty() && license.len() < 100).then(|| license.to_owned())
}
