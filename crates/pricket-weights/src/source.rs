//! Sources of file contents: a mapped file, bytes in the program, or a remote file.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::mapped::Mapped;
use crate::{Bytes, Error, Result};

/// A remote file that can be read in ranges, for example over HTTP.
pub trait ReadAt: Send + Sync {
    /// Returns the name of the file for messages.
    fn name(&self) -> String;

    /// Returns the length of the file in bytes.
    fn size(&self) -> u64;

    /// Returns the bytes of a range, which lies inside the file.
    ///
    /// # Errors
    /// Returns an error, usually [`Error::Io`], if the range cannot be read.
    fn read_at(&self, range: Range<u64>) -> Result<Vec<u8>>;
}

/// The contents of a weight file.
pub(crate) enum Source {
    Mapped(Arc<Mapped>),
    Embedded(&'static [u8]),
    Remote(Remote),
}

/// A remote file with a cache of recently used blocks. Headers are read in many small neighboring pieces, which the
/// cache serves.
pub(crate) struct Remote {
    file: Arc<dyn ReadAt>,
    path: PathBuf,
    /// Cached blocks with their numbers, the most recently used first.
    blocks: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

/// Bytes per block. A request takes about as long as the transfer of this many bytes.
const BLOCK: u64 = 32 << 10;
/// Number of cached blocks, enough for all of a small checkpoint.
const BLOCKS: usize = 32;

impl Remote {
    fn read(&self, start: u64, len: u64) -> Result<Vec<u8>> {
        let end = start + len;
        if len > BLOCK {
            return self.fetch(start..end);
        }
        let mut out = Vec::with_capacity(len as usize);
        for n in start / BLOCK..end.div_ceil(BLOCK) {
            let (block, base) = (self.block(n)?, n * BLOCK);
            let (from, to) = (start.max(base) - base, end.min(base + BLOCK) - base);
            out.extend_from_slice(&block[from as usize..to as usize]);
        }
        Ok(out)
    }

    fn block(&self, n: u64) -> Result<Arc<[u8]>> {
        let lock = || self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut blocks = lock();
            if let Some(at) = blocks.iter().position(|(known, _)| *known == n)
                && let Some(found) = blocks.remove(at)
            {
                blocks.push_front(found.clone());
                return Ok(found.1);
            }
        }
        // The lock is not held during the request. At worst two threads fetch the same block.
        let block: Arc<[u8]> = self.fetch(n * BLOCK..((n + 1) * BLOCK).min(self.file.size()))?.into();
        let mut blocks = lock();
        blocks.push_front((n, Arc::clone(&block)));
        blocks.truncate(BLOCKS);
        Ok(block)
    }

    fn fetch(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let wanted = range.end - range.start;
        let bytes = self.file.read_at(range)?;
        if bytes.len() as u64 == wanted {
            Ok(bytes)
        } else {
            let what = format!("received {} bytes; requested {wanted}", bytes.len());
            Err(Error::Corrupt { path: self.path.clone(), what })
        }
    }
}

impl Source {
    pub(crate) fn mapped(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Source::Mapped(Arc::new(Mapped::open(path.as_ref())?)))
    }

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

    /// Returns whether reading needs requests over a network.
    pub(crate) fn is_remote(&self) -> bool {
        matches!(self, Source::Remote(_))
    }

    /// Returns `len` bytes from `start`, or an error if the file is shorter.
    pub(crate) fn read(&self, start: usize, len: usize) -> Result<Cow<'_, [u8]>> {
        let end = start.checked_add(len).filter(|&end| end <= self.len());
        let Some(end) = end else {
            return Err(self.corrupt(format!("truncated: the file ends before byte {}", start.saturating_add(len))));
        };
        Ok(match self {
            Source::Mapped(file) => Cow::Borrowed(&file[start..end]),
            Source::Embedded(bytes) => Cow::Borrowed(&bytes[start..end]),
            Source::Remote(remote) => Cow::Owned(remote.read(start as u64, len as u64)?),
        })
    }

    /// Returns `len` bytes from `start` as the bytes of a tensor, without a copy if the file is mapped.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file whose bytes are a function of their offset.
    struct Counting(u64);

    fn byte(at: u64) -> u8 {
        (at ^ (at >> 8) ^ (at >> 16)) as u8
    }

    impl ReadAt for Counting {
        fn name(&self) -> String {
            "counting".into()
        }

        fn size(&self) -> u64 {
            self.0
        }

        fn read_at(&self, range: Range<u64>) -> Result<Vec<u8>> {
            assert!(range.end <= self.0);
            Ok(range.map(byte).collect())
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Random reads over more blocks than the cache holds.
        #[test]
        fn a_read_is_what_the_file_has(
            size in 1u64..3_000_000,
            reads in proptest::collection::vec((0u64..3_000_000, 0u64..100_000), 1..120),
        ) {
            let source = Source::remote(Arc::new(Counting(size)));
            for (start, len) in reads {
                let start = start % size;
                let len = len.min(size - start);
                let found = source.read(start as usize, len as usize).unwrap();
                prop_assert!(found.iter().enumerate().all(|(i, &b)| b == byte(start + i as u64)) && found.len() as u64 == len);
            }
            prop_assert!(source.read(size as usize, 1).is_err());
        }
    }

    #[test]
    fn a_block_that_is_old_and_wanted_stays() {
        let source = Source::remote(Arc::new(Counting(BLOCK * 64)));
        for n in (0..=BLOCKS as u64).filter(|&n| n != 1) {
            source.read((n * BLOCK) as usize, 1).unwrap();
        }
        assert_eq!(source.read((BLOCK - 1) as usize, 2).unwrap().len(), 2);
    }
}
