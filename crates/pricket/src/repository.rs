//! From the name of a model to its files: a path, a directory's revision, or a repository of the Hub.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use pricket_hub::{Events, Hub, InUse, Listed, ModelId, Report, Snapshot, is_commit};
use pricket_nn::Progress;

use crate::cards::{Card, KnownKind, card};
use crate::{Error, Provenance, Result};

/// What is fetched beside the weights, as far as it is there. Python's tokenizers want the last three.
const SMALL: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "README.md",
];
/// None of these is larger.
const SMALL_BYTES: u64 = 16 << 20;

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A file or directory.
    Local(PathBuf),
    /// A revision of a repository.
    Hub(ModelId),
}

/// What is at `path` if something is, else the repository that is called so.
pub(crate) fn locate(path: &Path) -> Result<Place> {
    if path.exists() {
        return Ok(Place::Local(path.to_owned()));
    }
    let text = path.to_string_lossy();
    if let Some((directory, revision)) = text.rsplit_once('@')
        && Path::new(directory).is_dir()
    {
        return revision_in(Path::new(directory), revision).map(Place::Local);
    }
    repository(&text).map(Place::Hub).ok_or_else(|| Error::NotFound {
        path: path.to_owned(),
        what: "no such file or directory, and no repository of that name is known".into(),
    })
}

/// `owner/name@revision`, or a name that a card has.
fn repository(text: &str) -> Option<ModelId> {
    let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
    let id = match card(name) {
        Some(card) => card.id.parse().ok()?,
        None if name.contains('/') => name.parse().ok()?,
        None => return None,
    };
    let is_file = [".safetensors", ".bin", ".gguf", ".json", ".pt", ".pth"].iter().any(|end| name.ends_with(end));
    if is_file { None } else { ModelId::new(id, revision).ok() }
}

/// `revisions/REVISION` in a directory.
fn revision_in(directory: &Path, revision: &str) -> Result<PathBuf> {
    if revision == "main" {
        return Ok(directory.into());
    }
    let found = directory.join("revisions").join(revision);
    if !revision.contains(['/', '\\']) && revision != ".." && found.is_dir() {
        return Ok(found);
    }
    let known = revisions_in(directory);
    let what = if known.is_empty() {
        format!("{} has no revisions", directory.display())
    } else {
        format!("no revision {revision:?}; there are main, {}", known.join(", "))
    };
    Err(Error::NotFound { path: format!("{}@{revision}", directory.display()).into(), what })
}

/// The revisions that a directory keeps, steps by number.
pub(crate) fn revisions_in(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory.join("revisions")).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_by_key(|name| (pricket_hub::step_of(name), name.clone()));
    names
}

/// Files of a revision, in the cache.
#[derive(Debug)]
#[non_exhaustive]
pub struct Fetched {
    /// The directory that holds them.
    pub directory: PathBuf,
    /// The weight file, or the index of its shards.
    pub weights: PathBuf,
    /// Where they came from.
    pub provenance: Provenance,
    /// What it took.
    pub report: Report,
    /// What a careful user should know.
    pub warnings: Vec<String>,
    /// Keeps the files from being evicted.
    pub in_use: InUse,
}

/// Fetches what loading `model` needs, and does not load it: configuration, tokenizer, and its weights in the form that is
/// best read, shards as their index names them.
///
/// # Errors
/// [`Error::Repository`] with what is known of mirrors, [`Error::Hub`], [`Error::Offline`].
pub fn fetch(model: &str, hub: &Hub, progress: &dyn Progress) -> Result<Fetched> {
    match locate(Path::new(model))? {
        Place::Hub(id) => fetch_id(&id, hub, progress),
        Place::Local(path) => Err(Error::Input(format!("{} is here already", path.display()))),
    }
}

/// Passes on what a download tells, and keeps the notices.
pub(crate) struct Telling<'a> {
    progress: &'a dyn Progress,
    what: String,
    begun: AtomicBool,
    notices: Mutex<Vec<String>>,
}

