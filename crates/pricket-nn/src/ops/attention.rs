//! Rotary embedding, the KV cache and attention.
//!
//! Attention is `softmax(scale · q kᵀ + bias) v` for each head. The bias is negative infinity for later keys. With
//! ALiBi, the bias of an earlier key is `-slope · distance`.

use std::sync::{Mutex, PoisonError};

use candle_core::{CustomOp3, D, DType, Device, Tensor};
use pricket_kernels::{AttentionOp, AttentionRow, RotaryOp, SelfAttentionOp, StoreOp, parallel, q8_values};

use super::dispatch::{has_kernels, on_our_kernels};
use super::softmax::softmax;
use crate::known::known;
use crate::{Error, Result};

/// Rotates pairs of dimensions: `(a, b)` becomes `(a cos - b sin, b cos + a sin)`.
///
/// `x` is `[b, t, h, head_dim]`; `cos` and `sin` are `[b or 1, t, pairs]`. Dimension `i` is paired with dimension
/// `i + pairs`; dimensions from `2 · pairs` on are copied. Returns `[b, h, t, head_dim]`, contiguous.
///
/// # Errors
/// Returns an error if the shapes do not match.
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

/// Removes the batch dimension of angles that all rows share, as candle's `rope` expects them.
fn one_row(angles: &Tensor) -> Result<Tensor> {
    let angles = if angles.dim(0)? == 1 { angles.squeeze(0)? } else { angles.clone() };
    Ok(angles.contiguous()?)
}

/// Plain form of [`rotary`].
///
/// # Errors
/// Returns an error if the shapes do not match.
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

/// New keys and values of a row: `len` positions of `k` and `v`, `[batch, kv_heads, time, head_dim]`, in batch element
/// `row` from index `from` on. Their first position in the row is `at`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewKeys<'a> {
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
    pub(crate) row: usize,
    pub(crate) from: usize,
    pub(crate) len: usize,
    pub(crate) at: usize,
}

/// Writes new keys and values into the tensors of the KV cache, one tensor of `kept` for each element of `new`.
///
/// A cache tensor is `[2, kv_heads, capacity, head_dim]` in a type of its own, or holds the bytes of `q8_0` blocks. On
/// the CPU several threads write rows in parallel. No gradient is tracked.
///
/// # Errors
/// Returns an error if the shapes do not match, or [`Error::Input`] for `q8_0` on another device than the CPU.
pub(crate) fn store(kept: &[Tensor], new: &[NewKeys<'_>]) -> Result<()> {
    // On a GPU one thread is enough: its stream runs operations in order.
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
        return Err(Error::Input("the q8_0 cache needs f32 keys and values on the CPU".into()));
    }
    let own = |x: &Tensor| x.detach().narrow(0, row, 1)?.narrow(2, from, len);
    let new = Tensor::cat(&[own(k)?, own(v)?], 0)?.to_dtype(kept.dtype())?;
    Ok(kept.slice_set(&new.contiguous()?, 2, at)?)
}

/// Converts stored keys or values of any cache type to `dtype`. Returns `[b, h, s, head_dim]`.
///
/// # Errors
/// Returns an error if a tensor operation fails.
pub fn widened(stored: &Tensor, head_dim: usize, dtype: DType) -> Result<Tensor> {
    if stored.dtype() != DType::U8 {
        return Ok(stored.to_dtype(dtype)?);
    }
    let (b, h, s, _) = stored.dims4()?;
    let mut values = vec![0f32; b * h * s * head_dim];
    q8_values(&stored.flatten_all()?.to_vec1::<u8>()?, head_dim, &mut values);
    Ok(Tensor::from_vec(values, (b, h, s, head_dim), stored.device())?.to_dtype(dtype)?)
}

/// Scaling and biases of attention scores before the softmax.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    /// Factor of the products of queries and keys.
    pub scale: f64,
    /// ALiBi slopes, one for each head; empty for no biases. The score of a key `n` positions back is lowered by `n`
    /// times the slope.
    pub slopes: &'a [f32],
}

/// Returns whether [`attention`] has a kernel for these queries, keys and values.
pub fn attention_is_fused(q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
    let untracked = |x: &Tensor| on_our_kernels(x) && !x.track_op();
    [q, k, v].into_iter().all(untracked) && [k, v].iter().all(|x| x.stride().last() == Some(&1))
}

/// Causal attention with separate keys for each row, for f32 on the CPU without a gradient.
///
/// `q` is `[b, h, t, head_dim]`. Each element of `rows` takes the next queries and attends to its own keys. Returns
/// `[b, t, h · head_dim]`. [`attention_pattern`] followed by [`attention_output`] is the plain form.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn attention(q: &Tensor, rows: Vec<AttentionRow>, scores: Scores<'_>) -> Result<Tensor> {
    let op = AttentionOp { scale: scores.scale as f32, slopes: scores.slopes.to_vec(), rows };
    Ok(q.contiguous()?.apply_op1_no_bwd(&op)?)
}

