//! The reader of PyTorch checkpoints in the zip format.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use crate::error::clip;
use crate::pickle::{self, Fault, Id, Pickle, TensorRef, Value};
use crate::source::Source;
use crate::zip_directory::{self, Record};
use crate::{Bytes, Dtype, Entry, Error, Result, Store};

/// Maximum size of `data.pkl` in bytes. A 20B checkpoint has less than 200 kB.
const MAX_PICKLE: u64 = 32 << 20;

/// A memory-mapped PyTorch checkpoint in the zip format (1.6 and later).
///
/// The entries of the zip are not compressed, so storages and contiguous tensors are ranges of the file.
#[derive(Debug)]
pub struct TorchFile {
    file: Source,
    tensors: BTreeMap<String, View>,
}

/// A tensor as a strided view of the file, checked to lie inside its storage.
#[derive(Debug)]
struct View {
    dtype: Dtype,
    shape: Vec<usize>,
    stride: Vec<usize>,
    /// Zip entry of the storage.
    record: Record,
    /// Offset of the first element in the storage, in bytes.
    offset: usize,
}

impl View {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn is_contiguous(&self) -> bool {
        // An empty tensor has no elements to gather. Its strides may be arbitrary.
        if self.elements() == 0 {
            return true;
        }
        let mut expected = 1;
        for (&n, &stride) in self.shape.iter().zip(&self.stride).rev() {
            if n != 1 && stride != expected {
                return false;
            }
            expected *= n;
        }
        true
    }
}

impl TorchFile {
    /// Opens a file and reads its pickle, but not the storages.
    ///
    /// # Errors
    /// - [`Error::Io`] if the file cannot be read;
    /// - [`Error::Refused`] if the pickle names a global other than tensors and containers;
    /// - [`Error::Corrupt`] if the zip or the pickle is invalid, or a tensor exceeds its storage;
    /// - [`Error::Unsupported`] for `TorchScript` archives and big-endian files.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::new(Source::mapped(path)?)
    }

    pub(crate) fn new(file: Source) -> Result<Self> {
        let tensors = read_tensors(&file)?;
        Ok(Self { file, tensors })
    }
}

fn read_tensors(file: &Source) -> Result<BTreeMap<String, View>> {
    let archive = Archive::open(file)?;
    let pickle = pickle::read(&archive.pickle()?).map_err(|fault| match fault {
        Fault::Forbidden(global) => Error::Refused {
            path: file.path().into(),
            what: format!("the pickle names the global {global:?}, which is neither a tensor nor a container; no code was executed"),
        },
        Fault::Malformed(what) => file.corrupt(format!("not a state dict: {what}")),
    })?;
    let mut tensors = BTreeMap::new();
    for (name, tensor) in state_dict(&pickle).ok_or_else(|| file.corrupt("the pickle has no state dict"))? {
        tensors.insert(name.to_owned(), archive.view(name, tensor)?);
    }
    Ok(tensors)
}

/// Keys under which training programs store a state dict, outermost key first. In this order: Lightning, transformers
/// and others; nnU-Net and many tutorials; Megatron; DeepSpeed; Composer.
const PLACES: [&[&str]; 5] = [&["state_dict"], &["model_state_dict"], &["model"], &["module"], &["state", "model"]];

/// Returns the tensors of the state dict: the root dictionary or one at the [`PLACES`], whichever has the most tensors.
fn state_dict(pickle: &Pickle) -> Option<Vec<(&str, &TensorRef)>> {
    let inside = |place: &[&str]| {
        let step = |id: Id, key: &&str| named(pickle, id)?.iter().find(|(name, _)| name == key).map(|(_, id)| *id);
        let place = place.iter().try_fold(pickle.root, step)?;
        Some(tensors(pickle, &named(pickle, place)?))
    };
    let nested = PLACES.iter().flat_map(|outer| {
        // Places can be nested: {"model": {"state_dict": ..}}.
        std::iter::once(outer.to_vec()).chain(PLACES.iter().map(|inner| [*outer, *inner].concat()))
    });
    let mut best = inside(&[])?;
    // With equal numbers of tensors, the outer dictionary wins.
    for found in nested.filter_map(|place| inside(&place)) {
        if found.len() > best.len() {
            best = found;
        }
    }
    Some(best).filter(|found| !found.is_empty())
}

/// Maximum length of a tensor name in bytes. Names are copied, and the memo lets a pickle use one long string as many
/// keys.
const MAX_NAME: usize = 1 << 10;

/// Returns the entries of a dictionary whose keys are strings.
fn named(pickle: &Pickle, id: Id) -> Option<Vec<(&str, Id)>> {
    let Value::Dict(pairs) = pickle.get(id) else { return None };
    let name = |id| if let Value::Str(text) = pickle.get(id) { Some(text.as_str()) } else { None };
    let name = |id| name(id).filter(|name| name.len() <= MAX_NAME);
    Some(pairs.iter().filter_map(|&(key, value)| Some((name(key)?, value))).collect())
}

