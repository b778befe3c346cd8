use candle_core::{D, IndexOp, Tensor};
use pricket_nn::ops::RowSummary;
use pricket_nn::{CausalLm, Context, ops};

use crate::diagnose::diagnose;
use crate::loglikelihood::{Continuation, ScoreOptions, roomy};
use crate::{Error, Result};

/// Positions whose logits are held at once: `[64, vocab]` in f32 is 13 MB for Pythia.
const BLOCK: usize = 64;

/// A token and how likely the model thought it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability given everything before it.
    pub logprob: f32,
    /// Whether no token was more likely.
    pub is_greedy: bool,
}

/// The log-probability of each token but the first, given all before it.
///
/// The head is applied to a few positions at a time, so memory does not grow with length times vocabulary.
///
/// # Errors
/// [`pricket_nn::Error::ContextExceeded`] if the text is longer than the model was trained for,
/// [`Error::NonFinite`] if the model overflows.
pub fn token_logprobs(model: &dyn CausalLm, ids: &[u32]) -> Result<Vec<TokenLogprob>> {
    match ids.split_first() {
        Some((_, rest)) if !rest.is_empty() => scored_after(model, ids, 1, Context::new()),
        _ => Ok(Vec::new()),
    }
}

/// The log-probability of every token of a text of any length: the first given `prefix`, each of the others given what comes before
/// it in its window. [`Continuation::windows`] splits the text.
///
/// # Errors
/// As [`ScoreOptions::check`]; [`Error::NonFinite`] if the model overflows, [`pricket_nn::Error::Cancelled`], and what the model says.
pub fn text_logprobs(
    model: &dyn CausalLm,
    ids: &[u32],
    prefix: u32,
    options: &ScoreOptions,
) -> Result<Vec<TokenLogprob>> {
    let mut out = Vec::with_capacity(ids.len());
    let windows = options.windows(model, ids, prefix)?;
    options.progress.begin("scoring", ids.len() as u64, "tokens");
    for Continuation { mut context, ids } in windows {
        if options.progress.cancelled() {
            return Err(pricket_nn::Error::Cancelled.into());
        }
        let given = context.len();
        context.extend(ids);
        out.extend(scored_after(model, &context, given, roomy())?);
        options.progress.update(out.len() as u64);
    }
    options.progress.end();
    Ok(out)
}

/// The log-probabilities of `ids` from number `given` on, given all before them. At least one is given and one is scored.
fn scored_after(model: &dyn CausalLm, ids: &[u32], given: usize, mut ctx: Context) -> Result<Vec<TokenLogprob>> {
    let input = Tensor::new(&ids[..ids.len() - 1], &model.info().device)?.unsqueeze(0)?;
    let hidden = model.hidden(&input, &mut ctx)?;
    let hidden = hidden.narrow(1, given - 1, ids.len() - given)?;
    let mut out = Vec::with_capacity(ids.len() - given);
    for (block, targets) in ids[given..].chunks(BLOCK).enumerate() {
        let logits = model.head(&hidden.narrow(1, block * BLOCK, targets.len())?)?.i(0)?;
        let mut scored = Ok(Vec::new());
        model.on_threads(&mut || scored = ops::logprobs(&logits, targets));
        for ((summary, logprob), &id) in scored?.into_iter().zip(targets) {
            if !summary.finite {
                return Err(diagnose(model, ids));
            }
            out.push(TokenLogprob { id, logprob: logprob as f32, is_greedy: logprob >= -summary.log_sum });
        }
    }
    Ok(out)
}

/// Log-softmax of a row at `id`, and whether nothing was more likely.
pub(crate) fn logprob_of(summary: &RowSummary, row: &[f32], id: u32) -> Result<(f32, bool)> {
    let Some(&target) = row.get(id as usize) else {
        return Err(Error::Input(format!("token {id} is outside the vocabulary of {}", row.len())));
    };
    Ok(((f64::from(target - summary.max) - summary.log_sum) as f32, target >= summary.max))
}

/// Mean cross-entropy of each token of `ids` `[b, t]` given those before it, with a gradient: a scalar.
///
/// # Errors
/// What the model says.
pub fn loss(model: &dyn CausalLm, ids: &Tensor) -> Result<Tensor> {
    let (_, t) = ids.dims2()?;
    if t < 2 {
        return Err(Error::Input("a loss needs at least two tokens a row".into()));
    }
    let hidden = model.hidden(&ids.narrow(1, 0, t - 1)?.contiguous()?, &mut Context::new())?;
    let logprobs = ops::log_softmax(&model.head(&hidden)?)?;
    let targets = ids.narrow(1, 1, t - 1)?.contiguous()?.unsqueeze(2)?;
    Ok(logprobs.gather(&targets, D::Minus1)?.mean_all()?.neg()?)
}

/// Refuses logits with a NaN or an infinity in them, saying where `ids` first overflows.
///
/// # Errors
/// [`Error::NonFinite`].
pub fn check_finite(model: &dyn CausalLm, logits: &[f32], ids: &[u32]) -> Result<()> {
    if ops::row_summary(logits).finite { Ok(()) } else { Err(diagnose(model, ids)) }
}

/// What rows of logits amount to, each of them once, on the model's threads.
pub(crate) fn summaries(model: &dyn CausalLm, rows: &[Vec<f32>]) -> Vec<RowSummary> {
    let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
    let mut summaries = Vec::new();
    model.on_threads(&mut || summaries = ops::row_summaries(&rows));
    summaries
}
