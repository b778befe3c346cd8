//! From a listing to a snapshot: what is there, what fits, several files at once, and what is remembered of it.

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
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        let ModelId { repo, revision } = id;
        let snapshot = self.fetch_part(repo, commit, wanted, progress)?;
        let layout = self.layout(repo);
        // Last, so that a branch never leads to half a snapshot where it led to a whole one, and that no listing is kept
        // that has not proved right.
        let keep = || {
            let _mutex = Lock::wait(&layout.mutex(), MUTEX, progress, &|| false)?;
            if layout.in_use(commit).is_file() {
                self.record(repo, commit, listing)?;
            }
            layout.write_reference(revision, commit)
        };
        let is_known = revision == commit || layout.read_reference(revision).as_deref() == Some(commit);
        // Only a commit that we took ourselves has a listing to keep: Python's has no lock of ours.
        let is_unlisted = layout.in_use(commit).is_file() && !layout.record(commit).is_file();
        if !is_known || is_unlisted {
            // The files are there, whatever else cannot be written, as in a cache that somebody else owns.
            if let Err(e) = keep() {
                progress.notice(&format!("{id}: not remembered: {e}"));
            }
        }
        Ok(snapshot)
    }

    /// The same for files that are not yet all: no branch leads to them, and the listing is not kept.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
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

    /// Keeps a commit from being evicted while it is used, if it is one that we fetched.
    pub fn in_use(&self, repo: &RepoId, commit: &str) -> InUse {
        let path = self.layout(repo).in_use(commit);
        InUse { _lock: path.is_file().then(|| Lock::share(&path).ok()).flatten() }
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
        progress: &dyn Progress,
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
                        let what = "the server knows no ranges; fetch the whole file".into();
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
