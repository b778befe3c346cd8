//! Training steps of a model: listing, selecting and fetching them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use pricket_hub::{Digest, Hub, Listed, ModelId, RepoId, Steps, step_of};
use pricket_nn::{NoProgress, Progress};
use serde_json::{Value, json};

use crate::loading::forms::{forms, is_weight_file};
use crate::loading::repository::{Fetched, RenamedProgress, explained, fetch_commit};
use crate::loading::source::{Place, Source, holds_model, revision_path, revisions_in, step_in};
use crate::suites::cards::{Card, KnownKind, card};
use crate::suites::remote::Tensors;
use crate::task::Task;
use crate::{Error, Result};

/// Number of listings requested at the same time.
const AT_ONCE: usize = 8;

/// The listed files of a checkpoint, and whether the list is complete.
pub(crate) struct Files {
    pub(crate) files: Vec<Listed>,
    pub(crate) is_complete: bool,
}

/// Location of the revisions of a model.
#[derive(Clone, Debug)]
pub(crate) enum Home {
    /// A directory that contains training steps.
    Local(PathBuf),
    /// A repository, and the requested weight file.
    Hub(RepoId, Hub, Option<String>),
}

/// The training steps of a model.
///
/// ```
/// let tiny = pricket::checkpoints(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny"))?;
/// let log: Vec<String> = tiny.select(&"log".parse()?)?.iter().map(|c| c.revision.clone()).collect();
/// assert_eq!(log[..4], ["step0", "step1", "step16", "step64"]);
/// # Ok::<(), pricket::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Checkpoints {
    /// The repository or directory of the model.
    pub model: String,
    /// Model card, if there is one.
    pub card: Option<&'static Card>,
    /// Training steps, ascending: those that exist, and missing ones that the card lists.
    pub steps: Vec<Checkpoint>,
    /// The revision `main`.
    pub main: Option<Checkpoint>,
    pub(crate) home: Home,
}

/// A checkpoint: one training step of a model, or `main`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Checkpoint {
    /// Branch, or name of the directory.
    pub revision: String,
    /// Training step; `None` for `main`.
    pub step: Option<u64>,
    /// Number of training tokens seen, if the model card gives the tokens per step.
    pub tokens: Option<u64>,
    /// Commit on the Hub.
    pub commit: Option<String>,
    /// Whether the checkpoint exists.
    pub present: bool,
    /// Size of the weights in bytes, after [`Checkpoints::fetch_sizes`].
    pub bytes: Option<u64>,
    /// Known facts about the checkpoint (wrong, missing or unusual), each with its source.
    pub known: Vec<String>,
    /// Whether a known fact is worse than unusual.
    pub known_bad: bool,
}

/// Lists the training steps of `model`. One request lists all branches of a repository with their commits. A directory
/// contains training steps in `revisions/`, or as subdirectories whose name ends in a number.
///
/// # Errors
/// Returns the errors of [`crate::load`] for a missing repository or path.
pub fn checkpoints(model: impl Into<Source>) -> Result<Checkpoints> {
    // A local directory must work even if the environment variables of the Hub are invalid.
    match model.into().locate()? {
        Place::Local(path) => Checkpoints::in_directory(&path),
        Place::Hub(id, file) => Checkpoints::of_repository(&Hub::from_env()?, &id, file, &NoProgress),
    }
}

