//! Exchange with candle programs: weights of any format for candle's models, and candle's weights for pricket's models.
//!
//! Types of other crates have the versions that this module and the crate root export: [`tokenizers`], [`hf_hub`] and
//! [`crate::candle_nn`].
//!
//! ```
//! use pricket::candle::{DType, Device};
//! use pricket::interop;
//!
//! let opened = interop::open(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny"))?;
//! // Names and row order are those of the Hub, for every file format.
//! let weights = opened.var_builder(DType::F32, &Device::Cpu);
//! let embedding = weights.get((2048, 128), "gpt_neox.embed_in.weight")?;
//! assert_eq!(embedding.dtype(), DType::F32);
//!
//! // The other direction: loads a pricket model from a VarBuilder.
//! let again = pricket::Loader::from_store(opened.config.clone(), interop::store(weights)).threads(1).load()?;
//! assert_eq!(again.info().layers, 4);
//! # Ok::<(), pricket::Error>(())
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use pricket_lm::Tokenizer;
use pricket_nn::{LoadOptions, RowOrder, Weights};
use pricket_weights::{Bytes, Dtype, Entry, Headers, Store, read_tensor};
use serde_json::Value;

pub use {hf_hub, tokenizers};

use crate::loading::family::checked_family;
use crate::loading::load::Loader;
use crate::loading::small_files::at;
use crate::loading::source::Source;
use crate::{Error, Result};

/// An open checkpoint: its configuration, its tokenizer, and its tensors in the layout of the Hub.
#[non_exhaustive]
pub struct Opened {
    /// Contents of config.json, or the equivalent configuration of a GGUF or GGML file.
    pub config: Value,
    /// The tokenizer, if the checkpoint has one.
    pub tokenizer: Option<Tokenizer>,
    store: Arc<dyn Store>,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opened({} tensors)", self.store.names().len())
    }
}

/// Opens a checkpoint of any format: a directory, a file, or a repository of the Hub. Repositories are fetched into the
/// cache that Python also uses.
///
/// No tensor is read yet. Exception: if a GGUF file does not state the order of its QKV rows, the model is loaded once
/// to determine it.
///
/// # Errors
/// Returns the errors of [`Loader::load`].
pub fn open(source: impl Into<Source>) -> Result<Opened> {
    Opened::from_loader(&Loader::new(source))
}

impl Opened {
    /// Opens the checkpoint of a loader, with the loader's changes to configuration, tokenizer and order of QKV rows.
    ///
    /// # Errors
    /// Returns the errors of [`open`], and [`Error::Options`] if the loader has adapters, which are not merged here.
    pub fn from_loader(loader: &Loader) -> Result<Self> {
        #[cfg(feature = "train")]
        if loader.has_adapters() {
            let what = "adapters are not merged into these tensors; convert the model with them first";
            return Err(Error::Options(what.into()));
        }
        let mut opened = loader.opened()?;
        let wrong = |e| at(&opened.config_path, e);
        let family = checked_family(&opened.config).map_err(wrong)?;
        let options = LoadOptions { allow_unused: loader.allows_unused(), ..LoadOptions::default() };
        let dry = Weights::new(Arc::new(Headers::of(Arc::clone(&opened.store))), family.names(), options);
        family.load(&opened.config, &dry).map_err(wrong)?;
        loader.check_unused(&dry, &*opened.store)?;
        let fused: BTreeMap<String, RowOrder> = dry.fused().into_iter().collect();
        let in_model_order = loader.in_model_order(&mut opened)?;
        let tensors = dry.loaded_names().into_iter().map(|(name, from)| {
            let order = fused.get(&name).copied().filter(|_| in_model_order).unwrap_or(RowOrder::AsStored);
            (name, (from, order))
        });
        let store = Arc::new(HubLayout { tensors: tensors.collect(), store: opened.store });
        Ok(Self { config: opened.config, tokenizer: opened.tokenizer, store })
    }

    /// Returns the tensors with the names and row order of the Hub. Quantized tensors whose rows are reordered are read
    /// as f32.
    pub fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    /// Returns a `VarBuilder` over the tensors, in `dtype` on `device`. Each tensor is read when a layer requests it.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        var_builder(self.store(), dtype, device)
    }
}

