//! Training samples: token ids, and which of them are counted in the loss.

use crate::{Error, Result};

/// A text as token ids, with a mask of the ids that are counted in the loss.
///
/// The first id is never counted, because the model does not predict it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sample {
    ids: Vec<u32>,
    counts: Vec<bool>,
}

impl Sample {
    /// Creates a sample of which all ids except the first are counted.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if `ids` is empty.
    pub fn new(ids: Vec<u32>) -> Result<Self> {
        let counts = vec![true; ids.len()];
        Self::masked(ids, counts)
    }

    /// Creates a sample from a prompt and a response, of which the response is counted. `response` includes the end
    /// token.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if both are empty.
    pub fn response(prompt: &[u32], response: &[u32]) -> Result<Self> {
        let counts = [vec![false; prompt.len()], vec![true; response.len()]].concat();
        Self::masked([prompt, response].concat(), counts)
    }

    /// Creates a sample of which the ids with a `true` in `counts` are counted. The first id is not counted in any
    /// case.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the lists are empty or their lengths differ.
    pub fn masked(ids: Vec<u32>, mut counts: Vec<bool>) -> Result<Self> {
        if ids.len() != counts.len() || ids.is_empty() {
            return Err(Error::Input(format!(
                "{} token ids with a mask of {}; expected equal lengths of at least 1",
                ids.len(),
                counts.len()
            )));
        }
        counts[0] = false;
        Ok(Self { ids, counts })
    }

    /// Returns the token ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Returns the number of ids that are counted in the loss.
    pub fn counted(&self) -> usize {
        self.counts.iter().filter(|&&counts| counts).count()
    }

    /// Returns the positions whose next id is counted, each with that id.
    pub(crate) fn targets(&self) -> impl Iterator<Item = (usize, u32)> {
        (1..self.ids.len()).filter(|&i| self.counts[i]).map(|i| (i - 1, self.ids[i]))
    }

    /// Returns the ids in runs of which all or none are counted in the loss, in order.
    ///
    /// ```
    /// let sample = pricket_train::Sample::response(&[1, 2], &[3])?;
    /// let runs: Vec<_> = sample.runs().collect();
    /// assert_eq!(runs, [(&[1, 2][..], false), (&[3][..], true)]);
    /// # Ok::<(), pricket_train::Error>(())
    /// ```
    pub fn runs(&self) -> impl Iterator<Item = (&[u32], bool)> {
        let mut from = 0;
        self.counts.chunk_by(|a, b| a == b).map(move |run| {
            let ids = &self.ids[from..from + run.len()];
            from += run.len();
            (ids, run[0])
        })
    }

    /// Truncates the sample to its first `len` ids, at least one.
    #[must_use]
    pub fn truncated(mut self, len: usize) -> Self {
        self.ids.truncate(len.max(1));
        self.counts.truncate(len.max(1));
        self
    }
}
