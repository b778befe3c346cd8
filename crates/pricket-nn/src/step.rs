//! Decoding as one call a step: a batch of rows that join and leave, each of which reads a few tokens and is given the next.

use crate::ops::RowSummary;
use crate::{Result, SamplingParams, State};

/// New tokens that a row reads in a step, at most.
pub const MAX_STEP: usize = 8;

/// A row of a [`StepDecoder`], until it is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowId(pub u64);

/// A row that joins a [`StepDecoder`].
#[derive(Debug)]
pub struct Admission {
    /// Its state, of one row.
    pub state: State,
    /// Its tokens, those that were read and those that were not.
    pub ids: Vec<u32>,
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// How its next tokens are chosen.
    pub sampling: SamplingParams,
    /// Ids from here on are never chosen; `None` for no limit.
    pub vocab: Option<usize>,
}

/// The tokens that a row reads in a step.
#[derive(Clone, Debug)]
pub struct RowStep<'a> {
    /// The row.
    pub row: RowId,
    /// The tokens that it reads, 1 to [`MAX_STEP`]: those of the row that it has not read, or some that are tried.
    pub tokens: &'a [u32],
    /// For each of them a number from 0 to 1 from which the token after it is drawn. Not looked at where tokens are not drawn.
    pub draws: &'a [f64],
}

/// A token that was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// Its log-probability under the model, before penalties and filters; not a number if the logits overflowed.
    pub logprob: f32,
}

impl Choice {
    /// Chooses among `logits`, which `summary` sums up, after `ids`: a prompt of `prompt_len` tokens and what follows it. Ids from
    /// `vocab` on are never chosen; `draw` as in [`SamplingParams::choose`].
    pub fn of(
        (logits, summary): (&[f32], &RowSummary),
        sampling: &SamplingParams,
        vocab: Option<usize>,
        (ids, prompt_len): (&[u32], usize),
        draw: f64,
    ) -> Self {
        let vocab = vocab.unwrap_or(logits.len()).min(logits.len());
        let id = if sampling.is_argmax() && summary.argmax < vocab {
            summary.argmax as u32
        } else {
            sampling.choose(&mut logits[..vocab].to_vec(), ids, prompt_len, draw)
        };
        let logprob = f64::from(logits[id as usize] - summary.max) - summary.log_sum;
        Self { id, logprob: if summary.finite { logprob as f32 } else { f32::NAN } }
    }
}

/// Chooses the next tokens of a batch of rows. A model may have one of its own, with kernels that do a whole step; any model has
/// [`PlainDecoder`](crate::PlainDecoder).
pub trait StepDecoder: Send {
    /// Adds a row.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for a state that has not one row.
    fn admit(&mut self, row: Admission) -> Result<RowId>;

    /// Reads the new tokens of some rows. Returns, for each row and each of its tokens, the token that is chosen after it.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for a row that is not there, or more tokens than a step takes; what the model says.
    fn step(&mut self, rows: &[RowStep<'_>]) -> Result<Vec<Vec<Choice>>>;

    /// Takes back what was read of a row from position `len` on: tokens that were tried and rejected. Returns the number of
    /// positions that are kept, as [`State::rewind`].
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for a row that is not there.
    fn rewind(&mut self, row: RowId, len: usize) -> Result<usize>;

    /// Adds a token to a row: what was chosen and accepted. It is read by a later step.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for a row that is not there.
    fn push(&mut self, row: RowId, token: u32) -> Result<()>;

    /// Removes a row, and returns its state.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for a row that is not there.
    fn release(&mut self, row: RowId) -> Result<State>;
}
