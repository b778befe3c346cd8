//! The local cache: listing its repositories, verifying hashes, and evicting commits.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::layout::{GOING, Layout, TEMPORARY};
use crate::ledger::Ledger;
use crate::lock::Lock;
use crate::part::SUFFIX;
use crate::{Digest, Error, Listed, Progress, RepoId, Result, platform};

/// A cache in the layout of Python's `huggingface_hub`, which other programs may share.
///
/// Listing and verifying cover every model in the cache. Evicting deletes only commits that pricket fetched.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// A repository in the cache.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CachedRepo {
    /// The id of the repository.
    pub repo: RepoId,
    /// Cached commits.
    pub revisions: Vec<CachedRevision>,
    /// Bytes on disk. Every blob counts once.
    pub bytes: u64,
    /// The part of `bytes` that belongs to unfinished downloads.
    pub partial_bytes: u64,
}

/// A commit in the cache.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CachedRevision {
    /// The commit hash.
    pub commit: String,
    /// Branches and tags that pointed to this commit when they were last resolved.
    pub refs: Vec<String>,
    /// Cached files of the commit.
    pub files: Vec<CachedFile>,
    /// Time when pricket last used the commit. `None` if another program fetched it.
    pub last_used: Option<SystemTime>,
}

/// A cached file of a commit.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CachedFile {
    /// Path in the repository.
    pub path: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Expected hash, from the listing or from the name of the blob. `None` if the cache has neither.
    pub digest: Option<Digest>,
    /// Path of the file on disk: the blob, or the file in the snapshot if it is not a link.
    pub location: PathBuf,
}

/// The result of verifying one file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Verified {
    /// The repository.
    pub repo: RepoId,
    /// Path of the file in one of the commits that contain it.
    pub path: String,
    /// Path of the file on disk.
    pub location: PathBuf,
    /// Expected hash. `None` if it is unknown.
    pub expected: Option<Digest>,
    /// Computed hash. `None` if the file could not be read or its expected hash is unknown.
    pub found: Option<Digest>,
}

impl Verified {
    /// Returns whether this is a link to a missing blob.
    pub fn is_dangling(&self) -> bool {
        !self.location.exists()
    }

    /// Returns whether the hash of the file matches, or `None` if the expected hash is unknown.
    pub fn is_good(&self) -> Option<bool> {
        self.expected.as_ref().map(|expected| self.found.as_ref() == Some(expected))
    }
}

/// The result of [`Cache::evict`].
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Evicted {
    /// Deleted commits, the least recently used first.
    pub revisions: Vec<(RepoId, String)>,
    /// Freed bytes.
    pub freed: u64,
    /// Bytes that the commits fetched by pricket and all unfinished downloads still take.
    pub left: u64,
    /// Commits that were kept because they are in use.
    pub in_use: Vec<(RepoId, String)>,
}

impl Cache {
    /// Creates a handle on the cache at `root`, which need not exist. See [`crate::Settings::cache`].
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Returns the directory of the cache.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the free bytes on the file system of the cache, or `None` if the platform does not report them.
    ///
    /// If the directory does not exist, the file system of its nearest existing parent counts.
    pub fn free_space(&self) -> Option<u64> {
        let there = self.root.ancestors().find(|path| path.is_dir())?;
        fs4::available_space(there).ok()
    }

    /// Returns all cached models and datasets, sorted by name. A missing cache directory is an empty cache.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the directory cannot be read.
    pub fn repos(&self) -> Result<Vec<CachedRepo>> {
        let mut out: Vec<CachedRepo> = names_in(&self.root)?
            .iter()
            .filter_map(|name| RepoId::from_folder(name))
            .map(|repo| self.repo(repo))
            .collect();
        out.sort_by(|a, b| a.repo.cmp(&b.repo));
        Ok(out)
    }

