//! Losses of the named slices of a collection of texts.

use std::collections::BTreeMap;

use pricket_nn::{CausalLm, Error as NnError};
use serde_json::Value;

use crate::loglikelihood::{ScoreOptions, loglikelihoods};
use crate::{Error, Result, Tokenizer};

/// Number of documents scored together.
const TOGETHER: usize = 256;

/// Total loss and size of the documents of a slice.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SliceLoss {
    /// Number of documents.
    pub documents: u64,
    /// Number of tokens, all of which are scored.
    pub tokens: u64,
    /// Number of UTF-8 bytes.
    pub bytes: u64,
    /// Number of words, separated by whitespace.
    pub words: u64,
    /// Total negative log-likelihood of the documents, in nats.
    pub nats: f64,
}

impl SliceLoss {
    /// Returns the cross-entropy in nats per token, or 0 for a slice without tokens.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens.max(1) as f64
    }

    /// Returns the perplexity per token: `exp` of [`SliceLoss::loss`].
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    /// Returns the perplexity per word: `exp(nats / words)`.
    pub fn word_perplexity(&self) -> f64 {
        (self.nats / self.words.max(1) as f64).exp()
    }

    /// Returns the perplexity per byte: `exp(nats / bytes)`.
    pub fn byte_perplexity(&self) -> f64 {
        (self.nats / self.bytes.max(1) as f64).exp()
    }

    /// Returns the loss in bits per byte.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / self.bytes.max(1) as f64 / std::f64::consts::LN_2
    }

    fn add(&mut self, text: &str, tokens: usize, sum: f64) {
        self.documents += 1;
        self.tokens += tokens as u64;
        self.bytes += text.len() as u64;
        self.words += text.split_whitespace().count() as u64;
        self.nats -= sum;
    }
}

/// Scores every document and sums the losses of each slice.
///
/// A document has its text under `text`. It has the name of its slice under `meta.pile_set_name`, as in the Pile (Gao
/// et al. 2020, arXiv:2101.00027), or under `slice`. Documents without a name belong to the slice `all`. Texts longer
/// than the maximum length are scored in windows ([`ScoreOptions`]). The first window begins with the token `prefix`.
///
/// # Errors
/// Returns [`Error::Input`] if a document has no text. Returns an error if a document cannot be read, and the errors of
/// [`loglikelihoods`].
pub fn slice_losses(
    model: &dyn CausalLm,
    tokenizer: &Tokenizer,
    documents: impl IntoIterator<Item = Result<Value>>,
    prefix: u32,
    options: &ScoreOptions,
) -> Result<BTreeMap<String, SliceLoss>> {
    let mut slices: BTreeMap<String, SliceLoss> = BTreeMap::new();
    let mut documents = documents.into_iter().enumerate().peekable();
    while documents.peek().is_some() {
        if options.progress.cancelled() {
            return Err(NnError::Cancelled.into());
        }
        let (mut read, mut requests) = (Vec::new(), Vec::new());
        for (number, document) in documents.by_ref().take(TOGETHER) {
            let document = document?;
            let Some(text) = document["text"].as_str() else {
                return Err(Error::Input(format!("document {number}: expected a string under \"text\"")));
            };
            let named =
                [&document["meta"]["pile_set_name"], &document["slice"]].into_iter().find_map(|name| match name {
                    Value::String(name) => Some(name.clone()),
                    Value::Number(number) => Some(number.to_string()),
                    Value::Bool(flag) => Some(flag.to_string()),
                    _ => None,
                });
            let named = named.unwrap_or_else(|| "all".into());
            let ids = tokenizer.encode(text)?;
            let first = requests.len();
            requests.extend(options.windows(model, &ids, prefix)?);
            read.push((named, text.to_owned(), ids.len(), first..requests.len()));
        }
        let answers = loglikelihoods(model, &requests, options)?;
        for (slice, text, tokens, range) in read {
            let sum = answers[range].iter().map(|answer| answer.sum).sum();
            slices.entry(slice).or_default().add(&text, tokens, sum);
        }
    }
    Ok(slices)
}
