use candle_core::Tensor;

use crate::ops::{self, Activations, Gelu, Matrix};
use crate::{Error, Result};

/// How the rows of a weight on file relate to the rows that the model multiplies with.
///
/// A fused query-key-value matrix is re-laid once, at load, so that there is one attention path. This type is the only
/// place that applies the order or undoes it, for gradients, adapters, merging and export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowOrder {
    /// As on file.
    #[default]
    AsStored,
    /// On file `[heads, 3, head_dim]`: each head's q, k and v side by side, as GPT-NeoX trains them. In memory
    /// `[3, heads, head_dim]`: Q, then K, then V.
    PerHead {
        /// Number of heads.
        heads: usize,
    },
}

impl RowOrder {
    /// From the order on file to the order in memory; `tensor` is `[rows, ..]`.
    ///
    /// # Errors
    /// If the rows do not divide into heads.
    pub fn apply(self, tensor: &Tensor) -> Result<Tensor> {
        match self {
            RowOrder::AsStored => Ok(tensor.clone()),
            RowOrder::PerHead { heads } => swap(tensor, heads, 3),
        }
    }

    /// As [`RowOrder::apply`], of a matrix in any form.
    ///
    /// # Errors
    /// If the rows do not divide into heads.
    pub fn apply_to_matrix(self, matrix: Matrix) -> Result<Matrix> {
        match (self, matrix) {
            (_, Matrix::Dense(tensor)) => Ok(Matrix::Dense(self.apply(&tensor)?)),
            (RowOrder::AsStored, matrix) => Ok(matrix),
            (_, Matrix::Packed(_)) => Err(Error::Input("packed rows are in the model's order already".into())),
            (RowOrder::PerHead { heads }, Matrix::Blocks(blocks)) => {
                let (rows, _) = blocks.shape();
                if !rows.is_multiple_of(3 * heads) {
                    return Err(Error::Input(format!("{rows} rows are not three for each dimension of {heads} heads")));
                }
                let dim = rows / heads / 3;
                // Row [part, head, i] in memory is row [head, part, i] on file.
                let order = |row: usize| (row / dim % heads * 3 + row / dim / heads) * dim + row % dim;
                Ok(Matrix::Blocks(blocks.reordered(order)))
            }
        }
    }

    /// From the order in memory back to the order on file.
    ///
    /// # Errors
    /// If the rows do not divide into heads.
    pub fn undo(self, tensor: &Tensor) -> Result<Tensor> {
        match self {
            RowOrder::AsStored => Ok(tensor.clone()),
            RowOrder::PerHead { heads } => swap(tensor, 3, heads),
        }
    }
}

/// Rows `[outer, inner, ..]` to `[inner, outer, ..]`.
fn swap(tensor: &Tensor, outer: usize, inner: usize) -> Result<Tensor> {
    let rows = tensor.dim(0)?;
    let split = tensor.reshape((outer, inner, tensor.elem_count() / (outer * inner)))?;
    let mut shape = tensor.dims().to_vec();
    shape[0] = rows;
    Ok(split.transpose(0, 1)?.contiguous()?.reshape(shape)?)
}

/// `y = x Wᵀ + b`. A frozen weight stays as it is stored and is never widened whole.
#[derive(Clone, Debug)]
pub struct Linear {
    pub(crate) weight: Matrix,
    pub(crate) bias: Option<Tensor>,
    pub(crate) activations: Activations,
}

impl Linear {
    /// Multiplies with the table of an embedding: a tied head, from one copy.
    pub fn tied(embedding: &crate::Embedding) -> Self {
        Self { weight: embedding.weight.clone(), bias: None, activations: embedding.activations }
    }

    /// `[.., in]` to `[.., out]`.
    ///
    /// # Errors
    /// If the last dimension of `x` is not this layer's input.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, self.bias.as_ref(), self.activations)
    }

    /// [`Linear::forward`], then a GELU.
    pub(crate) fn forward_gelu(&self, x: &Tensor, form: Gelu) -> Result<Tensor> {
        ops::linear_gelu(x, &self.weight, self.bias.as_ref(), form, self.activations)
    }
}
