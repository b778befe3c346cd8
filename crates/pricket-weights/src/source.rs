use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::mapped::Mapped;
use crate::{Bytes, Error, Result};

/// A file that is somewhere else and can be read in ranges, over HTTP say.
pub trait ReadAt: Send + Sync {
    /// What it is called in messages.
    fn name(&self) -> String;

    /// Its length in bytes.
    fn size(&self) -> u64;

    /// The bytes of a range that lies inside it.
    ///
    /// # Errors
    /// What went wrong, as [`Error::Io`] mostly.
    fn read_at(&self, range: Range<u64>) -> Result<Vec<u8>>;
}

/// Where the bytes of a weight file are.
pub(crate) enum Source {
    Mapped(Mapped),
    Embedded(&'static [u8]),
    Remote(Remote),
}

/// Headers are read in small pieces that lie together, so blocks of the file are kept for a while.
pub(crate) struct Remote {
    file: Arc<dyn ReadAt>,
    path: PathBuf,
    /// By their number, the newest first.
    blocks: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

/// Asked for at least: a request costs as much as this many bytes.
const BLOCK: u64 = 32 << 10;
/// Kept; a small checkpoint is whole in them.
const BLOCKS: usize = 32;

impl Remote {
    fn read(&self, start: u64, len: u64) -> Result<Vec<u8>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        if len > BLOCK {
            return self.file.read_at(start..start + len);
        }
        let (first, last) = (start / BLOCK, (start + len - 1) / BLOCK);
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let missing: Vec<u64> = (first..=last).filter(|n| blocks.iter().all(|(known, _)| known != n)).collect();
        if let (Some(from), Some(to)) = (missing.first(), missing.last()) {
            let range = from * BLOCK..((to + 1) * BLOCK).min(self.file.size());
            let bytes = self.file.read_at(range)?;
            for (n, block) in (*from..).zip(bytes.chunks(BLOCK as usize)) {
                blocks.push_front((n, block.into()));
            }
            blocks.truncate(BLOCKS);
        }
        let mut out = Vec::with_capacity(len as usize);
        for n in first..=last {
            let block = blocks.iter().find(|(known, _)| *known == n).map_or(&[][..], |(_, block)| block);
            let (from, to) = (start.max(n * BLOCK) - n * BLOCK, (start + len).min((n + 1) * BLOCK) - n * BLOCK);
            out.extend_from_slice(block.get(from as usize..to as usize).unwrap_or_default());
        }
        if out.len() as u64 == len {
            Ok(out)
        } else {
            Err(Error::Corrupt { path: self.path.clone(), what: "fewer bytes came than were asked for".into() })
        }
    }
}

impl Source {
    pub(crate) fn remote(file: Arc<dyn ReadAt>) -> Self {
        Source::Remote(Remote { path: file.name().into(), file, blocks: Mutex::default() })
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Source::Mapped(file) => file.path(),
            Source::Embedded(_) => Path::new("embedded.safetensors"),
            Source::Remote(remote) => &remote.path,
        }
    }

    pub(crate) fn corrupt(&self, what: impl Into<String>) -> Error {
        Error::Corrupt { path: self.path().into(), what: what.into() }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Source::Mapped(file) => file.len(),
            Source::Embedded(bytes) => bytes.len(),
            Source::Remote(remote) => usize::try_from(remote.file.size()).unwrap_or(usize::MAX),
        }
    }

    /// Whether every byte costs a request rather than nothing.
    pub(crate) fn is_remote(&self) -> bool {
        matches!(self, Source::Remote(_))
    }

    /// `len` bytes from `start` on, if the file reaches that far.
    pub(crate) fn read(&self, start: usize, len: usize) -> Result<Cow<'_, [u8]>> {
        let end = start.checked_add(len).filter(|&end| end <= self.len());
        let Some(end) = end else {
            return Err(self.corrupt(format!("the file ends before byte {} of it", start.saturating_add(len))));
        };
        Ok(match self {
            Source::Mapped(file) => Cow::Borrowed(&file[start..end]),
            Source::Embedded(bytes) => Cow::Borrowed(&bytes[start..end]),
            Source::Remote(remote) => Cow::Owned(remote.read(start as u64, len as u64)?),
        })
    }

    /// The same for the bytes of a tensor.
    pub(crate) fn bytes(&self, start: usize, len: usize) -> Result<Bytes<'_>> {
        match self {
            Source::Mapped(file) if start.checked_add(len).is_some_and(|end| end <= file.len()) => {
                Ok(Bytes::mapped(file, start, len))
            }
            _ => Ok(self.read(start, len)?.into_owned().into()),
        }
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.path().display(), self.len())
    }
}
