//! The one place that maps files into memory.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A read-only memory-mapped file that knows its path.
#[derive(Debug)]
pub(crate) struct Mapped {
    path: PathBuf,
    map: memmap2::Mmap,
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
        Ok(Self { path: path.into(), map })
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
