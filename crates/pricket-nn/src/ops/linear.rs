//! Linear layers, `x Wᵀ + b`, their low-rank adapters, `s (x Aᵀ) Bᵀ`, and activations.

use candle_core::{D, DType, Tensor};
use pricket_kernels::{ActivationPrecision, BackwardOnlyOp, Gelu, GeluOp, LinearOp, LoraOp, Matrix, TrainedLinearOp};

use super::dispatch::on_our_kernels;
use crate::{Activation, Result};

/// Returns `x Wᵀ + b`, `[.., out]` in the type of `x`. `x` is `[.., in]`; `weight` is `[out, in]` and keeps its stored
/// type.
///
/// `activations` sets the precision of `x` in products on the CPU.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn linear(x: &Tensor, weight: &Matrix, bias: Option<&Tensor>, activations: ActivationPrecision) -> Result<Tensor> {
    if let (Matrix::Dense(weight), true) = (weight, on_our_kernels(x) && weight.track_op())
        && on_our_kernels(weight)
    {
        let y = x.contiguous()?.apply_op2(weight, TrainedLinearOp)?;
        return Ok(match bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        });
    }
    if on_our_kernels(x) && !weight.track_op() {
        let fused = bias.filter(|b| !b.track_op());
        let y = x.contiguous()?.apply_op1(LinearOp {
            weight: weight.clone(),
            bias: fused.cloned(),
            activations,
            transposed: false,
            then: None,
        })?;
        return Ok(match bias {
            Some(b) if fused.is_none() => y.broadcast_add(b)?,
            _ => y,
        });
    }
    plain_linear(x, weight, bias)
}

/// Returns `x W`, which is the gradient of the input of [`linear`]. `x` is `[rows, out]`; `weight` is `[out, in]`. No
/// gradient is tracked.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn linear_transposed(x: &Tensor, weight: &Matrix) -> Result<Tensor> {
    if on_our_kernels(x) && !weight.track_op() {
        let op = LinearOp {
            weight: weight.clone(),
            bias: None,
            activations: ActivationPrecision::F32,
            transposed: true,
            then: None,
        };
        return Ok(x.detach().contiguous()?.apply_op1_no_bwd(&op)?);
    }
    let weight = widened_weight(x, weight)?.detach();
    Ok(x.detach().to_dtype(weight.dtype())?.matmul(&weight)?.to_dtype(x.dtype())?)
}

/// Returns the weight that plain operations multiply with. On the CPU a weight in another type than f32 is converted to
/// the type of `x`, so that the activations are not rounded. On a GPU loading has already cast dense weights to the
/// compute type.
fn widened_weight(x: &Tensor, weight: &Matrix) -> Result<Tensor> {
    match weight {
        Matrix::Dense(weight) if weight.dtype() == DType::F32 || !x.device().is_cpu() => Ok(weight.clone()),
        Matrix::Dense(weight) => Ok(weight.to_dtype(x.dtype())?),
        Matrix::Blocks(_) | Matrix::Packed(_) | Matrix::FourBit(_) | Matrix::InPlace(_) => {
            Ok(weight.to_dense(x.dtype(), x.device())?)
        }
    }
}

/// [`linear`] for a caller that needs only the gradient of `x`. Returns zeros if that saves the product, which requires
/// a frozen weight.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub(crate) fn linear_backward_only(x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    if !on_our_kernels(x) || weight.track_op() || bias.is_some_and(Tensor::track_op) {
        return linear(x, weight, bias, ActivationPrecision::F32);
    }
    Ok(x.contiguous()?.apply_op1(BackwardOnlyOp(LinearOp {
        weight: weight.clone(),
        bias: None,
        activations: ActivationPrecision::F32,
        transposed: false,
        then: None,
    }))?)
}

/// Returns `x Wᵀ + b + s (x Aᵀ) Bᵀ`, computed in one operation. Supported on the CPU with a frozen weight; otherwise
/// returns `None`.
///
/// With an activation `of`, `of(x)` replaces `x` and is not kept for the backward pass. If `has_value` is false, the
/// result may be zeros, and only its gradients are computed.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub(crate) fn lora(
    x: &Tensor,
    (weight, bias): (&Matrix, Option<&Tensor>),
    (a, b, scale): (&Tensor, &Tensor, f64),
    of: Option<Activation>,
    activations: ActivationPrecision,
    has_value: bool,
) -> Result<Option<Tensor>> {
    let fits = |tensor: &Tensor| on_our_kernels(tensor) && tensor.is_contiguous();
    if ![x, a, b].into_iter().all(on_our_kernels) || !fits(a) || !fits(b) || weight.track_op() {
        return Ok(None);
    }
    let of = match of.map(fused) {
        Some(None) => return Ok(None),
        Some(Some(form)) => Some(GeluOp { form, as_ggml: false }),
        None => None,
    };
    let frozen = bias.filter(|bias| !bias.track_op());
    let base = LinearOp { weight: weight.clone(), bias: frozen.cloned(), activations, transposed: false, then: None };
    let y = x.contiguous()?.apply_op3(a, b, LoraOp { base, of, scale: scale as f32, has_value })?;
    Ok(Some(match bias {
        Some(bias) if frozen.is_none() => y.broadcast_add(bias)?,
        _ => y,
    }))
}

/// Plain form of [`linear`].
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn plain_linear(x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    let dtype = x.dtype();
    let weight = &widened_weight(x, weight)?;
    let (rows, dims) = (x.elem_count() / x.dim(D::Minus1)?.max(1), x.dims());
    let mut shape = dims.to_vec();
    shape[dims.len() - 1] = weight.dim(0)?;
    let flat = x.reshape((rows, x.dim(D::Minus1)?))?.to_dtype(weight.dtype())?;
    let y = flat.matmul(&weight.t()?)?.to_dtype(dtype)?;
    let y = match bias {
        Some(b) => y.broadcast_add(&b.to_dtype(dtype)?)?,
        None => y,
    };
    Ok(y.reshape(shape)?)
}

/// [`linear`] followed by an activation.
///
/// On the CPU with 8-bit activations, the argument and the value of GELU are rounded to f16, because ggml uses a lookup
/// table in f16.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn linear_then(
    x: &Tensor,
    weight: &Matrix,
    bias: Option<&Tensor>,
    activation: Activation,
    precision: ActivationPrecision,
) -> Result<Tensor> {
    let tracked = x.track_op() || weight.track_op() || bias.is_some_and(Tensor::track_op);
    if on_our_kernels(x)
        && !tracked
        && let Some(form) = fused(activation)
    {
        let then = Some(GeluOp { form, as_ggml: precision == ActivationPrecision::Q8 });
        let op =
            LinearOp { weight: weight.clone(), bias: bias.cloned(), activations: precision, transposed: false, then };
        return Ok(x.contiguous()?.apply_op1_no_bwd(&op)?);
    }
    activate(&linear(x, weight, bias, precision)?, activation)
}

/// Applies an activation to each element, with a gradient. [`Activation::forward`] is the plain form.
///
/// # Errors
/// Returns an error if a tensor operation fails.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match fused(activation).filter(|_| on_our_kernels(x)) {
        Some(form) => Ok(x.contiguous()?.apply_op1(GeluOp { form, as_ggml: false })?),
        None => activation.forward(x),
    }
}

/// Returns the form of GELU that the kernel of a linear layer can fuse, or `None` for other activations.
fn fused(activation: Activation) -> Option<Gelu> {
    match activation {
        Activation::GeluErf => Some(Gelu::Erf),
        Activation::GeluTanh => Some(Gelu::Tanh),
        Activation::Silu | Activation::SquaredRelu => None,
    }
}
