//! [`Hub::fetch`] and [`Hub::read`]: downloads listed files into a snapshot, several at once, and reads byte ranges of
//! remote files.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::file::{One, check_range};
use crate::http::{Failure, Http, Tries};
use crate::id::{is_commit, is_relative_path};
use crate::layout::Layout;
use crate::ledger::{AtEnd, Ledger, MUTEX};
use crate::lock::Lock;
use crate::part::Part;
use crate::{Digest, Error, Hub, Listed, ModelId, Progress, RepoId, Result};

/// Fetched files of one commit on disk.
#[derive(Debug)]
#[non_exhaustive]
pub struct Snapshot {
    /// The directory that holds them.
    pub directory: PathBuf,
    /// The commit.
    pub commit: String,
    /// The requested files, as listed.
    pub files: Vec<Listed>,
    /// Numbers of bytes received and reused.
    pub report: Report,
    /// Guard that keeps [`crate::Cache::evict`] from deleting the commit.
    pub in_use: InUse,
}

/// Guard of a commit: the commit is not evicted until the guard is dropped.
#[derive(Debug)]
pub struct InUse {
    _lock: Option<Lock>,
}

/// Statistics of a fetch, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Size of all requested files.
    pub total: u64,
    /// Bytes that were on disk before the fetch, in complete or unfinished files.
    pub on_disk: u64,
    /// Bytes received as file contents.
    pub received: u64,
    /// The part of `received` that was received more than once.
    pub repeated: u64,
}

impl Hub {
    /// Fetches the files `wanted` of `commit` into the cache and records `commit` as the commit of the revision that
    /// `id` names. `listing` is the result of [`Hub::files`].
    ///
    /// Files in the cache are not fetched again, and interrupted downloads resume. If another process is fetching a
    /// file, this call waits for it. The length and hash of every received file are verified before the file gets its
    /// final name.
    ///
    /// # Errors
    /// - [`Error::NoSpace`] if the files do not fit on the disk, before anything is fetched;
    /// - [`Error::Mismatch`] if the hash of a file is wrong three times in a row;
    /// - [`Error::Network`] if the retries of [`crate::Patience`] are used up;
    /// - [`Error::Offline`] if a file is missing and offline mode is on;
    /// - [`Error::Cancelled`] if `progress` cancels the work.
    pub fn fetch(
        &self,
        id: &ModelId,
        commit: &str,
        wanted: &[Listed],
        listing: &[Listed],
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        let ModelId { repo, revision } = id;
        let snapshot = self.fetch_part(repo, commit, wanted, progress)?;
        let layout = self.layout(repo);
        // Runs after the fetch, so that a branch never moves from a complete snapshot to an incomplete one. The listing
        // is kept only after the hashes have confirmed it.
        let keep = || {
            let _mutex = Lock::wait(&layout.mutex(), MUTEX, progress, &|| false)?;
            if layout.in_use(commit).is_file() {
                self.record(repo, commit, listing)?;
            }
            layout.write_reference(revision, commit)
        };
        let is_known = revision == commit || layout.read_reference(revision).as_deref() == Some(commit);
        // Listings are kept only of commits that pricket fetched. Commits of Python have no lock file of pricket.
        let is_unlisted = layout.in_use(commit).is_file() && !layout.record(commit).is_file();
        if !is_known || is_unlisted {
            // Only a notice: the files are complete even if the cache is read-only.
            if let Err(e) = keep() {
                progress.notice(&format!("{id}: the revision was not recorded in the cache: {e}"));
            }
        }
        Ok(snapshot)
    }

