//! The only file that calls fused operations, candle's or ours.
//!
//! There is no training mode to forget. Each function asks its inputs whether a gradient is tracked: if none is, it
//! takes the fused form; if any is, an operation with a backward pass or the plain twin, because candle's fused
//! softmax, norm and rotary drop gradients without a word. The twins are public, and tests compare them.

use std::sync::OnceLock;

use candle_core::{CpuStorage, D, DType, Device, Storage, Tensor};
pub use pricket_kernels::{
    Activations, BlockType, Blocks, Gelu, Matrix, Pool, RowSummary, argmax, chosen as cpu_path, keep_freed_memory,
    multiply_add_rate, narrowed, q8_row_bytes, quantise, row_summaries, row_summary,
};
use pricket_kernels::{AttentionOp, GeluOp, LayerNormOp, LinearOp, RotaryOp, StoreOp, SumOp, q8_values};

use crate::{Error, Result};

/// The kernels of ours run on the CPU and compute in f32.
fn on_our_kernels(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// `x Wᵀ + b` for `x` of `[.., in]` and `weight` of `[out, in]` as stored; gives `[.., out]` in the type of `x`. On
/// the CPU activations are as precise as `activations` says.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Matrix, bias: Option<&Tensor>, activations: Activations) -> Result<Tensor> {
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

/// The plain twin of [`linear`].
///
/// # Errors
/// If the shapes do not fit.
pub fn plain_linear(x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    let dtype = x.dtype();
    let weight = &match weight {
        Matrix::Dense(weight) => weight.clone(),
        Matrix::Blocks(_) | Matrix::Packed(_) => weight.to_dense(dtype, x.device())?,
    };
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
    if x.track_op() || weight.track_op() || bias.track_op() {
        return plain_layer_norm(x, weight, bias, eps);
    }
    let x = x.contiguous()?;
    if on_our_kernels(&x) {
        return Ok(x.apply_op3_no_bwd(weight, bias, &LayerNormOp { eps: eps as f32 })?);
    }
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

/// [`linear`], then the GELU of `form`; candle's `gelu_erf` and `gelu` are its plain twins. With 8-bit activations its
/// argument and its value are rounded to f16, on the CPU: ggml looks it up in a table of halves.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear_gelu(
    x: &Tensor,
    weight: &Matrix,
    bias: Option<&Tensor>,
    form: Gelu,
    activations: Activations,
) -> Result<Tensor> {
    let tracked = x.track_op() || weight.track_op() || bias.is_some_and(Tensor::track_op);
    if on_our_kernels(x) && !tracked {
        let then = Some(GeluOp { form, as_ggml: activations == Activations::Q8 });
        let op = LinearOp { weight: weight.clone(), bias: bias.cloned(), activations, transposed: false, then };
        return Ok(x.contiguous()?.apply_op1_no_bwd(&op)?);
    }
    let y = linear(x, weight, bias, activations)?;
    Ok(match form {
        Gelu::Erf => y.gelu_erf()?,
        Gelu::Tanh => y.gelu()?,
    })
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
    if !x.device().is_cpu() && !x.track_op() {
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

/// Writes `new` of `[b, h, t, head_dim]` into `past`, `[b, h, capacity, head_dim]` in its own type or bytes of `q8_0` blocks,
/// from position `at` on. No gradient goes through it.
///
/// # Errors
/// If the shapes do not fit, or for blocks that are not on the CPU.
pub fn store(past: &Tensor, new: &Tensor, at: usize) -> Result<()> {
    let new = new.detach();
    let blocks = past.dtype() == DType::U8;
    if on_our_kernels(&new) && (blocks || new.stride().last() == Some(&1)) {
        let new = if new.stride().last() == Some(&1) { new } else { new.contiguous()? };
        return Ok(past.narrow(2, at, new.dim(2)?)?.inplace_op2(&new, &StoreOp)?);
    }
    if blocks {
        return Err(Error::Input("keys and values are cached as q8_0 on the CPU only, in f32".into()));
    }
    Ok(past.slice_set(&new.to_dtype(past.dtype())?.contiguous()?, 2, at)?)
}

/// Keys or values of `[b, h, s, head_dim]` as `dtype`, from whatever [`store`] has made of them.
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
    /// Keys hidden on the left of each row; empty for none.
    pub padding: &'a [usize],
    /// Where all layers of a pass share what is added to the scores, once one of them has made it. Scores of another shape, padding
    /// or slopes get what is theirs.
    pub bias: &'a SharedBias,
}

/// What is added to scores, made by the first who asks and shared with all who ask for the same.
#[derive(Debug, Default)]
pub struct SharedBias(OnceLock<(BiasKey, Option<Tensor>)>);

/// What a bias depends on.
#[derive(Clone, Debug, PartialEq)]
struct BiasKey {
    shape: [usize; 4],
    slopes: Vec<f32>,
    padding: Vec<usize>,
}

impl SharedBias {
    fn get(&self, shape: [usize; 4], scores: &Scores<'_>, device: &Device) -> Result<Option<Tensor>> {
        let is_same = |(key, bias): &&(BiasKey, Option<Tensor>)| {
            (key.shape, &key.slopes[..], &key.padding[..]) == (shape, scores.slopes, scores.padding)
                && bias.as_ref().is_none_or(|bias| bias.device().same_device(device))
        };
        if let Some((_, bias)) = self.0.get().filter(is_same) {
            return Ok(bias.clone());
        }
        let bias = attention_bias(shape, scores, device)?;
        let key = BiasKey { shape, slopes: scores.slopes.to_vec(), padding: scores.padding.to_vec() };
        // Who asks for something else, in the middle of another pass, gets it and is not remembered.
        self.0.set((key, bias.clone())).ok();
        Ok(bias)
    }
}

/// Causal attention, the queries being the last positions of the keys: `q` of `[b, h, t, head_dim]`, `k` and `v` of
/// `[b, kv_heads, s, head_dim]`, as they are stored. Gives `[b, t, h · head_dim]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scores: Scores<'_>) -> Result<Tensor> {
    let tracked = q.track_op() || k.track_op() || v.track_op();
    let stored = |x: &Tensor| matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16 | DType::U8);
    if on_our_kernels(q) && stored(k) && stored(v) && !tracked {
        let Scores { scale, slopes, padding, .. } = scores;
        let op = AttentionOp { scale: scale as f32, padding: padding.to_vec(), slopes: slopes.to_vec() };
        return Ok(q.contiguous()?.apply_op3_no_bwd(k, v, &op)?);
    }
    attention_output(&attention_pattern(q, k, scores)?, &widened(v, q.dim(3)?, q.dtype())?)
}

