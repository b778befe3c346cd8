//! Repositories of the Hub: choosing and fetching the files of a revision that a model needs.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use pricket_hub::{Hub, InUse, Listed, ModelId, Phase, Refs, Report, Settings, Snapshot};
use pricket_nn::Progress;
use pricket_weights::parts_of;

use crate::loading::changes::Changes;
use crate::loading::family::{checked_family, remove_four_bit};
use crate::loading::provenance::Provenance;
use crate::loading::small_files::{TOKENIZER_FILES, TOKENIZERS, at, read_json};
use crate::loading::source::{Place, Source};
use crate::suites::cards::{Card, KnownKind, card};
use crate::{Error, Result};

/// Files that are fetched in addition to the weights, if they exist.
const SMALL: [&str; 14] = [
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
];
/// Size limit in bytes of these files and of an index of shards.
const SMALL_BYTES: u64 = 6 << 20;

/// Files of a revision in the cache.
#[derive(Debug)]
#[non_exhaustive]
pub struct Fetched {
    /// The directory that contains the files.
    pub directory: PathBuf,
    /// The weight file, or the index of its shards.
    pub weights: PathBuf,
    /// Origin of the files.
    pub provenance: Provenance,
    /// Statistics of the download.
    pub report: Report,
    /// Warnings about the revision.
    pub warnings: Vec<String>,
    /// Guard that protects the files from eviction.
    pub in_use: InUse,
}

/// Fetches the files needed to load `model` without loading it: configuration, tokenizer, and the weights in the
/// preferred form, including all shards.
///
/// # Errors
/// Returns [`Error::Repository`] or [`Error::Revision`] if the repository or revision does not exist,
/// [`Error::Offline`] if files are missing in the cache and requests are disabled, and [`Error::Hub`] for other
/// failures of the download. Returns [`Error::Source`] if `model` is a local path.
pub fn fetch(model: impl Into<Source>, hub: &Hub, progress: &dyn Progress) -> Result<Fetched> {
    match model.into().locate()? {
        Place::Hub(id, file) => fetch_id(&id, file.as_deref(), &Changes::default(), hub, progress),
        Place::Local(path) => Err(Error::Source(format!("{} is already local", path.display()))),
    }
}

/// A progress that renames a download and keeps its fallback messages.
pub(crate) struct RenamedProgress<'a> {
    progress: &'a dyn Progress,
    what: String,
    fallbacks: Mutex<Vec<String>>,
}

impl<'a> RenamedProgress<'a> {
    pub(crate) fn new(progress: &'a dyn Progress, what: impl Into<String>) -> Self {
        Self { progress, what: what.into(), fallbacks: Mutex::default() }
    }

