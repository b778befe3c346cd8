//! The feed-forward part of a block: `down(activation(up(x)))`, or `down(activation(gate(x)) · up(x))` with a gate.

use candle_core::Tensor;

use crate::ops::{self, Gate};
use crate::{Activation, Adapter, Context, Layer, Linear, Norm, Result, Site};

/// Multilayer perceptron: `down(activation(up(x)))`, or `down(activation(gate(x)) · up(x))` with a gate (Shazeer 2020,
/// arXiv:2002.05202).
#[derive(Clone, Debug)]
pub struct Mlp {
    /// Gate projection, `[hidden, d]`; `None` for an MLP without a gate.
    pub gate: Option<Linear>,
    /// Up projection, `[hidden, d]`.
    pub up: Linear,
    /// Down projection, `[d, hidden]`.
    pub down: Linear,
    /// Activation function of the gate, or of `up` if there is no gate.
    pub activation: Activation,
}

impl Mlp {
    /// Returns the output of the MLP for `norm(x)`, which the block adds to the residual stream. `x` and the result are
    /// `[b, t, d]`.
    ///
    /// # Errors
    /// Returns an error if a tensor operation or the edit of a tap fails.
    pub fn forward(&self, norm: &Norm, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let later = || {
            let (mlp, norm) = (self.clone(), norm.clone());
            move |x: &Tensor, ctx: &mut Context| mlp.forward(&norm, x, ctx)
        };
        if let Some(zeros) = ctx.defer(ctx.needs().mlp, x, later)? {
            return Ok(zeros);
        }
        let x = norm.forward(x)?;
        let has_value = ctx.needs().mlp;
        if self.gate.is_none() && self.down.adapters.iter().any(Adapter::track_op) {
            let out = self.down.forward_of(&self.up.forward(&x)?, self.activation, has_value)?;
            return ctx.tap(Site::MlpOut, out);
        }
        let hidden = match &self.gate {
            Some(gate) if self.activation == Activation::Silu => {
                ops::gated(&gate.forward(&x)?, &self.up.forward(&x)?, Gate::Silu)?
            }
            Some(gate) => (gate.forward_then(&x, self.activation)? * self.up.forward(&x)?)?,
            None => self.up.forward_then(&x, self.activation)?,
        };
        let out = self.down.forward_or_zeros(&hidden, has_value)?;
        ctx.tap(Site::MlpOut, out)
    }

    /// Returns the layers: `gate`, `up` and `down`.
    pub fn layers(&mut self) -> Vec<Layer<'_>> {
        self.gate.iter_mut().chain([&mut self.up, &mut self.down]).map(Layer::from).collect()
    }
}
