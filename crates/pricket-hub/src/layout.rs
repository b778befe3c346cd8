//! Where things lie in a cache: `models--owner--name/{blobs,snapshots,refs}` and `.locks`, as Python's `huggingface_hub`
//! has them. What is our own lies in `models--owner--name/.pricket`, where Python does not look.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Digest, Error, Listed, RepoId, Result};

/// What files on their way to another name begin with.
pub(crate) const TEMPORARY: &str = "tmp-";

/// The folders of one repository.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    cache: PathBuf,
    folder: String,
}

impl Layout {
    pub(crate) fn new(cache: &Path, repo: &RepoId) -> Self {
        Self { cache: cache.into(), folder: repo.folder() }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.cache.join(&self.folder)
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root().join("blobs").join(digest.hex())
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        let repo = hf_hub::Repo::model(self.folder.trim_start_matches("models--").replace("--", "/"));
        hf_hub::Cache::new(self.cache.clone()).repo(repo).pointer_path(commit)
    }

    pub(crate) fn reference(&self, revision: &str) -> PathBuf {
        self.root().join("refs").join(revision)
    }

    /// The lock that Python takes while it fetches this blob.
    pub(crate) fn blob_lock(&self, name: &str) -> PathBuf {
        self.cache.join(".locks").join(&self.folder).join(format!("{name}.lock"))
    }

    /// What we know of a commit that we fetched from.
    pub(crate) fn record(&self, commit: &str) -> PathBuf {
        self.root().join(".pricket").join(format!("{commit}.json"))
    }

    /// Shared by who uses a commit that we fetched; its time is that of the last use.
    pub(crate) fn in_use(&self, commit: &str) -> PathBuf {
        self.root().join(".pricket").join(format!("{commit}.lock"))
    }

    /// Held for a moment while links and blobs change.
    pub(crate) fn mutex(&self) -> PathBuf {
        self.root().join(".pricket/lock")
    }

    /// The commit that a branch or tag had when it was last asked for.
    pub(crate) fn read_reference(&self, revision: &str) -> Option<String> {
        let path = self.reference(revision);
        let small = std::fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() < 256);
        let text = small.then(|| std::fs::read_to_string(path).ok()).flatten()?;
        Some(text.trim().to_owned()).filter(|commit| crate::is_commit(commit))
    }

    /// Remembers it, if it is new. A cache that cannot be written is read all the same.
    pub(crate) fn write_reference(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || self.read_reference(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        self.replace(&self.reference(revision), commit.as_bytes())
    }

    /// A name that nobody else uses, on the same file system and where no reader looks.
    fn temporary(&self) -> Result<PathBuf> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let directory = self.root().join(".pricket");
        std::fs::create_dir_all(&directory).map_err(Error::io(&directory))?;
        Ok(directory.join(format!("{TEMPORARY}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))))
    }

    /// Writes a small file in one step: readers see the old one or the new one.
    pub(crate) fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let parent = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let temporary = self.temporary()?;
        let written = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
        written.map_err(|e| {
            let _ = std::fs::remove_file(&temporary);
            Error::io(path)(e)
        })
    }

    /// Whether `pointer` is now a link to `target`.
    #[cfg(unix)]
    fn symlink(&self, target: &str, pointer: &Path) -> bool {
        use std::os::unix::fs::symlink;
        match symlink(target, pointer) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                std::fs::read_link(pointer).is_ok_and(|old| old == Path::new(target))
                    || self.temporary().is_ok_and(|temporary| {
                        symlink(target, &temporary).is_ok() && std::fs::rename(&temporary, pointer).is_ok()
                    })
            }
            made => made.is_ok(),
        }
    }

    #[cfg(not(unix))]
    fn symlink(&self, _: &str, _: &Path) -> bool {
        false
    }

    /// The file of a snapshot, if it is there and as long as listed.
    pub(crate) fn present(&self, commit: &str, file: &Listed) -> Option<PathBuf> {
        let path = self.snapshot(commit).join(&file.path);
        std::fs::metadata(&path).ok().filter(|meta| meta.is_file() && meta.len() == file.size).map(|_| path)
    }

    /// Makes `snapshots/COMMIT/PATH` the blob: a relative link, or where there are none the file itself.
    pub(crate) fn link(&self, commit: &str, file: &str, digest: &Digest, symlinks: bool) -> Result<()> {
        let pointer = self.snapshot(commit).join(file);
        let parent = pointer.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let blob = self.blob(digest);
        let up = "../".repeat(2 + file.matches('/').count());
        if symlinks && self.symlink(&format!("{up}blobs/{}", digest.hex()), &pointer) {
            return Ok(());
        }
        // The blob's name goes, as with Python, so that the bytes are there once.
        std::fs::rename(&blob, &pointer).map_err(Error::io(&pointer))
    }
}
