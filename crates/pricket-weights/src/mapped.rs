//! The one place that maps files into memory.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_kernels::MappedBytes;

use crate::{Error, Result};

/// A read-only memory-mapped file that knows its path.
#[derive(Debug)]
pub(crate) struct Mapped {
    path: PathBuf,
    map: memmap2::Mmap,
    file: File,
}

/// A part of a mapped file, which is kept mapped.
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

    /// Reading what a file has no more would end the process.
    fn check(&self) -> std::result::Result<(), String> {
        let (path, mapped) = (self.file.path.display(), self.file.map.len() as u64);
        match self.file.file.metadata() {
            Ok(meta) if meta.len() >= mapped => Ok(()),
            Ok(meta) => {
                Err(format!("{path}: the file had {mapped} bytes when it was loaded, now it has {}", meta.len()))
            }
            Err(e) => Err(format!("{path}: {e}")),
        }
    }
}

impl Mapped {
    /// Maps a regular, non-empty file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.into(), source };
        // Looked at before it is opened: opening a pipe would wait for ever.
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
        // SAFETY: read-only. As with every mapping, a file that another process truncates meanwhile faults; the
        // Hub cache never rewrites a blob in place.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Ok(Self { path: path.into(), map, file })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the pages of a range go. They are read again from the file if somebody looks.
    pub(crate) fn release(&self, start: usize, len: usize) {
        #[cfg(unix)]
        {
            // Only whole large ranges: a system call per bias would cost more than it frees.
            if len >= 1 << 20 {
                #[allow(unsafe_code)]
                // SAFETY: the mapping is read-only and backed by the file, so dropped pages come back unchanged.
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
