//! Matrices in a mapped file, which products read without a copy.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::cpu::operands::Stored;

/// Bytes that stay at their address until this value is dropped: a part of a mapped file.
pub trait MappedBytes: Debug + Send + Sync {
    /// Returns the bytes.
    fn bytes(&self) -> &[u8];

    /// Checks that the bytes can still be read.
    ///
    /// # Errors
    /// Returns a message if they cannot, for example because the file has become shorter.
    fn check(&self) -> std::result::Result<(), String>;
}

/// A matrix of f32, f16 or bf16 numbers that is read in place. Cheap to clone.
#[derive(Clone, Debug)]
pub struct InPlace {
    kept: Arc<dyn MappedBytes>,
    dtype: DType,
    rows: usize,
    columns: usize,
}

impl InPlace {
    /// Creates a matrix `[rows, columns]`. Returns `None` if the number of bytes does not match, if the bytes are not
    /// aligned for `dtype`, or if products cannot read `dtype` in place: they read f32, f16 and bf16, on little-endian
    /// processors.
    pub fn new(kept: Arc<dyn MappedBytes>, dtype: DType, rows: usize, columns: usize) -> Option<Self> {
        let size = dtype.size_in_bytes();
        let bytes = rows.checked_mul(columns)?.checked_mul(size)?;
        let is_read = matches!(dtype, DType::F32 | DType::F16 | DType::BF16) && cfg!(target_endian = "little");
        let fits = kept.bytes().len() == bytes && kept.bytes().as_ptr().align_offset(size) == 0;
        (is_read && fits).then_some(Self { kept, dtype, rows, columns })
    }

    /// Returns whether both are the same matrix at the same address.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.kept, &other.kept) && self.shape() == other.shape() && self.dtype == other.dtype
    }

    /// Returns the numbers of rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Returns the type of the numbers.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Calls `f` with the numbers of the matrix.
    ///
    /// # Errors
    /// Returns an error if the file has become too short for the matrix.
    pub(crate) fn with_stored<R>(&self, f: impl FnOnce(Stored<'_>) -> R) -> Result<R> {
        if let Err(what) = self.kept.check() {
            bail!("{what}");
        }
        let bytes = self.kept.bytes();
        Ok(f(match self.dtype {
            DType::F16 => Stored::F16(bytemuck::cast_slice(bytes)),
            DType::BF16 => Stored::BF16(bytemuck::cast_slice(bytes)),
            _ => Stored::F32(bytemuck::cast_slice(bytes)),
        }))
    }

    /// Widens a row to f32.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let size = self.dtype.size_in_bytes();
        let bytes = &self.kept.bytes()[row * self.columns * size..][..self.columns * size];
        match self.dtype {
            DType::F16 => bytemuck::cast_slice::<u8, f16>(bytes).convert_to_f32_slice(out),
            DType::BF16 => bytemuck::cast_slice::<u8, bf16>(bytes).convert_to_f32_slice(out),
            _ => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        }
    }

    /// Copies the matrix into a tensor on the CPU.
    ///
    /// # Errors
    /// Returns an error if the file has become too short for the matrix.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let shape = self.shape();
        self.with_stored(|stored| match stored {
            Stored::F16(w) => Tensor::from_slice(w, shape, &Device::Cpu),
            Stored::BF16(w) => Tensor::from_slice(w, shape, &Device::Cpu),
            Stored::F32(w) => Tensor::from_slice(w, shape, &Device::Cpu),
            Stored::Blocks(_) | Stored::Packed(_) | Stored::FourBit(_) => {
                unreachable!("matrices in place hold numbers")
            }
        })?
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.kept.check().or_else(|what| bail!("{what}"))
    }
}
