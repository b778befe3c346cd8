use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::{Error, Progress, Result, platform};

/// An advisory lock on a file (`flock`, as Python's filelock takes it). It is let go with the value, or the process.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
    /// Whether the file system knows locks at all; else everybody gets one.
    pub(crate) is_real: bool,
}

fn open(path: &Path) -> Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    // Readable too: network file systems want that of a shared lock.
    let options = |new| {
        let mut options = File::options();
        options.read(true).write(true).create_new(new).truncate(false).open(path)
    };
    match options(true) {
        Ok(file) => {
            platform::share_with_group(&file);
            Ok(file)
        }
        Err(e) if e.kind() == ErrorKind::AlreadyExists => options(false).map_err(Error::io(path)),
        Err(e) => Err(Error::io(path)(e)),
    }
}

/// Whether the file system has no locks, as some network file systems.
fn has_no_locks(e: &std::io::Error) -> bool {
    // ENOLCK and ENOSYS.
    e.kind() == ErrorKind::Unsupported || cfg!(target_os = "linux") && matches!(e.raw_os_error(), Some(37 | 38))
}

impl Lock {
    /// Waits for whoever holds it, however long that takes, and says so once; gives up when `stop` says so.
    pub(crate) fn wait(path: &Path, for_what: &str, progress: &dyn Progress, stop: &dyn Fn() -> bool) -> Result<Self> {
        let began = Instant::now();
        let mut told = false;
        loop {
            if let Some(lock) = Self::try_new(path)? {
                return Ok(lock);
            }
            if stop() || progress.cancelled() {
                return Err(Error::Cancelled);
            }
            if !told && began.elapsed() > Duration::from_secs(2) {
                told = true;
                progress.notice(&format!("waiting for {for_what}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `None` if somebody holds it.
    pub(crate) fn try_new(path: &Path) -> Result<Option<Self>> {
        let file = open(path)?;
        match file.try_lock() {
            // Who deletes lock files splits those who wait for them: the lock must be on the file of this name.
            Ok(()) if platform::same_file(&file, path) => Ok(Some(Self { _file: file, is_real: true })),
            Ok(()) | Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(e)) if has_no_locks(&e) => Ok(Some(Self { _file: file, is_real: false })),
            // Some file systems say so when somebody else holds it.
            Err(std::fs::TryLockError::Error(e)) if e.kind() == ErrorKind::PermissionDenied => Ok(None),
            Err(std::fs::TryLockError::Error(e)) => Err(Error::io(path)(e)),
        }
    }

    /// Held together with others who share it; the file's time becomes now.
    pub(crate) fn share(path: &Path) -> Result<Self> {
        let file = open(path)?;
        let is_real = match file.lock_shared() {
            Ok(()) => true,
            Err(e) if has_no_locks(&e) => false,
            Err(e) => return Err(Error::io(path)(e)),
        };
        file.set_modified(SystemTime::now()).map_err(Error::io(path))?;
        Ok(Self { _file: file, is_real })
    }
}
