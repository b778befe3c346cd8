use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::{Error, Events, Result};

/// An advisory lock on a file (`flock`, as Python's filelock takes it). It is let go with the value, or the process.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

fn open(path: &Path) -> Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    File::options().create(true).truncate(false).write(true).open(path).map_err(Error::io(path))
}

impl Lock {
    /// Waits for whoever holds it, however long that takes, and says so once; gives up when `stop` says so.
    pub(crate) fn wait(path: &Path, what: &str, events: &dyn Events, stop: &dyn Fn() -> bool) -> Result<Self> {
        let began = Instant::now();
        let mut told = false;
        loop {
            if let Some(lock) = Self::try_new(path)? {
                return Ok(lock);
            }
            if stop() || events.cancelled() {
                return Err(Error::Cancelled);
            }
            if !told && began.elapsed() > Duration::from_secs(2) {
                told = true;
                events.notice(&format!("waiting for another process that fetches {what}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `None` if somebody holds it.
    pub(crate) fn try_new(path: &Path) -> Result<Option<Self>> {
        let file = open(path)?;
        match file.try_lock() {
            // Who deletes lock files splits those who wait for them: the lock must be on the file of this name.
            Ok(()) if same_file(&file, path) => Ok(Some(Self { _file: file })),
            Ok(()) | Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            // A file system without locks: every download checks its hash, so two at once cost traffic, no more.
            Err(std::fs::TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {
                Ok(Some(Self { _file: file }))
            }
            Err(std::fs::TryLockError::Error(e)) => Err(Error::io(path)(e)),
        }
    }

    /// Held together with others who share it; the file's time becomes now.
    pub(crate) fn share(path: &Path) -> Result<Self> {
        let file = open(path)?;
        let locked = file.lock_shared();
        if let Err(e) = locked.and_then(|()| file.set_modified(SystemTime::now()))
            && e.kind() != std::io::ErrorKind::Unsupported
        {
            return Err(Error::io(path)(e));
        }
        Ok(Self { _file: file })
    }
}

#[cfg(unix)]
fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let inode = |meta: std::io::Result<std::fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
    inode(file.metadata()).is_some_and(|ours| inode(std::fs::metadata(path)) == Some(ours))
}

#[cfg(not(unix))]
fn same_file(_: &File, _: &Path) -> bool {
    // An open file cannot be deleted there.
    true
}