    /// Fetches files as [`Hub::fetch`] does, but records neither the revision nor the listing.
    ///
    /// Use it for the first of several fetches of one commit: the branch moves only when all files are there.
    ///
    /// # Errors
    /// Returns the errors of [`Hub::fetch`].
    pub fn fetch_part(
        &self,
        repo: &RepoId,
        commit: &str,
        wanted: &[Listed],
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
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
        // Locks the commit before looking for files, so that no file found is evicted afterwards.
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
        // A commit that another program fetched is not marked as pricket's, even if pricket adds files to it.
        let is_ours = mark.is_file() || !layout.snapshot(commit).exists();
        let in_use = InUse { _lock: if is_ours { Some(Lock::share(&mark)?) } else { None } };
        self.check_space(&layout, &missing)?;
        // Starts with the large files, so that small ones are fetched beside them.
        missing.sort_by_key(|file| std::cmp::Reverse(file.size));
        let waiting: u64 = missing.iter().map(|file| file.size).sum();
        let ledger = Ledger::new(progress, "fetching", total);
        ledger.found(total - waiting);
        let report = self.fetch_all(repo, commit, &layout, &missing, &ledger)?;
        ledger.update(total);
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
        // This fetch has its own connection pool, so that shutting it down does not affect others.
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
                                // Keeps the first error, the cause. Files stopped because of it fail with `Cancelled`.
                                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                                stop.store(true, Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
            // Closes the connections on cancellation, so that it does not wait for a stalled server.
            while over.load(Ordering::Acquire) < threads {
                if stop.load(Ordering::Relaxed) || ledger.progress.cancelled() {
                    stop.store(true, Ordering::Relaxed);
                    http.shutdown();
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        if let Some(e) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(if ledger.progress.cancelled() { Error::Cancelled } else { e });
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

    /// Returns a guard that keeps a commit from being evicted. It has no effect on commits that pricket did not fetch.
    pub fn in_use(&self, repo: &RepoId, commit: &str) -> InUse {
        let path = self.layout(repo).in_use(commit);
        InUse { _lock: path.is_file().then(|| Lock::share(&path).ok()).flatten() }
    }
}

/// Rejects commits, paths and hashes that could lead outside the cache. Callers may pass listings that did not come
/// from the Hub.
fn check_names(commit: &str, files: &[Listed]) -> Result<()> {
    let bad = |what: &str| Err(Error::Input(format!("invalid commit, file path or file hash: {what:?}")));
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

/// Returns the hash of a file to fetch. Every listing of the Hub has one.
fn known(file: &Listed) -> Result<&Digest> {
    file.digest
        .as_ref()
        .ok_or_else(|| Error::Input(format!("{}: cannot fetch a file whose hash is unknown", file.path)))
}
impl Hub {
    /// Returns the bytes `range` of a file from the Hub. Nothing is written to the cache, and the hash cannot be
    /// verified.
    ///
    /// # Errors
    /// - [`Error::NoFile`] if the range exceeds the file;
    /// - [`Error::Protocol`] if the server does not support range requests;
    /// - [`Error::Network`], [`Error::Offline`] and [`Error::Cancelled`] as [`Hub::fetch`].
    pub fn read(
        &self,
        repo: &RepoId,
        commit: &str,
        file: &Listed,
        range: std::ops::Range<u64>,
        progress: &dyn Progress,
    ) -> Result<Vec<u8>> {
        check_names(commit, std::slice::from_ref(file))?;
        let std::ops::Range { start, end } = range;
        let too_much =
            || Error::Input(format!("{} bytes exceed the address space of this platform", end.saturating_sub(start)));
        let wanted = usize::try_from(end.saturating_sub(start)).map_err(|_| too_much())?;
        if start >= end {
            return Ok(Vec::new());
        }
        if end > file.size {
            let what = format!("{} has {} bytes; the requested range ends at {end}", file.path, file.size);
            return Err(Error::NoFile { repo: repo.to_string(), revision: commit.into(), what });
        }
        if self.settings.offline {
            return Err(Error::Offline {
                what: format!("{repo}@{commit}: reading a part of {} needs a request", file.path),
            });
        }
        let (layout, stop) = (self.layout(repo), AtomicBool::new(false));
        let ledger = Ledger::new(progress, "fetching", end - start);
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
        let mut tries = Tries::new(http.patience(), progress);
        let mut out = Vec::new();
        while out.len() < wanted {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            let (before, at) = (out.len(), start + out.len() as u64);
            let received = one.get(Some((at, end))).and_then(|answer| {
                let upto = match answer.status {
                    200 if (at, end) == (0, file.size) => end,
                    200 => {
                        let what = "the server does not support range requests; fetch the whole file".into();
                        return Err(Failure::Fatal(Error::Protocol { url: url.clone(), what }));
                    }
                    _ => check_range(&url, &answer, at, end, file.size)?,
                };
                one.receive(&url, answer, upto - at, &|| progress.cancelled(), |bytes| {
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
