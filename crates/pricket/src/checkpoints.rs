use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use pricket_hub::{Digest, Hub, Listed, ModelId, RepoId, Steps, step_of};
use pricket_nn::{Progress, Silent};
use serde_json::{Value, json};

use crate::cards::{Card, KnownKind, card};
use crate::remote::Tensors;
use crate::repository::{Place, Telling, explained, locate, revisions_in};
use crate::{Error, Result};

/// Listings asked for at once.
const AT_ONCE: usize = 8;

/// Where the revisions of a model are.
#[derive(Clone, Debug)]
pub(crate) enum Home {
    /// A directory with `revisions/`.
    Local(PathBuf),
    Hub(RepoId, Hub),
}

/// The training steps of a model.
///
/// ```
/// let tiny = pricket::checkpoints(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny"))?;
/// let log: Vec<String> = tiny.select(&"log".parse()?)?.iter().map(|c| c.revision.clone()).collect();
/// assert_eq!(log[..4], ["step0", "step1", "step2", "step4"]);
/// # Ok::<(), pricket::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Checkpoints {
    /// The model: a repository or a directory.
    pub model: String,
    /// Its card, if it has one.
    pub card: Option<&'static Card>,
    /// The steps, ascending: those that are there, and those that should be.
    pub steps: Vec<Checkpoint>,
    /// What `main` is.
    pub main: Option<Checkpoint>,
    pub(crate) home: Home,
}

/// A training step.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Checkpoint {
    /// Its branch, or its directory below `revisions/`.
    pub revision: String,
    /// Its number; `main` has none.
    pub step: Option<u64>,
    /// Tokens that the model had seen, where its card says how many a step has.
    pub tokens: Option<u64>,
    /// Its commit, on the Hub.
    pub commit: Option<String>,
    /// Whether it is there.
    pub present: bool,
    /// Bytes of its weights, once asked for: [`Checkpoints::ask_sizes`].
    pub bytes: Option<u64>,
    /// What is known of it that is wrong, missing or surprising, with the source.
    pub known: Vec<String>,
    /// Whether what is known of it is worse than surprising.
    pub known_bad: bool,
}

/// The training steps of `model`: a repository, of which one request tells every branch and its commit, or a directory that
/// keeps them under `revisions/`.
///
/// # Errors
/// As [`crate::load`] for a repository that is not there.
pub fn checkpoints(model: &str) -> Result<Checkpoints> {
    // A directory needs no Hub, nor an environment that makes sense of one.
    match locate(Path::new(model))? {
        Place::Local(path) => Checkpoints::in_directory(&path),
        Place::Hub(id) => Checkpoints::on(&Hub::from_env()?, &id.repo, &Silent),
    }
}