impl<'a> Telling<'a> {
    pub(crate) fn new(progress: &'a dyn Progress, what: impl Into<String>) -> Self {
        Self { progress, what: what.into(), begun: AtomicBool::new(false), notices: Mutex::default() }
    }

    fn notices(&self) -> Vec<String> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        if *self.begun.get_mut() {
            self.progress.end();
        }
    }
}

impl Events for Telling<'_> {
    fn progress(&self, done: u64, total: u64) {
        if !self.begun.swap(true, Ordering::Relaxed) {
            self.progress.begin(&self.what, total, "bytes");
        }
        self.progress.update(done);
    }

    fn notice(&self, message: &str) {
        self.progress.notice(message);
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).push(message.into());
    }

    fn cancelled(&self) -> bool {
        self.progress.cancelled()
    }
}

pub(crate) fn fetch_id(id: &ModelId, hub: &Hub, progress: &dyn Progress) -> Result<Fetched> {
    Revision::find(id, hub, progress)?.fetch(hub, progress)
}

/// A revision that has been found, and of which nothing has been fetched.
pub(crate) struct Revision {
    id: ModelId,
    pub(crate) commit: String,
    pub(crate) listing: Vec<Listed>,
    chosen: Chosen,
    pub(crate) warnings: Vec<String>,
}

impl Revision {
    pub(crate) fn find(id: &ModelId, hub: &Hub, progress: &dyn Progress) -> Result<Self> {
        let card = card(id.repo.as_str());
        let explain = |e| explained(e, id, card);
        let asking = Telling::new(progress, String::new());
        let commit = hub.resolve(id, &asking).map_err(explain)?;
        let listing = hub.files(&id.repo, &commit, &asking).map_err(explain)?;
        // An answer from the cache instead of the network is worth a warning, a retry is not.
        let mut warnings = asking.notices();
        warnings.retain(|notice| notice.contains("going on with"));
        warnings.extend(known_warnings(id, &commit, hub, card));
        Ok(Self { chosen: Chosen::among(&listing, id)?, id: id.clone(), commit, listing, warnings })
    }

    fn get(&self, wanted: &[Listed], hub: &Hub, progress: &dyn Progress) -> Result<Snapshot> {
        let telling = Telling::new(progress, format!("fetching {}", self.id));
        let fetched = hub.fetch(&self.id, &self.commit, wanted, &self.listing, &telling);
        fetched.map_err(|e| explained(e, &self.id, card(self.id.repo.as_str())))
    }

    /// Configuration, tokenizer, and the index of shards if there is one.
    pub(crate) fn fetch_small(&self, hub: &Hub, progress: &dyn Progress) -> Result<Snapshot> {
        self.get(&self.chosen.fetch_first(), hub, progress)
    }

    fn fetch(self, hub: &Hub, progress: &dyn Progress) -> Result<Fetched> {
        let small = self.fetch_small(hub, progress)?;
        let weights = small.directory.join(&self.chosen.weights.path);
        let large =
            if self.chosen.is_index() { shards(&self.listing, &weights)? } else { vec![self.chosen.weights.clone()] };
        let wanted = [self.chosen.fetch_first(), large].concat();
        let whole = self.get(&wanted, hub, progress)?;
        let mut report = whole.report;
        report.received += small.report.received;
        report.repeated += small.report.repeated;
        report.on_disk -= small.report.received - small.report.repeated;
        let ModelId { repo, revision } = &self.id;
        Ok(Fetched {
            provenance: Provenance::of_repository(repo, revision, &self.commit, &whole.directory, &wanted),
            directory: whole.directory,
            weights,
            report,
            warnings: self.warnings,
            in_use: whole.in_use,
        })
    }
}

/// Which files of a revision are its weights.
pub(crate) struct Chosen {
    /// The file, or the index.
    pub(crate) weights: Listed,
    small: Vec<Listed>,
}

