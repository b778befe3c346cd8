//! The only file that calls fused operations, candle's or ours.
//!
//! There is no training mode to forget. Each function asks its inputs whether a gradient is tracked: if none is, it
//! takes the fused form; if any is, an operation with a backward pass or the plain twin, because candle's fused
//! softmax, norm and rotary drop gradients without a word. On the CPU, in f32, both give the same bits. The twins are public,
//! and tests compare them.

use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::{CpuStorage, D, DType, Device, Storage, Tensor};
pub use pricket_kernels::{
    Activations, AttentionRow, BlockType, Blocks, Gate, Gelu, Matrix, Path as CpuPath, Pool, RowSummary, argmax,
    chosen as cpu_path, keep_freed_memory, multiply_add_rate, narrowed, q8_row_bytes, quantise, row_summaries,
    row_summary,
};
use pricket_kernels::{
    AttentionOp, BackwardOnlyOp, GatedOp, GeluOp, LayerNormOp, LinearOp, LoraOp, MixOp, RmsNormOp, RotaryOp,
    SelfAttentionOp, SoftmaxOp, StoreOp, SumOp, TrainedLinearOp, WkvOp, parallel, q8_values,
};

use crate::{Activation, Error, Result};

/// Returns whether pricket's own kernels are used. If the environment variable `PRICKET_KERNELS` is `off`, candle's operations
/// compute instead. The variable is read once.
///
/// # Errors
/// A sentence, if the variable is neither `on` nor `off`.
pub fn kernels_are_on() -> std::result::Result<bool, String> {
    static ON: OnceLock<std::result::Result<bool, String>> = OnceLock::new();
    let read = || match std::env::var("PRICKET_KERNELS").as_deref() {
        Err(_) | Ok("on") => Ok(true),
        Ok("off") => Ok(false),
        Ok(other) => Err(format!("PRICKET_KERNELS is {other:?}; it can be on or off")),
    };
    ON.get_or_init(read).clone()
}

/// Returns whether pricket's own kernels compute on a device: on the CPU, unless they are off.
pub(crate) fn has_kernels(device: &Device) -> bool {
    device.is_cpu() && kernels_are_on().unwrap_or(true)
}

/// Returns whether pricket's own kernels can compute with `x`, which they do in f32 only.
fn on_our_kernels(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && has_kernels(x.device())
}

/// `x Wᵀ + b` for `x` of `[.., in]` and `weight` of `[out, in]` as stored; gives `[.., out]` in the type of `x`. On
/// the CPU activations are as precise as `activations` says.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Matrix, bias: Option<&Tensor>, activations: Activations) -> Result<Tensor> {
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

/// `x W` for `x` of `[rows, out]` and `weight` of `[out, in]`: the gradient of the input of [`linear`]. No gradient goes through it.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear_transposed(x: &Tensor, weight: &Matrix) -> Result<Tensor> {
    if on_our_kernels(x) && !weight.track_op() {
        let op = LinearOp {
            weight: weight.clone(),
            bias: None,
            activations: Activations::F32,
            transposed: true,
            then: None,
        };
        return Ok(x.detach().contiguous()?.apply_op1_no_bwd(&op)?);
    }
    let weight = widened_weight(x, weight)?.detach();
    Ok(x.detach().to_dtype(weight.dtype())?.matmul(&weight)?.to_dtype(x.dtype())?)
}

/// Returns the weight that the plain twins multiply. On the CPU weights stay as stored beside f32 activations, so a 16-bit weight is
/// widened rather than the activations rounded. On a GPU loading has cast weights to the type that is computed in.
fn widened_weight(x: &Tensor, weight: &Matrix) -> Result<Tensor> {
    match weight {
        Matrix::Dense(weight) if weight.dtype() == DType::F32 || !x.device().is_cpu() => Ok(weight.clone()),
        Matrix::Dense(weight) => Ok(weight.to_dtype(x.dtype())?),
        Matrix::Blocks(_) | Matrix::Packed(_) => Ok(weight.to_dense(x.dtype(), x.device())?),
    }
}

