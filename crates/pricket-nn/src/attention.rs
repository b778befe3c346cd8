use candle_core::Tensor;

use crate::rotary::Rotary;
use crate::{Context, LayerNorm, Linear, Result, Site, ops};

/// Multi-head attention with a fused, re-laid projection: Q ‖ K ‖ V over the whole width.
#[derive(Clone, Debug)]
pub struct Attention {
    /// `[d, (heads + 2 kv_heads) · head_dim]`.
    pub qkv: Linear,
    /// `[heads · head_dim, d]`.
    pub out: Linear,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f64,
    /// Rotates queries and keys; `None` for models whose positions enter elsewhere.
    pub rotary: Option<Rotary>,
}

impl Attention {
    /// What attention over `norm(x)` adds to the residual stream. `x` and the result are `[b, t, d]`.
    ///
    /// # Errors
    /// What an operation or a tap says.
    pub fn forward(&self, norm: &LayerNorm, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let (heads, kv) = (self.heads, self.kv_heads);
        let qkv = self.qkv.forward(&norm.forward(x)?)?.reshape((b, t, heads + 2 * kv, self.head_dim))?;
        let (q, k) = (qkv.narrow(2, 0, heads)?, qkv.narrow(2, heads, kv)?);
        let v = qkv.narrow(2, heads + kv, kv)?.transpose(1, 2)?;
        let (q, k) = match &self.rotary {
            Some(rotary) => {
                let (cos, sin) = ctx.angles(rotary, x.dtype(), x.device())?;
                (ops::rotary(&q, &cos, &sin)?, ops::rotary(&k, &cos, &sin)?)
            }
            None => (q.transpose(1, 2)?.contiguous()?, k.transpose(1, 2)?.contiguous()?),
        };
        let q = ctx.tap(Site::Query, q)?;
        let k = ctx.tap(Site::Key, k)?;
        let v = ctx.tap(Site::Value, v)?;
        let (k, v) = ctx.past(k, v)?;
        let mixed = if ctx.wants(Site::Pattern) {
            let pattern = ops::attention_pattern(&q, &k, self.scale, ctx.padding())?;
            ops::attention_output(&ctx.tap(Site::Pattern, pattern)?, &v)?
        } else {
            ops::attention(&q, &k, &v, self.scale, ctx.padding())?
        };
        ctx.tap(Site::AttentionOut, self.out.forward(&mixed)?)
    }
}