impl Chosen {
    pub(crate) fn among(listing: &[Listed], id: &ModelId) -> Result<Self> {
        let names: Vec<&str> =
            listing.iter().map(|file| file.path.as_str()).filter(|path| !path.contains('/')).collect();
        let place = PathBuf::from(id.to_string());
        let name = pricket_weights::choose_weights(&names, &place)?;
        let find = |name: &str| listing.iter().find(|file| file.path == name).cloned();
        let missing = || Error::NotFound { path: place.clone(), what: format!("{name} is not listed") };
        let small = SMALL.iter().filter_map(|name| find(name)).filter(|file| file.size <= SMALL_BYTES);
        Ok(Self { weights: find(name).ok_or_else(missing)?, small: small.collect() })
    }

    pub(crate) fn is_index(&self) -> bool {
        self.weights.path.ends_with(".index.json")
    }

    /// The small files, an index among them.
    pub(crate) fn fetch_first(&self) -> Vec<Listed> {
        let index = self.is_index().then(|| self.weights.clone()).filter(|index| index.size <= SMALL_BYTES);
        self.small.iter().cloned().chain(index).collect()
    }
}

/// The shards that the index at `path` names, as listed.
fn shards(listing: &[Listed], path: &Path) -> Result<Vec<Listed>> {
    let bytes = std::fs::read(path).map_err(|error| Error::Io { path: path.into(), error })?;
    let names: std::collections::BTreeSet<String> = pricket_weights::shard_map(&bytes, path)?.into_values().collect();
    let listed = |name: String| {
        listing.iter().find(|file| file.path == name).cloned().ok_or_else(|| Error::NotFound {
            path: path.into(),
            what: format!("it names {name}, which the revision does not have"),
        })
    };
    names.into_iter().map(listed).collect()
}

/// What the card knows of a revision that should keep nobody from sleeping, and what should.
fn known_warnings(id: &ModelId, commit: &str, hub: &Hub, card: Option<&Card>) -> Vec<String> {
    let Some(card) = card else { return Vec::new() };
    // A commit is what its branches are.
    let mut names = vec![id.revision.clone()];
    if is_commit(&id.revision) {
        let refs = hub.cached_refs(&id.repo).unwrap_or_default();
        names.extend(refs.branches.into_iter().filter(|(_, at)| at == commit).map(|(name, _)| name));
    }
    let known = names.iter().flat_map(|name| card.known_of(name).into_iter().map(move |known| (name, known)));
    let alarming = known.filter(|(_, known)| matches!(known.kind, KnownKind::Wrong | KnownKind::Suspect));
    let mut out: Vec<String> =
        alarming.map(|(name, known)| format!("{}@{name} {} ({})", card.id, known.what, known.source)).collect();
    if card.non_commercial {
        out.push(format!("{}: licence {}, no commercial use", card.id, card.licence));
    }
    out
}

/// An error of the Hub with what the card has to say.
pub(crate) fn explained(e: pricket_hub::Error, id: &ModelId, card: Option<&Card>) -> Error {
    use pricket_hub::Error as H;
    let local = || {
        let owner = id.repo.as_str().split('/').next().unwrap_or_default();
        if Path::new(owner).is_dir() {
            format!(" (nor is there a file or directory {})", id.repo)
        } else {
            String::new()
        }
    };
    match (e, card) {
        (H::Repository { what, .. }, Some(card)) if card.gone.is_some() => {
            let gone = card.gone.as_deref().unwrap_or_default();
            let instead = match &card.mirrors[..] {
                [] => "no mirror is known; give a directory that has it".into(),
                mirrors => format!("copies by others, not compared with the original: {}", mirrors.join(", ")),
            };
            Error::Repository { id: id.to_string(), what: format!("{what}; it left the Hub in {gone}; {instead}") }
        }
        (H::Repository { what, .. }, _) => Error::Repository { id: id.to_string(), what: format!("{what}{}", local()) },
        (H::Revision { repo, revision, known }, Some(card)) => {
            let missing = card.known_of(&revision).into_iter().find(|known| known.kind == KnownKind::Missing);
            let why = missing.map_or(String::new(), |known| format!("; it {} ({})", known.what, known.source));
            let e = H::Revision { repo, revision, known };
            Error::Repository { id: id.to_string(), what: format!("{e}{why}") }
        }
        (e, _) => e.into(),
    }
}
