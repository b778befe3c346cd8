//! A file that is not all there yet: its bytes at their places, and after the last of them how much of each range has
//! arrived. One file, so that the two cannot be parted; cut to its length it is the file itself.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::{Error, Result, platform};

/// What a file is called before it has its own name. Python's `.incomplete` files are not ours to touch.
pub(crate) const SUFFIX: &str = ".pricket-part";
const MAGIC: &[u8; 8] = b"pricket1";
const MOST_RANGES: u64 = 1 << 20;

#[derive(Debug)]
pub(crate) struct Part {
    path: PathBuf,
    file: File,
    size: u64,
    range_bytes: u64,
    /// Bytes that are there of each range, from its beginning.
    done: Vec<AtomicU64>,
    news: (Mutex<()>, Condvar),
}

impl Part {
    pub(crate) fn path_for(blob: &Path) -> PathBuf {
        let mut name = blob.as_os_str().to_owned();
        name.push(SUFFIX);
        name.into()
    }

    /// Goes on with what lies at `path`, or begins.
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

    /// Bytes that an earlier run left at `path` for a file of `size` bytes. An estimate before the lock is held.
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

    fn resume(&mut self) -> Result<bool> {
        let length = self.file.metadata().map_err(Error::io(&self.path))?.len();
        if length == self.size && length > 0 {
            // Complete, and interrupted before its hash was compared.
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
            // A count that cannot be is none.
            .map(|(i, &done)| AtomicU64::new(if done <= self.range_len(i) { done } else { 0 }))
            .collect();
        Ok(true)
    }

    fn begin(&mut self) -> Result<()> {
        // So few ranges that their counts stay small.
        self.range_bytes = self.range_bytes.max(self.size / MOST_RANGES).max(1);
        let ranges = self.size.div_ceil(self.range_bytes);
        self.done = (0..ranges).map(|_| AtomicU64::new(0)).collect();
        let mut trailer = MAGIC.to_vec();
        trailer.extend_from_slice(&self.range_bytes.to_le_bytes());
        trailer.resize(trailer.len() + 8 * ranges as usize, 0);
        // The trailer first and alone: a file of just the right size says that its bytes are there.
        self.file.set_len(0).map_err(Error::io(&self.path))?;
        platform::write_all_at(&self.file, &trailer, self.size).map_err(Error::io(&self.path))
    }

    /// Forgets what has arrived.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.begin()
    }

    /// Forgets what has arrived; from now on there is one range.
    pub(crate) fn restart_whole(&mut self) -> Result<()> {
        self.range_bytes = self.size.max(1);
        self.begin()
    }

    pub(crate) fn ranges(&self) -> usize {
        self.done.len()
    }

    pub(crate) fn range_start(&self, i: usize) -> u64 {
        i as u64 * self.range_bytes
    }

    pub(crate) fn range_len(&self, i: usize) -> u64 {
        self.range_bytes.min(self.size - self.range_start(i))
    }

    pub(crate) fn done(&self, i: usize) -> u64 {
        self.done[i].load(Ordering::Acquire)
    }

    pub(crate) fn total(&self) -> u64 {
        (0..self.ranges()).map(|i| self.done(i)).sum()
    }

    /// Writes the next bytes of range `i`, then that they are there.
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

    /// Wakes whoever waits for bytes.
    pub(crate) fn announce(&self) {
        drop(self.news.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.news.1.notify_all();
    }

    /// Reads bytes of range `i` from `from` on, as many as are there and fit; waits a little if there are none.
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

    /// Makes it the file itself. The caller has compared its hash.
    pub(crate) fn complete(&self) -> Result<()> {
        self.file.set_len(self.size).map_err(Error::io(&self.path))?;
        // The bytes before the name: after a power cut it must not lead to holes.
        self.file.sync_data().map_err(Error::io(&self.path))
    }

    /// Gives it its final name.
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
        // Another size of ranges does not lose what is there.
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
