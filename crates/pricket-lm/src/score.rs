//! Log-probabilities of the tokens of a text, and the cross-entropy loss of a batch.

use candle_core::Tensor;
use pricket_nn::{CausalLm, Context, Error as NnError, ops};

use crate::diagnose::diagnose;
use crate::engine::{Request, Score};
use crate::loglikelihood::{self, Continuation, ScoreOptions};
use crate::{Error, Result};

/// Token of a text with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// Token ID.
    pub id: u32,
    /// Text of the token. An incomplete character is U+FFFD. Empty if tokens are scored without a tokenizer.
    pub text: String,
    /// Natural logarithm of the token's probability given the preceding tokens.
    pub logprob: f32,
    /// Whether no other token was more likely.
    pub is_greedy: bool,
}

/// Returns the log-probability of each token except the first, given all preceding tokens. Returns no tokens for fewer
/// than two IDs.
///
/// The head is applied to a few positions at a time, so memory does not grow with length times vocabulary.
///
/// # Errors
/// Returns [`pricket_nn::Error::ContextExceeded`] if the text is longer than the model was trained for. Returns
/// [`Error::NonFinite`] if the logits are not finite.
pub fn token_logprobs(model: &dyn CausalLm, ids: &[u32]) -> Result<Vec<ScoredToken>> {
    if ids.len() < 2 {
        return Ok(Vec::new());
    }
    let asked = ids.len() - 1;
    if let Some(limit) = model.info().context.filter(|&limit| asked > limit) {
        return Err(NnError::ContextExceeded { asked, limit }.into());
    }
    let mut out = Vec::with_capacity(asked);
    let add = |_, score| out.push(scored(ids[out.len() + 1], score));
    let request = Request::score(ids.to_vec(), 1);
    loglikelihood::score(model, std::iter::once(request), asked, &ScoreOptions::default(), add)?;
    Ok(out)
}

/// Returns the log-probability of every token of a text of any length. [`Continuation::windows`] splits the text.
///
/// The first token is conditioned on `prefix`. Each other token is conditioned on the preceding tokens of its window.
///
/// # Errors
/// Returns the errors of [`ScoreOptions::check`]. Returns [`Error::NonFinite`] if the logits are not finite,
/// [`pricket_nn::Error::Cancelled`] if the progress was canceled, or the error of the model.
pub fn text_logprobs(
    model: &dyn CausalLm,
    ids: &[u32],
    prefix: u32,
    options: &ScoreOptions,
) -> Result<Vec<ScoredToken>> {
    let windows = options.windows(model, ids, prefix)?;
    let mut parts: Vec<Vec<ScoredToken>> = windows.iter().map(|window| Vec::with_capacity(window.ids.len())).collect();
    let requests = windows.iter().map(|window| {
        let Continuation { context, ids } = window;
        Request::score([&context[..], ids].concat(), context.len())
    });
    let total = windows.iter().map(|window| window.context.len() + window.ids.len() - 1).sum();
    loglikelihood::score(model, requests, total, options, |window, score| {
        let part = &mut parts[window];
        part.push(scored(windows[window].ids[part.len()], score));
    })?;
    Ok(parts.concat())
}

fn scored(id: u32, score: Score) -> ScoredToken {
    ScoredToken { id, text: String::new(), logprob: score.logprob as f32, is_greedy: score.is_likeliest }
}

/// Returns the mean cross-entropy of the tokens `ids` `[b, t]`, each given the preceding tokens of its row. The result
/// is a scalar with a gradient.
///
/// Logits are computed for a block of positions at a time ([`CausalLm::nll`]).
///
/// # Errors
/// Returns [`Error::Input`] if `t` is less than 2, or the error of the model.
pub fn loss(model: &dyn CausalLm, ids: &Tensor) -> Result<Tensor> {
    let (_, t) = ids.dims2()?;
    if t < 2 {
        return Err(Error::Input("the loss needs at least two tokens per row".into()));
    }
    let hidden = model.hidden(&ids.narrow(1, 0, t - 1)?.contiguous()?, &mut Context::new())?;
    let targets = ids.narrow(1, 1, t - 1)?.flatten_all()?.to_vec1::<u32>()?;
    Ok(model.nll(&hidden.flatten_to(1)?, &targets)?.mean_all()?)
}

/// Checks that `logits` contain no NaN and no infinity. `ids` are the tokens that produced them.
///
/// # Errors
/// Returns [`Error::NonFinite`], naming the first layer with non-finite activations, if a logit is not finite.
pub fn check_finite(model: &dyn CausalLm, logits: &[f32], ids: &[u32]) -> Result<()> {
    if ops::row_summary(logits).finite { Ok(()) } else { Err(diagnose(model, ids)) }
}
