//! Paths in the cache: `models--owner--name/{blobs,snapshots,refs}` and `.locks`, as Python's `huggingface_hub` defines
//! them.
//!
//! Files of pricket alone are in `models--owner--name/.pricket`, which Python ignores.

use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use crate::id::is_revision;
use crate::part::Part;
use crate::{Digest, Error, Listed, RepoId, Result, platform};

/// Prefix of temporary files.
pub(crate) const TEMPORARY: &str = "tmp-";
/// Prefix of folders of commits whose eviction is in progress.
pub(crate) const GOING: &str = "going-";

/// Paths of one repository in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    cache: PathBuf,
    repo: RepoId,
    folder: String,
}

impl Layout {
    pub(crate) fn new(cache: &Path, repo: &RepoId) -> Self {
        Self { cache: cache.into(), repo: repo.clone(), folder: repo.folder() }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.cache.join(&self.folder)
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root().join("blobs").join(digest.hex())
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        hf_hub::Cache::new(self.cache.clone()).repo(self.repo.known()).pointer_path(commit)
    }

    pub(crate) fn reference(&self, revision: &str) -> PathBuf {
        self.root().join("refs").join(revision)
    }

    /// Returns the path of the lock file of a blob. Python uses the same lock while it fetches the blob.
    pub(crate) fn blob_lock(&self, name: &str) -> PathBuf {
        self.cache.join(".locks").join(&self.folder).join(format!("{name}.lock"))
    }

    /// Returns the path of the kept listing of a commit.
    pub(crate) fn record(&self, commit: &str) -> PathBuf {
        self.root().join(".pricket").join(format!("{commit}.json"))
    }

    /// Returns the path of the snapshot of a commit during eviction. It has the depth of `snapshots/COMMIT`, so
    /// relative links stay valid.
    pub(crate) fn going(&self, commit: &str) -> PathBuf {
        self.root().join(".pricket").join(format!("{GOING}{commit}"))
    }

    /// Returns the path of the lock file that all users of a commit share. Its modification time is the time of the
    /// last use. The file exists only for commits that pricket fetched.
    pub(crate) fn in_use(&self, commit: &str) -> PathBuf {
        self.root().join(".pricket").join(format!("{commit}.lock"))
    }

    /// Returns the path of the lock file of the repository, held briefly while links and blobs change.
    pub(crate) fn mutex(&self) -> PathBuf {
        self.root().join(".pricket/lock")
    }

    /// Returns the recorded commit of a branch or tag.
    pub(crate) fn read_reference(&self, revision: &str) -> Option<String> {
        let path = self.reference(revision);
        let small = std::fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() < 256);
        let text = small.then(|| std::fs::read_to_string(path).ok()).flatten()?;
        Some(text.trim().to_owned()).filter(|commit| crate::is_commit(commit))
    }

    /// Records the commit of a branch or tag, if it has changed.
    pub(crate) fn write_reference(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || !is_revision(revision) || self.read_reference(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        self.replace(&self.reference(revision), commit.as_bytes())
    }

    /// Returns a unique path for a temporary file, on the same file system and in a directory that readers ignore.
    fn temporary(&self) -> Result<PathBuf> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let directory = self.root().join(".pricket");
        std::fs::create_dir_all(&directory).map_err(Error::io(&directory))?;
        // Random, because process ids can coincide if several machines share a cache.
        let chance = RandomState::new().hash_one(SystemTime::now());
        Ok(directory.join(format!("{TEMPORARY}{chance:016x}-{}", COUNT.fetch_add(1, Ordering::Relaxed))))
    }

    /// Returns a unique path for an unfinished download, for file systems without locks.
    pub(crate) fn private_part(&self, digest: &Digest) -> Result<PathBuf> {
        let name = self.temporary()?;
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Part::path_for(&self.root().join("blobs").join(format!("{}.{name}", digest.hex()))))
    }

    /// Replaces a small file atomically: readers see the old or the new contents.
    pub(crate) fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let parent = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let temporary = self.temporary()?;
        let write = || {
            let mut file = std::fs::File::create_new(&temporary)?;
            file.write_all(bytes)?;
            file.sync_data()?;
            std::fs::rename(&temporary, path)
        };
        write().map_err(|e| {
            let _ = std::fs::remove_file(&temporary);
            Error::io(path)(e)
        })
    }

    /// Creates or replaces the symbolic link `pointer` to `target`.
    fn symlink(&self, target: &str, pointer: &Path) -> std::io::Result<()> {
        match platform::symlink(target, pointer) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                if std::fs::read_link(pointer).is_ok_and(|old| old == Path::new(target)) {
                    return Ok(());
                }
                let temporary = self.temporary().map_err(std::io::Error::other)?;
                platform::symlink(target, &temporary)?;
                std::fs::rename(&temporary, pointer)
            }
            made => made,
        }
    }

    /// Returns the path of a file of a snapshot, or `None` if it is missing or its length differs from the listing.
    pub(crate) fn present(&self, commit: &str, file: &Listed) -> Option<PathBuf> {
        let path = self.snapshot(commit).join(&file.path);
        std::fs::metadata(&path).ok().filter(|meta| meta.is_file() && meta.len() == file.size).map(|_| path)
    }

    /// Creates `snapshots/COMMIT/PATH` for a blob: a relative symbolic link, or the file itself if links are off or not
    /// supported.
    ///
    /// `is_new` means that no other snapshot links to the blob, so the blob may be moved instead of copied.
    pub(crate) fn link(&self, commit: &str, file: &str, digest: &Digest, symlinks: bool, is_new: bool) -> Result<()> {
        let pointer = self.snapshot(commit).join(file);
        let parent = pointer.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let blob = self.blob(digest);
        let up = "../".repeat(2 + file.matches('/').count());
        if symlinks {
            match self.symlink(&format!("{up}blobs/{}", digest.hex()), &pointer) {
                // The file system does not support links.
                Err(e) if matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied) => {}
                made => return made.map_err(Error::io(&pointer)),
            }
        }
        if is_new {
            // Moves the blob, as Python does, so that the bytes are stored once.
            return std::fs::rename(&blob, &pointer).map_err(Error::io(&pointer));
        }
        let temporary = self.temporary()?;
        let copied = std::fs::hard_link(&blob, &temporary).or_else(|_| std::fs::copy(&blob, &temporary).map(drop));
        copied.and_then(|()| std::fs::rename(&temporary, &pointer)).map_err(Error::io(&pointer))
    }
}