impl Checkpoints {
    fn in_directory(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Err(Error::NotFound { path: path.into(), what: "not a directory, so it has no revisions".into() });
        }
        let steps = revisions_in(path)
            .into_iter()
            .filter_map(|name| Some(Checkpoint { step: Some(step_of(&name)?), ..Checkpoint::new(name, None, true) }));
        let main = path.join("config.json").is_file().then(|| Checkpoint::new("main".into(), None, true));
        Ok(Self {
            model: path.display().to_string(),
            card: None,
            steps: steps.collect(),
            main,
            home: Home::Local(path.into()),
        })
    }

    /// The training steps of a repository on `hub`.
    ///
    /// # Errors
    /// As [`checkpoints`].
    pub fn on(hub: &Hub, repo: &RepoId, progress: &dyn Progress) -> Result<Self> {
        let card = card(repo.as_str());
        let id = ModelId::new(repo.clone(), "main")?;
        let refs = hub.refs(repo, &Telling::new(progress, "")).map_err(|e| explained(e, &id, card))?;
        let number = |name: &str| card.map_or_else(|| step_of(name), |card| card.step_of(name));
        let pattern = card.and_then(|card| card.checkpoints.as_ref());
        let mut steps: BTreeMap<u64, Checkpoint> = BTreeMap::new();
        // A cache alone cannot say what is missing from the Hub.
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
            checkpoint.tokens = pattern.map(|pattern| step * pattern.tokens_per_step);
            let known = card.map(|card| card.known_of(&checkpoint.revision)).unwrap_or_default();
            checkpoint.known = known.iter().map(|known| format!("{} ({})", known.what, known.source)).collect();
            checkpoint.known_bad = known.iter().any(|known| known.kind != KnownKind::Odd);
        }
        let main = refs.branches.get("main").map(|commit| Checkpoint::new("main".into(), Some(commit.clone()), true));
        Ok(Self {
            model: repo.to_string(),
            card,
            steps: steps.into_values().collect(),
            main,
            home: Home::Hub(repo.clone(), hub.clone()),
        })
    }

    /// The chosen steps, ascending, missing ones among them.
    ///
    /// # Errors
    /// [`Error::Input`] for a number that is no step of this model, or if nothing is chosen.
    pub fn select(&self, steps: &Steps) -> Result<Vec<&Checkpoint>> {
        if self.steps.is_empty() {
            return Err(Error::Input(format!("{} has no training steps", self.model)));
        }
        let numbers: Vec<u64> = self.steps.iter().filter_map(|checkpoint| checkpoint.step).collect();
        let chosen: BTreeSet<u64> = steps.select(&numbers)?.into_iter().collect();
        let is_chosen = |checkpoint: &&Checkpoint| checkpoint.step.is_some_and(|step| chosen.contains(&step));
        Ok(self.steps.iter().filter(is_chosen).collect())
    }

    /// The name by which [`crate::load`] finds a checkpoint of this model.
    pub fn id(&self, checkpoint: &Checkpoint) -> String {
        format!("{}@{}", self.model, checkpoint.revision)
    }

    /// The tensors of a checkpoint, without fetching it: see [`Tensors`].
    ///
    /// # Errors
    /// [`Error::NotFound`] if it is not there; what the Hub says.
    pub fn tensors(&self, checkpoint: &Checkpoint) -> Result<Tensors> {
        let missing = || Error::NotFound { path: self.id(checkpoint).into(), what: "is not there".into() };
        let listing = self.home.listing(checkpoint, &Silent)?.ok_or_else(missing)?;
        self.home.tensors(checkpoint, &listing)
    }

    /// Fills in the sizes of the chosen steps, for which each is asked for its files.
    ///
    /// # Errors
    /// As [`Checkpoints::select`]; [`Error::Hub`] if the network fails.
    pub fn ask_sizes(&mut self, steps: &Steps, progress: &dyn Progress) -> Result<()> {
        let chosen: Vec<Checkpoint> = self.select(steps)?.into_iter().cloned().collect();
        let listings = self.home.listings(&chosen, progress)?;
        for (asked, listing) in chosen.iter().zip(listings) {
            let bytes = listing.as_deref().and_then(|listing| weight_bytes(listing, &self.model));
            if let Some(checkpoint) = self.steps.iter_mut().find(|checkpoint| checkpoint.revision == asked.revision) {
                checkpoint.bytes = bytes;
            }
        }
        Ok(())
    }
}

/// Bytes of the weights that a loader would take.
fn weight_bytes(listing: &[Listed], model: &str) -> Option<u64> {
    let names: Vec<&str> = listing.iter().map(|file| file.path.as_str()).collect();
    let chosen = pricket_weights::choose_weights(&names, Path::new(model)).ok()?;
    let taken = |file: &&Listed| match chosen.strip_suffix(".index.json") {
        // The shards of `model.safetensors.index.json` are `model-00001-of-00002.safetensors`.
        Some(whole) => whole.split_once('.').is_some_and(|(stem, kind)| {
            file.path.starts_with(&format!("{stem}-")) && file.path.ends_with(&format!(".{kind}"))
        }),
        None => file.path == chosen,
    };
    Some(listing.iter().filter(taken).map(|file| file.size).sum())
}

