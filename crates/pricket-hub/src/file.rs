//! The download of one file.
//!
//! Several threads fetch ranges of the file into a [`Part`], which records the bytes received. Another thread hashes
//! the bytes up to the first gap, so that the hash is ready soon after the last byte. The file gets its final name only
//! if its hash matches the listing.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::http::{Answer, CHUNK, Failure, Http, Tries, WORTHWHILE, reason};
use crate::layout::Layout;
use crate::ledger::{AtEnd, Ledger, MUTEX};
use crate::lock::Lock;
use crate::part::Part;
use crate::{Digest, Error, Hub, Listed, Phase, RepoId, Result};

/// Number of complete downloads with a wrong hash after which the fetch fails.
const MISMATCHES: u32 = 3;
/// Minimum rate of a response body, in bytes per second.
const SLOWEST: f64 = 1024.0;

/// The download of one file.
pub(crate) struct One<'a> {
    pub(crate) hub: &'a Hub,
    pub(crate) http: &'a Http,
    pub(crate) repo: &'a RepoId,
    pub(crate) commit: &'a str,
    pub(crate) layout: &'a Layout,
    pub(crate) file: &'a Listed,
    pub(crate) digest: &'a Digest,
    pub(crate) ledger: &'a Ledger<'a>,
    pub(crate) stop: &'a AtomicBool,
    /// Target of the last redirect, which stays valid for a while.
    pub(crate) moved: Mutex<Option<String>>,
}

/// The reason why a part could not be filled by ranges.
enum Unfilled {
    /// The server ignores range requests and sends whole files.
    WholeOnly,
    Failed(Error),
}

