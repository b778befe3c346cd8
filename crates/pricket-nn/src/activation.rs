//! Activation functions.

use candle_core::Tensor;

use crate::Result;

/// The nonlinearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), `x Φ(x)`, by the error function.
    GeluErf,
    /// Its tanh approximation.
    GeluTanh,
    /// `x sigmoid(x)`.
    Silu,
    /// `max(x, 0)²`.
    SquaredRelu,
}

impl Activation {
    /// The function that transformers means by `name`; `None` for one that no model here uses.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "gelu" | "gelu_python" => Some(Activation::GeluErf),
            // Three spellings of one formula: their constants agree to f32 precision.
            "gelu_fast" | "gelu_new" | "gelu_pytorch_tanh" => Some(Activation::GeluTanh),
            "silu" | "swish" => Some(Activation::Silu),
            "relu2" => Some(Activation::SquaredRelu),
            _ => None,
        }
    }

    /// Applies it to each element.
    ///
    /// # Errors
    /// What candle says.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Activation::GeluErf => x.gelu_erf()?,
            Activation::GeluTanh => x.gelu()?,
            Activation::Silu => x.silu()?,
            Activation::SquaredRelu => x.relu()?.sqr()?,
        })
    }
}