/// The probabilities of [`attention`], `[b, h, t, s]`; with [`attention_output`] its plain twin.
///
/// # Errors
/// If the shapes do not fit.
pub fn attention_pattern(q: &Tensor, k: &Tensor, scores: Scores<'_>) -> Result<Tensor> {
    let (b, h, t, dim) = q.dims4()?;
    let (k, s) = (repeat_heads(&widened(k, dim, q.dtype())?, h)?, k.dim(2)?);
    let products = (q.contiguous()?.matmul(&k.t()?)?.to_dtype(DType::F32)? * scores.scale)?;
    let products = match scores.bias.get([b, h, t, s], &scores, q.device())? {
        Some(bias) => products.broadcast_add(&bias)?,
        None => products,
    };
    Ok(softmax(&products)?.to_dtype(q.dtype())?)
}

/// What is added to the scores of `b` rows of `h` heads, `t` queries and `s` keys: distances times slopes, and what hides keys; of
/// `[b or 1, h or 1, t, s]`, or nothing where nothing is to be added.
fn attention_bias(shape: [usize; 4], scores: &Scores<'_>, device: &Device) -> Result<Option<Tensor>> {
    let ([b, h, t, s], &Scores { slopes, padding, .. }) = (shape, scores);
    if t == 1 && slopes.is_empty() && padding.is_empty() {
        return Ok(None);
    }
    let rows = if padding.is_empty() { 1 } else { b };
    let hidden = |row: usize, i: usize, j: usize| {
        let last = s - t + i;
        j > last || j < padding.get(row).copied().unwrap_or(0).min(last)
    };
    let mask = (0..rows).flat_map(|row| (0..t).flat_map(move |i| (0..s).map(move |j| (row, i, j))));
    let mask: Vec<f32> = mask.map(|(row, i, j)| if hidden(row, i, j) { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(mask, (rows, 1, t, s), device)?;
    if slopes.is_empty() {
        return Ok(Some(mask));
    }
    let back = |i: usize, j: usize| (j as f32) - (s - t + i) as f32;
    let distance: Vec<f32> = (0..t).flat_map(|i| (0..s).map(move |j| back(i, j))).collect();
    let distance = Tensor::from_vec(distance, (1, t, s), device)?;
    let slopes = Tensor::from_vec(slopes.to_vec(), (h, 1, 1), device)?;
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
    if !x.device().is_cpu() && !x.track_op() {
        return Ok(candle_nn::ops::softmax_last_dim(&x.contiguous()?)?);
    }
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?.exp()?;
    Ok(shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?)
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
