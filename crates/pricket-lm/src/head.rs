//! Applies the head of a model to a few positions at a time: memory does not grow with length times vocabulary.

use candle_core::Tensor;
use pricket_nn::ops::RowSummary;
use pricket_nn::{CausalLm, ops};

use crate::Result;

/// Positions whose logits are held at once: `[64, vocab]` in f32 is 13 MB for Pythia.
const BLOCK: usize = 64;

/// Calls `each` with the logits of each block of positions: the index of its first position, and `[block, vocab]`. Hidden states
/// are `[n, d]`.
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

/// Computes the logits of hidden states `[n, d]`, and returns a summary of each row and the log-probability of its target, as
/// [`ops::logprobs`] does.
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
