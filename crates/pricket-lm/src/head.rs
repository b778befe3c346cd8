//! Applies the head of a model to one block of positions at a time, so that the logits of a long text are never all in
//! memory.

use candle_core::Tensor;
use pricket_nn::ops::RowSummary;
use pricket_nn::{CausalLm, ops};

use crate::Result;

/// Number of positions per block. For Pythia, the `[64, vocab]` logits take 13 MB in f32.
const BLOCK: usize = 64;

/// Calls `each` for every block of positions, with the index of its first position and its logits `[block, vocab]`.
/// `hidden` holds the hidden states, `[n, d]`.
pub(crate) fn by_blocks(
    model: &dyn CausalLm,
    hidden: &Tensor,
    mut each: impl FnMut(usize, &Tensor) -> Result<()>,
) -> Result<()> {
    let (n, _) = hidden.dims2()?;
    for at in (0..n).step_by(BLOCK) {
        let rows = hidden.narrow(0, at, BLOCK.min(n - at))?;
        each(at, &model.head(&rows)?)?;
    }
    Ok(())
}

/// Computes the logits of the hidden states `[n, d]`. Returns a summary of each row of logits and the log-probability
/// of its target, as [`ops::logprobs`] does.
pub(crate) fn logprobs(model: &dyn CausalLm, hidden: &Tensor, targets: &[u32]) -> Result<Vec<(RowSummary, f64)>> {
    let mut out = Vec::with_capacity(targets.len());
    by_blocks(model, hidden, |at, logits| {
        let targets = &targets[at..at + logits.dim(0)?];
        let mut scored = Ok(Vec::new());
        model.on_threads(&mut || scored = ops::logprobs(logits, targets));
        out.extend(scored?);
        Ok(())
    })?;
    Ok(out)
}
