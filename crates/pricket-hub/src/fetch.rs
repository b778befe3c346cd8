//! From a listing to files under their final names, through whatever the network does.
//!
//! A file is fetched in ranges, several at a time, into a [`Part`] that remembers what has arrived; a hasher follows
//! behind the first gap, so that the hash is ready when the last byte is. Only a file whose hash is the listed one gets
//! its name.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::http::{Answer, CHUNK, Failure, Http, Tries, WORTHWHILE, reason};
use crate::id::{is_commit, is_relative_path};
use crate::layout::Layout;
use crate::lock::Lock;
use crate::part::Part;
use crate::{Digest, Error, Events, Hub, Listed, ModelId, Phase, RepoId, Result};

/// Complete files that do not have the listed hash, before we stop asking.
const MISMATCHES: u32 = 3;
/// Bytes a second that a body must bring.
const SLOWEST: f64 = 1024.0;

/// Files of one commit on disk.
#[derive(Debug)]
#[non_exhaustive]
pub struct Snapshot {
    /// The directory that holds them.
    pub directory: PathBuf,
    /// The commit.
    pub commit: String,
    /// What was asked for, as listed.
    pub files: Vec<Listed>,
    /// What it took.
    pub report: Report,
    /// Keeps [`crate::Cache::evict`] away for as long as this lives.
    pub in_use: InUse,
}

/// While this lives, the commit that it came with is not evicted.
#[derive(Debug)]
pub struct InUse {
    _lock: Option<Lock>,
}

/// What a fetch took, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// All files together.
    pub total: u64,
    /// Those that were on disk already, in whole or in part.
    pub on_disk: u64,
    /// Received as bodies of files.
    pub received: u64,
    /// Of these, received for the second time or more.
    pub repeated: u64,
}

/// What all threads of a fetch add to.
struct Ledger<'a> {
    events: &'a dyn Events,
    total: u64,
    done: AtomicU64,
    received: AtomicU64,
}

impl Ledger<'_> {
    fn arrived(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        self.found(bytes);
    }

    fn found(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.events.progress(done, self.total);
    }

    fn lost(&self, bytes: u64) {
        let done = self.done.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        self.events.progress(done, self.total);
    }
}

impl Hub {
    /// Fetches `wanted` of `commit` into the cache, and remembers it as the commit of the revision that `id` names. `listing`
    /// is what [`Hub::files`] says of it.
    ///
    /// What is there already is not asked for again, what was begun is gone on with, what another process is fetching is
    /// waited for. Every file that arrives is compared with its length and hash before it gets its name.
    ///
    /// # Errors
    /// [`Error::NoSpace`] before anything is fetched, [`Error::Mismatch`] if a file keeps arriving wrong,
    /// [`Error::Network`] when patience ends, [`Error::Offline`] if something is missing and may not be asked for.
    pub fn fetch(
        &self,
        id: &ModelId,
        commit: &str,
        wanted: &[Listed],
        listing: &[Listed],
        events: &dyn Events,
    ) -> Result<Snapshot> {
        let ModelId { repo, revision } = id;
        let snapshot = self.fetch_part(repo, commit, wanted, events)?;
        let layout = self.layout(repo);
        // Last, so that a branch never leads to half a snapshot where it led to a whole one, and that no listing is kept
        // that has not proved right.
        let keep = || {
            let _mutex = Lock::wait(&layout.mutex(), MUTEX, events, &|| false)?;
            if layout.in_use(commit).is_file() {
                self.record(repo, commit, listing)?;
            }
            layout.write_reference(revision, commit)
        };
        let is_known = revision == commit || layout.read_reference(revision).as_deref() == Some(commit);
        if !is_known || !layout.record(commit).is_file() {
            // The files are there, whatever else cannot be written, as in a cache that somebody else owns.
            if let Err(e) = keep() {
                events.notice(&format!("{id}: not remembered: {e}"));
            }
        }
        Ok(snapshot)
    }

