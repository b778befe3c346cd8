//! Comparison of two models on a text: perplexities, Kullback-Leibler divergence and agreement of the top tokens.
//!
//! The divergence at a position is `KL(p || q) = sum over v of p(v) (log p(v) - log q(v))`. Here `p` are the
//! probabilities of the reference and `q` those of the other model.

use candle_core::Tensor;
use pricket_nn::{CausalLm, Error as NnError};

use crate::diagnose::diagnose;
use crate::head::by_blocks;
use crate::loglikelihood::{Continuation, ScoreOptions, roomy};
use crate::{Error, Result};

/// Difference between a model and a reference on a text. The reference is usually the model before quantization.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// Number of predicted tokens: all tokens of the text.
    pub tokens: usize,
    /// Perplexity of the reference: `exp` of its mean loss in nats per token.
    pub reference_perplexity: f64,
    /// Perplexity of the other model.
    pub perplexity: f64,
    /// Mean Kullback-Leibler divergence of the other model's predictions from those of the reference, in nats per
    /// token.
    pub kl_divergence: f64,
    /// Largest Kullback-Leibler divergence at a position, in nats.
    pub worst_kl_divergence: f64,
    /// Share of the positions where both models have the same most likely token.
    pub top_1_agreement: f64,
}

/// Compares two models with the same tokenizer on the tokens of a text.
///
/// The text is split into windows as in [`text_logprobs`](crate::text_logprobs), so the perplexities agree with those
/// of that function. The length of a window is limited by both models.
///
/// # Errors
/// Returns [`Error::Input`] if the vocabularies differ in size or the text is empty, and the errors of
/// [`ScoreOptions::check`]. Returns [`Error::NonFinite`] if the logits of a model are not finite,
/// [`NnError::Cancelled`] if the progress was canceled, or the error of a model.
pub fn compare(
    reference: &dyn CausalLm,
    other: &dyn CausalLm,
    ids: &[u32],
    prefix: u32,
    options: &ScoreOptions,
) -> Result<Comparison> {
    let (vocab, others) = (reference.info().vocab, other.info().vocab);
    if vocab != others {
        return Err(Error::Input(format!(
            "cannot compare models with vocabularies of {vocab} and {others} tokens; the sizes must be equal"
        )));
    }
    if ids.is_empty() {
        return Err(Error::Input("the text to compare the models on is empty; expected at least one token".into()));
    }
    options.check(reference)?;
    options.check(other)?;
    let room = options.max_length(reference).min(options.max_length(other));
    let (mut reference_loss, mut loss, mut agreed) = (0.0, 0.0, 0usize);
    let mut sum = Comparison::default();
    options.progress.begin("comparing", ids.len() as u64, "tokens");
    for Continuation { mut context, ids } in
        Continuation::windows(ids, prefix, room, options.stride.unwrap_or(room).min(room))
    {
        if options.progress.cancelled() {
            return Err(NnError::Cancelled.into());
        }
        let given = context.len();
        context.extend(&ids);
        let hidden = |model: &dyn CausalLm| -> Result<Tensor> {
            let input = Tensor::new(&context[..context.len() - 1], &model.info().device)?.unsqueeze(0)?;
            Ok(model.hidden(&input, &mut roomy())?.squeeze(0)?.narrow(0, given - 1, ids.len())?)
        };
        let (first, second) = (hidden(reference)?, hidden(other)?);
        by_blocks(reference, &first, |at, logits| {
            let targets = &ids[at..at + logits.dim(0)?];
            let others = other.head(&second.narrow(0, at, targets.len())?)?;
            let (p, q) = (logits.to_vec2::<f32>()?, others.to_vec2::<f32>()?);
            for ((p, q), &target) in p.iter().zip(&q).zip(targets) {
                let (norm_p, norm_q) = (log_sum(p), log_sum(q));
                for (model, logits, norm) in [(reference, p, norm_p), (other, q, norm_q)] {
                    // A single infinite logit would make the divergence NaN.
                    if !norm.is_finite() || !logits.iter().all(|x| x.is_finite()) {
                        return Err(diagnose(model, &context));
                    }
                }
                reference_loss += norm_p - f64::from(p[target as usize]);
                loss += norm_q - f64::from(q[target as usize]);
                let divergence: f64 = p
                    .iter()
                    .zip(q)
                    .map(|(&p, &q)| {
                        let (p, q) = (f64::from(p) - norm_p, f64::from(q) - norm_q);
                        p.exp() * (p - q)
                    })
                    .sum();
                sum.kl_divergence += divergence;
                sum.worst_kl_divergence = sum.worst_kl_divergence.max(divergence);
                agreed += usize::from(likeliest(p) == likeliest(q));
                sum.tokens += 1;
            }
            Ok(())
        })?;
        options.progress.update(sum.tokens as u64);
    }
    options.progress.end();
    let tokens = sum.tokens as f64;
    Ok(Comparison {
        reference_perplexity: (reference_loss / tokens).exp(),
        perplexity: (loss / tokens).exp(),
        kl_divergence: sum.kl_divergence / tokens,
        top_1_agreement: agreed as f64 / tokens,
        ..sum
    })
}

fn log_sum(logits: &[f32]) -> f64 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    f64::from(most) + logits.iter().map(|&x| f64::from(x - most).exp()).sum::<f64>().ln()
}

fn likeliest(logits: &[f32]) -> usize {
    logits.iter().enumerate().fold(0, |best, (i, x)| if *x > logits[best] { i } else { best })
}
