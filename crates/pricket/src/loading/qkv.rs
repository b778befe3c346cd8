//! Row order of fused query-key-value matrices in GGUF files, and how it is determined.
//!
//! If the file does not state the order, the model is loaded in both orders and scores a short English text. The order
//! with the clearly lower loss wins. If the losses do not decide, the norms of the rows are compared.

use std::sync::Arc;

use candle_core::{DType, Device};
use pricket_nn::{CausalLm, FusedRows, RowOrder, Weights};
use pricket_weights::Store;

use crate::loading::opened::Opened;
use crate::{Error, Result};

/// Row order of the fused query-key-value matrices in a GGUF file, for families such as GPT-NeoX that are trained with
/// the rows grouped by head.
///
/// Until May 2024, converters kept the order of training: query, key and value rows of each head side by side. Later
/// converters write all of Q, then K, then V. GGUF files do not state which order they use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum QkvOrder {
    /// Determined while loading: the order that gives a text the lower loss. If the losses do not decide, the norms of
    /// the rows decide, then the version and metadata of the file.
    #[default]
    Auto,
    /// Q, then K, then V.
    Split,
    /// Q, K and V of each head side by side.
    Interleaved,
}

impl std::str::FromStr for QkvOrder {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "split" => Ok(Self::Split),
            "interleaved" => Ok(Self::Interleaved),
            _ => Err(Error::Unknown {
                what: "order of QKV rows",
                name: name.into(),
                known: "expected auto, split or interleaved".into(),
            }),
        }
    }
}

/// Returns whether the rows are in the model's order, from the file and the user's setting. `None` if neither states
/// it.
pub(crate) fn decided(rows: &FusedRows, order: QkvOrder) -> Option<bool> {
    match (rows, order) {
        (FusedRows::AsTrained, _) => Some(false),
        (FusedRows::InModelOrder, _) | (_, QkvOrder::Split) | (FusedRows::Stated, QkvOrder::Auto) => Some(true),
        (_, QkvOrder::Interleaved) => Some(false),
        (FusedRows::Unknown { .. }, QkvOrder::Auto) => None,
    }
}

/// Simple English text. A model trained on English scores it higher when the rows are in the right order.
const EVIDENCE: &str = "Tom had a red ball and a big dog. One day the dog took the ball and ran to the house. \
    Tom said that he would look for it. He looked in the box, but the ball was not in the box. \
    The man asked what the dog had done with the ball, and she said that it was in the water.";

/// Margin in nats per token by which one loss must be below the other, and below the loss of guessing. Models that are
/// untrained or trained on other data do not reach it.
const CLEAR: f64 = 0.25;

/// A model and the cursor that it was loaded from.
pub(crate) type Built = (Arc<dyn CausalLm>, Weights);