impl Checkpoints {
    fn in_directory(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Err(Error::NotFound { path: path.into(), what: "not a directory, so it has no revisions".into() });
        }
        let steps = revisions_in(path)
            .into_iter()
            .filter_map(|name| Some(Checkpoint { step: Some(step_in(&name)?), ..Checkpoint::new(name, None, true) }));
        let has_main = path.join("config.json").is_file() || holds_model(path);
        let main = has_main.then(|| Checkpoint::new("main".into(), None, true));
        Ok(Self {
            model: path.display().to_string(),
            card: None,
            steps: steps.collect(),
            main,
            home: Home::Local(path.into()),
        })
    }

    /// Lists training steps as [`checkpoints`] does, with repositories from `hub`.
    ///
    /// # Errors
    /// Returns the errors of [`checkpoints`].
    pub fn on(hub: &Hub, model: impl Into<Source>, progress: &dyn Progress) -> Result<Self> {
        match model.into().locate()? {
            Place::Local(path) => Self::in_directory(&path),
            Place::Hub(id, file) => Self::of_repository(hub, &id, file, progress),
        }
    }

    fn of_repository(hub: &Hub, id: &ModelId, file: Option<String>, progress: &dyn Progress) -> Result<Self> {
        if id.revision != "main" {
            return Err(Error::Source(format!("{id} is a single revision; use {} for its training steps", id.repo)));
        }
        let repo = &id.repo;
        let card = card(repo.as_str());
        let refs = hub.refs_or_main(repo, &RenamedProgress::new(progress, "")).map_err(|e| explained(e, id, card))?;
        let number = |name: &str| card.map_or_else(|| step_of(name), |card| card.step_of(name));
        let pattern = card.and_then(|card| card.checkpoints.as_ref());
        let mut steps: BTreeMap<u64, Checkpoint> = BTreeMap::new();
        // Offline, missing steps are not added: the cache does not know which steps exist on the Hub.
        if let Some(pattern) = pattern.filter(|_| !hub.settings().offline) {
            steps.extend(
                pattern.steps().into_iter().map(|step| (step, Checkpoint::new(pattern.branch(step), None, false))),
            );
        }
        for (name, commit) in &refs.branches {
            if let Some(step) = number(name) {
                steps.insert(step, Checkpoint::new(name.clone(), Some(commit.clone()), true));
            }
        }
        for (&step, checkpoint) in &mut steps {
            checkpoint.step = Some(step);
            checkpoint.tokens = pattern.and_then(|pattern| step.checked_mul(pattern.tokens_per_step));
            let known = card.map(|card| card.known_of(&checkpoint.revision)).unwrap_or_default();
            checkpoint.known = known.iter().map(|known| format!("{} ({})", known.what, known.source)).collect();
            checkpoint.known_bad = known.iter().any(|known| match known.kind {
                KnownKind::Wrong | KnownKind::Suspect => true,
                KnownKind::Missing => !checkpoint.present,
                KnownKind::Odd => false,
            });
        }
        let main = refs.branches.get("main").map(|commit| Checkpoint::new("main".into(), Some(commit.clone()), true));
        Ok(Self {
            model: file.as_ref().map_or_else(|| repo.to_string(), |file| format!("{repo}/{file}")),
            card,
            steps: steps.into_values().collect(),
            main,
            home: Home::Hub(repo.clone(), hub.clone(), file),
        })
    }

    /// Returns the selected training steps, ascending, including missing ones. For a model without training steps,
    /// returns `main`, unless `steps` lists numbers.
    ///
    /// # Errors
    /// Returns [`Error::Source`] or [`Error::Hub`] if a number is not a training step of this model, or if nothing is
    /// selected.
    pub fn select(&self, steps: &Steps) -> Result<Vec<&Checkpoint>> {
        if self.steps.is_empty() {
            // A model without training steps is a single checkpoint, unless steps are requested by number.
            return match &self.main {
                Some(main) if steps.expand().is_none() => Ok(vec![main]),
                _ => Err(Error::Source(format!(
                    "{} has no training steps; expected directories revisions/stepN, or directories with a model whose \
                     name ends in a number, such as checkpoint-500 or global_step500",
                    self.model
                ))),
            };
        }
        let numbers: Vec<u64> = self.steps.iter().filter_map(|checkpoint| checkpoint.step).collect();
        let chosen: BTreeSet<u64> = steps.select(&numbers)?.into_iter().collect();
        let is_chosen = |checkpoint: &&Checkpoint| checkpoint.step.is_some_and(|step| chosen.contains(&step));
        Ok(self.steps.iter().filter(is_chosen).collect())
    }

    /// Returns the name by which [`crate::load`] loads a checkpoint of this model.
    pub fn source(&self, checkpoint: &Checkpoint) -> Source {
        let source = match &self.home {
            Home::Local(path) => Source::new(path),
            Home::Hub(repo, _, file) => {
                let source = Source::new(repo.as_str());
                file.iter().fold(source, Source::file)
            }
        };
        source.revision(&checkpoint.revision)
    }

    /// Returns the name of a checkpoint in messages and tables.
    pub fn id(&self, checkpoint: &Checkpoint) -> String {
        format!("{}@{}", self.model, checkpoint.revision)
    }

    fn missing(&self, checkpoint: &Checkpoint) -> Error {
        let why = checkpoint.known.first().map_or(String::new(), |known| format!(": {known}"));
        Error::NotFound { path: self.id(checkpoint).into(), what: format!("the checkpoint does not exist{why}") }
    }

    /// Opens the tensors of a checkpoint without fetching it; see [`Tensors`].
    ///
    /// # Errors
    /// Returns [`Error::NotFound`] if the checkpoint does not exist, and [`Error::Hub`] if a request fails.
    pub fn tensors(&self, checkpoint: &Checkpoint) -> Result<Tensors> {
        let listing = self.home.listing(checkpoint, &NoProgress)?.ok_or_else(|| self.missing(checkpoint))?;
        self.home.tensors(checkpoint, &listing.files)
    }

    /// Fetches a checkpoint into the cache, like [`crate::loading::fetch`], at the commit of the listing.
    ///
    /// # Errors
    /// Returns the errors of [`crate::loading::fetch`], and [`Error::Source`] if the checkpoint is a local directory.
    pub fn fetch(&self, checkpoint: &Checkpoint, progress: &dyn Progress) -> Result<Fetched> {
        match (&self.home, &checkpoint.commit) {
            (Home::Hub(repo, hub, file), Some(commit)) => {
                let id = ModelId::new(repo.clone(), &checkpoint.revision)?;
                fetch_commit(&id, commit, file.as_deref(), hub, progress)
            }
            (Home::Hub(..), None) => Err(self.missing(checkpoint)),
            (Home::Local(_), _) => Err(Error::Source(format!("{} is already local", self.id(checkpoint)))),
        }
    }

    /// Returns the number of bytes that fetching a checkpoint adds to the cache; 0 if unknown.
    pub(crate) fn bytes_to_fetch(&self, checkpoint: &Checkpoint) -> u64 {
        let (Home::Hub(repo, hub, _), Some(commit)) = (&self.home, &checkpoint.commit) else { return 0 };
        let Ok(Some(listing)) = self.home.listing(checkpoint, &NoProgress) else { return 0 };
        let weights = forms(&listing.files).into_values().next().unwrap_or_default();
        let missing = weights.iter().filter(|file| hub.cached(repo, commit, file).is_none());
        missing.map(|file| file.size).sum()
    }

    /// Returns whether the model is a local directory.
    pub fn is_local(&self) -> bool {
        self.home.is_local()
    }

    /// Fills in [`Checkpoint::bytes`] of the selected steps. Requests the file list of each step.
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoints::select`], and [`Error::Hub`] if a request fails.
    pub fn fetch_sizes(&mut self, steps: &Steps, progress: &dyn Progress) -> Result<()> {
        let chosen: Vec<Checkpoint> = self.select(steps)?.into_iter().cloned().collect();
        let listings = self.home.listings(&chosen, progress)?;
        for (asked, listing) in chosen.iter().zip(listings) {
            let bytes = listing?.and_then(|listing| weight_bytes(&listing.files));
            if let Some(checkpoint) = self.steps.iter_mut().find(|checkpoint| checkpoint.revision == asked.revision) {
                checkpoint.bytes = bytes;
            }
        }
        Ok(())
    }
}

/// Returns the size in bytes of the weights that a loader would take.
fn weight_bytes(listing: &[Listed]) -> Option<u64> {
    let (_, taken) = forms(listing).into_iter().next()?;
    Some(taken.iter().map(|file| file.size).sum())
}

impl Checkpoint {
    fn new(revision: String, commit: Option<String>, present: bool) -> Self {
        let (step, tokens, bytes) = (None, None, None);
        Self { revision, step, tokens, commit, present, bytes, known: Vec::new(), known_bad: false }
    }

    /// Returns the checkpoint as JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "revision": self.revision, "step": self.step, "tokens": self.tokens, "commit": self.commit,
            "present": self.present, "bytes": self.bytes, "known": self.known, "known_bad": self.known_bad,
        })
    }
}

impl Home {
    /// Lists the files of a checkpoint; `None` if the checkpoint does not exist.
    pub(crate) fn listing(&self, checkpoint: &Checkpoint, progress: &dyn Progress) -> Result<Option<Files>> {
        match (self, &checkpoint.commit) {
            (Home::Local(_), _) => {
                let directory = self.directory(checkpoint);
                directory.map(|directory| Ok(Files { files: list(&directory)?, is_complete: true })).transpose()
            }
            (Home::Hub(repo, hub, file), Some(commit)) => {
                let id = ModelId::new(repo.clone(), &checkpoint.revision)?;
                let listing = hub.files(repo, commit, &RenamedProgress::new(progress, ""));
                let mut listing = listing.map_err(|e| explained(e, &id, card(repo.as_str())))?;
                if let Some(file) = file {
                    listing.files.retain(|listed| !is_weight_file(&listed.path) || listed.path == *file);
                }
                Ok(Some(Files { files: listing.files, is_complete: listing.is_complete }))
            }
            (Home::Hub(..), None) => Ok(None),
        }
    }

    /// Returns whether only the cache is available, which may lack revisions and files.
    pub(crate) fn is_partial(&self) -> bool {
        matches!(self, Home::Hub(_, hub, _) if hub.settings().offline)
    }

    pub(crate) fn is_local(&self) -> bool {
        matches!(self, Home::Local(_))
    }

    /// Lists the files of several checkpoints, with parallel requests.
    pub(crate) fn listings(
        &self,
        chosen: &[Checkpoint],
        progress: &dyn Progress,
    ) -> Result<Vec<Result<Option<Files>>>> {
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let out = Mutex::new(chosen.iter().map(|_| Ok(None)).collect::<Vec<_>>());
        let task = Task::begin(progress, "listing the files of each step", chosen.len(), "steps");
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(chosen.len()) {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        let Some(checkpoint) = chosen.get(i) else { return };
                        if progress.cancelled() {
                            return;
                        }
                        let listing = self.listing(checkpoint, progress);
                        out.lock().unwrap_or_else(PoisonError::into_inner)[i] = listing;
                        task.update(done.fetch_add(1, Ordering::Relaxed) + 1);
                    }
                });
            }
        });
        if progress.cancelled() {
            return Err(Error::Cancelled);
        }
        Ok(out.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Computes the hash of a local file. Files on the Hub are listed with their hashes.
    pub(crate) fn hash(&self, checkpoint: &Checkpoint, file: &mut Listed) -> Result<()> {
        if let (None, Some(directory)) = (&file.digest, self.directory(checkpoint)) {
            file.digest = Some(Digest::sha256_of(&directory.join(&file.path), &pricket_hub::NoProgress)?);
        }
        Ok(())
    }

    /// Returns a message if a local file is a Git LFS pointer or another placeholder for weights that were not
    /// downloaded.
    pub(crate) fn stand_in(&self, checkpoint: &Checkpoint, file: &Listed) -> Option<String> {
        let path = self.directory(checkpoint)?.join(&file.path);
        match pricket_weights::sniff(&path) {
            Err(pricket_weights::Error::Unsupported { what, .. }) => Some(format!("{}: {what}", file.path)),
            _ => None,
        }
    }

    /// Opens the tensors of a checkpoint.
    pub(crate) fn tensors(&self, checkpoint: &Checkpoint, listing: &[Listed]) -> Result<Tensors> {
        match (self, &checkpoint.commit) {
            (Home::Hub(repo, hub, _), Some(commit)) => {
                let id = ModelId::new(repo.clone(), &checkpoint.revision)?;
                Tensors::of_listing(hub, &id, commit, listing)
            }
            _ => Tensors::local(&self.directory(checkpoint).unwrap_or_default()),
        }
    }

    /// Reads a small file of a checkpoint, below 1 MiB. `None` if the checkpoint does not have it.
    pub(crate) fn small_file(
        &self,
        checkpoint: &Checkpoint,
        listing: &[Listed],
        name: &str,
    ) -> Result<Option<Vec<u8>>> {
        let Some(listed) = listing.iter().find(|file| file.path == name && file.size < 1 << 20) else {
            return Ok(None);
        };
        let path = match (self, &checkpoint.commit) {
            (Home::Hub(repo, hub, _), Some(commit)) => match hub.cached(repo, commit, listed) {
                Some(path) => path,
                None => return Ok(Some(hub.read(repo, commit, listed, 0..listed.size, &pricket_hub::NoProgress)?)),
            },
            _ => self.directory(checkpoint).unwrap_or_default().join(name),
        };
        std::fs::read(&path).map(Some).map_err(|error| Error::Io { path, error })
    }

    fn directory(&self, checkpoint: &Checkpoint) -> Option<PathBuf> {
        let Home::Local(root) = self else { return None };
        let directory = match checkpoint.revision.as_str() {
            "main" => root.clone(),
            revision => revision_path(root, revision)?,
        };
        directory.is_dir().then_some(directory)
    }
}

/// Lists the files of a directory.
fn list(directory: &Path) -> Result<Vec<Listed>> {
    let io = |error| Error::Io { path: directory.into(), error };
    let mut out = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(io)?.flatten() {
        let path = entry.path();
        let Ok(meta) = std::fs::metadata(&path) else { continue };
        if meta.is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            out.push(Listed::new(name, meta.len(), None));
        }
    }
    out.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(out)
}
