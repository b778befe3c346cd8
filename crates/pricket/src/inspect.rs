use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_hub::Hub;
use pricket_nn::{ModelInfo, Silent, Weights};
use pricket_weights::{Dtype, Format, Headers, Store};
use serde_json::Value;

use crate::family::Family;
use crate::load::{at, read_json};
use crate::remote::Tensors;
use crate::repository::{Place, Revision, locate};
use crate::{Error, Provenance, Result};

/// What is in a checkpoint, by its headers: no weight is read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// The weight file or index.
    pub file: PathBuf,
    /// Its format; of the first shard, for an index.
    pub format: Format,
    /// The config.json, where there is one.
    pub config: Option<Value>,
    /// The model that configuration and weights make up, where there is a configuration.
    pub info: Option<ModelInfo>,
    /// Whether a tokenizer.json is there.
    pub has_tokenizer: bool,
    /// Every tensor, by name.
    pub tensors: Vec<TensorInfo>,
    /// What a careful user should know.
    pub warnings: Vec<String>,
    /// Where it came from.
    pub provenance: Provenance,
}

/// A tensor on file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// The file it is in.
    pub file: String,
    /// Whether it is a mask or table that the model does not read.
    pub is_buffer: bool,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// Bytes on file.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(self.elements() as usize) as u64
    }
}

/// Looks at `model` (as [`crate::load`] reads it) without reading a weight: every name, type and shape is checked against the
/// configuration. A weight file without a config.json is only listed; of a repository on the Hub only configuration,
/// tokenizer and headers are fetched.
///
/// # Errors
/// The one that loading would give.
pub fn inspect(model: impl AsRef<Path>) -> Result<Inspection> {
    match locate(model.as_ref())? {
        Place::Local(path) => {
            let open = || {
                let file = if path.is_dir() { pricket_weights::find_weights(&path)? } else { path.clone() };
                let store: Arc<dyn Store> = Arc::from(pricket_weights::open(&file)?);
                let first = store.names().first().map_or_else(|| file.clone(), |name| store.origin(name).into());
                let mut files: Vec<PathBuf> = store.names().iter().map(|name| store.origin(name).into()).collect();
                files.dedup();
                let directory = file.parent().unwrap_or(Path::new("")).to_owned();
                Ok((file, pricket_weights::sniff(&first)?, store, Provenance::of_directory(&directory, &files)))
            };
            look(&path, Vec::new(), open)
        }
        Place::Hub(id) => {
            let hub = Hub::from_env()?;
            let found = Revision::find(&id, &hub, &Silent)?;
            let small = found.fetch_small(&hub, &Silent)?;
            let open = || {
                let tensors = Tensors::of_listing(&hub, &id, &found.commit, &found.listing)?;
                let provenance = tensors.provenance().clone();
                Ok((id.to_string().into(), tensors.format()?, tensors.into_store()?, provenance))
            };
            look(&small.directory, found.warnings.clone(), open)
        }
    }
}

/// Looks at configuration and tokenizer, then at the weights that `open` opens.
fn look(
    path: &Path,
    mut warnings: Vec<String>,
    open: impl FnOnce() -> Result<(PathBuf, Format, Arc<dyn Store>, Provenance)>,
) -> Result<Inspection> {
    let directory = if path.is_dir() { path.to_owned() } else { crate::load::parent(path) };
    let config_path = directory.join("config.json");
    let config = if config_path.is_file() {
        Some(read_json(&config_path)?)
    } else if path.is_dir() {
        return Err(Error::NotFound {
            path: config_path,
            what: "no such file; a checkpoint needs its config.json".into(),
        });
    } else {
        None
    };
    let family = config.as_ref().map(Family::from_config).transpose().map_err(|e| at(&config_path, e))?;
    let generation = directory.join("generation_config.json");
    if generation.is_file() {
        read_json(&generation)?;
    }
    let tokenizer = directory.join("tokenizer.json");
    let has_tokenizer = tokenizer.is_file();
    if has_tokenizer && config.is_some() {
        pricket_lm::Tokenizer::from_file(&tokenizer)?;
    }
    let (file, format, store, provenance) = open()?;
    let names = store.names();
    let is_buffer = |name: &str| family.as_ref().is_some_and(|family| family.names().is_buffer(name));
    let mut tensors = Vec::with_capacity(names.len());
    for name in names {
        let Some(entry) = store.entry(&name) else { continue };
        let (file, is_buffer) = (store.origin(&name), is_buffer(&name));
        if let (Dtype::Other(kind), false) = (entry.dtype, is_buffer) {
            warnings.push(format!("{name} is stored as {kind}, which is not read"));
        }
        tensors.push(TensorInfo { name, dtype: entry.dtype, shape: entry.shape, file, is_buffer });
    }
    let mut info = None;
    if let Some(family) = &family {
        let weights = Weights::as_stored(Arc::new(Headers::of(Arc::clone(&store))), family.names());
        info = Some(family.load(&weights).map_err(|e| at(&config_path, e))?.info().clone());
        warnings.extend(crate::load::unused_warning(&weights));
    }
    if config.is_some() && !has_tokenizer {
        warnings.push("no tokenizer.json: give one to read or write text".into());
    }
    Ok(Inspection { file, format, config, info, has_tokenizer, tensors, warnings, provenance })
}
