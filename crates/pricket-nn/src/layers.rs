//! The small layers: norm, embedding, activation.

use candle_core::{DType, Tensor};

use crate::Result;
use crate::ops::{self, Activations, Gelu, Matrix};

/// Layer norm (Ba et al. 2016, arXiv:1607.06450) over the last dimension, weight and bias.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) eps: f64,
}

impl LayerNorm {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// A table of token vectors, `[vocab, d]`, kept as stored.
#[derive(Clone, Debug)]
pub struct Embedding {
    pub(crate) weight: Matrix,
    /// For a head that is tied to it.
    pub(crate) activations: Activations,
}

impl Embedding {
    /// `ids` of `[b, t]` to `[b, t, d]` in `dtype`.
    pub(crate) fn forward(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let rows = self.weight.gather(&ids.flatten_all()?, dtype)?;
        Ok(rows.reshape((b, t, self.weight.shape()?.1))?)
    }
}

/// The nonlinearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x Φ(x)` by the error function.
    Gelu,
    /// Its tanh approximation.
    GeluTanh,
}

impl Activation {
    /// The function that transformers means by `name`; `None` for one that no model here uses.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "gelu" | "gelu_python" => Some(Activation::Gelu),
            // Three spellings of one formula: their constants agree to f32 precision.
            "gelu_fast" | "gelu_new" | "gelu_pytorch_tanh" => Some(Activation::GeluTanh),
            _ => None,
        }
    }

    pub(crate) fn form(self) -> Gelu {
        match self {
            Activation::Gelu => Gelu::Erf,
            Activation::GeluTanh => Gelu::Tanh,
        }
    }
}
