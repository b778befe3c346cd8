//! Tensors of single revisions, read without downloading whole files.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use pricket_hub::{Hub, Listed, ModelId, NoProgress};
use pricket_weights::{
    Bytes, Entry, Format, ReadAt, Store, open_one, open_remote, parts_of, read_tensor, shard_map, sniff, sniff_remote,
};

use crate::loading::containers;
use crate::loading::forms::forms;
use crate::loading::provenance::Provenance;
use crate::loading::repository::{Chosen, Revision};
use crate::loading::source::{Place, Source};
use crate::{Error, Result};

/// The tensors of a revision. Each tensor is read on request.
///
/// For a repository on the Hub, only the headers and the requested tensors are fetched: one matrix of 154 training
/// steps costs 154 times the matrix and some kilobytes. Files in the cache are read from there.
///
/// ```
/// let tensors = pricket::suites::tensors(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny@step64"))?;
/// let norm = tensors.read("gpt_neox.final_layer_norm.weight")?;
/// assert_eq!(norm.dims(), [128]);
/// # Ok::<(), pricket::Error>(())
/// ```
pub struct Tensors {
    provenance: Provenance,
    /// Maps the name of a weight file to its location.
    files: BTreeMap<String, File>,
    /// Maps the name of a tensor to its file.
    map: BTreeMap<String, String>,
    opened: Mutex<BTreeMap<String, Arc<dyn Store>>>,
}

/// Location of a weight file.
#[derive(Clone)]
enum File {
    Local(PathBuf),
    Remote(Arc<RemoteFile>),
}

/// Opens the tensors of `model`, which is named as in [`crate::load`]. Tensors of a local GGUF or GGML file get the
/// names of the Hub.
///
/// # Errors
/// Returns the errors of [`crate::load`] that do not depend on the weights.
pub fn tensors(model: impl Into<Source>) -> Result<Tensors> {
    match model.into().locate()? {
        Place::Local(path) => Tensors::local(&path),
        Place::Hub(id, file) => Tensors::in_repository(&Hub::from_env()?, &id, file.as_deref()),
    }
}

impl Tensors {
    pub(crate) fn local(path: &Path) -> Result<Self> {
        let weights = if path.is_dir() { pricket_weights::find_weights(path)? } else { path.to_owned() };
        let name = weights.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let folder = weights.parent().unwrap_or(Path::new("")).to_owned();
        let read = |index: &str| read_index(&folder.join(index));
        let provenance = Provenance::of_directory(&folder, std::slice::from_ref(&weights));
        // A file of an unknown family keeps its own names.
        if let Ok(Some(container)) = containers::open(&weights, None) {
            let store = containers::under_hub_names(container.tensors, &container.config)?;
            return Ok(Self {
                provenance,
                files: BTreeMap::from([(name.clone(), File::Local(weights))]),
                map: store.names().into_iter().map(|tensor| (tensor, name.clone())).collect(),
                opened: Mutex::new(BTreeMap::from([(name, store)])),
            });
        }
        Self::new(provenance, &name, read, |file| Ok(File::Local(folder.join(file))))
    }

    /// Opens tensors as [`tensors`] does, with repositories from `hub`.
    ///
    /// # Errors
    /// Returns the errors of [`tensors`].
    pub fn on(hub: &Hub, model: impl Into<Source>) -> Result<Self> {
        match model.into().locate()? {
            Place::Local(path) => Self::local(&path),
            Place::Hub(id, file) => Self::in_repository(hub, &id, file.as_deref()),
        }
    }

    fn in_repository(hub: &Hub, id: &ModelId, file: Option<&str>) -> Result<Self> {
        Self::of_revision(hub, id, &Revision::find(id, file, hub, &NoProgress)?)
    }

    /// Opens the tensors of a resolved revision.
    pub(crate) fn of_revision(hub: &Hub, id: &ModelId, found: &Revision) -> Result<Self> {
        Self::of_file(hub, id, &found.commit, &found.listing, found.weights())
    }

