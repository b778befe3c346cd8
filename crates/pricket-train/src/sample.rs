//! What a model is trained on: token ids, and which of them count.

use crate::{Error, Result};

/// A text as token ids, with the ids that the loss counts.
///
/// The first id is never predicted, so it never counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    ids: Vec<u32>,
    counts: Vec<bool>,
}

impl Sample {
    /// A sample of which every id counts but the first.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty list.
    pub fn new(ids: Vec<u32>) -> Result<Self> {
        let counts = vec![true; ids.len()];
        Self::masked(ids, counts)
    }

    /// A prompt and the response to it, of which the response counts. The end token is a part of the response.
    ///
    /// # Errors
    /// [`Error::Input`] if both are empty.
    pub fn response(prompt: &[u32], response: &[u32]) -> Result<Self> {
        let counts = [vec![false; prompt.len()], vec![true; response.len()]].concat();
        Self::masked([prompt, response].concat(), counts)
    }

    /// A sample and which of its ids count.
    ///
    /// # Errors
    /// [`Error::Input`] for lists of different lengths, or empty ones.
    pub fn masked(ids: Vec<u32>, mut counts: Vec<bool>) -> Result<Self> {
        if ids.len() != counts.len() || ids.is_empty() {
            return Err(Error::Input(format!("{} token ids with a mask of {}", ids.len(), counts.len())));
        }
        counts[0] = false;
        Ok(Self { ids, counts })
    }

    /// The token ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// How many ids count.
    pub fn counted(&self) -> usize {
        self.counts.iter().filter(|&&counts| counts).count()
    }

    /// Positions whose next id counts, and that id.
    pub(crate) fn targets(&self) -> impl Iterator<Item = (usize, u32)> {
        (1..self.ids.len()).filter(|&i| self.counts[i]).map(|i| (i - 1, self.ids[i]))
    }

    /// The first `len` ids.
    #[must_use]
    pub fn truncated(mut self, len: usize) -> Self {
        self.ids.truncate(len.max(1));
        self.counts.truncate(len.max(1));
        self
    }
}

/// Divides samples into micro-batches of at most `tokens` ids each, in order; a longer sample has one of its own.
pub fn micro_batches(samples: Vec<Sample>, tokens: usize) -> Vec<Vec<Sample>> {
    let mut batches: Vec<Vec<Sample>> = Vec::new();
    let mut left = 0;
    for sample in samples {
        let len = sample.ids.len();
        if let Some(batch) = batches.last_mut().filter(|_| len <= left) {
            left -= len;
            batch.push(sample);
        } else {
            left = tokens.saturating_sub(len);
            batches.push(vec![sample]);
        }
    }
    batches
}