impl Checkpoint {
    fn new(revision: String, commit: Option<String>, present: bool) -> Self {
        let (step, tokens, bytes) = (None, None, None);
        Self { revision, step, tokens, commit, present, bytes, known: Vec::new(), known_bad: false }
    }

    /// As JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "revision": self.revision, "step": self.step, "tokens": self.tokens, "commit": self.commit,
            "present": self.present, "bytes": self.bytes, "known": self.known, "known_bad": self.known_bad,
        })
    }
}

impl Home {
    /// The files of a checkpoint; `None` if it is not there.
    pub(crate) fn listing(&self, checkpoint: &Checkpoint, progress: &dyn Progress) -> Result<Option<Vec<Listed>>> {
        match (self, &checkpoint.commit) {
            (Home::Local(_), _) => self.directory(checkpoint).map(|directory| list(&directory)).transpose(),
            (Home::Hub(repo, hub), Some(commit)) => Ok(Some(hub.files(repo, commit, &Telling::new(progress, ""))?)),
            (Home::Hub(..), None) => Ok(None),
        }
    }

    /// The files of many, several at once.
    pub(crate) fn listings(&self, chosen: &[Checkpoint], progress: &dyn Progress) -> Result<Vec<Option<Vec<Listed>>>> {
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let out = Mutex::new(vec![None; chosen.len()]);
        let failed = Mutex::new(None);
        progress.begin("asking for the files of each step", chosen.len() as u64, "steps");
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(chosen.len()) {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        let Some(checkpoint) = chosen.get(i) else { return };
                        match self.listing(checkpoint, progress) {
                            Ok(listing) => lock(&out)[i] = listing,
                            Err(e) => {
                                lock(&failed).get_or_insert(e);
                                next.store(chosen.len(), Ordering::Relaxed);
                            }
                        }
                        progress.update(done.fetch_add(1, Ordering::Relaxed) as u64 + 1);
                    }
                });
            }
        });
        progress.end();
        match lock(&failed).take() {
            Some(e) => Err(e),
            None => Ok(std::mem::take(&mut *lock(&out))),
        }
    }

    /// Takes the hash of a file that lies in a directory; those of the Hub are listed with theirs.
    pub(crate) fn hash(&self, checkpoint: &Checkpoint, file: &mut Listed) -> Result<()> {
        if let (None, Some(directory)) = (&file.digest, self.directory(checkpoint)) {
            file.digest = Some(Digest::sha256_of(&directory.join(&file.path), &pricket_hub::Quiet)?);
        }
        Ok(())
    }

    /// The tensors of a checkpoint.
    pub(crate) fn tensors(&self, checkpoint: &Checkpoint, listing: &[Listed]) -> Result<Tensors> {
        match (self, &checkpoint.commit) {
            (Home::Hub(repo, hub), Some(commit)) => {
                let id = ModelId::new(repo.clone(), &checkpoint.revision)?;
                Tensors::of_listing(hub, &id, commit, listing)
            }
            _ => Tensors::local(&self.directory(checkpoint).unwrap_or_default()),
        }
    }

    /// The bytes of a small file of a checkpoint, if it has it.
    pub(crate) fn small_file(&self, checkpoint: &Checkpoint, listing: &[Listed], name: &str) -> Option<Vec<u8>> {
        let listed = listing.iter().find(|file| file.path == name && file.size < 1 << 20)?;
        match (self, &checkpoint.commit) {
            (Home::Hub(repo, hub), Some(commit)) => match hub.cached(repo, commit, listed) {
                Some(path) => std::fs::read(path).ok(),
                None => hub.read(repo, commit, listed, 0..listed.size, &pricket_hub::Quiet).ok(),
            },
            _ => std::fs::read(self.directory(checkpoint)?.join(name)).ok(),
        }
    }

    fn directory(&self, checkpoint: &Checkpoint) -> Option<PathBuf> {
        let Home::Local(root) = self else { return None };
        let directory = match checkpoint.revision.as_str() {
            "main" => root.clone(),
            revision => root.join("revisions").join(revision),
        };
        directory.is_dir().then_some(directory)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The files of a directory.
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
