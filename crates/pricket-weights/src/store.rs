use std::ops::Deref;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use pricket_kernels::{Blocks, FourBit, InPlace, Matrix, collect, dequantize};

use crate::mapped::{Mapped, Region};
use crate::{Dtype, Error, Result, clip};

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

    /// Bytes on file.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes(self.elements())
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

    /// The name under which `name` is stored: another one where the file maps `name` to a tensor that it shares memory with, as
    /// safetensors' `save_model` does; else `name` itself, whether it is there or not.
    fn resolve<'a>(&'a self, name: &'a str) -> &'a str {
        name
    }

    /// Whether the checkpoint says that it holds `name`. An index may list what its file lacks: such a tensor is missing, and
    /// nothing may be concluded from its absence.
    fn claims(&self, name: &str) -> bool {
        self.entry(self.resolve(name)).is_some()
    }

    /// The bytes of a tensor: contiguous, row-major, little-endian.
    ///
    /// # Errors
    /// [`Error::Missing`], or [`Error::Unsupported`] for an element type that is not read.
    fn bytes(&self, name: &str) -> Result<Bytes<'_>>;

    /// The file that holds `name`, for messages; the store itself where that is not known.
    fn origin(&self, name: &str) -> String;

    /// A matrix of 4-bit elements, and its type before quantization. Only stores that have entries of [`Dtype::FourBit`] have such matrices.
    ///
    /// # Errors
    /// Returns [`Error::Missing`] if there is no such matrix, and [`Error::Corrupt`] if its parts do not fit each other.
    fn four_bit(&self, name: &str) -> Result<(FourBit, Dtype)> {
        Err(self.missing(name))
    }

    /// Whether there are shapes but no bytes (see [`crate::ShapesOnly`]).
    fn shapes_only(&self) -> bool {
        false
    }

    /// The error for a tensor that is not there, with the name that is most like it.
    fn missing(&self, name: &str) -> Error {
        let parts = |name: &str| name.split('.').rev().map(str::to_owned).collect::<Vec<_>>();
        let wanted = parts(name);
        // Names that end alike differ in a prefix.
        let alike = |other: &String| parts(other).iter().zip(&wanted).take_while(|(a, b)| a == b).count();
        let mut names = self.names();
        // Of equals the first.
        names.reverse();
        let nearest = names.iter().max_by_key(|other| alike(other)).map(|other| clip(other));
        Error::Missing { origin: self.origin(name), name: name.into(), nearest }
    }
}

/// Bytes of a tensor, borrowed from a memory-mapped file or owned.
#[derive(Debug)]
pub struct Bytes<'a>(Source<'a>);

#[derive(Debug)]
enum Source<'a> {
    Mapped { file: &'a Arc<Mapped>, start: usize, len: usize },
    Owned(Vec<u8>),
}

impl<'a> Bytes<'a> {
    pub(crate) fn mapped(file: &'a Arc<Mapped>, start: usize, len: usize) -> Self {
        Self(Source::Mapped { file, start, len })
    }

    /// The bytes, copied if they are a file's; pages that have been read are let go.
    pub fn into_vec(self) -> Vec<u8> {
        match self.0 {
            Source::Owned(bytes) => bytes,
            Source::Mapped { .. } => elements(&self, u8::from_le_bytes),
        }
    }

    /// The bytes where the file is mapped, if they are.
    fn region(&self) -> Option<Region> {
        match self.0 {
            Source::Mapped { file, start, len } => Some(Region { file: Arc::clone(file), start, len }),
            Source::Owned(_) => None,
        }
    }

