//! The small layers: norm and embedding.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::ops::{self, ActivationPrecision, Matrix};
use crate::{Error, Result};

/// A norm over the last dimension.
#[derive(Clone, Debug)]
pub enum Norm {
    /// Layer norm (Ba et al. 2016, arXiv:1607.06450): `(x - mean) / sqrt(var + eps) · weight + bias`.
    Layer {
        /// The canonical name, without `.weight`.
        name: Arc<str>,
        /// `[d]`.
        weight: Tensor,
        /// `[d]`; zeros for a norm without a bias.
        bias: Tensor,
        /// Whether the checkpoint has a bias.
        has_bias: bool,
        /// Added to the variance.
        eps: f64,
    },
    /// Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467): `x / sqrt(mean(x²) + eps) · weight`.
    Rms {
        /// The canonical name, without `.weight`.
        name: Arc<str>,
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
            Norm::Layer { weight, bias, eps, .. } => ops::layer_norm(x, weight, bias, *eps),
            Norm::Rms { weight, eps, .. } => ops::rms_norm(x, weight, *eps),
        }
    }

    /// The canonical name, without `.weight`.
    pub fn name(&self) -> &str {
        match self {
            Norm::Layer { name, .. } | Norm::Rms { name, .. } => name,
        }
    }

    /// The weight, `[d]`.
    pub fn weight(&self) -> &Tensor {
        match self {
            Norm::Layer { weight, .. } | Norm::Rms { weight, .. } => weight,
        }
    }

    /// The bias, `[d]`, if the checkpoint has one.
    pub fn bias(&self) -> Option<&Tensor> {
        match self {
            Norm::Layer { bias, has_bias: true, .. } => Some(bias),
            Norm::Layer { .. } | Norm::Rms { .. } => None,
        }
    }

    /// The same norm with another weight and, where there is one, another bias.
    ///
    /// # Errors
    /// [`Error::Input`] for a tensor of another size, or a bias for a norm without one.
    pub fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let expected = self.weight().dims();
        let fits = weight.dims() == expected && bias.as_ref().is_none_or(|bias| bias.dims() == expected);
        if !fits || bias.is_some() != self.bias().is_some() {
            let found = (weight.dims(), bias.as_ref().map(Tensor::dims));
            return Err(Error::Input(format!("{}: a norm of {found:?}, expected {expected:?}", self.name())));
        }
        Ok(match self.clone() {
            Norm::Layer { name, bias: zeros, eps, has_bias, .. } => {
                Norm::Layer { name, weight, bias: bias.unwrap_or(zeros), has_bias, eps }
            }
            Norm::Rms { name, eps, .. } => Norm::Rms { name, weight, eps },
        })
    }
}

/// A table of token vectors, `[vocab, d]`, kept as stored.
#[derive(Clone, Debug)]
pub struct Embedding {
    pub(crate) name: Arc<str>,
    pub(crate) weight: Matrix,
    /// For a head that is tied to it.
    pub(crate) precision: ActivationPrecision,
}

impl Embedding {
    /// `ids` of `[b, t]` to `[b, t, d]` in `dtype`.
    pub(crate) fn forward(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let rows = self.weight.gather(&ids.flatten_all()?, dtype)?;
        Ok(rows.reshape((b, t, self.weight.shape()?.1))?)
    }

    /// The canonical name, without `.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The table, `[vocab, d]`.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }

    /// The same embedding with another table.
    ///
    /// # Errors
    /// [`Error::Input`] for a table of another size.
    pub fn with_weight(&self, weight: Matrix) -> Result<Self> {
        let (expected, found) = (self.weight.shape()?, weight.shape()?);
        if expected != found {
            return Err(Error::Input(format!("{}: a table of {found:?}, expected {expected:?}", self.name)));
        }
        Ok(Self { weight, ..self.clone() })
    }
}