    /// Returns the messages about using the cache instead of the network.
    fn fallbacks(&self) -> Vec<String> {
        self.fallbacks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Progress for RenamedProgress<'_> {
    fn begin(&self, _: &str, total: u64, unit: &str) {
        self.progress.begin(&self.what, total, unit);
    }

    fn update(&self, done: u64) {
        self.progress.update(done);
    }

    fn phase(&self, file: &str, phase: Phase) {
        self.progress.phase(file, phase);
    }

    fn fallback(&self, message: &str) {
        self.fallbacks.lock().unwrap_or_else(PoisonError::into_inner).push(message.into());
    }

    fn notice(&self, message: &str) {
        self.progress.notice(message);
    }

    fn end(&self) {
        self.progress.end();
    }

    fn cancelled(&self) -> bool {
        self.progress.cancelled()
    }
}

/// Fetches a revision. `file` overrides the preferred weight file.
pub(crate) fn fetch_id(
    id: &ModelId,
    file: Option<&str>,
    changes: &Changes,
    hub: &Hub,
    progress: &dyn Progress,
) -> Result<Fetched> {
    let found = Revision::find(id, file, hub, progress)?;
    found.fetch(changes, hub, progress)
}

/// Fetches a revision at a known commit, so that a branch that moves in the meantime has no effect.
pub(crate) fn fetch_commit(
    id: &ModelId,
    commit: &str,
    file: Option<&str>,
    hub: &Hub,
    progress: &dyn Progress,
) -> Result<Fetched> {
    let found = Revision::at(id, commit.to_owned(), file, hub, &RenamedProgress::new(progress, ""))?;
    found.fetch(&Changes::default(), hub, progress)
}

/// Fetches the tokenizer of a repository for a model that has none.
pub(crate) fn fetch_tokenizer(repo: &str, hub: &Hub, progress: &dyn Progress) -> Result<PathBuf> {
    let id: ModelId = repo.parse()?;
    let telling = RenamedProgress::new(progress, format!("fetching the tokenizer of {id}"));
    let commit = hub.resolve(&id, &telling)?;
    let listing = hub.files(&id.repo, &commit, &telling)?.files;
    let find = |name: &str| listing.iter().find(|file| file.path == name && file.size <= SMALL_BYTES).cloned();
    let missing = || Error::NotFound { path: "tokenizer.json".into(), what: format!("not in the repository {id}") };
    let found = TOKENIZERS.iter().find_map(|name| find(name)).ok_or_else(missing)?;
    let mut wanted = vec![found.clone()];
    wanted.extend(TOKENIZER_FILES.iter().filter_map(|name| find(name)));
    let snapshot = hub.fetch(&id, &commit, &wanted, &listing, &telling)?;
    Ok(snapshot.directory.join(found.path))
}

/// Fetches the files of an adapter and returns their directory in the cache.
#[cfg(feature = "train")]
pub(crate) fn fetch_adapter(id: &ModelId, hub: &Hub, progress: &dyn Progress) -> Result<PathBuf> {
    let telling = RenamedProgress::new(progress, format!("fetching the adapter {id}"));
    let commit = hub.resolve(id, &telling).map_err(|e| explained(e, id, None))?;
    let listing = hub.files(&id.repo, &commit, &telling)?.files;
    let find = |name: &str| listing.iter().find(|file| file.path == name).cloned();
    let weights = find("adapter_model.safetensors").or_else(|| find("adapter_model.bin"));
    let (Some(config), Some(weights)) = (find("adapter_config.json"), weights) else {
        let what = format!("{id} has no adapter_config.json with an adapter_model.safetensors or adapter_model.bin");
        return Err(Error::NotFound { path: "adapter_config.json".into(), what });
    };
    Ok(hub.fetch(id, &commit, &[config, weights], &listing, &telling)?.directory)
}

/// A revision whose commit and files are known, before anything is fetched.
pub(crate) struct Revision {
    id: ModelId,
    pub(crate) commit: String,
    pub(crate) listing: Vec<Listed>,
    chosen: Chosen,
    pub(crate) warnings: Vec<String>,
}

impl Revision {
    pub(crate) fn find(id: &ModelId, file: Option<&str>, hub: &Hub, progress: &dyn Progress) -> Result<Self> {
        let asking = RenamedProgress::new(progress, "");
        let commit = hub.resolve(id, &asking).map_err(|e| explained(e, id, card(id.repo.as_str())))?;
        Self::at(id, commit, file, hub, &asking)
    }

    fn at(id: &ModelId, commit: String, file: Option<&str>, hub: &Hub, asking: &RenamedProgress<'_>) -> Result<Self> {
        let card = card(id.repo.as_str());
        let listing = hub.files(&id.repo, &commit, asking).map_err(|e| explained(e, id, card))?.files;
        let mut warnings = asking.fallbacks();
        warnings.extend(card.map(|card| known_warnings(card, id, &commit, hub)).unwrap_or_default());
        Ok(Self { chosen: Chosen::among(&listing, file, id)?, id: id.clone(), commit, listing, warnings })
    }

    /// Returns the path of the weight file, or of the index of its shards.
    pub(crate) fn weights(&self) -> &str {
        &self.chosen.weights.path
    }

    fn explained(&self, e: pricket_hub::Error) -> Error {
        explained(e, &self.id, card(self.id.repo.as_str()))
    }

    /// Fetches configuration, tokenizer, and the index of shards if there is one.
    pub(crate) fn fetch_small(&self, hub: &Hub, progress: &dyn Progress) -> Result<Snapshot> {
        let telling = RenamedProgress::new(progress, format!("fetching {}", self.id));
        let first = self.chosen.fetch_first();
        hub.fetch_part(&self.id.repo, &self.commit, &first, &telling).map_err(|e| self.explained(e))
    }