    fn repo(&self, repo: RepoId) -> CachedRepo {
        let layout = Layout::new(&self.root, &repo);
        let mut refs: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in files_below(&layout.root().join("refs")) {
            if let Some(commit) = layout.read_reference(&name) {
                refs.entry(commit).or_default().push(name);
            }
        }
        let mut revisions = Vec::new();
        for commit in names_in(&layout.root().join("snapshots")).unwrap_or_default() {
            let used = std::fs::metadata(layout.in_use(&commit)).and_then(|meta| meta.modified()).ok();
            revisions.push(CachedRevision {
                files: cached_files(&layout, &commit),
                refs: refs.remove(&commit).unwrap_or_default(),
                last_used: used,
                commit,
            });
        }
        let mut sizes: BTreeMap<PathBuf, u64> = BTreeMap::new();
        for file in revisions.iter().flat_map(|revision: &CachedRevision| &revision.files) {
            sizes.insert(file.location.clone(), file.bytes);
        }
        let blobs = layout.root().join("blobs");
        let mut partial_bytes = 0;
        for name in names_in(&blobs).unwrap_or_default() {
            let path = blobs.join(&name);
            let bytes = space_taken(&path);
            if name.ends_with(SUFFIX) {
                partial_bytes += bytes;
            }
            sizes.entry(path).or_insert(bytes);
        }
        CachedRepo { bytes: sizes.values().sum(), partial_bytes, revisions, repo }
    }

    /// Computes the hash of every file of `repos` once and compares it with the listing of its commit, or else with the
    /// name of its blob.
    ///
    /// Unreadable files and dangling links are part of the result, with [`Verified::is_good`] false.
    ///
    /// # Errors
    /// Returns [`Error::Cancelled`] if `progress` cancels the work.
    pub fn verify(&self, repos: &[CachedRepo], progress: &dyn Progress) -> Result<Vec<Verified>> {
        let mut seen = BTreeMap::new();
        for repo in repos {
            for file in repo.revisions.iter().flat_map(|revision| &revision.files) {
                seen.entry(&file.location).or_insert((repo, file));
            }
        }
        let total = seen.values().map(|(_, file)| file.bytes).sum();
        let mut done = 0;
        let mut out = Vec::new();
        let ledger = Ledger::new(progress, "checking hashes", total);
        for (location, (repo, file)) in seen {
            ledger.update(done);
            let hashed = match &file.digest {
                Some(expected) => expected.of_file(location, progress).map(Some),
                None => Ok(None),
            };
            if let Err(Error::Cancelled) = hashed {
                return Err(Error::Cancelled);
            }
            done += file.bytes;
            out.push(Verified {
                repo: repo.repo.clone(),
                path: file.path.clone(),
                location: location.clone(),
                expected: file.digest.clone(),
                found: hashed.unwrap_or(None),
            });
        }
        ledger.update(total);
        out.extend(repos.iter().flat_map(|repo| self.dangling(repo)));
        Ok(out)
    }

    /// Returns the links of snapshots whose blobs are missing.
    fn dangling(&self, repo: &CachedRepo) -> Vec<Verified> {
        let layout = Layout::new(&self.root, &repo.repo);
        let mut out = Vec::new();
        for revision in &repo.revisions {
            let snapshot = layout.snapshot(&revision.commit);
            for path in files_below(&snapshot) {
                let location = snapshot.join(&path);
                let Some(target) = std::fs::read_link(&location).ok().filter(|_| !location.exists()) else { continue };
                let name = target.file_name().and_then(|name| name.to_str());
                let expected = name.and_then(Digest::from_hex).or(Some(Digest::Sha256(String::new())));
                out.push(Verified { repo: repo.repo.clone(), path, location, expected, found: None });
            }
        }
        out
    }

