//! The WKV recurrence of RWKV-4.
//!
//! With `w = e^decay`, `u = first` and sums that start at 0, each position `t` computes
//!
//! ```text
//! out[t] = (num + e^(u + k[t]) · v[t]) / (den + e^(u + k[t]))
//! num    = e^(-w) · num + e^(k[t]) · v[t]
//! den    = e^(-w) · den + e^(k[t])
//! ```
//!
//! The state stores `num`, `den` and a running maximum of the exponents, which keeps the sums from overflowing.

use candle_core::{DType, Device, Tensor};
use pricket_kernels::WkvOp;

use super::dispatch::on_our_kernels;
use crate::Result;

/// Returns the initial state of [`wkv4`], `[3, d]`: numerator 0, denominator 0 and the maximum exponent -1e38, which is
/// below every key.
///
/// # Errors
/// Returns an error if a tensor operation fails.
pub fn wkv4_initial_state(channels: usize, device: &Device) -> Result<Tensor> {
    let sums = Tensor::zeros((2, channels), DType::F32, device)?;
    Ok(Tensor::cat(&[&sums, &Tensor::full(-1e38f32, (1, channels), device)?], 0)?)
}

/// WKV recurrence of RWKV-4 (Peng et al. 2023, arXiv:2305.13048, equation 16).
///
/// `k` and `v` are `[positions, d]` and hold the rows one after the other; row `i` has `lens[i]` positions and starts
/// from the state `before[i]`, `[3, d]`. `decay` and `first` are the parameters `time_decay` and `time_first`, `[d]`.
/// At each position the past decays by the factor `e^(-e^decay)`.
///
/// Returns the outputs, `[positions, d]`, and the state after the last position of each row.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn wkv4(
    k: &Tensor,
    v: &Tensor,
    decay: &Tensor,
    first: &Tensor,
    lens: &[usize],
    before: &[Tensor],
) -> Result<(Tensor, Vec<Tensor>)> {
    let (n, _) = k.dims2()?;
    if ![k, v, decay, first].into_iter().all(on_our_kernels) || before.iter().any(Tensor::track_op) || n == 0 {
        return plain_wkv4(k, v, decay, first, lens, before);
    }
    let op = WkvOp { lens: lens.to_vec(), states: Tensor::cat(before, 0)?.flatten_all()?.to_vec1()? };
    let out = k.contiguous()?.apply_op3(&v.contiguous()?, &Tensor::stack(&[decay, first], 0)?, op)?;
    let states = out.detach();
    let after = (0..lens.len()).map(|row| Ok(states.narrow(0, n + 3 * row, 3)?.copy()?)).collect::<Result<_>>()?;
    Ok((out.narrow(0, 0, n)?, after))
}

/// Plain form of [`wkv4`], computed position by position.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn plain_wkv4(
    k: &Tensor,
    v: &Tensor,
    decay: &Tensor,
    first: &Tensor,
    lens: &[usize],
    before: &[Tensor],
) -> Result<(Tensor, Vec<Tensor>)> {
    let dtype = v.dtype();
    let [k, v, decay, first] = [k, v, decay, first].map(|x| x.to_dtype(DType::F32));
    let (k, v, decay, first) = (k?, v?, decay?.exp()?.neg()?, first?);
    let (mut out, mut after, mut at) = (Vec::new(), Vec::with_capacity(lens.len()), 0);
    for (&len, state) in lens.iter().zip(before) {
        let (mut num, mut den, mut max) = (state.get(0)?, state.get(1)?, state.get(2)?);
        for t in at..at + len {
            let (k, v) = (k.get(t)?, v.get(t)?);
            let now = (&first + &k)?;
            let top = max.maximum(&now)?;
            let (old, new) = ((&max - &top)?.exp()?, (&now - &top)?.exp()?);
            out.push((((&old * &num)? + (&new * &v)?)? / ((&old * &den)? + &new)?)?);
            let faded = (&max + &decay)?;
            let top = faded.maximum(&k)?;
            let (old, new) = ((&faded - &top)?.exp()?, (&k - &top)?.exp()?);
            num = ((&old * &num)? + (&new * &v)?)?;
            den = ((&old * &den)? + &new)?;
            max = top;
        }
        after.push(Tensor::stack(&[num, den, max], 0)?.detach());
        at += len;
    }
    Ok((Tensor::stack(&out, 0)?.to_dtype(dtype)?, after))
}
