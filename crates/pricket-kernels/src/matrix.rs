//! Weight matrices: dense tensors, quantized blocks, or numbers in a mapped file.

use candle_core::{DType, Device, Result, Tensor};

use crate::{Blocks, FourBit, InPlace, Packed};

/// A weight matrix in the type in which it is stored: numbers or quantized blocks. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// A contiguous tensor, `[rows, columns]`.
    Dense(Tensor),
    /// Quantized blocks in the order of the file, on the CPU.
    Blocks(Blocks),
    /// Quantized blocks in the order in which the kernels read them, on the CPU.
    Packed(Packed),
    /// 4-bit types of bitsandbytes, on the CPU.
    FourBit(FourBit),
    /// Numbers in a mapped file, not copied, on the CPU.
    InPlace(InPlace),
}

impl Matrix {
    /// Returns the numbers of rows and columns.
    ///
    /// # Errors
    /// Returns an error if a dense tensor does not have two dimensions.
    pub fn shape(&self) -> Result<(usize, usize)> {
        match self {
            Matrix::Dense(tensor) => tensor.dims2(),
            Matrix::Blocks(blocks) => Ok(blocks.shape()),
            Matrix::Packed(packed) => Ok(packed.shape()),
            Matrix::FourBit(matrix) => Ok(matrix.shape()),
            Matrix::InPlace(matrix) => Ok(matrix.shape()),
        }
    }

    /// Returns the type of the numbers, or `None` for quantized blocks.
    pub fn dtype(&self) -> Option<DType> {
        match self {
            Matrix::Dense(tensor) => Some(tensor.dtype()),
            Matrix::InPlace(matrix) => Some(matrix.dtype()),
            Matrix::Blocks(_) | Matrix::Packed(_) | Matrix::FourBit(_) => None,
        }
    }

    /// Returns the same matrix, detached from the graph of gradients.
    #[must_use]
    pub fn detached(&self) -> Self {
        match self {
            Matrix::Dense(tensor) => Matrix::Dense(tensor.detach()),
            other => other.clone(),
        }
    }

    /// Returns whether a gradient is tracked for the matrix.
    pub fn track_op(&self) -> bool {
        matches!(self, Matrix::Dense(tensor) if tensor.track_op())
    }

    /// Returns the whole matrix as a tensor in `dtype` on `device`.
    ///
    /// # Errors
    /// Returns an error if a tensor operation fails, or if the mapped file has become too short.
    pub fn to_dense(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        match self {
            Matrix::Dense(tensor) => tensor.to_dtype(dtype)?.to_device(device),
            Matrix::Blocks(blocks) => {
                Tensor::from_vec(blocks.to_f32(), blocks.shape(), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
            }
            Matrix::FourBit(matrix) => {
                Tensor::from_vec(matrix.to_f32(), matrix.shape(), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
            }
            Matrix::InPlace(matrix) => matrix.to_tensor()?.to_dtype(dtype)?.to_device(device),
            Matrix::Packed(packed) => {
                Tensor::from_vec(packed.to_f32(), packed.shape(), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
            }
        }
    }

    /// Returns the rows at the indices `ids` (u32), `[ids, columns]`, in `dtype`.
    ///
    /// # Errors
    /// Returns an error if an index is not below the number of rows, or if the mapped file has become too short.
    pub fn gather(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        match self {
            Matrix::Dense(tensor) => tensor.index_select(ids, 0)?.to_dtype(dtype),
            Matrix::Blocks(blocks) => {
                let row = |row: usize, out: &mut [f32]| crate::dequantize(blocks.kind(), blocks.row(row), out);
                gather(ids, blocks.shape(), dtype, row)
            }
            Matrix::InPlace(matrix) => {
                matrix.check()?;
                gather(ids, matrix.shape(), dtype, |row, out| matrix.row(row, out))
            }
            Matrix::FourBit(matrix) => gather(ids, matrix.shape(), dtype, |row, out| matrix.row(row, out)),
            Matrix::Packed(packed) => gather(ids, packed.shape(), dtype, |row, out| packed.row(row, out)),
        }
    }

    /// Packs quantized blocks into the order in which the kernels read them, in the same memory if possible. Other
    /// matrices, and block types that are not packed, are returned as they are.
    #[must_use]
    pub fn packed(self) -> Self {
        match self {
            Matrix::Blocks(blocks) => Packed::new(blocks).map_or_else(Matrix::Blocks, Matrix::Packed),
            other => other,
        }
    }
}

fn gather(
    ids: &Tensor,
    (rows, columns): (usize, usize),
    dtype: DType,
    row: impl Fn(usize, &mut [f32]),
) -> Result<Tensor> {
    let device = ids.device();
    let ids = ids.to_vec1::<u32>()?;
    let mut out = vec![0f32; ids.len() * columns];
    for (&id, out) in ids.iter().zip(out.chunks_exact_mut(columns)) {
        if id as usize >= rows {
            candle_core::bail!("row {id} is out of range; the matrix has {rows} rows");
        }
        row(id as usize, out);
    }
    Tensor::from_vec(out, (ids.len(), columns), device)?.to_dtype(dtype)
}
