use candle_core::Tensor;

use crate::{Activation, Context, LayerNorm, Linear, Result, Site};

/// `down(activation(up(x)))`.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[d, hidden]`.
    pub up: Linear,
    /// `[hidden, d]`.
    pub down: Linear,
    /// Between the two.
    pub activation: Activation,
}

impl Mlp {
    /// What the MLP of `norm(x)` adds to the residual stream. `x` and the result are `[b, t, d]`.
    ///
    /// # Errors
    /// What an operation or a tap says.
    pub fn forward(&self, norm: &LayerNorm, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let hidden = self.up.forward_gelu(&norm.forward(x)?, self.activation.form())?;
        ctx.tap(Site::MlpOut, self.down.forward(&hidden)?)
    }
}