    /// Deletes commits that pricket fetched, the least recently used first, until the remaining ones take at most
    /// `budget` bytes.
    ///
    /// Unfinished downloads are deleted first. The following is never deleted:
    ///
    /// - commits that Python or another program fetched;
    /// - datasets, which are small and needed to evaluate models;
    /// - commits in use (see [`crate::InUse`]);
    /// - blobs that another commit links to.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be deleted, and [`Error::Cancelled`] if `progress` cancels the work.
    pub fn evict(&self, budget: u64, progress: &dyn Progress) -> Result<Evicted> {
        let mut out = Evicted::default();
        let mut repos = self.repos()?;
        repos.retain(|repo| !repo.repo.is_dataset());
        let mut candidates = Vec::new();
        let mut ours: BTreeMap<&PathBuf, u64> = BTreeMap::new();
        for repo in &repos {
            out.left += repo.partial_bytes;
            for revision in &repo.revisions {
                if let Some(used) = revision.last_used {
                    candidates.push((used, repo, revision));
                    ours.extend(revision.files.iter().map(|file| (&file.location, file.bytes)));
                }
            }
        }
        out.left += ours.values().sum::<u64>();
        candidates.sort_by(|a, b| (a.0, &a.2.commit).cmp(&(b.0, &b.2.commit)));
        for repo in &repos {
            out.freed += self.sweep(&repo.repo, &Layout::new(&self.root, &repo.repo), progress)?;
        }
        for repo in repos.iter().filter(|repo| repo.partial_bytes > 0) {
            if out.left > budget {
                let freed = Self::drop_partial(&Layout::new(&self.root, &repo.repo))?;
                out.freed += freed;
                out.left -= freed.min(out.left);
            }
        }
        for (_, repo, revision) in candidates {
            if out.left <= budget {
                break;
            }
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            let layout = Layout::new(&self.root, &repo.repo);
            let name = (repo.repo.clone(), revision.commit.clone());
            match self.drop_revision(&layout, &repo.repo, revision, progress)? {
                Some(freed) => {
                    out.freed += freed;
                    out.left -= freed.min(out.left);
                    out.revisions.push(name);
                }
                None => out.in_use.push(name),
            }
        }
        Ok(out)
    }

    /// Deletes unfinished downloads that no process is working on. Returns the freed bytes.
    fn drop_partial(layout: &Layout) -> Result<u64> {
        let blobs = layout.root().join("blobs");
        let mut freed = 0;
        for name in names_in(&blobs)? {
            let Some(blob) = name.strip_suffix(SUFFIX) else { continue };
            let Some(_lock) = Lock::try_new(&layout.blob_lock(blob))? else { continue };
            let path = blobs.join(&name);
            freed += space_taken(&path);
            remove(&path)?;
        }
        Ok(freed)
    }

    /// Deletes a commit and returns the freed bytes, or `None` if the commit is in use.
    fn drop_revision(
        &self,
        layout: &Layout,
        repo: &RepoId,
        revision: &CachedRevision,
        progress: &dyn Progress,
    ) -> Result<Option<u64>> {
        let in_use = layout.in_use(&revision.commit);
        let Some(_lock) = Lock::try_new(&in_use)? else { return Ok(None) };
        let _mutex = Lock::wait(&layout.mutex(), "another process that changes this repository", progress, &|| false)?;
        // Lists the commits again, now under the lock.
        let now = self.repo(repo.clone());
        let kept: BTreeSet<&PathBuf> = now
            .revisions
            .iter()
            .filter(|other| other.commit != revision.commit)
            .flat_map(|other| other.files.iter().map(|file| &file.location))
            .collect();
        let Some(going) = now.revisions.iter().find(|other| other.commit == revision.commit) else {
            // Another process has deleted the commit meanwhile, and `try_new` has created its lock file again.
            remove(&in_use)?;
            return Ok(Some(0));
        };
        // References first, then links, then blobs, so that nothing ever points to a deleted file.
        for name in &going.refs {
            remove(&layout.reference(name))?;
        }
        remove(&layout.record(&revision.commit))?;
        let (snapshot, gone) = (layout.snapshot(&revision.commit), layout.going(&revision.commit));
        let own =
            going.files.iter().filter(|file| file.location.starts_with(&snapshot)).map(|file| file.bytes).sum::<u64>();
        // The rename hides the snapshot atomically and keeps its links, which name the blobs to delete.
        std::fs::rename(&snapshot, &gone).map_err(Error::io(&snapshot))?;
        let freed = own + drop_blobs(layout, &gone, &kept)?;
        remove(&in_use)?;
        Ok(Some(freed))
    }

