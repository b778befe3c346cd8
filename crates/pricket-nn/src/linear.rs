//! Linear layers, the order of their rows, and what adapts them.

use std::sync::Arc;

use candle_core::Tensor;

use crate::ops::{self, Activations, Matrix};
use crate::{Activation, Embedding, Error, Result};

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

/// A low-rank change to a linear layer (Hu et al. 2021, arXiv:2106.09685): `y += scale · (x Aᵀ) Bᵀ`.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// `[rank, inputs]`.
    pub a: Tensor,
    /// `[outputs, rank]`, in the order of rows in which the model multiplies: [`RowOrder::apply`] brings one from a file there.
    pub b: Tensor,
    /// Multiplies the product; `alpha / rank` in PEFT's terms.
    pub scale: f64,
}

/// `y = x Wᵀ + b`. A frozen weight stays as it is stored and is never widened whole.
#[derive(Clone, Debug)]
pub struct Linear {
    pub(crate) name: Arc<str>,
    pub(crate) weight: Matrix,
    pub(crate) bias: Option<Tensor>,
    pub(crate) precision: Activations,
    pub(crate) rows: RowOrder,
    pub(crate) adapter: Option<Adapter>,
}

impl Linear {
    /// The head `name` that multiplies with the table of an embedding: a tied head, from one copy.
    pub fn tied(embedding: &Embedding, name: &str) -> Self {
        Self {
            name: name.into(),
            weight: embedding.weight.clone(),
            bias: None,
            precision: embedding.precision,
            rows: RowOrder::AsStored,
            adapter: None,
        }
    }

    /// Its canonical name, without `.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The weight, `[outputs, inputs]`, in the model's order of rows.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }

    /// The bias, `[outputs]`, in the model's order of rows.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// How the rows were ordered on file.
    pub fn rows(&self) -> RowOrder {
        self.rows
    }

    /// The adapter, if there is one.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// The same layer over the same weight with another adapter, or none.
    ///
    /// # Errors
    /// [`Error::Input`] for an adapter of other sizes.
    pub fn with_adapter(&self, adapter: Option<Adapter>) -> Result<Self> {
        if let Some(Adapter { a, b, .. }) = &adapter {
            let (outputs, inputs) = self.weight.shape()?;
            let rank = a.dims().first().copied().unwrap_or(0);
            if a.dims() != [rank, inputs] || b.dims() != [outputs, rank] {
                return Err(Error::Input(format!(
                    "{}: an adapter of {:?} and {:?}; expected [rank, {inputs}] and [{outputs}, rank]",
                    self.name,
                    a.dims(),
                    b.dims()
                )));
            }
        }
        Ok(Self { adapter, ..self.clone() })
    }

    /// `[.., inputs]` to `[.., outputs]`.
    ///
    /// # Errors
    /// If the last dimension of `x` is not this layer's input.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = ops::linear(x, &self.weight, self.bias.as_ref(), self.precision)?;
        let Some(Adapter { a, b, scale }) = &self.adapter else { return Ok(y) };
        let product = |x: &Tensor, w: &Tensor| ops::plain_linear(x, &Matrix::Dense(w.clone()), None);
        Ok((y + (product(&product(x, a)?, b)? * *scale)?)?)
    }

    /// The gradient of the input, given that of the output: `grad W`, and the adapter's share. In `dtype`, which is the input's.
    pub(crate) fn backward(&self, grad: &Tensor, dtype: candle_core::DType) -> Result<Tensor> {
        let mut back = ops::linear_transposed(grad, &self.weight)?;
        if let Some(Adapter { a, b, scale }) = &self.adapter {
            let low = grad.to_dtype(b.dtype())?.matmul(b)?.matmul(a)?;
            back = (&back + (low.to_dtype(back.dtype())? * *scale)?)?;
        }
        Ok(back.to_dtype(dtype)?)
    }

    /// [`Linear::forward`], then an activation.
    pub(crate) fn forward_then(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        if self.adapter.is_some() {
            return activation.forward(&self.forward(x)?);
        }
        ops::linear_then(x, &self.weight, self.bias.as_ref(), activation, self.precision)
    }
}

/// The embedding and the head of a model; see [`Weights::embedding_and_head`](crate::Weights::embedding_and_head).
#[derive(Clone, Debug)]
pub struct Tables {
    /// Token vectors.
    pub embed: Embedding,
    /// To logits.
    pub head: Linear,
    /// Whether the head is the table of `embed`.
    pub is_tied: bool,
}