    /// The same for files that are not yet all: no branch leads to them, and the listing is not kept.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub fn fetch_part(&self, repo: &RepoId, commit: &str, wanted: &[Listed], events: &dyn Events) -> Result<Snapshot> {
        check_names(commit, wanted)?;
        let layout = self.layout(repo);
        let total = wanted.iter().map(|file| file.size).sum();
        let snapshot = |in_use, report| Snapshot {
            directory: layout.snapshot(commit),
            commit: commit.into(),
            files: wanted.to_vec(),
            report,
            in_use,
        };
        // The lock before the look: what is there then stays there.
        let in_use = self.in_use(repo, commit);
        let mut missing: Vec<&Listed> = wanted.iter().filter(|file| layout.present(commit, file).is_none()).collect();
        if missing.is_empty() {
            return Ok(snapshot(in_use, Report { total, on_disk: total, ..Report::default() }));
        }
        if self.settings.offline {
            let names: Vec<&str> = missing.iter().map(|file| file.path.as_str()).collect();
            return Err(Error::Offline { what: format!("{repo}@{commit}: {} is not in the cache", names.join(", ")) });
        }
        let mark = layout.in_use(commit);
        // A commit that another program brought stays theirs, also if a file of it is ours.
        let is_ours = mark.is_file() || !layout.snapshot(commit).exists();
        let in_use = InUse { _lock: if is_ours { Some(Lock::share(&mark)?) } else { None } };
        self.check_space(&layout, &missing)?;
        // The large ones first: the small ones fit beside them.
        missing.sort_by_key(|file| std::cmp::Reverse(file.size));
        let waiting: u64 = missing.iter().map(|file| file.size).sum();
        let ledger = Ledger { events, total, done: AtomicU64::new(0), received: AtomicU64::new(0) };
        ledger.found(total - waiting);
        let report = self.fetch_all(repo, commit, &layout, &missing, &ledger)?;
        events.progress(total, total);
        Ok(snapshot(in_use, report))
    }

    fn fetch_all(
        &self,
        repo: &RepoId,
        commit: &str,
        layout: &Layout,
        missing: &[&Listed],
        ledger: &Ledger<'_>,
    ) -> Result<Report> {
        // A pool of its own: stopping it touches nobody else.
        let http = Http::new(&self.settings);
        let (next, over) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (failed, on_disk) = (Mutex::new(None), AtomicU64::new(ledger.done.load(Ordering::Relaxed)));
        let stop = AtomicBool::new(false);
        let threads = self.settings.files.clamp(1, missing.len());
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let _over = AtEnd(|| {
                        over.fetch_add(1, Ordering::Release);
                    });
                    while let Some(file) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if stop.load(Ordering::Relaxed) {
                            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(Error::Cancelled);
                            break;
                        }
                        let fetched = known(file).and_then(|digest| {
                            let stop = &stop;
                            let one = One {
                                hub: self,
                                http: &http,
                                repo,
                                commit,
                                layout,
                                file,
                                digest,
                                ledger,
                                stop,
                                moved: Mutex::default(),
                            };
                            one.fetch()
                        });
                        match fetched {
                            Ok(found) => {
                                on_disk.fetch_add(found, Ordering::Relaxed);
                            }
                            Err(e) => {
                                // The first failure is the cause; those that it stopped say "cancelled".
                                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                                stop.store(true, Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
            // Whoever cancels does not wait for a silent server.
            while over.load(Ordering::Acquire) < threads {
                if stop.load(Ordering::Relaxed) || ledger.events.cancelled() {
                    stop.store(true, Ordering::Relaxed);
                    http.shutdown();
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        if let Some(e) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(if ledger.events.cancelled() { Error::Cancelled } else { e });
        }
        let (on_disk, received) = (on_disk.into_inner(), ledger.received.load(Ordering::Relaxed));
        let repeated = (on_disk + received).saturating_sub(ledger.total);
        Ok(Report { total: ledger.total, on_disk, received, repeated })
    }

    fn check_space(&self, layout: &Layout, missing: &[&Listed]) -> Result<()> {
        let (mut needed, mut counted) = (0, BTreeSet::new());
        for file in missing {
            if !counted.insert(known(file)?) && self.settings.symlinks {
                continue;
            }
            let blob = layout.blob(known(file)?);
            let there = std::fs::metadata(&blob).is_ok_and(|meta| meta.len() == file.size);
            if !there {
                needed += file.size.saturating_sub(Part::left_behind(&Part::path_for(&blob), file.size));
            }
        }
        let root = layout.root();
        std::fs::create_dir_all(&root).map_err(Error::io(&root))?;
        match fs4::available_space(&root) {
            Ok(available) if available < needed => {
                Err(Error::NoSpace { path: self.settings.cache.clone(), needed, available })
            }
            _ => Ok(()),
        }
    }

    /// Keeps a commit from being evicted while it is used, if it is one that we fetched.
    pub fn in_use(&self, repo: &RepoId, commit: &str) -> InUse {
        let path = self.layout(repo).in_use(commit);
        InUse { _lock: path.is_file().then(|| Lock::share(&path).ok()).flatten() }
    }
}

/// What the mutex of a repository is waited for.
const MUTEX: &str = "another process that changes this repository in the cache";

/// Does something when it goes, also in a panic: whoever waits for a thread must not wait for ever.
struct AtEnd<F: FnMut()>(F);

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Refuses what would leave the cache. A listing has been checked, but anybody can make one up.
fn check_names(commit: &str, files: &[Listed]) -> Result<()> {
    let bad = |what: &str| Err(Error::Input(format!("{what:?} is not the name of anything in a cache")));
    if !is_commit(commit) {
        return bad(commit);
    }
    for file in files {
        let hex = file.digest.as_ref().map_or("", Digest::hex);
        if !is_relative_path(&file.path) || !(hex.is_empty() || Digest::from_hex(hex).is_some()) {
            return bad(&file.path);
        }
    }
    Ok(())
}

/// The hash of a file that is to be fetched; every listing of the Hub has one.
fn known(file: &Listed) -> Result<&Digest> {
    file.digest
        .as_ref()
        .ok_or_else(|| Error::Input(format!("{}: its hash is not known, so it cannot be fetched", file.path)))
}

/// One file on its way.
struct One<'a> {
    hub: &'a Hub,
    http: &'a Http,
    repo: &'a RepoId,
    commit: &'a str,
    layout: &'a Layout,
    file: &'a Listed,
    digest: &'a Digest,
    ledger: &'a Ledger<'a>,
    stop: &'a AtomicBool,
    /// Where the last redirect led, which is good for a while.
    moved: Mutex<Option<String>>,
}

/// Why a part could not be filled by ranges.
enum Unfilled {
    /// The server sends whole files only.
    WholeOnly,
    Failed(Error),
}

impl One<'_> {
    /// Gives the bytes that were on disk already.
    fn fetch(&self) -> Result<u64> {
        let Self { layout, file, digest: expected, ledger, .. } = *self;
        let blob = layout.blob(expected);
        let blobs = layout.root().join("blobs");
        std::fs::create_dir_all(&blobs).map_err(Error::io(&blobs))?;
        let for_what = format!("another process that fetches {}", file.path);
        let lock = Lock::wait(&layout.blob_lock(expected.hex()), &for_what, ledger.events, &|| self.stopped())?;
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
            // Nobody keeps others off the file, so it must be one that nobody else has.
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
            // Nobody can tell which bytes are wrong.
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
            let what = format!("{}: expected {expected}, received {digest}; fetching it again", file.path);
            ledger.events.notice(&what);
        }
        self.phase(Phase::Rename);
        part.complete()?;
        self.link(true, || part.name(&blob))?;
        Ok(on_disk)
    }

    /// Links the snapshot to the blob that `name` gives its name.
    fn link(&self, is_new: bool, name: impl FnOnce() -> Result<()>) -> Result<()> {
        let layout = self.layout;
        let _mutex = Lock::wait(&layout.mutex(), MUTEX, self.ledger.events, &|| self.stopped())?;
        name()?;
        layout.link(self.commit, &self.file.path, self.digest, self.hub.settings.symlinks, is_new)
    }

    /// GETs a range or all of the file, from where the last redirect led if that is known.
    fn get(&self, range: Option<(u64, u64)>) -> Result<Answer, Failure> {
        let lock = || self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lock().clone();
        let answer = match &known {
            Some(url) => self.http.get(url, range, true),
            None => self.http.get(&self.url(), range, false),
        };
        *lock() = answer.as_ref().ok().and_then(|answer| answer.moved.clone());
        answer
    }

    fn url(&self) -> String {
        self.hub.file_url(self.repo, self.commit, &self.file.path)
    }

    fn phase(&self, phase: Phase) {
        self.ledger.events.phase(&self.file.path, phase);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.ledger.events.cancelled()
    }

    /// Fills what is missing, several ranges at a time, and hashes on this thread behind the first gap.
    fn by_ranges(&self, part: &Part) -> Result<Digest, Unfilled> {
        self.phase(Phase::Body);
        let missing: Vec<usize> = (0..part.ranges()).filter(|&i| part.done(i) < part.range_len(i)).collect();
        let (next, halt) = (AtomicUsize::new(0), AtomicBool::new(false));
        let failed = Mutex::new(None);
        let worker = || {
            let _halt = AtEnd(|| {
                // Whoever waits for the bytes of a worker that panicked would wait for ever.
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

    /// The hash of the part, read as it grows.
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

    /// Fills range `i`, trying again for as long as patience lasts.
    fn fill(&self, part: &Part, i: usize, halted: &dyn Fn() -> bool) -> Result<(), Unfilled> {
        let mut tries = Tries::new(self.http.patience(), self.ledger.events);
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

    fn explained(&self, failure: Failure) -> Failure {
        match failure {
            Failure::Status { url, status, code } => {
                Failure::Fatal(self.hub.refused(self.repo, self.commit, url, status, &code))
            }
            failure => failure,
        }
    }

    /// One request for the rest of range `i`. `false` if the server answered with the whole file to a part of it.
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
            return Err(Failure::again(&url, format!("only {} bytes of a range came", upto - start)));
        }
        Ok(true)
    }

    /// Passes on exactly `expected` bytes of a body as they arrive.
    fn receive(
        &self,
        url: &str,
        mut answer: Answer,
        expected: u64,
        halted: &dyn Fn() -> bool,
        mut append: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if let Some(length) = answer.length.filter(|&length| length != expected) {
            return Err(Failure::again(url, format!("{length} bytes came where {expected} were expected")));
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
                return Err(Failure::again(url, format!("the body ended {left} bytes early")));
            }
            append(&buffer[..n])?;
            self.ledger.arrived(n as u64);
            left -= n as u64;
            recent += n;
            let time = since.elapsed();
            if time > stall {
                if (recent as f64) < SLOWEST * time.as_secs_f64() && left > 0 {
                    return Err(Failure::again(url, format!("{recent} bytes in {:.1} s", time.as_secs_f64())));
                }
                (since, recent) = (Instant::now(), 0);
            }
        }
        // Reading the end lets the connection be used again, and shows a body without a length that goes on.
        match answer.body.read(&mut buffer[..1]) {
            Ok(1..) => Err(Failure::again(url, format!("more than the {expected} bytes expected came"))),
            // After an error, too: the bytes are here, only the connection is spoiled.
            Ok(0) | Err(_) => Ok(()),
        }
    }

    /// The whole file in one body, from the first byte: for servers that know no ranges.
    fn whole(&self, part: &mut Part) -> Result<Digest> {
        self.phase(Phase::Body);
        let halted = || self.stopped();
        let mut tries = Tries::new(self.http.patience(), self.ledger.events);
        let mut restart = true;
        loop {
            if halted() {
                return Err(Error::Cancelled);
            }
            if restart {
                self.ledger.lost(part.total());
                part.restart_whole()?;
            }
            // A try that broke off is gone on with, in case the server knows ranges after all.
            let received = self.range(part, 0, &halted);
            restart = matches!(received, Ok(false));
            match received {
                _ if part.total() == self.file.size => return self.hash(part, &halted),
                Ok(_) => {}
                // What came may be worth nothing without the rest, so it is no progress.
                Err(failure) => tries.failed(self.explained(failure), 0, &halted)?,
            }
        }
    }
}

/// The end of what a 206 holds, if it begins where it was asked to and is of a file of this size.
fn check_range(url: &str, answer: &Answer, start: u64, end: u64, size: u64) -> Result<u64, Failure> {
    let text = answer.header("content-range").unwrap_or_default();
    let parsed = text.strip_prefix("bytes ").and_then(|text| {
        let (range, total) = text.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?, total.parse::<u64>().ok()?))
    });
    match parsed {
        Some((first, last, total)) if first == start && total == size && (start..end).contains(&last) => Ok(last + 1),
        _ => {
            let what = format!("asked for bytes {start}-{} of {size}, the answer says {text:?}", end - 1);
            Err(Failure::again(url, what))
        }
    }
}