/// Returns a `VarBuilder` over the tensors of any store, in `dtype` on `device`. Each tensor is read when a layer
/// requests it; quantized tensors are dequantized.
pub fn var_builder(store: Arc<dyn Store>, dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(Backend(store)), dtype, device.clone())
}

/// Wraps a `VarBuilder` as a [`Store`], for [`Loader::from_store`].
///
/// A `VarBuilder` cannot list its names. Unused tensors are therefore not reported, and an error about a missing tensor
/// does not suggest a similar name.
pub fn store(tensors: VarBuilder<'static>) -> Arc<dyn Store> {
    Arc::new(Built { tensors, shapes: Mutex::default() })
}

/// Converts a tokenizer of the `tokenizers` crate.
///
/// # Errors
/// Returns [`Error::Tokenizer`] if the tokenizer cannot be written as a tokenizer.json, or has components that are not
/// supported.
pub fn tokenizer(tokenizer: &tokenizers::Tokenizer) -> Result<Tokenizer> {
    let origin = "the tokenizer given";
    let json =
        tokenizer.to_string(false).map_err(|e| Error::Tokenizer { origin: origin.into(), what: e.to_string() })?;
    Ok(Tokenizer::from_bytes(json.as_bytes(), origin)?)
}

/// Converts a tokenizer to one of the `tokenizers` crate.
///
/// # Errors
/// Returns [`Error::Tokenizer`] if the tokenizer was read from a sentencepiece model, which has no tokenizer.json.
pub fn to_tokenizers(tokenizer: &Tokenizer) -> Result<tokenizers::Tokenizer> {
    let json = tokenizer.to_json()?;
    let wrong = |e: tokenizers::Error| Error::Tokenizer { origin: "tokenizer.json".into(), what: e.to_string() };
    tokenizers::Tokenizer::from_bytes(json.as_bytes()).map_err(wrong)
}

/// Converts a model repository of the `hf_hub` crate to a source.
///
/// # Errors
/// Returns [`Error::Source`] if the repository is a dataset or a space.
pub fn source(repo: &hf_hub::Repo) -> Result<Source> {
    // Without hf-hub's HTTP features, only the folder name gives the id and the kind.
    let folder = repo.folder_name();
    let Some(id) = folder.strip_prefix("models--") else {
        return Err(Error::Source(format!("{folder} is not a model repository")));
    };
    let id = id.split_once("--").map_or_else(|| id.to_owned(), |(owner, name)| format!("{owner}/{name}"));
    Ok(Source::new(id).revision(repo.revision()))
}

/// Converts a source to a model repository of the `hf_hub` crate.
///
/// # Errors
/// Returns [`Error::Source`] if the source is a local path or one file of a repository.
pub fn repo(source: impl Into<Source>) -> Result<hf_hub::Repo> {
    let source = source.into();
    match source.locate()? {
        crate::loading::source::Place::Hub(id, Some(file)) => {
            Err(Error::Source(format!("{id} names the file {file} of its repository; a Repo cannot name a file")))
        }
        crate::loading::source::Place::Hub(id, None) => {
            Ok(hf_hub::Repo::with_revision(id.repo.to_string(), hf_hub::RepoType::Model, id.revision.clone()))
        }
        crate::loading::source::Place::Local(path) => {
            Err(Error::Source(format!("{} is a local path, not a repository", path.display())))
        }
    }
}

/// A store that renames and reorders tensors to the layout of the Hub.
struct HubLayout {
    /// Maps a name on the Hub to the name on file and the row order on file.
    tensors: BTreeMap<String, (String, RowOrder)>,
    store: Arc<dyn Store>,
}

impl Store for HubLayout {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let (from, order) = self.tensors.get(name)?;
        let mut entry = self.store.entry(from)?;
        if matches!(entry.dtype, Dtype::Block(_)) && *order != RowOrder::AsStored {
            entry.dtype = Dtype::F32;
        }
        Some(entry)
    }

    fn bytes(&self, name: &str) -> pricket_weights::Result<Bytes<'_>> {
        let Some((from, order)) = self.tensors.get(name) else { return Err(self.missing(name)) };
        if *order == RowOrder::AsStored {
            return self.store.bytes(from);
        }
        let tensor = read_tensor(&*self.store, from, &Device::Cpu)?;
        let undone = order.undo(&tensor).map_err(|e| match e {
            pricket_nn::Error::Candle(e) => e,
            e => candle_core::Error::Msg(e.to_string()),
        });
        undone.and_then(|tensor| bytes_of(&tensor)).map_err(|source| self.in_candle(name, source))
    }

    fn origin(&self, name: &str) -> String {
        self.store.origin(self.tensors.get(name).map_or(name, |(from, _)| from))
    }
}