    /// Opens the tensors of the weight files that a loader would choose from a listing.
    pub(crate) fn of_listing(hub: &Hub, id: &ModelId, commit: &str, listing: &[Listed]) -> Result<Self> {
        Self::of_file(hub, id, commit, listing, &Chosen::among(listing, None, id)?.weights.path)
    }

    fn of_file(hub: &Hub, id: &ModelId, commit: &str, listing: &[Listed], weights: &str) -> Result<Self> {
        let find = |name: &str| {
            let listed = listing.iter().find(|file| file.path == name).cloned().ok_or_else(|| Error::NotFound {
                path: id.to_string().into(),
                what: format!("{weights} needs {name}, which is missing in the revision"),
            })?;
            let here = hub.cached(&id.repo, commit, &listed);
            Ok(here.map_or_else(
                || {
                    let (id, commit) = (id.clone(), commit.to_owned());
                    File::Remote(Arc::new(RemoteFile { hub: hub.clone(), id, commit, listed }))
                },
                File::Local,
            ))
        };
        let read = |index: &str| match find(index)? {
            File::Local(path) => read_index(&path),
            // The size was checked when the file was chosen.
            File::Remote(file) => Ok(file.read_at(0..file.size())?),
        };
        let layout = hub.cache().root().join(id.repo.folder()).join("snapshots").join(commit);
        let files: Vec<Listed> = forms(listing).into_values().next().unwrap_or_default();
        Self::new(Provenance::of_repository(&id.repo, &id.revision, commit, &layout, &files), weights, read, find)
    }

    fn new(
        provenance: Provenance,
        weights: &str,
        read: impl Fn(&str) -> Result<Vec<u8>>,
        find: impl Fn(&str) -> Result<File>,
    ) -> Result<Self> {
        let mut out = Self { provenance, files: BTreeMap::new(), map: BTreeMap::new(), opened: Mutex::default() };
        if weights.ends_with(".index.json") {
            out.map = shard_map(&read(weights)?, Path::new(weights))?;
            for file in out.map.values() {
                if !out.files.contains_key(file) {
                    out.files.insert(file.clone(), find(file)?);
                }
            }
        } else {
            // Numbered parts without an index: the header of each part lists its tensors.
            for file in parts_of(weights).unwrap_or_else(|| vec![weights.to_owned()]) {
                out.files.insert(file.clone(), find(&file)?);
                let names = out.open(&file)?.names();
                out.map.extend(names.into_iter().map(|name| (name, file.clone())));
            }
        }
        Ok(out)
    }

    fn open(&self, file: &str) -> Result<Arc<dyn Store>> {
        let lock = || self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = lock().get(file) {
            return Ok(Arc::clone(store));
        }
        // The lock is not held during requests. At worst, two threads read the same header.
        let store: Arc<dyn Store> = Arc::from(match &self.files[file] {
            File::Local(path) => open_one(path)?,
            File::Remote(remote) => open_remote(Arc::clone(remote) as Arc<dyn ReadAt>)?,
        });
        lock().insert(file.to_owned(), Arc::clone(&store));
        Ok(store)
    }

    /// Returns the store that contains a tensor.
    pub(crate) fn holder(&self, name: &str) -> Result<Arc<dyn Store>> {
        let missing = || {
            let nearest = self.map.keys().next().map(|name| pricket_weights::clip(name));
            pricket_weights::Error::Missing { origin: self.provenance.name(), name: name.into(), nearest }
        };
        self.open(self.map.get(name).ok_or_else(missing)?)
    }

    /// Returns the origin: repository, revision, commit, and the weight files with their listed hashes.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Returns all tensor names, sorted. For shards the names come from the index, so no shard is opened.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// Returns shape and type of a tensor.
    ///
    /// # Errors
    /// Returns [`Error::Corrupt`] if the tensor does not exist, and other errors if its header cannot be fetched or
    /// read.
    pub fn entry(&self, name: &str) -> Result<Entry> {
        let store = self.holder(name)?;
        Ok(store.entry(name).ok_or_else(|| store.missing(name))?)
    }