/// As [`linear`] of a frozen weight, for a caller who only goes back through it: zeros where that saves the product.
///
/// # Errors
/// If the shapes do not fit.
pub(crate) fn linear_backward_only(x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    if !on_our_kernels(x) || weight.track_op() || bias.is_some_and(Tensor::track_op) {
        return linear(x, weight, bias, Activations::F32);
    }
    Ok(x.contiguous()?.apply_op1(BackwardOnlyOp(LinearOp {
        weight: weight.clone(),
        bias: None,
        activations: Activations::F32,
        transposed: false,
        then: None,
    }))?)
}

/// `x Wᵀ + b + s (x Aᵀ) Bᵀ` in one operation, where there is one: on the CPU, beside a frozen weight.
///
/// # Errors
/// If the shapes do not fit.
pub(crate) fn lora(
    x: &Tensor,
    (weight, bias): (&Matrix, Option<&Tensor>),
    (a, b, scale): (&Tensor, &Tensor, f64),
    activations: Activations,
    has_value: bool,
) -> Result<Option<Tensor>> {
    let fits = |tensor: &Tensor| on_our_kernels(tensor) && tensor.is_contiguous();
    if ![x, a, b].into_iter().all(on_our_kernels) || !fits(a) || !fits(b) || weight.track_op() {
        return Ok(None);
    }
    let fused = bias.filter(|bias| !bias.track_op());
    let base = LinearOp { weight: weight.clone(), bias: fused.cloned(), activations, transposed: false, then: None };
    let y = x.contiguous()?.apply_op3(a, b, LoraOp { base, scale: scale as f32, has_value })?;
    Ok(Some(match bias {
        Some(bias) if fused.is_none() => y.broadcast_add(bias)?,
        _ => y,
    }))
}

/// The plain twin of [`linear`].
///
/// # Errors
/// If the shapes do not fit.
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

/// Layer norm over the last dimension: `(x - mean) / sqrt(var + eps) · weight + bias`, statistics in f64 on the CPU.
///
/// # Errors
/// If the shapes do not fit.
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

/// The plain twin of [`layer_norm`].
///
/// # Errors
/// If the shapes do not fit.
pub fn plain_layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    // Centred twice: a mean summed in f32 is off where it is large, and what it is off by is the mean of the difference.
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let centred = centred.broadcast_sub(&centred.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let normed = centred.broadcast_div(&deviation)?.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    Ok(normed.broadcast_add(&bias.to_dtype(DType::F32)?)?.to_dtype(dtype)?)
}

/// Root-mean-square norm over the last dimension: `x / sqrt(mean(x²) + eps) · weight`, its statistics in f64 on the CPU.
///
/// # Errors
/// If the shapes do not fit.
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

/// The plain twin of [`rms_norm`]. The quotient is rounded to the type of `x` before it meets the weight, as transformers has it.
///
/// # Errors
/// If the shapes do not fit.
pub fn plain_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let deviation = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    Ok(wide.broadcast_div(&deviation)?.to_dtype(x.dtype())?.broadcast_mul(&weight.to_dtype(x.dtype())?)?)
}

/// [`linear`], then an activation, which is elementwise. With 8-bit precision the argument and the value of a GELU are rounded to
/// f16, on the CPU: ggml looks it up in a table of halves.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear_then(
    x: &Tensor,
    weight: &Matrix,
    bias: Option<&Tensor>,
    activation: Activation,
    precision: Activations,
) -> Result<Tensor> {
    let tracked = x.track_op() || weight.track_op() || bias.is_some_and(Tensor::track_op);
    if on_our_kernels(x)
        && !tracked
        && let Some(form) = fused(activation)
    {
        let then = Some(GeluOp { form, as_ggml: precision == Activations::Q8 });
        let op =
            LinearOp { weight: weight.clone(), bias: bias.cloned(), activations: precision, transposed: false, then };
        return Ok(x.contiguous()?.apply_op1_no_bwd(&op)?);
    }
    activate(&linear(x, weight, bias, precision)?, activation)
}

