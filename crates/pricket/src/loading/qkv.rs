//! The order of the rows in a GGUF file's fused query-key-value matrices, and how it is found out.

use std::sync::Arc;

use candle_core::{DType, Device};
use pricket_nn::{CausalLm, FusedRows, RowOrder, Weights};
use pricket_weights::Store;

use crate::loading::opened::Opened;
use crate::{Error, Result};

/// How a GGUF file has the rows of fused query-key-value matrices that a family trains head by head, as GPT-NeoX does.
///
/// Until May 2024 converters kept the order of training: each head's query, key and value rows side by side. Later ones write all
/// of Q, then K, then V. Nothing in a file says which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum QkvOrder {
    /// What gives a text the lower loss; where that tells nothing, what the file's age suggests.
    #[default]
    Auto,
    /// Q, then K, then V.
    Split,
    /// Head by head.
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
                known: "there are auto, split and interleaved".into(),
            }),
        }
    }
}

/// Whether the rows are in the model's order, given what the file tells and what the user says; `None` if it has to be found out.
pub(crate) fn decided(rows: &FusedRows, order: QkvOrder) -> Option<bool> {
    match (rows, order) {
        (FusedRows::AsTrained, _) => Some(false),
        (FusedRows::InModelOrder, _) | (_, QkvOrder::Split) | (FusedRows::Stated, QkvOrder::Auto) => Some(true),
        (_, QkvOrder::Interleaved) => Some(false),
        (FusedRows::Unknown { .. }, QkvOrder::Auto) => None,
    }
}

/// Sentences of the simplest kind, which every model that was trained on English finds likelier in its right mind.
const EVIDENCE: &str = "Tom had a red ball and a big dog. One day the dog took the ball and ran to the house. \
    Tom said that he would look for it. He looked in the box, but the ball was not in the box. \
    The man asked what the dog had done with the ball, and she said that it was in the water.";

/// By how many nats a token one loss must be below the other, and below that of guessing: what was never trained, or on
/// something else, tells nothing.
const CLEAR: f64 = 0.25;

/// A model, and the cursor that it was loaded from.
pub(crate) type Built = (Arc<dyn CausalLm>, Weights);

/// Loads a model both ways and keeps the one that finds a text likelier; where that tells nothing, the one that its weights
/// speak for; else the likely one.
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
            let told = format!("Q, K and V explain {most:.2} of the spread of row norms, and {least:.2} the other way");
            return Ok((split > interleaved, told));
        }
        Ok((likely, why.into()))
    };
    let Some(tokenizer) = &opened.tokenizer else {
        let (order, why) = by_rows()?;
        return Ok((
            order,
            build(order)?,
            format!("QKV rows are {}: {why}; without a tokenizer no text can tell", name(order)),
        ));
    };
    let ids = tokenizer.encode(EVIDENCE)?;
    let loss = |model: &Arc<dyn CausalLm>| -> Result<f64> {
        let room = model.info().context.unwrap_or(ids.len()).min(ids.len());
        let scored = pricket_lm::token_logprobs(&**model, &ids[..room])?;
        Ok(-scored.iter().map(|token| f64::from(token.logprob)).sum::<f64>() / scored.len().max(1) as f64)
    };
    // The unlikely one first, so that the one that is kept is mostly the one in memory.
    // A wrong order may overflow: that is no error of the file.
    let other = build(!likely).and_then(|built| loss(&built.0)).unwrap_or(f64::INFINITY);
    let built = build(likely)?;
    let found = loss(&built.0).unwrap_or(f64::INFINITY);
    let guessing = (tokenizer.vocab_size() as f64).ln();
    let clear = |this: f64, that: f64| this + CLEAR < that.min(guessing);
    let (order, why) = if clear(other, found) || clear(found, other) {
        let (this, that) = (found.min(other), found.max(other));
        (likely == (found < other), format!("loss of a text {this:.2} nats a token, and {that:.2} the other way"))
    } else {
        let (order, why) = by_rows()?;
        (order, format!("{why}; the loss of a text tells nothing ({found:.2} and {other:.2} nats a token)"))
    };
    let note = format!("QKV rows are {}: {why}", name(order));
    if order == likely {
        return Ok((order, built, note));
    }
    // Not two at once.
    drop(built);
    Ok((order, build(order)?, note))
}

/// How much of the spread of the rows' norms it explains to call them Q, K and V in one order or the other: split,
/// interleaved; and how much chance explains. Training makes values other than queries and keys; rows that are called wrong
/// are all alike.
fn told_by_rows(store: &dyn Store, headers: &Weights) -> Result<(f64, f64, f64)> {
    let (mut total, mut explained, mut chance) = (0.0, [0.0; 2], 1.0f64);
    let (fused, asked) = (headers.fused(), headers.asked());
    let fused = fused.iter().filter_map(|(canonical, order)| {
        let RowOrder::PerHead { heads } = *order else { return None };
        let (_, name) = asked.iter().find(|(asked, _)| asked == canonical && canonical.ends_with(".weight"))?;
        Some((name, heads))
    });
    // A few layers tell as well as all.
    for (name, heads) in fused.take(8) {
        let weight = pricket_weights::read_tensor(store, name, &Device::Cpu)?.to_dtype(DType::F32)?;
        let norms: Vec<f32> = weight.sqr()?.sum(1)?.to_vec1()?;
        let logs: Vec<f64> = norms.iter().map(|norm| f64::from(norm.max(1e-20)).ln()).collect();
        // Three means of rows that are all of a kind explain this much of their spread.
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