    fn fetch(self, changes: &Changes, hub: &Hub, progress: &dyn Progress) -> Result<Fetched> {
        let small = self.fetch_small(hub, progress)?;
        // The configuration is checked before gigabytes of weights are fetched. Some weight files need no config.json.
        let config = small.directory.join("config.json");
        if !config.is_file() && !self.chosen.by_name && !self.chosen.may_stand_alone() {
            let what = format!("not in the repository {}; a checkpoint needs its config.json", self.id);
            return Err(Error::NotFound { path: "config.json".into(), what });
        }
        if config.is_file() {
            let mut json = read_json(&config)?;
            remove_four_bit(&mut json);
            changes.apply(&mut json)?;
            checked_family(&json).map_err(|e| at(&config, e))?;
        }
        let weights = small.directory.join(&self.chosen.weights.path);
        let large = match parts_of(&self.chosen.weights.path) {
            _ if self.chosen.is_index() => shards(&self.listing, &weights)?,
            Some(parts) => parts.iter().map(|part| listed(&self.listing, &weights, part)).collect::<Result<_>>()?,
            None => vec![self.chosen.weights.clone()],
        };
        let wanted = [self.chosen.fetch_first(), large].concat();
        let telling = RenamedProgress::new(progress, format!("fetching {}", self.id));
        let whole =
            hub.fetch(&self.id, &self.commit, &wanted, &self.listing, &telling).map_err(|e| self.explained(e))?;
        let mut report = whole.report;
        report.received += small.report.received;
        report.repeated += small.report.repeated;
        report.on_disk = report.on_disk.saturating_sub(small.report.received - small.report.repeated);
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

fn is_index(path: &str) -> bool {
    path.ends_with(".index.json")
}

/// The files of a revision that are chosen for loading.
pub(crate) struct Chosen {
    /// The weight file, or the index of its shards.
    pub(crate) weights: Listed,
    /// Whether the user named the weight file.
    by_name: bool,
    small: Vec<Listed>,
}

impl Chosen {
    pub(crate) fn among(listing: &[Listed], file: Option<&str>, id: &ModelId) -> Result<Self> {
        let names: Vec<&str> =
            listing.iter().map(|file| file.path.as_str()).filter(|path| !path.contains('/')).collect();
        let place = PathBuf::from(id.to_string());
        let named = |file| {
            let others: Vec<&str> = names.iter().copied().filter(|name| !SMALL.contains(name)).collect();
            let what = format!("no file {file:?}; the files are {}", others.join(", "));
            names.iter().copied().find(|name| *name == file).ok_or(Error::NotFound { path: place.clone(), what })
        };
        let name = match file {
            Some(file) => named(file)?,
            None => pricket_weights::choose_weights(&names, &place)?,
        };
        let find = |name: &str| listing.iter().find(|file| file.path == name).cloned();
        let missing = || Error::NotFound { path: place.clone(), what: format!("{name} is not listed") };
        let tokenizer = TOKENIZERS.into_iter().find(|name| find(name).is_some());
        let small = ["config.json"].into_iter().chain(tokenizer).chain(is_index(name).then_some(name));
        if let Some(large) = small.filter_map(find).find(|file| file.size > SMALL_BYTES) {
            let what = format!("the file has {} bytes; the limit for its kind is {SMALL_BYTES}", large.size);
            let error = pricket_weights::Error::Corrupt { path: place.join(large.path), what };
            return Err(Error::Corrupt { tensor: None, error });
        }
        let small = SMALL.iter().filter_map(|name| find(name)).filter(|file| file.size <= SMALL_BYTES);
        Ok(Self { by_name: file.is_some(), weights: find(name).ok_or_else(missing)?, small: small.collect() })
    }

    pub(crate) fn is_index(&self) -> bool {
        is_index(&self.weights.path)
    }

    /// Returns whether the configuration may follow from the weight file itself.
    fn may_stand_alone(&self) -> bool {
        let path = Path::new(&self.weights.path);
        let is_ggml = self.weights.path.contains("ggml");
        path.extension().is_some_and(|end| end == "gguf" || end == "pth" || (end == "bin" && is_ggml))
    }

    /// Returns the small files, including the index of shards.
    pub(crate) fn fetch_first(&self) -> Vec<Listed> {
        let index = self.is_index().then(|| self.weights.clone());
        self.small.iter().cloned().chain(index).collect()
    }
}

/// Returns the shards that the index at `path` names.
fn shards(listing: &[Listed], path: &Path) -> Result<Vec<Listed>> {
    let bytes = std::fs::read(path).map_err(|error| Error::Io { path: path.into(), error })?;
    let names: std::collections::BTreeSet<String> = pricket_weights::shard_map(&bytes, path)?.into_values().collect();
    names.iter().map(|name| listed(listing, path, name)).collect()
}

/// Returns the listing of a file that `path` needs.
fn listed(listing: &[Listed], path: &Path, name: &str) -> Result<Listed> {
    listing.iter().find(|file| file.path == name).cloned().ok_or_else(|| Error::NotFound {
        path: path.into(),
        what: format!("the shard {name} is missing in the revision"),
    })
}

/// Returns the card's warnings for a snapshot directory, using the branches that its cache knows.
pub(crate) fn snapshot_warnings(provenance: &Provenance) -> Vec<String> {
    let snapshot = || {
        let (repo, commit) = (provenance.repo.as_deref()?, provenance.commit.as_deref()?);
        let cache = std::path::absolute(provenance.directory.as_deref()?).ok()?;
        let mut settings = Settings::new("https://huggingface.co", cache.ancestors().nth(3)?);
        settings.offline = true;
        let id = ModelId::new(repo.parse().ok()?, commit).ok()?;
        Some(known_warnings(card(repo)?, &id, commit, &Hub::new(settings)))
    };
    snapshot().unwrap_or_default()
}

/// Returns the card's warnings for a revision.
fn known_warnings(card: &Card, id: &ModelId, commit: &str, hub: &Hub) -> Vec<String> {
    let mut names = vec![id.revision.clone()];
    if card.step_of(&id.revision).is_none() && id.revision != "main" && !card.known.is_empty() {
        // The revision is a commit, tag or pull request: warnings for branches at the same commit apply.
        let here = |refs: &Refs| {
            let at = refs.branches.iter().filter(|(_, at)| *at == commit);
            at.map(|(name, _)| name.clone()).collect::<Vec<_>>()
        };
        let mut found = hub.cached_refs(&id.repo).map(|refs| here(&refs)).unwrap_or_default();
        if found.is_empty() && !hub.settings().offline {
            found = hub.refs(&id.repo, &pricket_hub::NoProgress).map(|refs| here(&refs)).unwrap_or_default();
        }
        names.extend(found);
    }
    let known = names.iter().flat_map(|name| card.known_of(name).into_iter().map(move |known| (name, known)));
    let alarming = known.filter(|(_, known)| matches!(known.kind, KnownKind::Wrong | KnownKind::Suspect));
    let mut out: Vec<String> =
        alarming.map(|(name, known)| format!("{}@{name} {} ({})", card.id, known.what, known.source)).collect();
    if card.non_commercial {
        out.push(format!("{}: license {}, no commercial use", card.id, card.license));
    }
    out
}

/// Adds the information of the model card to an error of the Hub.
pub(crate) fn explained(e: pricket_hub::Error, id: &ModelId, card: Option<&Card>) -> Error {
    use pricket_hub::Error as H;
    let local = || {
        let owner = id.repo.as_str().split('/').next().unwrap_or_default();
        if Path::new(owner).is_dir() { format!(" (and the path {} does not exist)", id.repo) } else { String::new() }
    };
    match (e, card) {
        (H::Repository { what, .. }, Some(card)) if card.gone.is_some() => {
            let gone = card.gone.as_deref().unwrap_or_default();
            let instead = match &card.mirrors[..] {
                [] => "no mirror is known; use a local directory with the model".into(),
                mirrors => format!("copies by others, not verified against the original: {}", mirrors.join(", ")),
            };
            Error::Repository { id: id.to_string(), what: format!("{what}; removed from the Hub in {gone}; {instead}") }
        }
        (H::Repository { what, .. }, _) => Error::Repository { id: id.to_string(), what: format!("{what}{}", local()) },
        (H::Revision { repo, revision, known }, card) => {
            let missing = card.map(|card| card.known_of(&id.revision)).unwrap_or_default();
            let missing = missing.into_iter().find(|known| known.kind == KnownKind::Missing);
            let why = missing.map_or(String::new(), |known| format!("; it {} ({})", known.what, known.source));
            let what = format!("{}{why}", H::Revision { repo, revision, known: known.clone() });
            Error::Revision { id: id.to_string(), known, what }
        }
        (e, _) => e.into(),
    }
}