/// Loads a model in both orders and keeps the one with the lower loss on a text. If the losses do not decide, the norms
/// of the rows decide; if they do not decide either, `likely` does. Returns whether the rows are in the model's order,
/// the model, and a note.
pub(crate) fn by_evidence(
    build: impl Fn(bool) -> Result<Built>,
    likely: bool,
    why: &str,
    opened: &Opened,
    headers: &Weights,
) -> Result<(bool, Built, String)> {
    let name = |in_model_order: bool| if in_model_order { "split" } else { "interleaved" };
    let by_rows = || -> Result<(bool, String)> {
        let (split, interleaved, chance) = told_by_rows(&*opened.store, headers)?;
        let (most, least) = (split.max(interleaved), split.min(interleaved));
        if most > (6.0 * chance).max(0.03) && most > 2.0 * least {
            let told =
                format!("Q, K and V explain {most:.2} of the variance of row norms; in the other order {least:.2}");
            return Ok((split > interleaved, told));
        }
        Ok((likely, why.into()))
    };
    let Some(tokenizer) = &opened.tokenizer else {
        let (order, why) = by_rows()?;
        return Ok((
            order,
            build(order)?,
            format!("QKV rows are {}: {why}; no text was scored, because there is no tokenizer", name(order)),
        ));
    };
    let ids = tokenizer.encode(EVIDENCE)?;
    let loss = |model: &Arc<dyn CausalLm>| -> Result<f64> {
        let room = model.info().context.unwrap_or(ids.len()).min(ids.len());
        let scored = pricket_lm::token_logprobs(&**model, &ids[..room])?;
        Ok(-scored.iter().map(|token| f64::from(token.logprob)).sum::<f64>() / scored.len().max(1) as f64)
    };
    // The unlikely order is loaded first, so that usually the model to keep is the last one loaded.
    // A wrong order may overflow, so an error here is not reported.
    let other = build(!likely).and_then(|built| loss(&built.0)).unwrap_or(f64::INFINITY);
    let built = build(likely)?;
    let found = loss(&built.0).unwrap_or(f64::INFINITY);
    let guessing = (tokenizer.vocab_size() as f64).ln();
    let clear = |this: f64, that: f64| this + CLEAR < that.min(guessing);
    let (order, why) = if clear(other, found) || clear(found, other) {
        let (this, that) = (found.min(other), found.max(other));
        (likely == (found < other), format!("loss of a text {this:.2} nats per token; in the other order {that:.2}"))
    } else {
        let (order, why) = by_rows()?;
        (order, format!("{why}; the loss of a text does not decide ({found:.2} and {other:.2} nats per token)"))
    };
    let note = format!("QKV rows are {}: {why}", name(order));
    if order == likely {
        return Ok((order, built, note));
    }
    // Frees the first model before the second is loaded.
    drop(built);
    Ok((order, build(order)?, note))
}

/// Returns the share of the variance of log row norms that the labels Q, K and V explain, for the split order, for the
/// interleaved order, and by chance.
///
/// Training gives query, key and value rows different norms. With wrong labels, the three groups have the same mean.
fn told_by_rows(store: &dyn Store, headers: &Weights) -> Result<(f64, f64, f64)> {
    let (mut total, mut explained, mut chance) = (0.0, [0.0; 2], 1.0f64);
    let (fused, asked) = (headers.fused(), headers.loaded_names());
    let fused = fused.iter().filter_map(|(canonical, order)| {
        let RowOrder::PerHead { heads } = *order else { return None };
        let (_, name) = asked.iter().find(|(asked, _)| asked == canonical && canonical.ends_with(".weight"))?;
        Some((name, heads))
    });
    // A few layers suffice.
    for (name, heads) in fused.take(8) {
        let weight = pricket_weights::read_tensor(store, name, &Device::Cpu)?.to_dtype(DType::F32)?;
        let norms: Vec<f32> = weight.sqr()?.sum(1)?.to_vec1()?;
        let logs: Vec<f64> = norms.iter().map(|norm| f64::from(norm.max(1e-20)).ln()).collect();
        // Expected share explained by the means of three random groups.
        chance = 2.0 / logs.len().saturating_sub(1).max(1) as f64;
        let width = logs.len() / 3;
        let dim = (width / heads.max(1)).max(1);
        let mean = logs.iter().sum::<f64>() / logs.len().max(1) as f64;
        total += logs.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
        let part = [|row: usize, width: usize, _: usize| row / width.max(1), |row, _, dim| row / dim % 3];
        for (part, explained) in part.iter().zip(&mut explained) {
            let (mut sums, mut counts) = ([0.0; 3], [0.0f64; 3]);
            for (row, x) in logs.iter().enumerate() {
                let part = part(row, width, dim).min(2);
                sums[part] += x - mean;
                counts[part] += 1.0;
            }
            *explained += sums.iter().zip(&counts).map(|(sum, count)| sum * sum / count.max(1.0)).sum::<f64>();
        }
    }
    let share = |x: f64| if total > 0.0 { x / total } else { 0.0 };
    Ok((share(explained[0]), share(explained[1]), chance))
}
