//! Activation functions of an MLP.

use candle_core::Tensor;

use crate::Result;

/// Activation function of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), `x Φ(x)`, computed with the error function.
    GeluErf,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// SiLU or Swish, `x sigmoid(x)`.
    Silu,
    /// Squared ReLU, `max(x, 0)²`.
    SquaredRelu,
}

impl Activation {
    /// Returns the function that transformers calls `name`, or `None` if no supported model uses it.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "gelu" | "gelu_python" => Some(Activation::GeluErf),
            // All three compute the tanh approximation; their constants agree to f32 precision.
            "gelu_fast" | "gelu_new" | "gelu_pytorch_tanh" => Some(Activation::GeluTanh),
            "silu" | "swish" => Some(Activation::Silu),
            "relu2" => Some(Activation::SquaredRelu),
            _ => None,
        }
    }

    /// Applies the function to each element.
    ///
    /// # Errors
    /// Returns an error if a tensor operation fails.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Activation::GeluErf => x.gelu_erf()?,
            Activation::GeluTanh => x.gelu()?,
            Activation::Silu => x.silu()?,
            Activation::SquaredRelu => x.relu()?.sqr()?,
        })
    }
}
