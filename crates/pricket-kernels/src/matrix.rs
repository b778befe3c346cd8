use candle_core::{DType, Device, Result, Tensor};

use crate::{Blocks, FourBit, InPlace, Packed};

/// A weight matrix as it is stored: numbers, or quantized blocks. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// A contiguous tensor of `[rows, columns]`.
    Dense(Tensor),
    /// Blocks, on the CPU.
    Blocks(Blocks),
    /// Blocks in the order of the kernels.
    Packed(Packed),
    /// Elements of 4 bits, on the CPU.
    FourBit(FourBit),
    /// Numbers in a mapped file, on the CPU.
    InPlace(InPlace),
}

impl Matrix {
    /// Rows, columns.
    ///
    /// # Errors
    /// If a tensor has not two dimensions.
    pub fn shape(&self) -> Result<(usize, usize)> {
        match self {
            Matrix::Dense(tensor) => tensor.dims2(),
            Matrix::Blocks(blocks) => Ok(blocks.shape()),
            Matrix::Packed(packed) => Ok(packed.shape()),
            Matrix::FourBit(matrix) => Ok(matrix.shape()),
            Matrix::InPlace(matrix) => Ok(matrix.shape()),
        }
    }

    /// The type of the numbers; `None` for blocks.
    pub fn dtype(&self) -> Option<DType> {
        match self {
            Matrix::Dense(tensor) => Some(tensor.dtype()),
            Matrix::InPlace(matrix) => Some(matrix.dtype()),
            Matrix::Blocks(_) | Matrix::Packed(_) | Matrix::FourBit(_) => None,
        }
    }

    /// The same numbers, for which no gradient is collected.
    #[must_use]
    pub fn detached(&self) -> Self {
        match self {
            Matrix::Dense(tensor) => Matrix::Dense(tensor.detach()),
            other => other.clone(),
        }
    }

    /// Whether a gradient is collected for it.
    pub fn track_op(&self) -> bool {
        matches!(self, Matrix::Dense(tensor) if tensor.track_op())
    }

    /// The whole of it in `dtype`.
    ///
    /// # Errors
    /// What candle says.
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

    /// The rows that `ids` names, `[ids, columns]`, in `dtype`.
    ///
    /// # Errors
    /// For an id that is no row.
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

    /// In the order in which the kernels read it, in the same memory where that can be.
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
            candle_core::bail!("row {id} of a table of {rows}");
        }
        row(id as usize, out);
    }
    Tensor::from_vec(out, (ids.len(), columns), device)?.to_dtype(dtype)
}
