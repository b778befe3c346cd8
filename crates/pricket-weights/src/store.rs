//! The [`Store`] trait, and functions that read its tensors.

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
    /// Stored element type.
    pub dtype: Dtype,
}

impl Entry {
    /// Returns the number of elements. Stores have checked that the product does not overflow.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the size in the file, in bytes.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes(self.elements())
    }
}

/// A collection of named tensors, usually a checkpoint on disk. The trait is object-safe, and a store can be shared
/// between threads.
pub trait Store: Send + Sync {
    /// Returns the names of all tensors, sorted.
    fn names(&self) -> Vec<String>;

    /// Returns the shape and type of a tensor, or `None` if the store does not have it.
    fn entry(&self, name: &str) -> Option<Entry>;

    /// Returns the shape and type of a tensor for a reader that expects `shape`. Files ignore the expectation. Stores
    /// without a file, such as [`crate::ShapesOnly`], create a tensor of that shape.
    fn expect(&self, name: &str, shape: &[usize]) -> Option<Entry> {
        let _ = shape;
        self.entry(name)
    }

    /// Returns the name under which a tensor is stored.
    ///
    /// It differs from `name` if the file stores one of several tensors that share memory, as `save_model` of
    /// safetensors does. Otherwise it is `name`, whether the tensor exists or not.
    fn resolve<'a>(&'a self, name: &'a str) -> &'a str {
        name
    }

    /// Returns whether the checkpoint lists a tensor. An index may list a tensor that its shard lacks. Readers must
    /// then report the tensor as missing and not treat it as left out on purpose.
    fn claims(&self, name: &str) -> bool {
        self.entry(self.resolve(name)).is_some()
    }

    /// Returns the bytes of a tensor: contiguous, row-major, little-endian.
    ///
    /// # Errors
    /// - [`Error::Missing`] if the store has no such tensor;
    /// - [`Error::Unsupported`] if the element type is not supported;
    /// - [`Error::Io`] or [`Error::Corrupt`] if the bytes cannot be read.
    fn bytes(&self, name: &str) -> Result<Bytes<'_>>;

    /// Returns the file that holds a tensor, for messages, or a description of the store if no file is known.
    fn origin(&self, name: &str) -> String;

    /// A matrix of 4-bit elements, and its type before quantization. Only stores that have entries of [`Dtype::FourBit`] have such matrices.
    ///
    /// # Errors
    /// Returns [`Error::Missing`] if there is no such matrix, and [`Error::Corrupt`] if its parts do not fit each other.
    fn four_bit(&self, name: &str) -> Result<(FourBit, Dtype)> {
        Err(self.missing(name))
    }

    /// Returns whether the store should be used for shapes and types only, without bytes (see [`crate::ShapesOnly`]).
    fn shapes_only(&self) -> bool {
        false
    }

    /// Creates the error for a missing tensor, with the most similar name in the store.
    fn missing(&self, name: &str) -> Error {
        let parts = |name: &str| name.split('.').rev().map(str::to_owned).collect::<Vec<_>>();
        let wanted = parts(name);
        // Compares the parts of names from their ends, because names usually differ in a prefix.
        let alike = |other: &String| parts(other).iter().zip(&wanted).take_while(|(a, b)| a == b).count();
        let mut names = self.names();
        // `max_by_key` returns the last of several maxima; reversed, that is the first name.
        names.reverse();
        let nearest = names.iter().max_by_key(|other| alike(other)).map(|other| clip(other));
        Error::Missing { origin: self.origin(name), name: name.into(), nearest }
    }
}

/// The bytes of a tensor, borrowed from a memory-mapped file or owned.
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

    /// Converts into owned bytes. Bytes of a mapped file are copied, and the pages are released.
    pub fn into_vec(self) -> Vec<u8> {
        match self.0 {
            Source::Owned(bytes) => bytes,
            Source::Mapped { .. } => elements(&self, u8::from_le_bytes),
        }
    }

    /// Returns the region of the mapped file, or `None` if the bytes are owned.
    fn region(&self) -> Option<Region> {
        match self.0 {
            Source::Mapped { file, start, len } => Some(Region { file: Arc::clone(file), start, len }),
            Source::Owned(_) => None,
        }
    }

    /// Releases the pages of a range of a mapped file. A later access reads them from the file again.
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

/// Number of bytes that are copied before their pages are released.
const PIECE: usize = 4 << 20;

/// Reads a tensor to `device` in its stored type. Quantized tensors become f32.
///
/// # Errors
/// Returns the errors of [`Store::bytes`], [`Error::Unsupported`] if candle does not have the type, and
/// [`Error::Candle`] if the tensor cannot be created on the device.
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
            let what = format!("tensor {name} is stored as {}, which candle does not support", entry.dtype);
            return Err(Error::Unsupported { path: store.origin(name).into(), what });
        }
    };
    tensor.map_err(|source| Error::Candle { origin: store.origin(name), name: name.into(), source })
}

/// Reads a matrix without dequantizing it. Quantized matrices keep their blocks; others become tensors on the CPU.
///
/// # Errors
/// Returns the errors of [`read_tensor`].
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

/// Reads a matrix of f32, f16 or bf16 without copying it, if its file is mapped and its elements are aligned. Otherwise
/// reads it with [`read_matrix`].
///
/// # Errors
/// Returns the errors of [`read_tensor`].
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

/// Copies elements, which may be unaligned, in pieces. The pages of a piece are released before the next piece is read,
/// so that a large tensor is never in memory twice.
fn elements<T: Copy + Send, const N: usize>(bytes: &Bytes<'_>, from_le_bytes: impl Fn([u8; N]) -> T + Sync) -> Vec<T> {
    // `PIECE` is a multiple of every element size.
    let (elements, piece) = (bytes.as_chunks::<N>().0, PIECE / N);
    let items = |from: usize| elements[from..].iter().map(|element| from_le_bytes(*element));
    collect(elements.len(), piece, items, |i| bytes.release(i * PIECE, PIECE.min(bytes.len() - i * PIECE)))
}
