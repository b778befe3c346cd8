//! Repositories of the test server and their files.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The bytes of a file with the hashes of its storage.
#[derive(Clone, Debug)]
pub struct Content {
    /// The bytes.
    pub bytes: Arc<Vec<u8>>,
    /// SHA-256 for a file in large-file storage (Git LFS). `None` for a file in git.
    pub sha256: Option<String>,
    /// Git hash of the file, or of its pointer if it is in large-file storage.
    pub oid: String,
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

fn git_oid(bytes: &[u8]) -> String {
    hex(&Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
}

impl Content {
    /// Creates a file in git.
    pub fn text(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        Self { oid: git_oid(&bytes), sha256: None, bytes: Arc::new(bytes) }
    }

    /// Creates a file in large-file storage.
    pub fn lfs(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        let sha256 = hex(&Sha256::digest(&bytes));
        let pointer =
            format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {}\n", bytes.len());
        Self { oid: git_oid(pointer.as_bytes()), sha256: Some(sha256), bytes: Arc::new(bytes) }
    }

    /// Reads a file from disk. Files with the extension `safetensors`, `bin` or `gguf` go to large-file storage, others
    /// to git.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub fn file(path: &Path) -> std::io::Result<Self> {
        let large = ["safetensors", "bin", "gguf"].iter().any(|kind| path.extension().is_some_and(|e| e == *kind));
        let bytes = std::fs::read(path)?;
        Ok(if large { Self::lfs(bytes) } else { Self::text(bytes) })
    }

    /// Returns the hash that identifies the file, which is also its name in the caches of clients.
    pub fn etag(&self) -> &str {
        self.sha256.as_ref().unwrap_or(&self.oid)
    }
}

/// A repository with branches, tags and commits.
#[derive(Clone, Debug, Default)]
pub struct Repo {
    pub(crate) branches: BTreeMap<String, String>,
    pub(crate) tags: BTreeMap<String, String>,
    pub(crate) commits: BTreeMap<String, BTreeMap<String, Content>>,
    pub(crate) token: Option<String>,
}

impl Repo {
    /// Adds a commit with these files and returns its hash.
    pub fn commit<'a>(&mut self, files: impl IntoIterator<Item = (&'a str, Content)>) -> String {
        let files: BTreeMap<String, Content> =
            files.into_iter().map(|(path, content)| (path.into(), content)).collect();
        let mut hash = Sha1::new_with_prefix(format!("commit {}\0", self.commits.len()));
        for (path, content) in &files {
            hash.update(format!("{path} {}\n", content.oid));
        }
        let commit = hex(&hash.finalize());
        self.commits.insert(commit.clone(), files);
        commit
    }

    /// Adds a commit with the files of a directory and returns its hash. Subdirectories are ignored.
    ///
    /// # Errors
    /// Returns an error if the directory or a file cannot be read.
    pub fn commit_directory(&mut self, directory: &Path) -> std::io::Result<String> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(directory)?.flatten() {
            if entry.path().is_file() {
                files.push((entry.file_name().to_string_lossy().into_owned(), Content::file(&entry.path())?));
            }
        }
        Ok(self.commit(files.iter().map(|(path, content)| (path.as_str(), content.clone()))))
    }

    /// Creates or moves a branch.
    pub fn branch(&mut self, name: &str, commit: &str) {
        self.branches.insert(name.into(), commit.into());
    }

    /// Creates or moves a tag.
    pub fn tag(&mut self, name: &str, commit: &str) {
        self.tags.insert(name.into(), commit.into());
    }

    /// Makes the repository private: requests need this token.
    pub fn private(&mut self, token: &str) {
        self.token = Some(token.into());
    }

    /// Returns the commit of a branch, tag or commit.
    pub fn resolve(&self, revision: &str) -> Option<&str> {
        let named = self.branches.get(revision).or_else(|| self.tags.get(revision));
        named.or_else(|| self.commits.keys().find(|commit| *commit == revision)).map(String::as_str)
    }

    /// Returns the files of a branch, tag or commit.
    pub fn files(&self, revision: &str) -> Option<&BTreeMap<String, Content>> {
        self.commits.get(self.resolve(revision)?)
    }
}
