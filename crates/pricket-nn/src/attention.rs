//! Multi-head attention: `softmax(q kᵀ · scale + bias) v` for each head, causal, followed by the output projection.

use candle_core::Tensor;

use crate::ops::{self, Scores};
use crate::rotary::Rotary;
use crate::{Alibi, Context, Layer, Linear, Norm, Result, Site};

/// Projections to queries, keys and values.
#[derive(Clone, Debug)]
pub enum Qkv {
    /// One matrix, `[(heads + 2 kv_heads) · head_dim, d]`: Q, then K, then V.
    Fused(Linear),
    /// Three matrices, which may be stored in different types: Q of `[heads · head_dim, d]`, K and V of
    /// `[kv_heads · head_dim, d]`.
    Split(Box<[Linear; 3]>),
}

/// Causal multi-head attention (Vaswani et al. 2017, arXiv:1706.03762). With fewer key heads than query heads it is
/// grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).
#[derive(Clone, Debug)]
pub struct Attention {
    /// Projections to queries, keys and values.
    pub qkv: Qkv,
    /// Output projection, `[d, heads · head_dim]`.
    pub out: Linear,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f64,
    /// Rotary positions of queries and keys; `None` for a model with other position information.
    pub rotary: Option<Rotary>,
    /// Biases of the scores by distance.
    pub alibi: Option<Alibi>,
    /// Limit of the absolute values of queries, keys and values.
    pub clip: Option<f64>,
    /// Norms of the queries and the keys, each over all heads together.
    pub qk_norm: Option<(Norm, Norm)>,
}

impl Attention {
    /// Returns the output of attention for `norm(x)`, which the block adds to the residual stream. `x` and the result
    /// are `[b, t, d]`.
    ///
    /// # Errors
    /// Returns an error if a tensor operation or the edit of a tap fails.
    pub fn forward(&self, norm: &Norm, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let later = || {
            let (attention, norm) = (self.clone(), norm.clone());
            move |x: &Tensor, ctx: &mut Context| attention.forward(&norm, x, ctx)
        };
        if let Some(zeros) = ctx.defer(ctx.needs().attention, x, later)? {
            return Ok(zeros);
        }
        let x = norm.forward(x)?;
        let slopes = self.alibi.as_ref().map_or(&[][..], |alibi| &alibi.slopes);
        let scores = Scores { scale: self.scale, slopes };
        let (heads, kv) = (self.heads, self.kv_heads);
        let mixed = match &self.qkv {
            Qkv::Fused(qkv) => {
                let qkv = self.project(qkv, &x, heads + 2 * kv)?;
                let at_once = match self.qk_norm {
                    None => ctx.attend_fused(&qkv, (heads, kv), self.rotary.as_ref(), scores)?,
                    Some(_) => None,
                };
                if let Some(mixed) = at_once {
                    mixed
                } else {
                    let part = |from, heads| qkv.narrow(2, from, heads);
                    self.attend([part(0, heads)?, part(heads, kv)?, part(heads + kv, kv)?], scores, ctx)?
                }
            }
            Qkv::Split(split) => {
                let [q, k, v] = &**split;
                let qkv = [self.project(q, &x, heads)?, self.project(k, &x, kv)?, self.project(v, &x, kv)?];
                self.attend(qkv, scores, ctx)?
            }
        };
        let out = self.out.forward_or_zeros(&mixed, ctx.needs().attention)?;
        ctx.release_later(&out);
        ctx.tap(Site::AttentionOut, out)
    }

    /// Projects `x` to queries, keys or values, `[b, t, heads, head_dim]`.
    fn project(&self, linear: &Linear, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let y = linear.forward(x)?;
        let y = self.clip.map_or_else(|| Ok(y.clone()), |clip| y.clamp(-clip, clip))?;
        Ok(y.reshape((b, t, heads, self.head_dim))?)
    }

    /// Normalizes and rotates queries and keys, then attends. `q`, `k` and `v` are `[b, t, heads, head_dim]`; the
    /// result is `[b, t, heads · head_dim]`.
    fn attend(&self, [mut q, mut k, v]: [Tensor; 3], scores: Scores<'_>, ctx: &mut Context) -> Result<Tensor> {
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let normed = |x: &Tensor, norm: &Norm| -> Result<Tensor> {
                Ok(norm.forward(&x.flatten_from(2)?)?.reshape(x.shape())?)
            };
            (q, k) = (normed(&q, q_norm)?, normed(&k, k_norm)?);
        }
        let v = v.transpose(1, 2)?;
        let (q, k) = match &self.rotary {
            Some(rotary) => {
                let (cos, sin) = ctx.angles(rotary, q.dtype(), q.device())?;
                (ops::rotary(&q, &cos, &sin)?, ops::rotary(&k, &cos, &sin)?)
            }
            None => (q.transpose(1, 2)?.contiguous()?, k.transpose(1, 2)?.contiguous()?),
        };
        let q = ctx.tap(Site::Query, q)?;
        let k = ctx.tap(Site::Key, k)?;
        let v = ctx.tap(Site::Value, v)?;
        ctx.attend(&q, &k, &v, scores)
    }

    /// Returns the layers: the projections to queries, keys and values, the norms of queries and keys, and the output
    /// projection.
    pub fn layers(&mut self) -> Vec<Layer<'_>> {
        let mut out: Vec<Layer<'_>> = match &mut self.qkv {
            Qkv::Fused(qkv) => vec![qkv.into()],
            Qkv::Split(split) => split.iter_mut().map(Layer::from).collect(),
        };
        out.extend(self.qk_norm.iter_mut().flat_map(|(q, k)| [q.into(), k.into()]));
        out.push((&mut self.out).into());
        out
    }
}
