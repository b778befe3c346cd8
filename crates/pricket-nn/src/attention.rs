use candle_core::Tensor;

use crate::rotary::Rotary;
use crate::{Alibi, Context, LayerNorm, Linear, Result, Site, ops};

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
    /// Biases the scores by distance.
    pub alibi: Option<Alibi>,
    /// Queries, keys and values are clamped to plus and minus this.
    pub clip: Option<f64>,
    /// Norms of queries and of keys, over all heads together.
    pub qk_norm: Option<(LayerNorm, LayerNorm)>,
}

impl Attention {
    /// What attention over `norm(x)` adds to the residual stream. `x` and the result are `[b, t, d]`.
    ///
    /// # Errors
    /// What an operation or a tap says.
    pub fn forward(&self, norm: &LayerNorm, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let (heads, kv) = (self.heads, self.kv_heads);
        let mut qkv = self.qkv.forward(&norm.forward(x)?)?;
        if let Some(clip) = self.clip {
            qkv = qkv.clamp(-clip, clip)?;
        }
        let qkv = qkv.reshape((b, t, heads + 2 * kv, self.head_dim))?;
        let (mut q, mut k) = (qkv.narrow(2, 0, heads)?, qkv.narrow(2, heads, kv)?);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let normed = |x: &Tensor, norm: &LayerNorm| -> Result<Tensor> {
                Ok(norm.forward(&x.flatten_from(2)?)?.reshape(x.shape())?)
            };
            (q, k) = (normed(&q, q_norm)?, normed(&k, k_norm)?);
        }
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
        let slopes = self.alibi.as_ref().map_or(&[][..], |alibi| &alibi.slopes);
        let scores = ctx.scores(self.scale, slopes);
        let mixed = if ctx.wants(Site::Pattern) {
            let pattern = ops::attention_pattern(&q, &k, scores)?;
            let v = ops::widened(&v, self.head_dim, q.dtype())?;
            ops::attention_output(&ctx.tap(Site::Pattern, pattern)?, &v)?
        } else {
            ops::attention(&q, &k, &v, scores)?
        };
        ctx.tap(Site::AttentionOut, self.out.forward(&mixed)?)
    }
}