/// An activation of each element, with a gradient. [`Activation::forward`] is its plain twin.
///
/// # Errors
/// What candle says.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match fused(activation).filter(|_| on_our_kernels(x)) {
        Some(form) => Ok(x.contiguous()?.apply_op1(GeluOp { form, as_ggml: false })?),
        None => activation.forward(x),
    }
}

/// The activation that the kernel of a linear layer computes with it, if it does.
fn fused(activation: Activation) -> Option<Gelu> {
    match activation {
        Activation::GeluErf => Some(Gelu::Erf),
        Activation::GeluTanh => Some(Gelu::Tanh),
        Activation::Silu | Activation::SquaredRelu => None,
    }
}

/// The sum of two or three tensors of one shape, from left to right.
///
/// # Errors
/// If the shapes differ.
pub fn sum(a: &Tensor, b: &Tensor, c: Option<&Tensor>) -> Result<Tensor> {
    let ours = |x: &Tensor| on_our_kernels(x) && !x.track_op() && x.is_contiguous();
    if ours(a) && ours(b) && c.is_none_or(ours) {
        return Ok(match c {
            Some(c) => a.apply_op3_no_bwd(b, c, &SumOp)?,
            None => a.apply_op2_no_bwd(b, &SumOp)?,
        });
    }
    let sum = (a + b)?;
    Ok(match c {
        Some(c) => (sum + c)?,
        None => sum,
    })
}

/// Splits heads and rotates: `x` of `[b, t, h, head_dim]`, `cos` and `sin` of `[b or 1, t, pairs]` give
/// `[b, h, t, head_dim]`, contiguous.
///
/// # Errors
/// If the shapes do not fit.
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if on_our_kernels(x) && x.stride().last() == Some(&1) {
        return Ok(x.apply_op3(cos, sin, RotaryOp)?);
    }
    if !has_kernels(x.device()) && !x.track_op() {
        let (turned, dim) = (2 * cos.dim(D::Minus1)?, x.dim(D::Minus1)?);
        let x = x.transpose(1, 2)?;
        let first = x.narrow(D::Minus1, 0, turned)?.contiguous()?;
        let first = candle_nn::rotary_emb::rope(&first, &one_row(cos)?, &one_row(sin)?)?;
        if turned == dim {
            return Ok(first);
        }
        return Ok(Tensor::cat(&[&first, &x.narrow(D::Minus1, turned, dim - turned)?], D::Minus1)?.contiguous()?);
    }
    plain_rotary(x, cos, sin)
}

/// Angles as candle wants them: without a batch where one row stands for all.
fn one_row(angles: &Tensor) -> Result<Tensor> {
    let angles = if angles.dim(0)? == 1 { angles.squeeze(0)? } else { angles.clone() };
    Ok(angles.contiguous()?)
}

/// The plain twin of [`rotary`].
///
/// # Errors
/// If the shapes do not fit.
pub fn plain_rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let x = x.transpose(1, 2)?;
    let (pairs, dim) = (cos.dim(D::Minus1)?, x.dim(D::Minus1)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let (a, z) = (x.narrow(D::Minus1, 0, pairs)?, x.narrow(D::Minus1, pairs, pairs)?);
    let turned_a = (a.broadcast_mul(&cos)? - z.broadcast_mul(&sin)?)?;
    let turned_z = (z.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let rest = x.narrow(D::Minus1, 2 * pairs, dim - 2 * pairs)?;
    let parts = if 2 * pairs < dim { vec![turned_a, turned_z, rest] } else { vec![turned_a, turned_z] };
    Ok(Tensor::cat(&parts, D::Minus1)?.contiguous()?)
}

/// New keys and values of a row: those of `[batch, kv_heads, time, head_dim]` that are its own, `len` from `from` on, which are at
/// the positions from `at` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewKeys<'a> {
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
    pub(crate) row: usize,
    pub(crate) from: usize,
    pub(crate) len: usize,
    pub(crate) at: usize,
}

