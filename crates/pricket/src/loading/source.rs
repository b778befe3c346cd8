//! Names of models, and how a path or id is resolved to files or a repository.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use pricket_hub::ModelId;

use crate::loading::embedded::Embedded;
use crate::suites::cards::{card, cards};
use crate::{Error, Result};

/// The name of a model: a path or repository, with an optional revision and an optional weight file.
///
/// Every function that takes a model takes `impl Into<Source>`, so a path or an id can be passed directly. A revision
/// can follow the id after an `@`. A directory that contains training steps takes `@REVISION` too.
///
/// ```
/// use pricket::Source;
///
/// let source = Source::new("EleutherAI/pythia-410m").revision("step3000");
/// assert_eq!(source, Source::from("EleutherAI/pythia-410m@step3000"));
/// assert_eq!(source.to_string(), "EleutherAI/pythia-410m@step3000");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The path or id as given, without the revision that [`split`] found.
    model: PathBuf,
    revision: Option<String>,
    file: Option<String>,
}

impl<P: AsRef<Path>> From<P> for Source {
    fn from(model: P) -> Self {
        Self::new(model)
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.model.display())?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))?;
        self.file.iter().try_for_each(|file| write!(f, "/{file}"))
    }
}

impl Source {
    /// Names a model by its path or by the id of its repository, each optionally followed by `@REVISION`. An existing
    /// path takes precedence.
    pub fn new(model: impl AsRef<Path>) -> Self {
        let model = model.as_ref();
        match split(model) {
            Some((model, revision)) => Self { model: model.into(), revision: Some(revision.into()), file: None },
            None => Self { model: model.to_owned(), revision: None, file: None },
        }
    }

    /// Chooses a branch, tag or commit, such as `step3000`. For a directory, chooses one of the training steps in it.
    #[must_use]
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        // An `@` in the name is then part of a path, or a second revision, which `locate` refuses.
        if let Some(before) = self.revision.take() {
            let name: OsString = [self.model.as_os_str(), "@".as_ref(), before.as_ref()].into_iter().collect();
            self.model = name.into();
        }
        self.revision = Some(revision.into());
        self
    }

    /// Chooses a weight file of the repository or directory, instead of the preferred one.
    #[must_use]
    pub fn file(mut self, name: impl Into<String>) -> Self {
        self.file = Some(name.into());
        self
    }

    /// Returns the embedded model of this name, unless a revision or file is chosen or a path of this name exists.
    pub(crate) fn embedded(&self) -> Option<&'static Embedded> {
        let is_plain = self.revision.is_none() && self.file.is_none() && !self.model.exists();
        self.model.to_str().filter(|_| is_plain).and_then(Embedded::find)
    }

    /// Resolves the name. Tried in this order: an existing path or a training step in it, the directory of an embedded
    /// model in the source tree of this program, and a repository.
    ///
    /// # Errors
    /// Returns [`Error::NotFound`] if nothing has this name, and [`Error::Source`] if a revision or a file is chosen
    /// but the path is a file.
    pub(crate) fn locate(&self) -> Result<Place> {
        match self.directory_or_file()? {
            Some(path) => match &self.file {
                Some(file) if path.is_file() => {
                    Err(Error::Source(format!("file {file:?}: {} is a file, not a directory", path.display())))
                }
                Some(file) => Ok(Place::Local(path.join(file))),
                None => Ok(Place::Local(path)),
            },
            None => self.repository(),
        }
    }

    fn directory_or_file(&self) -> Result<Option<PathBuf>> {
        let embedded = || Some(Embedded::find(self.model.to_str()?)?.directory()).filter(|path| path.is_dir());
        let there = Some(self.model.clone()).filter(|path| path.exists()).or_else(embedded);
        match (there, &self.revision) {
            (Some(path), Some(revision)) if path.is_file() => {
                Err(Error::Source(format!("{} is a file, so revision {revision:?} does not exist", path.display())))
            }
            (Some(path), Some(revision)) => revision_in(&path, revision).map(Some),
            (there, _) => Ok(there),
        }
    }

    /// Resolves the name as a revision of a repository: `owner/name`, or a name that a model card lists.
    fn repository(&self) -> Result<Place> {
        let not_found = || Error::NotFound {
            path: self.to_string().into(),
            what: "no such file or directory, and no known repository of this name".into(),
        };
        let text = self.model.to_string_lossy();
        let pasted = pasted(&text);
        let text = pasted.as_deref().unwrap_or(&text);
        let (name, pasted_revision) = match text.split_once('@') {
            Some((_, second)) if self.revision.is_some() => {
                return Err(Error::Source(format!("{self}: two revisions, {second:?} and {:?}", self.revision_name())));
            }
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let name = name.trim_end_matches('/');
        let is_file = [".safetensors", ".bin", ".gguf", ".json", ".pt", ".pth"].iter().any(|end| name.ends_with(end));
        let known = card(name);
        let repo = match known {
            Some(card) => card.id.parse().ok(),
            None if name.contains('/') && !is_file => name.parse().ok(),
            None => None,
        };
        let repo = repo.ok_or_else(not_found)?;
        let revision = pasted_revision.unwrap_or(self.revision_name()).trim_end_matches('/');
        // If a repository holds several models, the name of one of them implies its weight file.
        let is_whole =
            |id: &str| cards().iter().filter(|other| other.id == id).count() > 1 && names_repository(id, name);
        let file = known.filter(|card| !is_whole(&card.id)).and_then(|card| card.file.clone());
        Ok(Place::Hub(ModelId::new(repo, revision)?, self.file.clone().or(file)))
    }

    fn revision_name(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

/// Splits a name at the `@` before its revision. Existing paths are not split, and URLs are not split either.
fn split(model: &Path) -> Option<(&str, &str)> {
    if model.exists() {
        return None;
    }
    let text = model.to_str()?;
    let is_local = |there: &str| Path::new(there).exists();
    match text.rsplit_once('@') {
        Some((there, revision)) if is_local(there) => Some((there, revision)),
        _ if text.contains("://") => None,
        _ => text.split_once('@'),
    }
}

/// Returns whether `name` is the id of a repository, with or without its owner.
fn names_repository(id: &str, name: &str) -> bool {
    let bare = id.split_once('/').map_or(id, |(_, bare)| bare);
    [id, bare].iter().any(|known| known.eq_ignore_ascii_case(name))
}

/// Location of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A file or directory that exists.
    Local(PathBuf),
    /// A revision of a repository, and the requested weight file.
    Hub(ModelId, Option<String>),
}

/// Returns the id in a URL of the Hub, such as `https://huggingface.co/owner/name/tree/step3000`.
fn pasted(text: &str) -> Option<String> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"))?;
    let (host, path) = rest.split_once('/')?;
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_default();
    let own = endpoint.split_once("://").is_some_and(|(_, own)| own.trim_end_matches('/') == host);
    if !own && !["huggingface.co", "www.huggingface.co", "hf.co"].contains(&host) {
        return None;
    }
    let path = &path[..path.find(['?', '#']).unwrap_or(path.len())];
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let (owner, name) = (parts.next()?, parts.next()?);
    match (parts.next(), parts.next()) {
        // These path components are followed by a revision, then by a file.
        (Some("tree" | "blob" | "resolve" | "commit" | "commits"), Some(revision)) => {
            Some(format!("{owner}/{name}@{revision}"))
        }
        _ => Some(format!("{owner}/{name}")),
    }
}

