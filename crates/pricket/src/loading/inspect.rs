//! Inspection of checkpoints by their headers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_hub::{Hub, ModelId};
use pricket_nn::{Family, ModelInfo, NoProgress, Weights};
use pricket_weights::{Dtype, Format, FourBitTensors, Headers, Store};
use serde_json::Value;

use crate::loading::containers::{self, Container};
use crate::loading::family::{checked_family, config_from_shapes, remove_four_bit};
use crate::loading::provenance::Provenance;
use crate::loading::repository::Revision;
use crate::loading::small_files::{at, read_json, tokenizer_in, unknown_keys};
use crate::loading::source::{Place, Source};
use crate::suites::remote::Tensors;
use crate::{Error, Result};

/// Contents of a checkpoint, read from its headers. No weights are read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// The weight file, or the index of its shards.
    pub file: PathBuf,
    /// Format of the weight file, or of the first shard.
    pub format: Format,
    /// Description of the format in one line, including its version if the format has versions.
    pub describe: String,
    /// Contents of config.json, or the equivalent configuration of a GGUF or GGML file.
    pub config: Option<Value>,
    /// Metadata of a GGUF or GGML file. Arrays are represented by their lengths.
    pub metadata: Option<Value>,
    /// Description of the model, if the checkpoint has a configuration.
    pub info: Option<ModelInfo>,
    /// Whether the checkpoint has a tokenizer: tokenizer.json, tokenizer.model, or one inside a GGUF file.
    pub has_tokenizer: bool,
    /// All tensors, sorted by name.
    pub tensors: Vec<TensorInfo>,
    /// Warnings about the checkpoint.
    pub warnings: Vec<String>,
    /// Origin of the checkpoint.
    pub provenance: Provenance,
}

/// A tensor on file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Name of the tensor.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// The file that contains the tensor.
    pub file: String,
    /// Whether the tensor is a buffer, such as a mask, that the model does not read.
    pub is_buffer: bool,
}

/// Summary of all tensors of one element type.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct TypeSummary {
    /// The element type.
    pub dtype: Dtype,
    /// Number of tensors.
    pub tensors: usize,
    /// Total number of elements.
    pub elements: u64,
    /// Total size on file in bytes.
    pub bytes: u64,
}

impl TypeSummary {
    /// Returns the average bits per element on file. For quantized types this includes the scales of the blocks.
    pub fn bits(&self) -> f64 {
        8.0 * self.bytes as f64 / self.elements.max(1) as f64
    }
}

impl Inspection {
    /// Summarizes the tensors that the model reads by element type, largest total size first.
    pub fn types(&self) -> Vec<TypeSummary> {
        let mut types: Vec<TypeSummary> = Vec::new();
        for tensor in self.tensors.iter().filter(|tensor| !tensor.is_buffer) {
            let at = types.iter().position(|known| known.dtype == tensor.dtype).unwrap_or_else(|| {
                types.push(TypeSummary { dtype: tensor.dtype, tensors: 0, elements: 0, bytes: 0 });
                types.len() - 1
            });
            let sum = &mut types[at];
            (sum.tensors, sum.elements) = (sum.tensors + 1, sum.elements.saturating_add(tensor.elements()));
            sum.bytes = sum.bytes.saturating_add(tensor.bytes());
        }
        types.sort_by_key(|known| std::cmp::Reverse(known.bytes));
        types
    }
}

impl TensorInfo {
    /// Returns the number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// Returns the size on file in bytes.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(self.elements() as usize) as u64
    }
}

/// Inspects `model` without reading any weights. Every name, type and shape is checked against the configuration.
///
/// `model` is named as in [`crate::load`]. For a weight file without a config.json, the tensors are only listed. For a
/// repository on the Hub, only configuration, tokenizer and headers are fetched.
///
/// # Errors
/// Returns the error that loading would return.
pub fn inspect(model: impl Into<Source>) -> Result<Inspection> {
    match model.into().locate()? {
        Place::Local(path) => local(&path),
        Place::Hub(id, file) => on_hub(&Hub::from_env()?, &id, file.as_deref()),
    }
}

impl Inspection {
    /// Inspects `model` as [`inspect`] does, with repositories from `hub`.
    ///
    /// # Errors
    /// Returns the errors of [`inspect`].
    pub fn on(hub: &Hub, model: impl Into<Source>) -> Result<Self> {
        match model.into().locate()? {
            Place::Local(path) => local(&path),
            Place::Hub(id, file) => on_hub(hub, &id, file.as_deref()),
        }
    }
}

fn local(path: &Path) -> Result<Inspection> {
    if let Some(file) = containers::candidate(path)?
        && let Some(container) = containers::open(&file, None)?
    {
        return contained(file, container);
    }
    let open = || {
        let file = if path.is_dir() { pricket_weights::find_weights(path)? } else { path.to_owned() };
        let store: Arc<dyn Store> = FourBitTensors::over(Arc::from(pricket_weights::open(&file)?))?;
        let first = store.names().first().map_or_else(|| file.clone(), |name| store.origin(name).into());
        let mut files: Vec<PathBuf> = store.names().iter().map(|name| store.origin(name).into()).collect();
        files.dedup();
        let directory = file.parent().unwrap_or(Path::new("")).to_owned();
        Ok((file, pricket_weights::sniff(&first)?, store, Provenance::of_directory(&directory, &files)))
    };
    look(path, Vec::new(), open)
}