    /// Reads a tensor in its stored type.
    ///
    /// # Errors
    /// Returns the errors of [`Tensors::entry`], and other errors if its bytes cannot be fetched or read.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        Ok(read_tensor(&*self.holder(name)?, name, &Device::Cpu)?)
    }

    /// Returns all tensors as one store. Reads every header first, so that later requests for entries cannot fail.
    ///
    /// # Errors
    /// Returns an error if a header cannot be fetched or read.
    pub(crate) fn into_store(self) -> Result<Arc<dyn Store>> {
        for file in self.files.keys() {
            self.open(file)?;
        }
        Ok(Arc::new(self))
    }

    /// Returns the format of the first file.
    pub(crate) fn format(&self) -> Result<Format> {
        Ok(match self.files.values().next() {
            Some(File::Local(path)) => sniff(path)?,
            Some(File::Remote(remote)) => sniff_remote(&**remote)?,
            None => Format::Unknown,
        })
    }

    /// Returns whether all files are on disk, so that reading needs no requests.
    pub fn is_local(&self) -> bool {
        self.files.values().all(|file| matches!(file, File::Local(_)))
    }
}

impl Store for Tensors {
    fn names(&self) -> Vec<String> {
        self.map.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        self.holder(name).ok()?.entry(name)
    }

    fn resolve<'a>(&'a self, name: &'a str) -> &'a str {
        if self.map.contains_key(name) {
            return name;
        }
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let other = opened.values().map(|store| store.resolve(name)).find(|other| *other != name);
        other.and_then(|other| self.map.get_key_value(other)).map_or(name, |(other, _)| other)
    }

    fn claims(&self, name: &str) -> bool {
        self.map.contains_key(self.resolve(name))
    }

    fn bytes(&self, name: &str) -> pricket_weights::Result<Bytes<'_>> {
        let io = |e: Error| pricket_weights::Error::Io {
            path: self.provenance.name().into(),
            source: std::io::Error::other(e.to_string()),
        };
        Ok(self.holder(name).map_err(io)?.bytes(name)?.to_vec().into())
    }

    fn origin(&self, name: &str) -> String {
        self.holder(name).map_or_else(|_| self.provenance.name(), |store| store.origin(name))
    }
}

impl std::fmt::Debug for Tensors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensors({}, {} tensors in {} files)", self.provenance.name(), self.map.len(), self.files.len())
    }
}

/// Reads an index of shards from disk, up to 6 MiB.
fn read_index(path: &Path) -> Result<Vec<u8>> {
    let io = |error| Error::Io { path: path.into(), error };
    let meta = std::fs::metadata(path).map_err(io)?;
    if !meta.is_file() || meta.len() > 6 << 20 {
        let error = pricket_weights::Error::Corrupt { path: path.into(), what: "not an index of shards".into() };
        return Err(Error::Corrupt { tensor: None, error });
    }
    std::fs::read(path).map_err(io)
}

/// A file of a commit on the Hub, read in ranges.
struct RemoteFile {
    hub: Hub,
    id: ModelId,
    commit: String,
    listed: Listed,
}

impl ReadAt for RemoteFile {
    fn name(&self) -> String {
        format!("{}/{}", self.id, self.listed.path)
    }

    fn size(&self) -> u64 {
        self.listed.size
    }

    fn read_at(&self, range: Range<u64>) -> pricket_weights::Result<Vec<u8>> {
        let read = self.hub.read(&self.id.repo, &self.commit, &self.listed, range, &NoProgress);
        read.map_err(|e| pricket_weights::Error::Io { path: self.name().into(), source: std::io::Error::other(e) })
    }
}
