use candle_core::{DType, IndexOp, Tensor};
use pricket_nn::{Context, Progress};

use crate::{Error, Pricket, Result};

/// How far a model is from another one, mostly from what it was quantised from, over a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Perplexity of the reference: `exp` of its mean loss in nats a token.
    pub reference_perplexity: f64,
    /// That of the other model.
    pub perplexity: f64,
    /// Mean Kullback-Leibler divergence of the other's predictions from the reference's, in nats a token.
    pub kl_divergence: f64,
    /// The largest of them.
    pub worst_kl_divergence: f64,
    /// Share of the positions where both think the same token the likeliest.
    pub top_1_agreement: f64,
}

/// Positions whose predictions are compared at a time.
const ROWS: usize = 64;

/// Compares two models that have one tokenizer over a text, in windows of 512 tokens or what they can read.
///
/// # Errors
/// [`Error::Input`] for vocabularies of different sizes or a text of less than two tokens; what the models say.
pub fn compare(reference: &Pricket, other: &Pricket, text: &str, progress: &dyn Progress) -> Result<Comparison> {
    let (a, b) = (reference.model(), other.model());
    let vocab = a.info().vocab;
    if vocab != b.info().vocab {
        return Err(Error::Input(format!("vocabularies of {vocab} and {} cannot be compared", b.info().vocab)));
    }
    let ids = reference.encode(text)?;
    let window = [a.info().context, b.info().context].into_iter().flatten().fold(512, usize::min);
    let mut sum = Comparison::default();
    let (mut reference_loss, mut loss, mut agreed) = (0.0, 0.0, 0usize);
    progress.begin("comparing", ids.len() as u64, "tokens");
    for (n, ids) in ids.chunks(window).enumerate().filter(|(_, ids)| ids.len() > 1) {
        if progress.cancelled() {
            return Err(Error::Cancelled);
        }
        let input = Tensor::new(ids, &a.info().device)?.unsqueeze(0)?;
        let first = a.hidden(&input, &mut Context::new())?;
        let second = b.hidden(&input.to_device(&b.info().device)?, &mut Context::new())?;
        for start in (0..ids.len() - 1).step_by(ROWS) {
            let len = ROWS.min(ids.len() - 1 - start);
            let rows =
                |hidden: &Tensor| -> Result<Tensor> { Ok(hidden.i((.., start..start + len, ..))?.contiguous()?) };
            let logits =
                |logits: Tensor| -> Result<Vec<Vec<f32>>> { Ok(logits.i(0)?.to_dtype(DType::F32)?.to_vec2()?) };
            let (p, q) = (logits(a.head(&rows(&first)?)?)?, logits(b.head(&rows(&second)?)?)?);
            for (i, (p, q)) in p.iter().zip(&q).enumerate() {
                let (norm_p, norm_q) = (log_sum(p), log_sum(q));
                let target = ids[start + i + 1] as usize;
                reference_loss += norm_p - f64::from(p[target]);
                loss += norm_q - f64::from(q[target]);
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
        }
        progress.update((n * window + ids.len()) as u64);
    }
    progress.end();
    if sum.tokens == 0 {
        return Err(Error::Input("a text of at least two tokens is needed".into()));
    }
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