fn on_hub(hub: &Hub, id: &ModelId, file: Option<&str>) -> Result<Inspection> {
    let found = Revision::find(id, file, hub, &NoProgress)?;
    let small = found.fetch_small(hub, &NoProgress)?;
    let open = || {
        let tensors = Tensors::of_revision(hub, id, &found)?;
        let provenance = tensors.provenance().clone();
        Ok((id.to_string().into(), tensors.format()?, FourBitTensors::over(tensors.into_store()?)?, provenance))
    };
    look(&small.directory, found.warnings.clone(), open)
}

/// Inspects configuration and tokenizer in `path`, then the weights that `open` opens.
fn look(
    path: &Path,
    mut warnings: Vec<String>,
    mut open: impl FnMut() -> Result<(PathBuf, Format, Arc<dyn Store>, Provenance)>,
) -> Result<Inspection> {
    let directory = if path.is_dir() { path.to_owned() } else { crate::loading::small_files::parent(path) };
    let config_path = directory.join("config.json");
    let mut config = config_path.is_file().then(|| read_json(&config_path)).transpose()?;
    config.iter_mut().for_each(remove_four_bit);
    let mut opened = None;
    if config.is_none() {
        // For some files, the configuration follows from the shapes of the tensors.
        let missing = || Error::NotFound {
            path: config_path.clone(),
            what: "no such file; a checkpoint needs its config.json".into(),
        };
        let is_absent = |e: &Error| path.is_dir() && matches!(e, Error::NotFound { .. });
        let files = open().map_err(|e| if is_absent(&e) { missing() } else { e })?;
        config = config_from_shapes(&|name| files.2.entry(name).map(|entry| entry.shape));
        if config.is_some() {
            warnings.push("no config.json; the configuration follows from the tensor shapes".into());
        } else if path.is_dir() {
            return Err(missing());
        }
        opened = Some(files);
    }
    let family = config.as_ref().map(checked_family).transpose().map_err(|e| at(&config_path, e))?;
    warnings.extend(config.iter().flat_map(|config| unknown_keys(&config_path, config)));
    let generation = directory.join("generation_config.json");
    if generation.is_file() {
        read_json(&generation)?;
    }
    let tokenizer = tokenizer_in(&directory);
    let has_tokenizer = tokenizer.is_some();
    if let Some(tokenizer) = tokenizer.filter(|_| config.is_some()) {
        pricket_lm::Tokenizer::from_file(&tokenizer)?;
    }
    let (file, format, store, provenance) = opened.map_or_else(&mut open, Ok)?;
    let tensors = list(&*store, family, &mut warnings);
    let mut info = None;
    if let Some((family, config)) = family.zip(config.as_ref()) {
        let weights = Weights::as_stored(Arc::new(Headers::of(Arc::clone(&store))), family.names());
        info = Some(family.load(config, &weights).map_err(|e| at(&config_path, e))?.info().clone());
        warnings.extend(crate::loading::load::unused_warning(&weights));
    }
    if config.is_some() && !has_tokenizer {
        warnings.push("no tokenizer.json and no tokenizer.model; text requires a tokenizer".into());
    }
    Ok(Inspection {
        file,
        format,
        describe: format.to_string(),
        config,
        metadata: None,
        info,
        has_tokenizer,
        tensors,
        warnings,
        provenance,
    })
}

/// Lists all tensors. Adds a warning for each tensor of an unsupported type.
fn list(store: &dyn Store, family: Option<&dyn Family>, warnings: &mut Vec<String>) -> Vec<TensorInfo> {
    let is_buffer = |name: &str| family.is_some_and(|family| family.names().is_buffer(name));
    let mut tensors = Vec::new();
    for name in store.names() {
        let Some(entry) = store.entry(&name) else { continue };
        let (file, is_buffer) = (store.origin(&name), is_buffer(&name));
        if let (Dtype::Other(kind), false) = (entry.dtype, is_buffer) {
            warnings.push(format!("{name} is stored as {kind}, which is not supported"));
        }
        tensors.push(TensorInfo { name, dtype: entry.dtype, shape: entry.shape, file, is_buffer });
    }
    tensors
}

/// Inspects a container file (GGUF or legacy GGML).
fn contained(file: PathBuf, container: Container) -> Result<Inspection> {
    let Container { config, tokenizer, store, tensors, describe, metadata, mut warnings, notes, .. } = container;
    warnings.extend(notes);
    let family = checked_family(&config).map_err(|e| at(&file, e))?;
    let weights = Weights::as_stored(Arc::new(Headers::of(tensors)), family.names());
    let tensors = list(&*store, Some(family), &mut warnings);
    let info = family.load(&config, &weights).map_err(|e| at(&file, e))?.info().clone();
    warnings.extend(crate::loading::load::unused_warning(&weights));
    if tokenizer.is_none() {
        warnings.push("no tokenizer; text requires a tokenizer".into());
    }
    Ok(Inspection {
        format: pricket_weights::sniff(&file)?,
        describe,
        config: Some(config),
        metadata: Some(metadata),
        info: Some(info),
        has_tokenizer: tokenizer.is_some(),
        tensors,
        warnings,
        provenance: Provenance::of_directory(&crate::loading::small_files::parent(&file), std::slice::from_ref(&file)),
        file,
    })
}
