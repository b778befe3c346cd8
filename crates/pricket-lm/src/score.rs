use candle_core::Tensor;
use pricket_nn::{CausalLm, Context, ops};

use crate::diagnose::diagnose;
use crate::head::logprobs;
use crate::loglikelihood::{Continuation, ScoreOptions, roomy};
use crate::{Error, Result};

/// A token of a text and how likely the model thought it.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub id: u32,
    /// Its text; a part of a character is U+FFFD. Empty where tokens are scored without a tokenizer.
    pub text: String,
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
pub fn token_logprobs(model: &dyn CausalLm, ids: &[u32]) -> Result<Vec<ScoredToken>> {
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
) -> Result<Vec<ScoredToken>> {
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
fn scored_after(model: &dyn CausalLm, ids: &[u32], given: usize, mut ctx: Context) -> Result<Vec<ScoredToken>> {
    let input = Tensor::new(&ids[..ids.len() - 1], &model.info().device)?.unsqueeze(0)?;
    let hidden = model.hidden(&input, &mut ctx)?.squeeze(0)?;
    let hidden = hidden.narrow(0, given - 1, ids.len() - given)?;
    let mut out = Vec::with_capacity(ids.len() - given);
    for ((summary, logprob), &id) in logprobs(model, &hidden, &ids[given..])?.into_iter().zip(&ids[given..]) {
        if !summary.finite {
            return Err(diagnose(model, ids));
        }
        out.push(ScoredToken {
            id,
            text: String::new(),
            logprob: logprob as f32,
            is_greedy: logprob >= -summary.log_sum,
        });
    }
    Ok(out)
}

/// Mean cross-entropy of each token of `ids` `[b, t]` given those before it, with a gradient: a scalar. Logits are made a block of
/// positions at a time ([`CausalLm::nll`]).
///
/// # Errors
/// What the model says.
pub fn loss(model: &dyn CausalLm, ids: &Tensor) -> Result<Tensor> {
    let (_, t) = ids.dims2()?;
    if t < 2 {
        return Err(Error::Input("a loss needs at least two tokens a row".into()));
    }
    let hidden = model.hidden(&ids.narrow(1, 0, t - 1)?.contiguous()?, &mut Context::new())?;
    let targets = ids.narrow(1, 1, t - 1)?.flatten_all()?.to_vec1::<u32>()?;
    Ok(model.nll(&hidden.flatten_to(1)?, &targets)?.mean_all()?)
}

/// Refuses logits with a NaN or an infinity in them, saying where `ids` first overflows.
///
/// # Errors
/// [`Error::NonFinite`].
pub fn check_finite(model: &dyn CausalLm, logits: &[f32], ids: &[u32]) -> Result<()> {
    if ops::row_summary(logits).finite { Ok(()) } else { Err(diagnose(model, ids)) }
}
