use std::ops::Deref;

use candle_core::{DType, Device, Tensor};

use crate::mapped::Mapped;
use crate::{Dtype, Error, Result};

/// Shape and type of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Row-major dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Element type as stored.
    pub dtype: Dtype,
}

impl Entry {
    /// Number of elements. Stores have checked that the product does not overflow.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Named tensors, wherever they come from. Object-safe; a store is opened once and shared.
pub trait Store: Send + Sync {
    /// Every name, sorted.
    fn names(&self) -> Vec<String>;

    /// What is stored under `name`.
    fn entry(&self, name: &str) -> Option<Entry>;

    /// What is stored under `name`, for a reader that expects `shape`. A file ignores the expectation;
    /// a store without a file fulfils it.
    fn expect(&self, name: &str, shape: &[usize]) -> Option<Entry> {
        let _ = shape;
        self.entry(name)
    }

    /// The bytes of a tensor: contiguous, row-major, little-endian.
    ///
    /// # Errors
    /// [`Error::Missing`], or [`Error::Unsupported`] for an element type that is not read.
    fn bytes(&self, name: &str) -> Result<Bytes<'_>>;

    /// The file that holds `name`, for messages; the store itself where that is not known.
    fn origin(&self, name: &str) -> String;

    /// Whether there are shapes but no bytes (see [`crate::ShapesOnly`]).
    fn shapes_only(&self) -> bool {
        false
    }
}

/// Bytes of a tensor, borrowed from a memory-mapped file or owned.
///
/// Dropping a borrowed one tells the system that its pages may go, so that copying a checkpoint into memory does
/// not hold it twice.
#[derive(Debug)]
pub struct Bytes<'a>(Source<'a>);

#[derive(Debug)]
enum Source<'a> {
    Mapped { file: &'a Mapped, start: usize, len: usize },
    Owned(Vec<u8>),
}

impl<'a> Bytes<'a> {
    pub(crate) fn mapped(file: &'a Mapped, start: usize, len: usize) -> Self {
        Self(Source::Mapped { file, start, len })
    }
}

impl From<Vec<u8>> for Bytes<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Source::Owned(bytes))
    }
}

impl Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Source::Mapped { file, start, len } => &file[*start..*start + *len],
            Source::Owned(bytes) => bytes,
        }
    }
}

impl Drop for Bytes<'_> {
    fn drop(&mut self) {
        if let Source::Mapped { file, start, len } = self.0 {
            file.release(start, len);
        }
    }
}

/// Reads `name` whole into a tensor of its stored type on `device`.
///
/// # Errors
/// [`Error::Missing`], [`Error::Unsupported`] for a type candle lacks, or what the store says of the bytes.
pub fn read_tensor(store: &dyn Store, name: &str, device: &Device) -> Result<Tensor> {
    let entry = store.entry(name).ok_or_else(|| Error::Missing { origin: store.origin(name), name: name.into() })?;
    tensor_of(store, name, &entry, device)
}

/// As [`read_tensor`], for an entry that the caller has already looked up and checked.
pub(crate) fn tensor_of(store: &dyn Store, name: &str, entry: &Entry, device: &Device) -> Result<Tensor> {
    let dtype: DType = entry.dtype.to_candle().ok_or_else(|| Error::Unsupported {
        path: store.origin(name).into(),
        what: format!("tensor {name} is stored as {}, which candle cannot hold", entry.dtype),
    })?;
    let bytes = store.bytes(name)?;
    Tensor::from_raw_buffer(&bytes, dtype, &entry.shape, device).map_err(|source| Error::Candle {
        origin: store.origin(name),
        name: name.into(),
        source,
    })
}
