//! The small layers: norm and embedding.

use candle_core::{DType, Tensor};

use crate::Result;
use crate::ops::{self, Activations, Matrix};

/// A norm over the last dimension.
#[derive(Clone, Debug)]
pub enum Norm {
    /// Layer norm (Ba et al. 2016, arXiv:1607.06450): `(x - mean) / sqrt(var + eps) · weight + bias`.
    Layer {
        /// `[d]`.
        weight: Tensor,
        /// `[d]`; zeros for a norm without a bias.
        bias: Tensor,
        /// Added to the variance.
        eps: f64,
    },
    /// Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467): `x / sqrt(mean(x²) + eps) · weight`.
    Rms {
        /// `[d]`.
        weight: Tensor,
        /// Added to the mean of squares.
        eps: f64,
    },
}

impl Norm {
    /// Families hand a norm to the layer that reads it, which applies it there.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Norm::Layer { weight, bias, eps } => ops::layer_norm(x, weight, bias, *eps),
            Norm::Rms { weight, eps } => ops::rms_norm(x, weight, *eps),
        }
    }
}

/// A table of token vectors, `[vocab, d]`, kept as stored.
#[derive(Clone, Debug)]
pub struct Embedding {
    pub(crate) weight: Matrix,
    /// For a head that is tied to it.
    pub(crate) precision: Activations,
}

impl Embedding {
    /// `ids` of `[b, t]` to `[b, t, d]` in `dtype`.
    pub(crate) fn forward(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let rows = self.weight.gather(&ids.flatten_all()?, dtype)?;
        Ok(rows.reshape((b, t, self.weight.shape()?.1))?)
    }

    /// The table, `[vocab, d]`.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }
}