/// Returns the path of a revision in a directory, or an error that lists the revisions.
fn revision_in(directory: &Path, revision: &str) -> Result<PathBuf> {
    if revision == "main" {
        return Ok(directory.into());
    }
    if let Some(found) = revision_path(directory, revision) {
        return Ok(found);
    }
    let known = revisions_in(directory);
    let what = if known.is_empty() {
        format!("{} has no revisions", directory.display())
    } else {
        format!("no revision {revision:?}; the revisions are main, {}", known.join(", "))
    };
    Err(Error::NotFound { path: format!("{}@{revision}", directory.display()).into(), what })
}

/// Returns the path of a revision in a directory: in `revisions/`, or directly in the directory, where training
/// programs write checkpoints.
pub(crate) fn revision_path(directory: &Path, revision: &str) -> Option<PathBuf> {
    let is_name = !revision.contains(['/', '\\']) && !["", ".", ".."].contains(&revision);
    let below = directory.join("revisions").join(revision);
    let beside = || Some(directory.join(revision)).filter(|path| step_in(revision).is_some() && holds_model(path));
    if !is_name {
        return None;
    }
    Some(below).filter(|path| path.is_dir()).or_else(beside)
}

/// Returns the revisions in a directory, sorted by training step: all entries of `revisions/`, or if there are none,
/// the subdirectories that contain a model and whose name ends in a number.
pub(crate) fn revisions_in(directory: &Path) -> Vec<String> {
    let names_in = |directory: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let mut names = names_in(&directory.join("revisions"));
    if names.is_empty() {
        names = names_in(directory);
        names.retain(|name| step_in(name).is_some() && holds_model(&directory.join(name)));
    }
    names.sort_by_key(|name| (step_in(name), name.clone()));
    names
}

/// Returns the training step in the name of a directory: `step3000`, `checkpoint-500` (transformers' Trainer),
/// `global_step500` (DeepSpeed), `iter_0001000` (Megatron), or any other name that ends in a number.
pub(crate) fn step_in(name: &str) -> Option<u64> {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    pricket_hub::step_of(name).or_else(|| name[name.len() - digits..].parse().ok())
}

/// Returns whether a directory contains weights with a configuration.
pub(crate) fn holds_model(directory: &Path) -> bool {
    // GGUF and GGML files contain the configuration. That of native `.pth` files follows from the shapes.
    let is_whole = |weights: PathBuf| {
        let name = weights.file_name().unwrap_or_default().to_string_lossy();
        let is_complete = name.ends_with(".pth") || name.ends_with(".gguf") || name.contains("ggml");
        is_complete || directory.join("config.json").is_file()
    };
    pricket_weights::find_weights(directory).is_ok_and(is_whole)
}
