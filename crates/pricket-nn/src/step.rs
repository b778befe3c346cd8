//! Batched decoding. Rows join and leave the batch at any time. In each step a row reads a few tokens and gets the next
//! ones.

use std::borrow::Cow;

use crate::ops::{self, RowSummary};
use crate::{Result, SamplingParams, State};

/// Maximum number of tokens that a row reads in a step.
pub const MAX_STEP: usize = 8;

/// Identifier of a row of a [`StepDecoder`]; valid until the row is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowId(pub u64);

/// Row that joins a [`StepDecoder`].
#[derive(Debug)]
pub struct Admission {
    /// State with one row.
    pub state: State,
    /// All tokens of the row, including those not read yet.
    pub ids: Vec<u32>,
    /// Number of tokens at the start that are the prompt.
    pub prompt_len: usize,
    /// Sampling settings of the row.
    pub sampling: SamplingParams,
    /// Only ids below this are chosen; `None` for no limit.
    pub vocab: Option<usize>,
}

/// Tokens that a row reads in a step.
#[derive(Clone, Debug)]
pub struct RowStep<'a> {
    /// The row.
    pub row: RowId,
    /// Tokens to read, 1 to [`MAX_STEP`]: unread tokens of the row, or draft tokens.
    pub tokens: &'a [u32],
    /// Random numbers from 0 to 1, one for each token, which choose the tokens that follow. Ignored by greedy decoding.
    pub draws: &'a [f64],
}

/// Chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Token id.
    pub id: u32,
    /// Log-probability of the token under the model, before penalties and filters; NaN if the logits overflowed.
    pub logprob: f32,
}

/// Logits from which a token is chosen, and the settings of its row.
#[derive(Clone, Debug)]
pub struct ChoiceInput<'a> {
    /// Logits of the last position read.
    pub logits: &'a [f32],
    /// Sampling settings of the row.
    pub sampling: &'a SamplingParams,
    /// Only ids below this are chosen; `None` for no limit.
    pub vocab: Option<usize>,
    /// All previous tokens. May be empty if the settings do not depend on them ([`SamplingParams::is_argmax`]).
    pub ids: Cow<'a, [u32]>,
    /// Number of tokens at the start that are the prompt.
    pub prompt_len: usize,
    /// Random number from 0 to 1; see [`SamplingParams::choose`].
    pub draw: f64,
}

impl Choice {
    /// Chooses the next token.
    pub fn of(input: &ChoiceInput<'_>) -> Self {
        let ChoiceInput { logits, sampling, vocab, ids, prompt_len, draw } = input;
        let RowSummary { max, argmax, log_sum, finite } = ops::row_summary(logits);
        let vocab = vocab.unwrap_or(logits.len()).min(logits.len());
        let id = if sampling.is_argmax() && argmax < vocab {
            argmax as u32
        } else {
            sampling.choose(&mut logits[..vocab].to_vec(), ids, *prompt_len, *draw)
        };
        let logprob = f64::from(logits[id as usize] - max) - log_sum;
        Self { id, logprob: if finite { logprob as f32 } else { f32::NAN } }
    }

    /// Chooses a token for each input, on the installed thread pool.
    pub fn of_all(inputs: &[ChoiceInput<'_>]) -> Vec<Self> {
        ops::parallel_map(inputs.len(), |i| Self::of(&inputs[i]))
    }
}

/// Decoder that chooses the next tokens of a batch of rows.
///
/// A model may implement its own, for example with a kernel for a whole step. [`PlainDecoder`](crate::PlainDecoder)
/// works with any model.
pub trait StepDecoder: Send {
    /// Adds a row to the batch.
    ///
    /// # Errors
    /// Returns [`Error::Input`](crate::Error::Input) if the state does not have exactly one row.
    fn admit(&mut self, row: Admission) -> Result<RowId>;

    /// Reads new tokens of some rows. Returns, for each row and each of its tokens, the token chosen to follow it.
    ///
    /// # Errors
    /// Returns [`Error::Input`](crate::Error::Input) if a row does not exist or the number of tokens is not 1 to
    /// [`MAX_STEP`], or the error of the model.
    fn step(&mut self, rows: &[RowStep<'_>]) -> Result<Vec<Vec<Choice>>>;

    /// Discards the positions of a row from `len` on, for example rejected draft tokens. Returns the number of
    /// positions kept; see [`State::rewind`].
    ///
    /// # Errors
    /// Returns [`Error::Input`](crate::Error::Input) if the row does not exist.
    fn rewind(&mut self, row: RowId, len: usize) -> Result<usize>;

    /// Appends an accepted token to a row. A later step reads it.
    ///
    /// # Errors
    /// Returns [`Error::Input`](crate::Error::Input) if the row does not exist.
    fn push(&mut self, row: RowId, token: u32) -> Result<()>;

    /// Removes a row and returns its state.
    ///
    /// # Errors
    /// Returns [`Error::Input`](crate::Error::Input) if the row does not exist.
    fn release(&mut self, row: RowId) -> Result<State>;
}
