//! Layer norm, `(x - mean) / sqrt(var + eps) · weight + bias`, and RMS norm, `x / sqrt(mean(x²) + eps) · weight`.

use candle_core::{D, DType, Tensor};
use pricket_kernels::{LayerNormOp, RmsNormOp};

use super::dispatch::on_our_kernels;
use crate::Result;

/// Layer norm over the last dimension: `(x - mean) / sqrt(var + eps) · weight + bias`. On the CPU mean and variance are
/// f64.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let tracked = x.track_op() || weight.track_op() || bias.track_op();
    if [x, weight, bias].into_iter().all(on_our_kernels) {
        let (x, op) = (x.contiguous()?, LayerNormOp { eps: eps as f32 });
        return Ok(if tracked { x.apply_op3(weight, bias, op)? } else { x.apply_op3_no_bwd(weight, bias, &op)? });
    }
    if tracked {
        return plain_layer_norm(x, weight, bias, eps);
    }
    let x = x.contiguous()?;
    Ok(candle_nn::ops::layer_norm(&x, weight, bias, eps as f32)?)
}

/// Plain form of [`layer_norm`].
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn plain_layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    // Centered twice: a large mean has a rounding error in f32, and the mean of the centered values is that error.
    let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let centered = centered.broadcast_sub(&centered.mean_keepdim(D::Minus1)?)?;
    let deviation = (centered.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let normed = centered.broadcast_div(&deviation)?.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    Ok(normed.broadcast_add(&bias.to_dtype(DType::F32)?)?.to_dtype(dtype)?)
}

/// Root-mean-square norm over the last dimension: `x / sqrt(mean(x²) + eps) · weight`. On the CPU the mean of squares
/// is f64.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let tracked = x.track_op() || weight.track_op();
    if on_our_kernels(x) && on_our_kernels(weight) {
        let (x, op) = (x.contiguous()?, RmsNormOp { eps: eps as f32 });
        return Ok(if tracked { x.apply_op2(weight, op)? } else { x.apply_op2_no_bwd(weight, &op)? });
    }
    if tracked {
        return plain_rms_norm(x, weight, eps);
    }
    let x = x.contiguous()?;
    Ok(candle_nn::ops::rms_norm(&x, weight, eps as f32)?)
}

/// Plain form of [`rms_norm`]. The quotient is rounded to the type of `x` before it is multiplied by the weight, as in
/// transformers.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn plain_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let deviation = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    Ok(wide.broadcast_div(&deviation)?.to_dtype(x.dtype())?.broadcast_mul(&weight.to_dtype(x.dtype())?)?)
}