fn tensors<'a>(pickle: &'a Pickle, items: &[(&'a str, Id)]) -> Vec<(&'a str, &'a TensorRef)> {
    let tensor = |id| if let Value::Tensor(tensor) = pickle.get(id) { Some(tensor) } else { None };
    items.iter().filter_map(|&(name, id)| Some((name, tensor(id)?))).collect()
}

struct Archive<'a> {
    file: &'a Source,
    /// Entries by name, without the leading folder.
    entries: BTreeMap<String, Record>,
}

impl<'a> Archive<'a> {
    fn open(file: &'a Source) -> Result<Self> {
        let entries = zip_directory::read(file)?;
        if entries.contains_key("constants.pkl") {
            return Err(Error::Unsupported {
                path: file.path().into(),
                what: "a TorchScript archive contains a program instead of a state dict; save a state dict instead"
                    .into(),
            });
        }
        if !file.is_remote() {
            // Finds damage when the file is opened rather than when a tensor is read.
            entries.values().try_for_each(|record| record.start(file).map(drop))?;
        }
        let archive = Self { file, entries };
        if archive.bytes("byteorder")?.is_some_and(|order| *order == *b"big") {
            return Err(Error::Unsupported {
                path: file.path().into(),
                what: "big-endian PyTorch files are not supported".into(),
            });
        }
        Ok(archive)
    }

    /// Returns the bytes of a small entry, or `None` if it does not exist.
    fn bytes(&self, name: &str) -> Result<Option<Cow<'a, [u8]>>> {
        let Some(record) = self.entries.get(name) else { return Ok(None) };
        if record.size as u64 > MAX_PICKLE {
            let what = format!("{name} has {} bytes; the limit is {MAX_PICKLE}", record.size);
            return Err(self.file.corrupt(what));
        }
        self.file.read(record.start(self.file)?, record.size).map(Some)
    }

    fn pickle(&self) -> Result<Cow<'a, [u8]>> {
        let missing = || self.file.corrupt("not a PyTorch checkpoint: the zip file has no data.pkl");
        self.bytes("data.pkl")?.ok_or_else(missing)
    }

    /// Checks a tensor against its storage, and the storage against the archive.
    fn view(&self, name: &str, tensor: &TensorRef) -> Result<View> {
        let bad = |what: String| self.file.corrupt(format!("tensor {}: {what}", clip(name)));
        let storage = &tensor.storage;
        let record = *self
            .entries
            .get(&format!("data/{}", storage.key))
            .ok_or_else(|| bad(format!("its storage {:?} is not in the file", storage.key)))?;
        let width = storage.dtype.bytes(1) as u64;
        if storage.elements.checked_mul(width) != Some(record.size as u64) {
            return Err(bad(format!(
                "its storage should have {} elements of {width} bytes, but the file has {} bytes",
                storage.elements, record.size
            )));
        }
        if tensor.shape.len() != tensor.stride.len() {
            return Err(bad(format!("shape {:?} and stride {:?} differ in length", tensor.shape, tensor.stride)));
        }
        let elements = tensor.shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n));
        let Some(elements) = elements.filter(|&n| n <= storage.elements) else {
            return Err(bad(format!(
                "shape {:?} has more elements than its storage of {}; such a view is not supported",
                tensor.shape, storage.elements
            )));
        };
        if elements > 0 {
            let last = tensor
                .shape
                .iter()
                .zip(&tensor.stride)
                .try_fold(tensor.offset, |last, (&n, &stride)| last.checked_add((n - 1).checked_mul(stride)?));
            if last.is_none_or(|last| last >= storage.elements) {
                return Err(bad(format!(
                    "offset {} with shape {:?} and stride {:?} exceeds its storage of {} elements",
                    tensor.offset, tensor.shape, tensor.stride, storage.elements
                )));
            }
        }
        let first = if elements > 0 { tensor.offset * width } else { 0 };
        let to_usize = |values: &[u64]| values.iter().map(|&v| v as usize).collect();
        Ok(View {
            dtype: storage.dtype,
            shape: to_usize(&tensor.shape),
            stride: to_usize(&tensor.stride),
            record,
            offset: first as usize,
        })
    }
}

impl Store for TorchFile {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let view = self.tensors.get(name)?;
        Some(Entry { shape: view.shape.clone(), dtype: view.dtype })
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        let view = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let width = view.dtype.bytes(1);
        let elements = view.elements();
        let start = view.record.start(&self.file)?;
        if view.is_contiguous() {
            return self.file.bytes(start + view.offset, elements * width);
        }
        let storage = self.file.bytes(start, view.record.size)?;
        // Gathers the elements of a transposed or sliced view in row-major order.
        let mut out = Vec::with_capacity(elements * width);
        let mut index = vec![0; view.shape.len()];
        for _ in 0..elements {
            let at: usize = index.iter().zip(&view.stride).map(|(i, stride)| i * stride).sum();
            let start = view.offset + at * width;
            out.extend_from_slice(&storage[start..start + width]);
            for (i, &n) in index.iter_mut().zip(&view.shape).rev() {
                *i += 1;
                if *i < n {
                    break;
                }
                *i = 0;
            }
        }
        Ok(out.into())
    }

    fn origin(&self, _: &str) -> String {
        self.file.path().display().to_string()
    }
}