impl One<'_> {
    /// Fetches the file and returns the number of bytes that were on disk before.
    pub(crate) fn fetch(&self) -> Result<u64> {
        let Self { layout, file, digest: expected, ledger, .. } = *self;
        let blob = layout.blob(expected);
        let blobs = layout.root().join("blobs");
        std::fs::create_dir_all(&blobs).map_err(Error::io(&blobs))?;
        let for_what = format!("another process that fetches {}", file.path);
        let lock = Lock::wait(&layout.blob_lock(expected.hex()), &for_what, ledger.progress, &|| self.stopped())?;
        if layout.present(self.commit, file).is_some() {
            ledger.found(file.size);
            return Ok(file.size);
        }
        if std::fs::metadata(&blob).is_ok_and(|meta| meta.is_file() && meta.len() == file.size) {
            self.link(false, || Ok(()))?;
            ledger.found(file.size);
            return Ok(file.size);
        }
        let mut part_path = Part::path_for(&blob);
        if !lock.is_real {
            // Without locks another process could write to the shared part, so this process uses its own.
            part_path = layout.private_part(expected)?;
        }
        let mut part = Part::open(&part_path, file.size, self.hub.settings.range_bytes)?;
        let on_disk = part.total();
        ledger.found(on_disk);
        let mut ranged = true;
        for tried in 1.. {
            let filled = if ranged { self.by_ranges(&part) } else { self.whole(&mut part).map_err(Unfilled::Failed) };
            let digest = match filled {
                Ok(digest) => digest,
                Err(Unfilled::Failed(e)) => return Err(e),
                Err(Unfilled::WholeOnly) => {
                    ranged = false;
                    self.whole(&mut part)?
                }
            };
            if digest == *expected {
                break;
            }
            // It is unknown which bytes are wrong, so all are fetched again.
            ledger.lost(file.size);
            part.restart()?;
            let mismatch = Error::Mismatch {
                repo: self.repo.to_string(),
                commit: self.commit.into(),
                file: file.path.clone(),
                expected: expected.to_string(),
                found: digest.to_string(),
                times: tried,
            };
            if tried == MISMATCHES {
                std::fs::remove_file(&part_path).map_err(Error::io(&part_path))?;
                return Err(mismatch);
            }
            let what = format!("{}: expected {expected}, received {digest}; fetching the file again", file.path);
            ledger.progress.notice(&what);
        }
        self.phase(Phase::Rename);
        part.complete()?;
        self.link(true, || part.name(&blob))?;
        Ok(on_disk)
    }

    /// Calls `name`, which gives the blob its final name, then links the snapshot to the blob. Both happen under the
    /// mutex of the repository.
    fn link(&self, is_new: bool, name: impl FnOnce() -> Result<()>) -> Result<()> {
        let layout = self.layout;
        let _mutex = Lock::wait(&layout.mutex(), MUTEX, self.ledger.progress, &|| self.stopped())?;
        name()?;
        layout.link(self.commit, &self.file.path, self.digest, self.hub.settings.symlinks, is_new)
    }

    /// Sends a GET request for a range or all of the file, to the target of the last redirect if there was one.
    pub(crate) fn get(&self, range: Option<(u64, u64)>) -> Result<Answer, Failure> {
        let lock = || self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lock().clone();
        let answer = match &known {
            Some(url) => self.http.get(url, range, true),
            None => self.http.get(&self.url(), range, false),
        };
        *lock() = answer.as_ref().ok().and_then(|answer| answer.moved.clone());
        answer
    }

    pub(crate) fn url(&self) -> String {
        self.hub.file_url(self.repo, self.commit, &self.file.path)
    }

    fn phase(&self, phase: Phase) {
        self.ledger.progress.phase(&self.file.path, phase);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.ledger.progress.cancelled()
    }

    /// Fetches the missing bytes, several ranges at a time, while this thread hashes the bytes up to the first gap.
    fn by_ranges(&self, part: &Part) -> Result<Digest, Unfilled> {
        self.phase(Phase::Body);
        let missing: Vec<usize> = (0..part.ranges()).filter(|&i| part.done(i) < part.range_len(i)).collect();
        let (next, halt) = (AtomicUsize::new(0), AtomicBool::new(false));
        let failed = Mutex::new(None);
        let worker = || {
            let _halt = AtEnd(|| {
                // Without this, the hashing thread would wait forever for the bytes of a worker that panicked.
                if std::thread::panicking() {
                    halt.store(true, Ordering::Relaxed);
                    part.announce();
                }
            });
            while let Some(&i) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(e) = self.fill(part, i, &|| halt.load(Ordering::Relaxed) || self.stopped()) {
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                    halt.store(true, Ordering::Relaxed);
                    part.announce();
                    return;
                }
            }
        };
        let digest = std::thread::scope(|scope| {
            for _ in 0..self.hub.settings.ranges.clamp(1, missing.len().max(1)).min(missing.len()) {
                scope.spawn(worker);
            }
            let digest = self.hash(part, &|| halt.load(Ordering::Relaxed) || self.stopped());
            halt.fetch_or(digest.is_err(), Ordering::Relaxed);
            digest
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(e) => Err(e),
            None => digest.map_err(Unfilled::Failed),
        }
    }

    /// Hashes the part while it grows.
    fn hash(&self, part: &Part, halted: &dyn Fn() -> bool) -> Result<Digest> {
        let mut hasher = self.digest.hasher(self.file.size);
        let mut buffer = vec![0; 4 * CHUNK];
        let mut told = false;
        for i in 0..part.ranges() {
            let (mut at, end) = (0, part.range_len(i));
            while at < end {
                if !told && part.total() == self.file.size {
                    told = true;
                    self.phase(Phase::Hash);
                }
                let n = part.read(i, at, &mut buffer)?;
                if n == 0 && halted() || self.stopped() {
                    return Err(Error::Cancelled);
                }
                hasher.update(&buffer[..n]);
                at += n as u64;
            }
        }
        if !told {
            self.phase(Phase::Hash);
        }
        Ok(hasher.finish())
    }

    /// Fetches the rest of range `i`, with retries.
    fn fill(&self, part: &Part, i: usize, halted: &dyn Fn() -> bool) -> Result<(), Unfilled> {
        let mut tries = Tries::new(self.http.patience(), self.ledger.progress);
        while part.done(i) < part.range_len(i) {
            if halted() {
                return Err(Unfilled::Failed(Error::Cancelled));
            }
            let before = part.done(i);
            match self.range(part, i, halted) {
                Ok(true) => {}
                Ok(false) => return Err(Unfilled::WholeOnly),
                Err(failure) => {
                    let failure = self.explained(failure);
                    tries.failed(failure, part.done(i) - before, halted).map_err(Unfilled::Failed)?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn explained(&self, failure: Failure) -> Failure {
        match failure {
            Failure::Status { url, status, code } => {
                Failure::Fatal(self.hub.refused(self.repo, self.commit, url, status, &code))
            }
            failure => failure,
        }
    }

    /// Sends one request for the rest of range `i`. Returns `false` if the server ignored the range and sent the whole
    /// file.
    fn range(&self, part: &Part, i: usize, halted: &dyn Fn() -> bool) -> Result<bool, Failure> {
        let size = self.file.size;
        let start = part.range_start(i) + part.done(i);
        let end = part.range_start(i) + part.range_len(i);
        let all = start == 0 && end == size;
        let answer = self.get((!all).then_some((start, end)))?;
        let url = self.url();
        let upto = match (answer.status, all) {
            (200, false) => return Ok(false),
            (200, true) => end,
            _ => check_range(&url, &answer, start, end, size)?,
        };
        let append = |bytes: &[u8]| part.append(i, bytes).map_err(Failure::Fatal);
        self.receive(&url, answer, upto - start, halted, append)?;
        if upto < end && upto - start < WORTHWHILE {
            return Err(Failure::again(&url, format!("received only {} bytes of the requested range", upto - start)));
        }
        Ok(true)
    }

    /// Passes exactly `expected` bytes of a body to `append` as they arrive.
    pub(crate) fn receive(
        &self,
        url: &str,
        mut answer: Answer,
        expected: u64,
        halted: &dyn Fn() -> bool,
        mut append: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if let Some(length) = answer.length.filter(|&length| length != expected) {
            return Err(Failure::again(url, format!("the response announces {length} bytes; expected {expected}")));
        }
        let stall = self.http.patience().stall;
        let mut buffer = vec![0; CHUNK];
        let (mut left, mut since, mut recent) = (expected, Instant::now(), 0);
        while left > 0 {
            if halted() {
                return Err(Failure::Fatal(Error::Cancelled));
            }
            let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let n = answer.body.read(&mut buffer[..room]).map_err(|e| Failure::again(url, reason(&e)))?;
            if n == 0 {
                return Err(Failure::again(url, format!("the response ended {left} bytes early")));
            }
            append(&buffer[..n])?;
            self.ledger.arrived(n as u64);
            left -= n as u64;
            recent += n;
            let time = since.elapsed();
            if time > stall {
                if (recent as f64) < SLOWEST * time.as_secs_f64() && left > 0 {
                    return Err(Failure::again(
                        url,
                        format!("too slow: {recent} bytes in {:.1} s", time.as_secs_f64()),
                    ));
                }
                (since, recent) = (Instant::now(), 0);
            }
        }
        // Reading to the end lets the connection be reused and detects a body that is too long.
        match answer.body.read(&mut buffer[..1]) {
            Ok(1..) => Err(Failure::again(url, format!("received more than the expected {expected} bytes"))),
            // An error here spoils only the connection: all bytes have arrived.
            Ok(0) | Err(_) => Ok(()),
        }
    }

    /// Fetches the whole file in one body, for servers that do not support range requests.
    fn whole(&self, part: &mut Part) -> Result<Digest> {
        self.phase(Phase::Body);
        let halted = || self.stopped();
        let mut tries = Tries::new(self.http.patience(), self.ledger.progress);
        let mut restart = true;
        loop {
            if halted() {
                return Err(Error::Cancelled);
            }
            if restart {
                self.ledger.lost(part.total());
                part.restart_whole()?;
            }
            // After a failure the next request asks for the rest, in case the server supports ranges after all.
            let received = self.range(part, 0, &halted);
            restart = matches!(received, Ok(false));
            match received {
                _ if part.total() == self.file.size => return self.hash(part, &halted),
                Ok(_) => {}
                // Reports 0 new bytes: if the server ignores ranges, the received bytes are fetched again.
                Err(failure) => tries.failed(self.explained(failure), 0, &halted)?,
            }
        }
    }
}

/// Returns the end of the range of a 206 response. The range must begin at `start`, end at or before `end`, and belong
/// to a file of `size` bytes.
pub(crate) fn check_range(url: &str, answer: &Answer, start: u64, end: u64, size: u64) -> Result<u64, Failure> {
    let text = answer.header("content-range").unwrap_or_default();
    let parsed = text.strip_prefix("bytes ").and_then(|text| {
        let (range, total) = text.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?, total.parse::<u64>().ok()?))
    });
    match parsed {
        Some((first, last, total)) if first == start && total == size && (start..end).contains(&last) => Ok(last + 1),
        _ => {
            let what = format!("requested bytes {start}-{} of {size}; the Content-Range header is {text:?}", end - 1);
            Err(Failure::again(url, what))
        }
    }
}