impl HubLayout {
    fn in_candle(&self, name: &str, source: candle_core::Error) -> pricket_weights::Error {
        pricket_weights::Error::Candle { origin: self.origin(name), name: name.into(), source }
    }
}

/// Returns the elements of a tensor as little-endian bytes.
fn bytes_of(tensor: &Tensor) -> candle_core::Result<Bytes<'static>> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(storage), Some((from, to))) = (&*storage, layout.contiguous_offsets()) else {
        candle_core::bail!("the tensor is not on the CPU")
    };
    macro_rules! numbers {
        ($($kind:ident),*) => {
            match storage {
                $(CpuStorage::$kind(data) => data[from..to].iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>(),)*
                _ => candle_core::bail!("the element type {} is not supported", tensor.dtype().as_str()),
            }
        };
    }
    Ok(Bytes::from(numbers!(U8, U32, I64, BF16, F16, F32, F64)))
}

/// The backend of a `VarBuilder` over a store.
struct Backend(Arc<dyn Store>);

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let entry = self.0.entry(self.0.resolve(name)).ok_or_else(|| self.missing(name))?;
        if entry.shape != shape.dims() {
            let (expected, got) = (shape, entry.shape.into());
            return Err(candle_core::Error::UnexpectedShape {
                msg: format!("{}: {name}", self.0.origin(name)),
                expected,
                got,
            });
        }
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let name = self.0.resolve(name);
        let tensor = read_tensor(&*self.0, name, &Device::Cpu).map_err(candle_core::Error::wrap)?;
        tensor.to_dtype(dtype)?.to_device(device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.entry(self.0.resolve(name)).is_some()
    }
}

impl Backend {
    fn missing(&self, name: &str) -> candle_core::Error {
        candle_core::Error::wrap(self.0.missing(name))
    }
}

/// A store over a `VarBuilder`, with the shapes requested so far.
struct Built {
    tensors: VarBuilder<'static>,
    shapes: Mutex<BTreeMap<String, Vec<usize>>>,
}

impl Built {
    fn shapes(&self) -> MutexGuard<'_, BTreeMap<String, Vec<usize>>> {
        self.shapes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of_shape(&self, shape: Vec<usize>) -> Entry {
        let dtype = match self.tensors.dtype() {
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            DType::F32 => Dtype::F32,
            DType::F64 => Dtype::F64,
            other => Dtype::Other(other.as_str()),
        };
        Entry { shape, dtype }
    }
}

impl Store for Built {
    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        if let Some(shape) = self.shapes().get(name) {
            return Some(self.of_shape(shape.clone()));
        }
        let known = self.tensors.contains_tensor(name).then(|| self.tensors.get_unchecked(name).ok()).flatten()?;
        self.shapes().insert(name.into(), known.dims().to_vec());
        Some(self.of_shape(known.dims().to_vec()))
    }

    /// Records the shape that the model expects. A `VarBuilder` needs it: builders of variables and zeros create the
    /// tensor in that shape, and builders over files compare it.
    fn expect(&self, name: &str, shape: &[usize]) -> Option<Entry> {
        let found = self.entry(name);
        if found.is_some() || !self.tensors.contains_tensor(name) {
            return found;
        }
        self.shapes().insert(name.into(), shape.to_vec());
        Some(self.of_shape(shape.to_vec()))
    }

    fn claims(&self, name: &str) -> bool {
        self.tensors.contains_tensor(name)
    }

    fn bytes(&self, name: &str) -> pricket_weights::Result<Bytes<'_>> {
        let shape = self.entry(name).ok_or_else(|| self.missing(name))?.shape;
        let read = self.tensors.get(shape, name).and_then(|tensor| bytes_of(&tensor));
        read.map_err(|source| pricket_weights::Error::Candle { origin: self.origin(name), name: name.into(), source })
    }

    fn origin(&self, _: &str) -> String {
        "the VarBuilder".into()
    }
}
