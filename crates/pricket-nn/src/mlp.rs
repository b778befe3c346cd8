//! The feed-forward part of a block.

use candle_core::Tensor;

use crate::ops::{self, Gate};
use crate::{Activation, Context, Layer, Linear, Norm, Result, Site};

/// `down(activation(up(x)))`, or with a gate (Shazeer 2020, arXiv:2002.05202) `down(activation(gate(x)) · up(x))`.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[hidden, d]`, if there is one.
    pub gate: Option<Linear>,
    /// `[hidden, d]`.
    pub up: Linear,
    /// `[d, hidden]`.
    pub down: Linear,
    /// Of the gate, or of `up` where there is no gate.
    pub activation: Activation,
}

impl Mlp {
    /// What the MLP of `norm(x)` adds to the residual stream. `x` and the result are `[b, t, d]`.
    ///
    /// # Errors
    /// What an operation or a tap says.
    pub fn forward(&self, norm: &Norm, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let x = norm.forward(x)?;
        let hidden = match &self.gate {
            Some(gate) if self.activation == Activation::Silu => {
                ops::gated(&gate.forward(&x)?, &self.up.forward(&x)?, Gate::Silu)?
            }
            Some(gate) => (gate.forward_then(&x, self.activation)? * self.up.forward(&x)?)?,
            None => self.up.forward_then(&x, self.activation)?,
        };
        let out = self.down.forward_or_zeros(&hidden, ctx.needs().mlp)?;
        ctx.tap(Site::MlpOut, out)
    }

    /// Its layers.
    pub fn layers(&mut self) -> Vec<Layer<'_>> {
        self.gate.iter_mut().chain([&mut self.up, &mut self.down]).map(Layer::from).collect()
    }
}
