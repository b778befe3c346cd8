//! Elementwise operations: sums, gates and interpolation.

use candle_core::Tensor;
use pricket_kernels::{Gate, GatedOp, MixOp, SumOp};

use super::dispatch::on_our_kernels;
use crate::Result;

/// Returns the sum of two or three tensors of the same shape, added from left to right.
///
/// # Errors
/// Returns an error if the shapes differ.
pub fn sum(a: &Tensor, b: &Tensor, c: Option<&Tensor>) -> Result<Tensor> {
    let ours = |x: &Tensor| on_our_kernels(x) && x.is_contiguous();
    if ours(a) && ours(b) && c.is_none_or(ours) {
        return Ok(match c {
            Some(c) => a.apply_op3(b, c, SumOp)?,
            None => a.apply_op2(b, SumOp)?,
        });
    }
    let sum = (a + b)?;
    Ok(match c {
        Some(c) => (sum + c)?,
        None => sum,
    })
}

/// Returns `f(gate) · x` for each element, with a gradient.
///
/// # Errors
/// Returns an error if the shapes differ.
pub fn gated(gate: &Tensor, x: &Tensor, f: Gate) -> Result<Tensor> {
    if on_our_kernels(gate) && on_our_kernels(x) {
        return Ok(gate.contiguous()?.apply_op2(&x.contiguous()?, GatedOp { gate: f })?);
    }
    plain_gated(gate, x, f)
}

/// Plain form of [`gated`].
///
/// # Errors
/// Returns an error if the shapes differ.
pub fn plain_gated(gate: &Tensor, x: &Tensor, f: Gate) -> Result<Tensor> {
    let gate = match f {
        Gate::Silu => gate.silu()?,
        Gate::Sigmoid => (gate.neg()?.exp()? + 1.0)?.recip()?,
    };
    Ok((gate * x)?)
}

/// Returns `x · mix + before · (1 - mix)`, with a gradient. `x` and `before` are `[.., d]`; `mix` is `[d]`.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn mix(x: &Tensor, before: &Tensor, mix: &Tensor) -> Result<Tensor> {
    if [x, before, mix].into_iter().all(on_our_kernels) {
        return Ok(x.contiguous()?.apply_op3(&before.contiguous()?, &mix.contiguous()?, MixOp)?);
    }
    plain_mix(x, before, mix)
}

/// Plain form of [`mix`].
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn plain_mix(x: &Tensor, before: &Tensor, mix: &Tensor) -> Result<Tensor> {
    let mix = mix.to_dtype(x.dtype())?;
    Ok((x.broadcast_mul(&mix)? + before.broadcast_mul(&(1.0 - &mix)?)?)?)
}