/// Writes the new keys and values of some rows, each into its tensor of `kept`: `[2, kv_heads, capacity, head_dim]` in its own type
/// or bytes of `q8_0` blocks. On the CPU rows are written at once by several threads. No gradient goes through it.
///
/// # Errors
/// If the shapes do not fit, or for blocks that are not on the CPU.
pub(crate) fn store(kept: &[Tensor], new: &[NewKeys<'_>]) -> Result<()> {
    // On a GPU the order of its stream is that of one thread.
    if !new.iter().all(|new| on_our_kernels(new.k) && on_our_kernels(new.v)) {
        return kept.iter().zip(new).try_for_each(|(kept, new)| store_row(kept, new));
    }
    let failed = Mutex::new(None);
    parallel(kept.len(), |row| {
        if let Err(e) = store_row(&kept[row], &new[row]) {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

fn store_row(kept: &Tensor, &NewKeys { k, v, row, from, len, at }: &NewKeys<'_>) -> Result<()> {
    if on_our_kernels(k) && on_our_kernels(v) {
        let rows = |x: &Tensor| if x.stride().last() == Some(&1) { Ok(x.clone()) } else { x.contiguous() };
        return Ok(kept.inplace_op3(&rows(k)?, &rows(v)?, &StoreOp { row, from, len, at })?);
    }
    if kept.dtype() == DType::U8 {
        return Err(Error::Input("keys and values are kept as q8_0 on the CPU only, in f32".into()));
    }
    let own = |x: &Tensor| x.detach().narrow(0, row, 1)?.narrow(2, from, len);
    let new = Tensor::cat(&[own(k)?, own(v)?], 0)?.to_dtype(kept.dtype())?;
    Ok(kept.slice_set(&new.contiguous()?, 2, at)?)
}

/// Keys or values of `[b, h, s, head_dim]` as `dtype`, from whatever a state has made of them.
///
/// # Errors
/// What candle says.
pub fn widened(stored: &Tensor, head_dim: usize, dtype: DType) -> Result<Tensor> {
    if stored.dtype() != DType::U8 {
        return Ok(stored.to_dtype(dtype)?);
    }
    let (b, h, s, _) = stored.dims4()?;
    let mut values = vec![0f32; b * h * s * head_dim];
    q8_values(&stored.flatten_all()?.to_vec1::<u8>()?, head_dim, &mut values);
    Ok(Tensor::from_vec(values, (b, h, s, head_dim), stored.device())?.to_dtype(dtype)?)
}

/// What becomes of the scores of queries and keys before the softmax.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    /// Multiplies them.
    pub scale: f64,
    /// ALiBi: a key `n` positions back loses `n` times the slope of its head; empty for none.
    pub slopes: &'a [f32],
}

/// Whether [`attention`] has a kernel for these queries, keys and values.
pub fn attention_is_fused(q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
    let untracked = |x: &Tensor| on_our_kernels(x) && !x.track_op();
    [q, k, v].into_iter().all(untracked) && [k, v].iter().all(|x| x.stride().last() == Some(&1))
}

/// Causal attention of queries `[b, h, t, head_dim]` by row: each of `rows` takes the next queries and attends to its own keys.
/// Gives `[b, t, h · head_dim]`. For f32 on the CPU, without a gradient; [`attention_pattern`] and [`attention_output`] are
/// its plain twin.
///
/// # Errors
/// If the shapes do not fit.
pub fn attention(q: &Tensor, rows: Vec<AttentionRow>, scores: Scores<'_>) -> Result<Tensor> {
    let op = AttentionOp { scale: scores.scale as f32, slopes: scores.slopes.to_vec(), rows };
    Ok(q.contiguous()?.apply_op1_no_bwd(&op)?)
}

/// Whether [`self_attention`] has a kernel for these queries, keys and values.
pub fn self_attention_is_fused(q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
    [q, k, v].into_iter().all(|x| on_our_kernels(x) && x.stride().last() == Some(&1))
}

/// [`attention`] of rows to themselves, without a past, with a gradient: `q` of `[b, h, t, head_dim]`, `k` and `v` of
/// `[b, kv_heads, t, head_dim]`; the rows are spans of these, each an element of the batch, a first position and a length.
///
/// # Errors
/// If the shapes do not fit.
pub fn self_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: Vec<(usize, usize, usize)>,
    scores: Scores<'_>,
) -> Result<Tensor> {
    let op = SelfAttentionOp { scale: scores.scale as f32, slopes: scores.slopes.to_vec(), spans };
    Ok(q.apply_op3(k, v, op)?)
}

/// The probabilities of attention: `q` of `[b, h, t, head_dim]` and `k` of `[b, kv_heads, s, head_dim]` give `[b, h, t, s]`.
/// `bias` is added to the scores: see [`attention_bias`].
///
/// # Errors
/// If the shapes do not fit.
pub fn attention_pattern(q: &Tensor, k: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    let heads = q.dim(1)?;
    let k = repeat_heads(&k.to_dtype(q.dtype())?, heads)?;
    let products = (q.contiguous()?.matmul(&k.t()?)?.to_dtype(DType::F32)? * scale)?;
    let products = match bias {
        Some(bias) => products.broadcast_add(bias)?,
        None => products,
    };
    Ok(softmax(&products)?.to_dtype(q.dtype())?)
}

/// What is added to the scores of `len` queries that follow `past` positions: distances times slopes, and negative infinity for
/// keys to come; of `[1, h or 1, len, past + len]`, or nothing where nothing is to be added.
///
/// # Errors
/// What candle says.
pub fn attention_bias(slopes: &[f32], past: usize, len: usize, device: &Device) -> Result<Option<Tensor>> {
    if len == 1 && slopes.is_empty() {
        return Ok(None);
    }
    let keys = past + len;
    let hidden = |i: usize| (0..keys).map(move |j| if j > past + i { f32::NEG_INFINITY } else { 0.0 });
    let mask = Tensor::from_vec((0..len).flat_map(hidden).collect::<Vec<f32>>(), (1, 1, len, keys), device)?;
    if slopes.is_empty() {
        return Ok(Some(mask));
    }
    let back = |i: usize| (0..keys).map(move |j| j as f32 - (past + i) as f32);
    let distance = Tensor::from_vec((0..len).flat_map(back).collect::<Vec<f32>>(), (1, len, keys), device)?;
    let slopes = Tensor::from_vec(slopes.to_vec(), (slopes.len(), 1, 1), device)?;
    Ok(Some(slopes.broadcast_mul(&distance)?.unsqueeze(0)?.broadcast_add(&mask)?))
}

/// Mixes values by a pattern of `[b, h, t, s]` and merges heads: `[b, t, h · head_dim]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn attention_output(pattern: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (b, h, t, _) = pattern.dims4()?;
    let v = repeat_heads(&v.to_dtype(pattern.dtype())?, h)?.contiguous()?;
    let mixed = pattern.matmul(&v)?;
    Ok(mixed.transpose(1, 2)?.reshape((b, t, h * v.dim(3)?))?)
}

/// Softmax over the last dimension, with a gradient where one is tracked.
///
/// # Errors
/// What candle says.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if !has_kernels(x.device()) && !x.track_op() {
        return Ok(candle_nn::ops::softmax_last_dim(&x.contiguous()?)?);
    }
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?.exp()?;
    Ok(shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?)
}

