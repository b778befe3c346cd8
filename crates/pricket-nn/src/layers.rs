//! Norms and embeddings.
//!
//! Layer norm: `(x - mean) / sqrt(var + eps) · weight + bias`. RMS norm: `x / sqrt(mean(x²) + eps) · weight`. Both
//! normalize over the last dimension.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::ops::{self, ActivationPrecision, Matrix};
use crate::{Error, Result};

/// A norm over the last dimension.
#[derive(Clone, Debug)]
pub enum Norm {
    /// Layer norm (Ba et al. 2016, arXiv:1607.06450): `(x - mean) / sqrt(var + eps) · weight + bias`.
    Layer {
        /// Canonical name without `.weight`.
        name: Arc<str>,
        /// Weight, `[d]`.
        weight: Tensor,
        /// Bias, `[d]`; zeros for a norm without a bias.
        bias: Tensor,
        /// Whether the checkpoint has a bias.
        has_bias: bool,
        /// Added to the variance.
        eps: f64,
    },
    /// Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467): `x / sqrt(mean(x²) + eps) · weight`.
    Rms {
        /// Canonical name without `.weight`.
        name: Arc<str>,
        /// Weight, `[d]`.
        weight: Tensor,
        /// Added to the mean of squares.
        eps: f64,
    },
}

impl Norm {
    /// Applies the norm. Families do not call this: they pass the norm to attention or the MLP, which applies it.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Norm::Layer { weight, bias, eps, .. } => ops::layer_norm(x, weight, bias, *eps),
            Norm::Rms { weight, eps, .. } => ops::rms_norm(x, weight, *eps),
        }
    }

    /// Returns the canonical name without `.weight`.
    pub fn name(&self) -> &str {
        match self {
            Norm::Layer { name, .. } | Norm::Rms { name, .. } => name,
        }
    }

    /// Returns the weight, `[d]`.
    pub fn weight(&self) -> &Tensor {
        match self {
            Norm::Layer { weight, .. } | Norm::Rms { weight, .. } => weight,
        }
    }

    /// Returns the bias, `[d]`, if the checkpoint has one.
    pub fn bias(&self) -> Option<&Tensor> {
        match self {
            Norm::Layer { bias, has_bias: true, .. } => Some(bias),
            Norm::Layer { .. } | Norm::Rms { .. } => None,
        }
    }

    /// Returns a copy of the norm with another weight and another bias. `bias` is required if the norm has a bias.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a tensor has another shape, if the bias is missing, or if the norm has no bias and
    /// one is given.
    pub fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let expected = self.weight().dims();
        let fits = weight.dims() == expected && bias.as_ref().is_none_or(|bias| bias.dims() == expected);
        if !fits || bias.is_some() != self.bias().is_some() {
            let found = (weight.dims(), bias.as_ref().map(Tensor::dims));
            return Err(Error::Input(format!(
                "{}: weight and bias of shapes {found:?}; expected {expected:?}",
                self.name()
            )));
        }
        Ok(match self.clone() {
            Norm::Layer { name, bias: zeros, eps, has_bias, .. } => {
                Norm::Layer { name, weight, bias: bias.unwrap_or(zeros), has_bias, eps }
            }
            Norm::Rms { name, eps, .. } => Norm::Rms { name, weight, eps },
        })
    }
}

/// Table of token vectors or of learned positions, `[rows, d]`, kept as stored.
#[derive(Clone, Debug)]
pub struct Embedding {
    pub(crate) name: Arc<str>,
    pub(crate) weight: Matrix,
    /// Activation precision of a head that is tied to this table.
    pub(crate) precision: ActivationPrecision,
}

impl Embedding {
    /// Looks up `ids`, `[b, t]`. Returns `[b, t, d]` in `dtype`.
    pub(crate) fn forward(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let rows = self.weight.gather(&ids.flatten_all()?, dtype)?;
        Ok(rows.reshape((b, t, self.weight.shape()?.1))?)
    }

    /// Returns the canonical name without `.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the table, `[rows, d]`.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }

    /// Returns a copy of the embedding with another table.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the table has another shape.
    pub fn with_weight(&self, weight: Matrix) -> Result<Self> {
        let (expected, found) = (self.weight.shape()?, weight.shape()?);
        if expected != found {
            return Err(Error::Input(format!("{}: table of shape {found:?}; expected {expected:?}", self.name)));
        }
        Ok(Self { weight, ..self.clone() })
    }
}
