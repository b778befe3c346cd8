//! Memory-mapped files. No other module of this crate maps files.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_kernels::MappedBytes;

use crate::{Error, Result};

/// A read-only memory-mapped file with its path.
#[derive(Debug)]
pub(crate) struct Mapped {
    path: PathBuf,
    map: memmap2::Mmap,
    file: File,
}

/// A part of a mapped file. It keeps the file mapped.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) file: Arc<Mapped>,
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl MappedBytes for Region {
    fn bytes(&self) -> &[u8] {
        &self.file[self.start..self.start + self.len]
    }

    /// Returns an error if the file has become shorter, since reading beyond its end would terminate the process.
    fn check(&self) -> std::result::Result<(), String> {
        let (path, mapped) = (self.file.path.display(), self.file.map.len() as u64);
        match self.file.file.metadata() {
            Ok(meta) if meta.len() >= mapped => Ok(()),
            Ok(meta) => {
                Err(format!("{path}: the file had {mapped} bytes when it was loaded and now has {}", meta.len()))
            }
            Err(e) => Err(format!("{path}: {e}")),
        }
    }
}

impl Mapped {
    /// Maps a regular, non-empty file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.into(), source };
        // The type is checked before opening, because opening a pipe could block forever.
        let meta = std::fs::metadata(path).map_err(io)?;
        let corrupt = |what: &str| Error::Corrupt { path: path.into(), what: what.into() };
        if !meta.is_file() {
            return Err(corrupt("not a regular file"));
        }
        if meta.len() == 0 {
            return Err(corrupt("the file is empty"));
        }
        let file = File::open(path).map_err(io)?;
        #[allow(unsafe_code)]
        // SAFETY: the mapping is read-only. As with every mapping, an access faults if another process truncates the
        // file meanwhile. The Hub cache never rewrites a blob in place.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Ok(Self { path: path.into(), map, file })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Releases the pages of a range. A later access reads them from the file again.
    pub(crate) fn release(&self, start: usize, len: usize) {
        #[cfg(unix)]
        {
            // Only for large ranges: for a bias, a system call costs more than the freed memory is worth.
            if len >= 1 << 20 {
                #[allow(unsafe_code)]
                // SAFETY: the mapping is read-only and backed by the file, so dropped pages are read again unchanged.
                let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
            }
        }
        #[cfg(not(unix))]
        let _ = (start, len);
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