impl Hub {
    /// Bytes `start..end` of a file of a commit, which does not become a file here.
    ///
    /// # Errors
    /// As [`Hub::fetch`]; [`Error::Protocol`] if the server knows no ranges.
    pub fn read(
        &self,
        repo: &RepoId,
        commit: &str,
        file: &Listed,
        range: std::ops::Range<u64>,
        events: &dyn Events,
    ) -> Result<Vec<u8>> {
        check_names(commit, std::slice::from_ref(file))?;
        let std::ops::Range { start, end } = range;
        let too_much =
            || Error::Input(format!("{} bytes at once are too many for this machine", end.saturating_sub(start)));
        let wanted = usize::try_from(end.saturating_sub(start)).map_err(|_| too_much())?;
        if start >= end {
            return Ok(Vec::new());
        }
        if end > file.size {
            let what = format!("{} has {} bytes, {end} were asked for", file.path, file.size);
            return Err(Error::NoFile { repo: repo.to_string(), revision: commit.into(), what });
        }
        if self.settings.offline {
            return Err(Error::Offline { what: format!("{repo}@{commit}: {} would be read from the Hub", file.path) });
        }
        let (layout, stop) = (self.layout(repo), AtomicBool::new(false));
        let ledger = Ledger { events, total: end - start, done: AtomicU64::new(0), received: AtomicU64::new(0) };
        let http = self.http();
        let digest = known(file)?;
        let one = One {
            hub: self,
            http,
            repo,
            commit,
            layout: &layout,
            file,
            digest,
            ledger: &ledger,
            stop: &stop,
            moved: Mutex::default(),
        };
        let url = one.url();
        let mut tries = Tries::new(http.patience(), events);
        let mut out = Vec::new();
        while out.len() < wanted {
            if events.cancelled() {
                return Err(Error::Cancelled);
            }
            let (before, at) = (out.len(), start + out.len() as u64);
            let received = one.get(Some((at, end))).and_then(|answer| {
                let upto = match answer.status {
                    200 if (at, end) == (0, file.size) => end,
                    200 => {
                        let what = "the server knows no ranges; fetch the whole file".into();
                        return Err(Failure::Fatal(Error::Protocol { url: url.clone(), what }));
                    }
                    _ => check_range(&url, &answer, at, end, file.size)?,
                };
                one.receive(&url, answer, upto - at, &|| events.cancelled(), |bytes| {
                    out.extend_from_slice(bytes);
                    Ok(())
                })
            });
            if let Err(failure) = received {
                tries.failed(one.explained(failure), (out.len() - before) as u64, &|| false)?;
            }
        }
        Ok(out)
    }
}
