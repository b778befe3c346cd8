//! The feed-forward part of a block.

use candle_core::Tensor;

use crate::ops::{self, Gate};
use crate::{Activation, Adapter, Context, Layer, Linear, Norm, Result, Site};

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

    /// Its layers.
    pub fn layers(&mut self) -> Vec<Layer<'_>> {
        self.gate.iter_mut().chain([&mut self.up, &mut self.down]).map(Layer::from).collect()
    }
}