/// Returns whether [`self_attention`] has a kernel for these queries, keys and values.
pub fn self_attention_is_fused(q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
    [q, k, v].into_iter().all(|x| on_our_kernels(x) && x.stride().last() == Some(&1))
}

/// Causal attention of rows without a past, with a gradient.
///
/// `q` is `[b, h, t, head_dim]`; `k` and `v` are `[b, kv_heads, t, head_dim]`. Each element of `spans` describes a row
/// by the index in the batch, the first position and the length. Returns `[b, t, h · head_dim]`.
///
/// # Errors
/// Returns an error if the shapes do not match.
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

/// [`self_attention`] of a fused tensor `qkv`, `[b, t, heads + 2 kv_heads, head_dim]`: queries, then keys, then values.
///
/// With `angles`, the cosines and sines that [`rotary`] takes, queries and keys are rotated first. Only `qkv` is kept
/// for the backward pass. Returns `None` if there is no kernel for `qkv`.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub(crate) fn fused_self_attention(
    qkv: &Tensor,
    (heads, kv_heads): (usize, usize),
    angles: Option<(Tensor, Tensor)>,
    spans: Vec<(usize, usize, usize)>,
    scores: Scores<'_>,
) -> Result<Option<Tensor>> {
    if !on_our_kernels(qkv) || qkv.stride().last() != Some(&1) {
        return Ok(None);
    }
    let op = SelfAttentionOp { scale: scores.scale as f32, slopes: scores.slopes.to_vec(), spans };
    let turning = angles.clone();
    let split = move |qkv: &Tensor| -> Result<[Tensor; 3]> {
        let turned = |from: usize, heads: usize| match &turning {
            Some((cos, sin)) => rotary(&qkv.narrow(2, from, heads)?, cos, sin),
            None => Ok(qkv.narrow(2, from, heads)?.transpose(1, 2)?),
        };
        let v = qkv.narrow(2, heads + kv_heads, kv_heads)?.transpose(1, 2)?;
        Ok([turned(0, heads)?, turned(heads, kv_heads)?, v])
    };
    let turned_back = move |of: Option<Tensor>| -> Result<Option<Tensor>> {
        Ok(match (of, &angles) {
            (Some(of), Some((cos, sin))) => RotaryOp.bwd(&of, cos, sin, &of, &of)?.0,
            (of, _) => of.map(|of| of.transpose(1, 2)).transpose()?,
        })
    };
    let [q, k, v] = split(&qkv.detach())?;
    let mixed = q.apply_op3_no_bwd(&k, &v, &op)?;
    drop((q, k, v));
    let mixed = known(qkv, &qkv.detach(), Some(mixed), move |qkv, grad| {
        let [q, k, v] = split(&qkv.detach())?;
        let (of_q, of_k, of_v) = op.bwd(&q, &k, &v, &v, grad)?;
        drop((q, k));
        let of_v = of_v.map(|of| of.transpose(1, 2)).transpose()?;
        let parts: Vec<Tensor> = [turned_back(of_q)?, turned_back(of_k)?, of_v].into_iter().flatten().collect();
        Ok((Some(Tensor::cat(&parts, 2)?), None))
    })?;
    Ok(Some(mixed))
}

/// Returns the attention probabilities `softmax(scale · q kᵀ + bias)`, `[b, h, t, s]`.
///
/// `q` is `[b, h, t, head_dim]` and `k` is `[b, kv_heads, s, head_dim]`. See [`attention_bias`] for `bias`.
///
/// # Errors
/// Returns an error if the shapes do not match.
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

/// Returns the bias of the attention scores of `len` queries after `past` positions, `[1, h or 1, len, past + len]`.
///
/// The bias is negative infinity for later keys. For earlier keys it is `-slope · distance`, or 0 if `slopes` is empty.
/// Returns `None` for a single query without slopes, which needs no bias.
///
/// # Errors
/// Returns an error if a tensor operation fails.
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

/// Returns the sum of the values weighted by `pattern`, `[b, h, t, s]`, with the heads merged: `[b, t, h · head_dim]`.
///
/// # Errors
/// Returns an error if the shapes do not match.
pub fn attention_output(pattern: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (b, h, t, _) = pattern.dims4()?;
    let v = repeat_heads(&v.to_dtype(pattern.dtype())?, h)?.contiguous()?;
    let mixed = pattern.matmul(&v)?;
    Ok(mixed.transpose(1, 2)?.reshape((b, t, h * v.dim(3)?))?)
}

/// Repeats each key or value head for the query heads that share it. Returns `[b, heads, s, d]`.
fn repeat_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, kv, s, d) = x.dims4()?;
    if kv == heads {
        return Ok(x.clone());
    }
    let shared = x.unsqueeze(2)?.broadcast_as((b, kv, heads / kv, s, d))?;
    Ok(shared.reshape((b, heads, s, d))?)
}
