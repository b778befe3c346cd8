//! The on-disk format of an unfinished download.
//!
//! The bytes of the file are at their final offsets. A trailer follows: an 8-byte magic, the bytes per range, then the
//! number of bytes received of each range, as little-endian 64-bit integers. Bytes and counts are in one file, so that
//! they cannot be separated. Truncating the file to its final length completes it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::{Error, Result, platform};

/// Suffix of unfinished downloads. It differs from Python's `.incomplete`, so the two clients never write to the same
/// file.
pub(crate) const SUFFIX: &str = ".pricket-part";
const MAGIC: &[u8; 8] = b"pricket1";
/// Limit on the number of ranges, so that the trailer stays small.
const MOST_RANGES: u64 = 1 << 20;

/// An unfinished download.
#[derive(Debug)]
pub(crate) struct Part {
    path: PathBuf,
    file: File,
    size: u64,
    range_bytes: u64,
    /// Bytes received of each range, from its beginning.
    done: Vec<AtomicU64>,
    /// Wakes readers when bytes arrive.
    news: (Mutex<()>, Condvar),
}

impl Part {
    /// Returns the path of the unfinished download of `blob`.
    pub(crate) fn path_for(blob: &Path) -> PathBuf {
        let mut name = blob.as_os_str().to_owned();
        name.push(SUFFIX);
        name.into()
    }

    /// Resumes the download at `path`, or begins a new one if there is none or its trailer is invalid.
    pub(crate) fn open(path: &Path, size: u64, range_bytes: u64) -> Result<Self> {
        let file =
            File::options().create(true).truncate(false).read(true).write(true).open(path).map_err(Error::io(path))?;
        let mut part = Self {
            path: path.into(),
            file,
            size,
            range_bytes,
            done: Vec::new(),
            news: (Mutex::new(()), Condvar::new()),
        };
        if !part.resume()? {
            part.begin()?;
        }
        Ok(part)
    }

    /// Returns the number of bytes that an earlier run left at `path` for a file of `size` bytes. Without the lock this
    /// is an estimate.
    pub(crate) fn left_behind(path: &Path, size: u64) -> u64 {
        let Ok(file) = File::open(path) else { return 0 };
        let mut part = Self {
            path: path.into(),
            file,
            size,
            range_bytes: 0,
            done: Vec::new(),
            news: (Mutex::new(()), Condvar::new()),
        };
        if part.resume().unwrap_or(false) { part.total() } else { 0 }
    }

    /// Reads the trailer. Returns `false` if it is missing or invalid.
    fn resume(&mut self) -> Result<bool> {
        let length = self.file.metadata().map_err(Error::io(&self.path))?.len();
        if length == self.size && length > 0 {
            // All bytes have arrived and the trailer is cut off, but the rename did not happen. The hash is checked
            // again.
            self.range_bytes = self.size;
            self.done = vec![AtomicU64::new(self.size)];
            return Ok(true);
        }
        let Some(trailer) = length.checked_sub(self.size).filter(|n| (24..1 << 24).contains(n) && n % 8 == 0) else {
            return Ok(false);
        };
        let mut bytes = vec![0; trailer as usize];
        if platform::read_exact_at(&self.file, &mut bytes, self.size).is_err() || &bytes[..8] != MAGIC {
            return Ok(false);
        }
        let words: Vec<u64> = bytes[8..].as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let range_bytes = words[0];
        if range_bytes == 0 || self.size.div_ceil(range_bytes) != words.len() as u64 - 1 {
            return Ok(false);
        }
        self.range_bytes = range_bytes;
        self.done = words[1..]
            .iter()
            .enumerate()
            // An impossible count is treated as 0.
            .map(|(i, &done)| AtomicU64::new(if done <= self.range_len(i) { done } else { 0 }))
            .collect();
        Ok(true)
    }

    /// Empties the file and writes a new trailer.
    fn begin(&mut self) -> Result<()> {
        self.range_bytes = self.range_bytes.max(self.size / MOST_RANGES).max(1);
        let ranges = self.size.div_ceil(self.range_bytes);
        self.done = (0..ranges).map(|_| AtomicU64::new(0)).collect();
        let mut trailer = MAGIC.to_vec();
        trailer.extend_from_slice(&self.range_bytes.to_le_bytes());
        trailer.resize(trailer.len() + 8 * ranges as usize, 0);
        // The trailer is written before any bytes: a file of exactly `size` bytes counts as complete.
        self.file.set_len(0).map_err(Error::io(&self.path))?;
        platform::write_all_at(&self.file, &trailer, self.size).map_err(Error::io(&self.path))
    }

