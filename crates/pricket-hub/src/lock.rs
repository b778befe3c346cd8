//! Advisory file locks between processes.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::{Error, Progress, Result, platform};

/// An advisory lock on a file (`flock`, as in Python's filelock). It is released when the value is dropped or the
/// process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
    /// Whether the file system supports locks. If not, locking always succeeds and does not exclude other processes.
    pub(crate) is_real: bool,
}

/// Opens a lock file, or creates it with its directory.
fn open(path: &Path) -> Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    // Opened for reading too, because network file systems require that for a shared lock.
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

/// Returns whether an error means that the file system does not support locks, like some network file systems.
fn has_no_locks(e: &std::io::Error) -> bool {
    // ENOLCK and ENOSYS.
    e.kind() == ErrorKind::Unsupported || cfg!(target_os = "linux") && matches!(e.raw_os_error(), Some(37 | 38))
}

impl Lock {
    /// Takes the lock exclusively and waits without a time limit while another process holds it.
    ///
    /// After two seconds, reports "waiting for {for_what}" once. Fails with [`Error::Cancelled`] when `stop` returns
    /// true or `progress` is canceled.
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

    /// Takes the lock exclusively, or returns `None` if another process holds it.
    pub(crate) fn try_new(path: &Path) -> Result<Option<Self>> {
        let file = open(path)?;
        match file.try_lock() {
            // If another process deleted the lock file meanwhile, this lock is on a file without a name and excludes
            // nobody.
            Ok(()) if platform::same_file(&file, path) => Ok(Some(Self { _file: file, is_real: true })),
            Ok(()) | Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(e)) if has_no_locks(&e) => Ok(Some(Self { _file: file, is_real: false })),
            // Some file systems report a lock held by another process this way.
            Err(std::fs::TryLockError::Error(e)) if e.kind() == ErrorKind::PermissionDenied => Ok(None),
            Err(std::fs::TryLockError::Error(e)) => Err(Error::io(path)(e)),
        }
    }

    /// Takes the lock in shared mode and sets the modification time of the file to now.
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
