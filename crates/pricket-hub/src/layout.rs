//! Where things lie in a cache: `models--owner--name/{blobs,snapshots,refs}` and `.locks`, as Python's `huggingface_hub`
//! has them. What is our own lies in `models--owner--name/.pricket`, where Python does not look.

use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use crate::id::is_revision;
use crate::part::Part;
use crate::{Digest, Error, Listed, RepoId, Result, platform};

/// What files on their way to another name begin with.
pub(crate) const TEMPORARY: &str = "tmp-";
/// What folders of evicted commits begin with until their blobs are gone too.
pub(crate) const GOING: &str = "going-";

/// The folders of one repository.
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

    /// The lock that Python takes while it fetches this blob.
    pub(crate) fn blob_lock(&self, name: &str) -> PathBuf {
        self.cache.join(".locks").join(&self.folder).join(format!("{name}.lock"))
    }

    /// What we know of a commit that we fetched from.
    pub(crate) fn record(&self, commit: &str) -> PathBuf {
        self.root().join(".pricket").join(format!("{commit}.json"))
    }

    /// A commit on its way out: its links, at the depth that they were made for.
    pub(crate) fn going(&self, commit: &str) -> PathBuf {
        self.root().join(".pricket").join(format!("{GOING}{commit}"))
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

    /// Remembers it, if it is new.
    pub(crate) fn write_reference(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || !is_revision(revision) || self.read_reference(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        self.replace(&self.reference(revision), commit.as_bytes())
    }

    /// A name that nobody else uses, on the same file system and where no reader looks.
    fn temporary(&self) -> Result<PathBuf> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let directory = self.root().join(".pricket");
        std::fs::create_dir_all(&directory).map_err(Error::io(&directory))?;
        // Process numbers repeat on a cache that several machines share.
        let chance = RandomState::new().hash_one(SystemTime::now());
        Ok(directory.join(format!("{TEMPORARY}{chance:016x}-{}", COUNT.fetch_add(1, Ordering::Relaxed))))
    }

    /// Where a file is put together when nobody can be kept off its usual place.
    pub(crate) fn private_part(&self, digest: &Digest) -> Result<PathBuf> {
        let name = self.temporary()?;
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Part::path_for(&self.root().join("blobs").join(format!("{}.{name}", digest.hex()))))
    }

    /// Writes a small file in one step: readers see the old one or the new one.
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

    /// Makes `pointer` a link to `target`.
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

    /// The file of a snapshot, if it is there and as long as listed.
    pub(crate) fn present(&self, commit: &str, file: &Listed) -> Option<PathBuf> {
        let path = self.snapshot(commit).join(&file.path);
        std::fs::metadata(&path).ok().filter(|meta| meta.is_file() && meta.len() == file.size).map(|_| path)
    }

    /// Makes `snapshots/COMMIT/PATH` the blob: a relative link, or where there are none the file itself. Nobody else has a
    /// link to a blob that `is_new`.
    pub(crate) fn link(&self, commit: &str, file: &str, digest: &Digest, symlinks: bool, is_new: bool) -> Result<()> {
        let pointer = self.snapshot(commit).join(file);
        let parent = pointer.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let blob = self.blob(digest);
        let up = "../".repeat(2 + file.matches('/').count());
        if symlinks {
            match self.symlink(&format!("{up}blobs/{}", digest.hex()), &pointer) {
                // A file system without links.
                Err(e) if matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied) => {}
                made => return made.map_err(Error::io(&pointer)),
            }
        }
        if is_new {
            // The blob's name goes, as with Python, so that the bytes are there once.
            return std::fs::rename(&blob, &pointer).map_err(Error::io(&pointer));
        }
        let temporary = self.temporary()?;
        let copied = std::fs::hard_link(&blob, &temporary).or_else(|_| std::fs::copy(&blob, &temporary).map(drop));
        copied.and_then(|()| std::fs::rename(&temporary, &pointer)).map_err(Error::io(&pointer))
    }
}
