//! Softmax, log-softmax and log-probabilities of tokens.
//!
//! `softmax(x)[i] = exp(x[i] - max) / Σ exp(x[j] - max)`, over the last dimension.

use candle_core::{CpuStorage, D, DType, Storage, Tensor};
use pricket_kernels::{RowSummary, SoftmaxOp, row_summaries};

use super::dispatch::{has_kernels, on_our_kernels};
use crate::{Error, Result};

/// Softmax over the last dimension, with a gradient if one is tracked.
///
/// # Errors
/// Returns an error if a tensor operation fails.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if !has_kernels(x.device()) && !x.track_op() {
        return Ok(candle_nn::ops::softmax_last_dim(&x.contiguous()?)?);
    }
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?.exp()?;
    Ok(shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?)
}

/// [`softmax`] of logits. On the CPU it runs on the current thread pool, and a probability below 1e-38 may become
/// 1e-38.
///
/// # Errors
/// Returns an error if a tensor operation fails.
pub fn probabilities(logits: &Tensor) -> Result<Tensor> {
    if on_our_kernels(logits) && !logits.track_op() {
        return Ok(logits.contiguous()?.apply_op1_no_bwd(&SoftmaxOp)?);
    }
    softmax(logits)
}

/// Log-softmax over the last dimension in f32, with a gradient.
///
/// # Errors
/// Returns an error if a tensor operation fails.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(DType::F32)?;
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?;
    Ok(shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?)
}

/// Returns, for each row of `logits`, `[n, vocab]`, the summary of the row and the log-probability of the token in
/// `ids`.
///
/// Sums are computed in f64, on the current thread pool.
///
/// # Errors
/// Returns [`Error::Input`] if the number of ids differs from the number of rows, or if an id is outside the
/// vocabulary.
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
    // Logits on the CPU are read in place: copying them would take as long as the rest of the function.
    if let (Storage::Cpu(CpuStorage::F32(data)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) {
        return Ok(of_rows(&data[start..end]));
    }
    drop(storage);
    Ok(of_rows(&logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?))
}
