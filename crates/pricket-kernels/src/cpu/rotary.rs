//! Rotary position embedding (RoPE, Su et al. 2021, arXiv:2104.09864): each pair of dimensions `(a, z)` becomes `(a cos
//! - z sin, z cos + a sin)`.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use crate::cpu::pool::{parallel_chunks, zeros};
use crate::cpu::shared::f32_slice;

/// Rotary position embedding of the first `2 * pairs` dimensions of each head. The other dimensions are copied.
///
/// Inputs: `x` of `[batch, time, heads, head_dim]`, whose last stride is 1; `cos` and `sin` of
/// `[batch or 1, time, pairs]`. Output: `[batch, heads, time, head_dim]`, contiguous, so splitting the heads needs no
/// copy of its own. A pair is dimensions `i` and `i + pairs` ("rotate half", as in GPT-NeoX).
#[derive(Clone, Copy, Debug)]
pub struct RotaryOp;

impl CustomOp3 for RotaryOp {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let CpuStorage::F32(data) = x else { bail!("rotary: expected x in f32") };
        let (&[b, t, h, d], &[sb, st, sh, sd]) = (x_layout.dims(), x_layout.stride()) else {
            bail!("rotary: expected [batch, time, heads, head_dim], got {:?}", x_layout.dims())
        };
        let &[rows, time, pairs] = cos_layout.dims() else { bail!("rotary: expected cos of [batch, time, pairs]") };
        if sd != 1 || time != t || 2 * pairs > d || (rows != b && rows != 1) || cos_layout.dims() != sin_layout.dims() {
            bail!("rotary: x {:?} does not fit cos {:?} and sin {:?}", x_layout, cos_layout.dims(), sin_layout.dims());
        }
        let (cos, sin) = (f32_slice("rotary cos", cos, cos_layout)?, f32_slice("rotary sin", sin, sin_layout)?);
        let data = &data[x_layout.start_offset()..];
        let mut out = zeros(b * h * t * d);
        parallel_chunks(&mut out, t * d, |bh, out| {
            let (bi, hi) = (bh / h, bh % h);
            for (ti, out) in out.chunks_exact_mut(d).enumerate() {
                let row = &data[bi * sb + ti * st + hi * sh..][..d];
                let angle = ((bi % rows) * t + ti) * pairs;
                let (cos, sin) = (&cos[angle..angle + pairs], &sin[angle..angle + pairs]);
                for i in 0..pairs {
                    let (a, z) = (row[i], row[i + pairs]);
                    out[i] = a * cos[i] - z * sin[i];
                    out[i + pairs] = z * cos[i] + a * sin[i];
                }
                out[2 * pairs..].copy_from_slice(&row[2 * pairs..]);
            }
        });
        Ok((CpuStorage::F32(out), (b, h, t, d).into()))
    }

    /// The transpose of a rotation is the rotation by the negative angle.
    fn bwd(
        &self,
        _: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().transpose(1, 2)?.contiguous()?;
        let back = grad.apply_op3_no_bwd(cos, &sin.neg()?, &RotaryOp)?;
        Ok((Some(back.transpose(1, 2)?.contiguous()?), None, None))
    }
}
