//! Softmax, and log-probabilities of tokens.

use candle_core::{CpuStorage, D, DType, Storage, Tensor};
use pricket_kernels::{RowSummary, SoftmaxOp, row_summaries};

use super::dispatch::{has_kernels, on_our_kernels};
use crate::{Error, Result};

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