    /// Tells the system that the pages of a range may go; they come back from the file if somebody looks again.
    fn release(&self, from: usize, len: usize) {
        if let Source::Mapped { file, start, .. } = self.0 {
            file.release(start + from, len);
        }
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

/// Bytes copied before their pages are let go.
const PIECE: usize = 4 << 20;

/// Reads `name` whole into a tensor of its stored type on `device`; quantized values become f32.
///
/// # Errors
/// [`Error::Missing`], [`Error::Unsupported`] for a type candle lacks, or what the store says of the bytes.
pub fn read_tensor(store: &dyn Store, name: &str, device: &Device) -> Result<Tensor> {
    let entry = store.entry(name).ok_or_else(|| store.missing(name))?;
    if matches!(entry.dtype, Dtype::FourBit(_)) {
        let (matrix, original) = store.four_bit(name)?;
        // The values are those of the type before quantization.
        let original = original.to_candle().unwrap_or(DType::F32);
        let widened = || Tensor::from_vec(matrix.to_f32(), matrix.shape(), device)?.to_dtype(original);
        return widened().map_err(|source| Error::Candle { origin: store.origin(name), name: name.into(), source });
    }
    let bytes = store.bytes(name)?;
    let shape = &entry.shape[..];
    let tensor = match entry.dtype {
        Dtype::F64 => Tensor::from_vec(elements(&bytes, f64::from_le_bytes), shape, device),
        Dtype::F32 => Tensor::from_vec(elements(&bytes, f32::from_le_bytes), shape, device),
        Dtype::F16 => Tensor::from_vec(elements(&bytes, f16::from_le_bytes), shape, device),
        Dtype::BF16 => Tensor::from_vec(elements(&bytes, bf16::from_le_bytes), shape, device),
        Dtype::I64 => Tensor::from_vec(elements(&bytes, i64::from_le_bytes), shape, device),
        Dtype::I32 => Tensor::from_vec(elements(&bytes, i32::from_le_bytes), shape, device),
        Dtype::I16 => Tensor::from_vec(elements(&bytes, i16::from_le_bytes), shape, device),
        Dtype::U8 | Dtype::Bool => Tensor::from_vec(elements(&bytes, u8::from_le_bytes), shape, device),
        Dtype::Block(kind) => {
            let mut values = vec![0f32; entry.elements()];
            let (out, from) = (PIECE / 4, kind.bytes(PIECE / 4));
            for (i, (out, piece)) in values.chunks_mut(out).zip(bytes.chunks(from)).enumerate() {
                dequantize(kind, piece, out);
                bytes.release(i * from, piece.len());
            }
            Tensor::from_vec(values, shape, device)
        }
        Dtype::I8 | Dtype::FourBit(_) | Dtype::Other(_) => {
            let what = format!("tensor {name} is stored as {}, which candle cannot hold", entry.dtype);
            return Err(Error::Unsupported { path: store.origin(name).into(), what });
        }
    };
    tensor.map_err(|source| Error::Candle { origin: store.origin(name), name: name.into(), source })
}

/// Reads a matrix as it is stored: blocks stay blocks.
///
/// # Errors
/// As [`read_tensor`].
pub fn read_matrix(store: &dyn Store, name: &str) -> Result<Matrix> {
    let entry = store.entry(name).ok_or_else(|| store.missing(name))?;
    if matches!(entry.dtype, Dtype::FourBit(_)) {
        return Ok(Matrix::FourBit(store.four_bit(name)?.0));
    }
    let (Dtype::Block(kind), [rows, columns]) = (entry.dtype, &entry.shape[..]) else {
        return Ok(Matrix::Dense(read_tensor(store, name, &Device::Cpu)?));
    };
    Ok(Matrix::Blocks(Blocks::new(kind, *rows, *columns, store.bytes(name)?.into_vec())))
}

/// Reads a matrix of f32, f16 or bf16 without copying it, if its file is mapped and its numbers are aligned there; else as
/// [`read_matrix`].
///
/// # Errors
/// As [`read_tensor`].
pub fn read_matrix_in_place(store: &dyn Store, name: &str) -> Result<Matrix> {
    let entry = store.entry(name).ok_or_else(|| store.missing(name))?;
    if let (Some(dtype), [rows, columns]) = (entry.dtype.to_candle(), &entry.shape[..])
        && let Some(region) = store.bytes(name)?.region()
        && let Some(matrix) = InPlace::new(Arc::new(region), dtype, *rows, *columns)
    {
        return Ok(Matrix::InPlace(matrix));
    }
    read_matrix(store, name)
}

/// Copies elements out of a file, which may hold them at any alignment, in pieces: pages that have been read are let go
/// before the next are touched, so that a large tensor is never in memory twice.
fn elements<T: Copy + Send, const N: usize>(bytes: &Bytes<'_>, from_le_bytes: impl Fn([u8; N]) -> T + Sync) -> Vec<T> {
    // Every element size divides the piece.
    let (elements, piece) = (bytes.as_chunks::<N>().0, PIECE / N);
    let items = |from: usize| elements[from..].iter().map(|element| from_le_bytes(*element));
    collect(elements.len(), piece, items, |i| bytes.release(i * PIECE, PIECE.min(bytes.len() - i * PIECE)))
}