    /// Discards all received bytes.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.begin()
    }

    /// Discards all received bytes and makes the file one range.
    pub(crate) fn restart_whole(&mut self) -> Result<()> {
        self.range_bytes = self.size.max(1);
        self.begin()
    }

    /// Returns the number of ranges.
    pub(crate) fn ranges(&self) -> usize {
        self.done.len()
    }

    /// Returns the offset of range `i` in the file.
    pub(crate) fn range_start(&self, i: usize) -> u64 {
        i as u64 * self.range_bytes
    }

    /// Returns the length of range `i` in bytes. The last range may be shorter than the others.
    pub(crate) fn range_len(&self, i: usize) -> u64 {
        self.range_bytes.min(self.size - self.range_start(i))
    }

    /// Returns the number of bytes received of range `i`.
    pub(crate) fn done(&self, i: usize) -> u64 {
        self.done[i].load(Ordering::Acquire)
    }

    /// Returns the number of bytes received of all ranges.
    pub(crate) fn total(&self) -> u64 {
        (0..self.ranges()).map(|i| self.done(i)).sum()
    }

    /// Writes the next bytes of range `i`, then updates its count.
    pub(crate) fn append(&self, i: usize, bytes: &[u8]) -> Result<()> {
        let done = self.done(i);
        debug_assert!(done + bytes.len() as u64 <= self.range_len(i));
        let io = |e| Error::io(&self.path)(e);
        platform::write_all_at(&self.file, bytes, self.range_start(i) + done).map_err(io)?;
        let done = done + bytes.len() as u64;
        platform::write_all_at(&self.file, &done.to_le_bytes(), self.size + 16 + 8 * i as u64).map_err(io)?;
        self.done[i].store(done, Ordering::Release);
        self.announce();
        Ok(())
    }

    /// Wakes the threads that wait for bytes.
    pub(crate) fn announce(&self) {
        drop(self.news.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.news.1.notify_all();
    }

    /// Reads bytes of range `i` from offset `from` of the range. Returns the number read, limited by the bytes received
    /// and by the buffer.
    ///
    /// If there are none yet, waits up to 50 ms for them and may return 0.
    pub(crate) fn read(&self, i: usize, from: u64, buffer: &mut [u8]) -> Result<usize> {
        if self.done(i) <= from {
            let guard = self.news.0.lock().unwrap_or_else(PoisonError::into_inner);
            if self.done(i) <= from {
                drop(self.news.1.wait_timeout(guard, Duration::from_millis(50)));
            }
        }
        let n = (self.done(i).saturating_sub(from)).min(buffer.len() as u64) as usize;
        platform::read_exact_at(&self.file, &mut buffer[..n], self.range_start(i) + from)
            .map_err(Error::io(&self.path))?;
        Ok(n)
    }

    /// Cuts off the trailer and flushes the file. The caller has verified the hash.
    pub(crate) fn complete(&self) -> Result<()> {
        self.file.set_len(self.size).map_err(Error::io(&self.path))?;
        // Flushed before the rename, so that after a power failure the final name never refers to missing bytes.
        self.file.sync_data().map_err(Error::io(&self.path))
    }

    /// Renames the file to its final name.
    pub(crate) fn name(self, blob: &Path) -> Result<()> {
        std::fs::rename(&self.path, blob).map_err(Error::io(blob))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_arrived_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pricket-part");
        let part = Part::open(&path, 10, 4).unwrap();
        assert_eq!((part.ranges(), part.range_len(2)), (3, 2));
        part.append(0, b"abc").unwrap();
        part.append(2, b"ij").unwrap();
        drop(part);
        assert_eq!(Part::left_behind(&path, 10), 5);
        // Opening with another range size keeps the received bytes.
        let part = Part::open(&path, 10, 5).unwrap();
        assert_eq!((part.done(0), part.done(1), part.done(2)), (3, 0, 2));
        part.append(0, b"d").unwrap();
        part.append(1, b"efgh").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(part.read(1, 1, &mut buffer).unwrap(), 3);
        assert_eq!(&buffer[..3], b"fgh");
        part.complete().unwrap();
        part.name(&dir.path().join("x")).unwrap();
        assert_eq!(std::fs::read(dir.path().join("x")).unwrap(), b"abcdefghij");
    }

    #[test]
    fn nonsense_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pricket-part");
        for junk in [&b"short"[..], &[7; 200], &[0; 48], b"0123456789pricket1\0\0\0\0\0\0\0\0abcdefgh"] {
            std::fs::write(&path, junk).unwrap();
            let part = Part::open(&path, 10, 4).unwrap();
            assert_eq!((part.ranges(), part.total()), (3, 0));
        }
        let part = Part::open(&path, 0, 4).unwrap();
        assert_eq!((part.ranges(), part.total()), (0, 0));
        part.complete().unwrap();
        part.name(&dir.path().join("empty")).unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("empty")).unwrap().len(), 0);
    }
}