/// [`softmax`] of logits, over the installed threads on the CPU. There a probability below 1e-38 may be that instead.
///
/// # Errors
/// What candle says.
pub fn probabilities(logits: &Tensor) -> Result<Tensor> {
    if on_our_kernels(logits) && !logits.track_op() {
        return Ok(logits.contiguous()?.apply_op1_no_bwd(&SoftmaxOp)?);
    }
    softmax(logits)
}

/// Log-softmax over the last dimension in f32, with a gradient.
///
/// # Errors
/// What candle says.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(DType::F32)?;
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?;
    Ok(shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?)
}

/// Of each row of `logits`, `[n, vocab]` in f32: what it amounts to, and the log-probability of the token that `ids` names for
/// it, summed in f64. Over the installed threads.
///
/// # Errors
/// If there are not as many ids as rows, or one is outside the vocabulary.
pub fn logprobs(logits: &Tensor, ids: &[u32]) -> Result<Vec<(RowSummary, f64)>> {
    let (n, vocab) = logits.dims2()?;
    if n != ids.len() {
        return Err(Error::Input(format!("{} tokens for {n} rows of logits", ids.len())));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::Input(format!("token {id} is outside the vocabulary of {vocab}")));
    }
    let of_rows = |data: &[f32]| {
        let rows: Vec<&[f32]> = data.chunks_exact(vocab.max(1)).collect();
        let logprob = |((row, summary), &id): ((&&[f32], RowSummary), &u32)| {
            (summary, f64::from(row[id as usize]) - f64::from(summary.max) - summary.log_sum)
        };
        rows.iter().zip(row_summaries(&rows)).zip(ids).map(logprob).collect()
    };
    let (storage, layout) = logits.storage_and_layout();
    // In place where they are on the CPU: a copy of them takes as long as all of the rest.
    if let (Storage::Cpu(CpuStorage::F32(data)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) {
        return Ok(of_rows(&data[start..end]));
    }
    drop(storage);
    Ok(of_rows(&logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?))
}