    /// Finishes interrupted evictions and deletes temporary files older than six hours. Returns the freed bytes.
    fn sweep(&self, repo: &RepoId, layout: &Layout, progress: &dyn Progress) -> Result<u64> {
        let directory = layout.root().join(".pricket");
        let mut freed = 0;
        for name in names_in(&directory)? {
            let path = directory.join(&name);
            if name.starts_with(GOING) {
                let _mutex =
                    Lock::wait(&layout.mutex(), "another process that changes this repository", progress, &|| false)?;
                if !path.exists() {
                    // Another process was still evicting this commit and has finished meanwhile.
                    continue;
                }
                let now = self.repo(repo.clone());
                let kept =
                    now.revisions.iter().flat_map(|other| other.files.iter().map(|file| &file.location)).collect();
                freed += drop_blobs(layout, &path, &kept)?;
            } else if name.starts_with(TEMPORARY) {
                let age = std::fs::symlink_metadata(&path)
                    .and_then(|meta| meta.modified())
                    .ok()
                    .and_then(|t| t.elapsed().ok());
                if age.is_some_and(|age| age > Duration::from_hours(6)) {
                    remove(&path)?;
                }
            }
        }
        Ok(freed)
    }
}

/// Deletes the blobs that the snapshot at `gone` links to, except those in `kept`, then the snapshot. Returns the freed
/// bytes.
fn drop_blobs(layout: &Layout, gone: &Path, kept: &BTreeSet<&PathBuf>) -> Result<u64> {
    let mut freed = 0;
    for path in files_below(gone) {
        let target = std::fs::read_link(gone.join(&path)).ok();
        let name = target.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        let Some(digest) = name.and_then(Digest::from_hex) else { continue };
        let blob = layout.blob(&digest);
        if kept.contains(&blob) {
            continue;
        }
        // A process that holds this lock is about to link to the blob, so the blob stays.
        if let Some(_lock) = Lock::try_new(&layout.blob_lock(digest.hex()))? {
            freed += std::fs::metadata(&blob).map_or(0, |meta| meta.len());
            remove(&blob)?;
        }
    }
    std::fs::remove_dir_all(gone).map_err(Error::io(gone))?;
    Ok(freed)
}

/// Deletes a file. A missing file is not an error.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// Returns the bytes that a file takes on disk, without the holes of a sparse file.
fn space_taken(path: &Path) -> u64 {
    let Ok(meta) = std::fs::metadata(path) else { return 0 };
    platform::bytes_on_disk(&meta).min(meta.len())
}

/// Returns the sorted names in a directory, or an empty list if the directory does not exist.
fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(directory) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io(directory))?,
    };
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// Returns the paths of all files below a directory, relative to it and separated by `/`. Does not follow links to
/// directories.
pub(crate) fn files_below(directory: &Path) -> Vec<String> {
    let mut out = Vec::new();
    for name in names_in(directory).unwrap_or_default() {
        let path = directory.join(&name);
        if std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
            out.extend(files_below(&path).into_iter().map(|below| format!("{name}/{below}")));
        } else {
            out.push(name);
        }
    }
    out
}

fn cached_files(layout: &Layout, commit: &str) -> Vec<CachedFile> {
    let snapshot = layout.snapshot(commit);
    let listed: BTreeMap<String, Digest> = recorded_digests(layout, commit);
    let file = |path: String| {
        let pointer = snapshot.join(&path);
        let bytes = std::fs::metadata(&pointer).ok().filter(std::fs::Metadata::is_file)?.len();
        let target = std::fs::read_link(&pointer).ok();
        let blob = target.as_deref().and_then(Path::file_name).and_then(|name| Digest::from_hex(name.to_str()?));
        let location = match (&target, &blob) {
            (Some(_), Some(digest)) => layout.blob(digest),
            _ => pointer,
        };
        let digest = listed.get(&path).cloned().or(blob);
        Some(CachedFile { path, bytes, digest, location })
    };
    files_below(&snapshot).into_iter().filter_map(file).collect()
}

fn recorded_digests(layout: &Layout, commit: &str) -> BTreeMap<String, Digest> {
    let files = crate::records::read_record(layout, commit).unwrap_or_default();
    files.into_iter().filter_map(|file| Some((file.path, file.digest?))).collect()
}

/// Returns the files of a snapshot with their hashes where known, or `None` if the snapshot is empty or missing.
pub(crate) fn snapshot_files(layout: &Layout, commit: &str) -> Option<Vec<Listed>> {
    let files = cached_files(layout, commit);
    let listed = |file: CachedFile| Listed { path: file.path, size: file.bytes, digest: file.digest };
    (!files.is_empty()).then(|| files.into_iter().map(listed).collect())
}