/// Each key head as often as query heads share it.
fn repeat_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, kv, s, d) = x.dims4()?;
    if kv == heads {
        return Ok(x.clone());
    }
    let shared = x.unsqueeze(2)?.broadcast_as((b, kv, heads / kv, s, d))?;
    Ok(shared.reshape((b, heads, s, d))?)
}

/// The state from which [`wkv4`] begins, `[3, d]`: no numerator, no denominator, and a maximum below every key.
///
/// # Errors
/// What candle says.
pub fn wkv4_start(channels: usize, device: &Device) -> Result<Tensor> {
    let sums = Tensor::zeros((2, channels), DType::F32, device)?;
    Ok(Tensor::cat(&[&sums, &Tensor::full(-1e38f32, (1, channels), device)?], 0)?)
}

/// RWKV-4's recurrence (Peng et al. 2023, arXiv:2305.13048, equation 16) over `k` and `v` of `[positions, d]`, whose rows have
/// `lens` positions each and begin from `before`, `[3, d]` each. `decay` and `first` are `time_decay` and `time_first`, `[d]`: what is past fades by
/// `e^(-e^decay)` at each position.
/// Returns what each position gives, `[positions, d]`, and the states after the last position of each row.
///
/// # Errors
/// If the shapes do not fit.
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

/// `f(gate) · x`, elementwise, with a gradient.
///
/// # Errors
/// If the shapes differ.
pub fn gated(gate: &Tensor, x: &Tensor, f: Gate) -> Result<Tensor> {
    if on_our_kernels(gate) && on_our_kernels(x) {
        return Ok(gate.contiguous()?.apply_op2(&x.contiguous()?, GatedOp { gate: f })?);
    }
    plain_gated(gate, x, f)
}

/// The plain twin of [`gated`].
///
/// # Errors
/// If the shapes differ.
pub fn plain_gated(gate: &Tensor, x: &Tensor, f: Gate) -> Result<Tensor> {
    let gate = match f {
        Gate::Silu => gate.silu()?,
        Gate::Sigmoid => (gate.neg()?.exp()? + 1.0)?.recip()?,
    };
    Ok((gate * x)?)
}

/// `x · mix + before · (1 - mix)`, with a gradient: `x` and `before` of `[.., d]`, `mix` of `[d]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn mix(x: &Tensor, before: &Tensor, mix: &Tensor) -> Result<Tensor> {
    if [x, before, mix].into_iter().all(on_our_kernels) {
        return Ok(x.contiguous()?.apply_op3(&before.contiguous()?, &mix.contiguous()?, MixOp)?);
    }
    plain_mix(x, before, mix)
}

/// The plain twin of [`mix`].
///
/// # Errors
/// If the shapes do not fit.
pub fn plain_mix(x: &Tensor, before: &Tensor, mix: &Tensor) -> Result<Tensor> {
    let mix = mix.to_dtype(x.dtype())?;
    Ok((x.broadcast_mul(&mix)? + before.broadcast_mul(&(1.0 - &mix)?)?)?)
}

/// The plain twin of [`wkv4`], position by position.
///
/// # Errors
/// If the shapes do not fit.
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
