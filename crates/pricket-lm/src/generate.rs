//! Batched generation: reads prompts of different lengths packed, then generates one token per row and step.

use std::sync::Arc;

use candle_core::Tensor;
use pricket_nn::{
    Admission, CausalLm, Choice, Context, Error as NnError, PlainDecoder, Recording, RowId, RowStep, SamplingParams,
    State, StepDecoder, Taps, ops,
};

use crate::diagnose::diagnose;
use crate::{Error, Result, Sampler};

/// Maximum number of prompt positions per pass on the CPU. It bounds the memory for long prompts.
const PREFILL: usize = 512;

/// Options for continuing a prompt.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Maximum number of new tokens; 128 by default.
    pub max_tokens: usize,
    /// Sampling parameters; greedy by default, as in [`SamplingParams::default`].
    pub sampling: SamplingParams,
    /// Random seed; 0 by default. All rows of a batch use it, so that a prompt gives the same text in a batch as alone.
    pub seed: u64,
    /// Random seeds of the first rows of a batch, which replace `seed` there. Use them to sample one prompt several
    /// times. Empty by default.
    pub row_seeds: Vec<u64>,
    /// Stop strings. The text ends before the first of them; none by default.
    pub stop: Vec<String>,
    /// Ids of tokens that end the text, in addition to the model's end tokens; none by default.
    pub stop_ids: Vec<u32>,
    /// Whether the model's end tokens end the text; true by default.
    pub stop_at_eos: bool,
    /// Whether to allow positions beyond the length that the model was trained on; false by default.
    pub beyond_trained_length: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 128,
            sampling: SamplingParams::greedy(),
            seed: 0,
            row_seeds: Vec::new(),
            stop: Vec::new(),
            stop_ids: Vec::new(),
            stop_at_eos: true,
            beyond_trained_length: false,
        }
    }
}

/// Reason why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model generated an end token, or one of [`GenerateOptions::stop_ids`].
    Eos,
    /// The text reached one of [`GenerateOptions::stop`].
    Stop,
    /// The text has [`GenerateOptions::max_tokens`] new tokens.
    Length,
    /// The model's context is full.
    Context,
    /// The text was interrupted before it ended.
    Unfinished,
}

impl std::fmt::Display for FinishReason {
    /// Writes the reason as a phrase for messages.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FinishReason::Eos => "ended by the model",
            FinishReason::Stop => "ended by a stop string",
            FinishReason::Length => "ended by the maximum number of tokens",
            FinishReason::Context => "ended by the full context",
            FinishReason::Unfinished => "unfinished",
        })
    }
}

/// A prompt and the options for its continuation.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub ids: Vec<u32>,
    /// Options for the continuation. [`Generation`] ignores `stop` and `row_seeds`; the caller handles them.
    pub options: GenerateOptions,
    /// Ids of the model's end tokens. The end token that ends a row is the last token of the row.
    pub eos: Vec<u32>,
    /// Number of ids that may be chosen. Larger ids are padding of the model's vocabulary beyond its tokenizer. `None`
    /// for no limit.
    pub vocab: Option<usize>,
}

impl Request {
    /// Creates a request to continue `ids`, without end tokens or a vocabulary limit.
    pub fn new(ids: Vec<u32>, options: GenerateOptions) -> Self {
        Self { ids, options, eos: Vec::new(), vocab: None }
    }

    /// Returns whether the token `id` ends the row.
    fn ends(&self, id: u32) -> bool {
        (self.options.stop_at_eos && self.eos.contains(&id)) || self.options.stop_ids.contains(&id)
    }
}

/// A token generated for one row.
#[derive(Clone, Debug)]
pub struct Token {
    /// Row of the token: the index of its request.
    pub row: usize,
    /// Id of the token.
    pub id: u32,
    /// Log-probability of the token under the model, before penalties and filters.
    pub logprob: f32,
    /// Reason why the row ends with this token; `None` if the row goes on.
    pub finish: Option<FinishReason>,
}

/// A batch of prompts under generation, one token per row and step.
///
/// Prompts may differ in length; they are packed, without padding. A row that ends leaves the batch. The rows do not
/// affect each other: each prompt gives the same text in a batch as alone.
pub struct Generation {
    model: Arc<dyn CausalLm>,
    /// Rows that have not ended.
    rows: Vec<Row>,
    /// Context of the passes over the prompts.
    ctx: Context,
    /// Decoder of the model itself, if it has one. Otherwise `plain` generates the tokens after the first.
    own: Option<Box<dyn StepDecoder>>,
    plain: PlainDecoder,
    /// Logits of the last position of each prompt, `[rows][vocab]`. Empty after the first decoding step.
    first: Vec<Vec<f32>>,
    /// The state of the row that ended last.
    ended: Option<State>,
}

struct Row {
    index: usize,
    request: Request,
    ids: Vec<u32>,
    sampler: Sampler,
    done: bool,
    /// Id of the row in the decoder; `None` until its prompt has been read.
    id: Option<RowId>,
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Generation({} rows running)", self.rows.len())
    }
}

impl Generation {
    /// Creates a batch of `requests`. Does not run the model.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a prompt is empty or has an id outside the model's vocabulary. Returns an error if
    /// sampling parameters are invalid. Returns [`NnError::ContextExceeded`] if a prompt is longer than the model's
    /// context.
    pub fn new(model: Arc<dyn CausalLm>, requests: Vec<Request>) -> Result<Self> {
        let limit = model.info().context;
        for request in &requests {
            request.options.sampling.check()?;
            if request.ids.is_empty() {
                return Err(Error::Input("the prompt is empty; it needs at least one token".into()));
            }
            let vocab = model.info().vocab;
            if let Some(id) = request.ids.iter().find(|&&id| id as usize >= vocab) {
                return Err(Error::Input(format!("token {id} is outside the model's vocabulary of {vocab}")));
            }
            let asked = request.ids.len();
            if let Some(limit) = limit.filter(|&limit| asked > limit && !request.options.beyond_trained_length) {
                return Err(NnError::ContextExceeded { asked, limit }.into());
            }
        }
        let beyond = requests.iter().any(|r| r.options.beyond_trained_length);
        let row = |(index, request): (usize, Request)| Row {
            index,
            ids: request.ids.clone(),
            sampler: Sampler::new(request.options.sampling.clone(), request.options.seed),
            done: request.options.max_tokens == 0,
            id: None,
            request,
        };
        let rows: Vec<Row> = requests.into_iter().enumerate().map(row).filter(|row| !row.done).collect();
        let ctx = Context::new().with_state(State::with_type(model.info().cache));
        let ctx = if beyond { ctx.beyond_trained_length() } else { ctx };
        let (own, plain) = (model.step_decoder(), PlainDecoder::new(Arc::clone(&model)));
        Ok(Self { model, rows, ctx, own, plain, first: Vec::new(), ended: None })
    }

    /// Starts from a state that already holds the first tokens of the prompt, so that they are not read again.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the batch or the state has more than one row, or if the state leaves no token of the
    /// prompt to read.
    pub fn with_past(mut self, past: State) -> Result<Self> {
        let read = past.len(0);
        match &self.rows[..] {
            [] => {}
            _ if past.rows() > 1 => {
                return Err(Error::Input(format!("the past state has {} rows; expected one", past.rows())));
            }
            [row] if read < row.ids.len() => self.ctx = self.ctx.with_state(past),
            [row] => return Err(Error::Input(format!("past of {read} tokens; the prompt has only {}", row.ids.len()))),
            rows => return Err(Error::Input(format!("a past state needs one prompt, found {}", rows.len()))),
        }
        Ok(self)
    }

    /// Records or edits activations at `taps` in every pass, including the passes over prompts. The model's own decoder
    /// ([`CausalLm::step_decoder`]) is then not used.
    #[must_use]
    pub fn with_taps(mut self, taps: Taps) -> Self {
        self.own = None;
        self.ctx.set_taps(Some(taps));
        self
    }

    /// Takes the recording of the last pass.
    pub fn take_recording(&mut self) -> Recording {
        if self.first.is_empty() { self.plain.take_recording() } else { self.ctx.take_recording() }
    }

    /// Generates one token for every row that has not ended. Returns `None` when all rows have ended.
    ///
    /// # Errors
    /// Returns [`Error::NonFinite`] if the model computes NaN or infinity, and an error if a tensor operation fails.
    /// After an error, all rows have ended.
    pub fn step(&mut self) -> Result<Option<Vec<Token>>> {
        let tokens = self.advance();
        if tokens.is_err() {
            self.rows.clear();
        }
        tokens
    }

    fn advance(&mut self) -> Result<Option<Vec<Token>>> {
        self.drop_finished()?;
        if self.rows.is_empty() {
            return Ok(None);
        }
        let started = self.rows.iter().all(|row| row.id.is_some());
        let choices = if started { self.decode()? } else { self.prefill()? };
        let limit = self.model.info().context;
        let mut tokens = Vec::with_capacity(self.rows.len());
        for (row, Choice { id, logprob }) in self.rows.iter_mut().zip(choices) {
            if logprob.is_nan() {
                return Err(diagnose(&*self.model, &row.ids));
            }
            let prompt_len = row.request.ids.len();
            row.ids.push(id);
            if let Some(place) = row.id {
                decoder(&mut self.own, &mut self.plain).push(place, id)?;
            }
            let full = limit.is_some_and(|limit| row.ids.len() > limit) && !row.request.options.beyond_trained_length;
            let finish = if row.request.ends(id) {
                Some(FinishReason::Eos)
            } else if row.ids.len() - prompt_len >= row.request.options.max_tokens {
                Some(FinishReason::Length)
            } else {
                full.then_some(FinishReason::Context)
            };
            row.done = finish.is_some();
            tokens.push(Token { row: row.index, id, logprob, finish });
        }
        Ok(Some(tokens))
    }

    /// Ends a row early. Has no effect if the row has already ended.
    pub fn stop(&mut self, row: usize) {
        if let Some(row) = self.rows.iter_mut().find(|r| r.index == row) {
            row.done = true;
        }
    }

    /// Returns the logits from which the last step chose, in the order of its tokens. Empty after the first step if the
    /// model has its own decoder ([`CausalLm::step_decoder`]).
    pub fn logits(&self) -> &[Vec<f32>] {
        if self.first.is_empty() { self.plain.logits() } else { &self.first }
    }

    /// Ends a batch of one row and returns its state, which holds all tokens but the last. Returns `None` if no token
    /// has been read.
    pub fn take_state(&mut self) -> Option<State> {
        self.rows.iter_mut().for_each(|row| row.done = true);
        self.drop_finished().ok()?;
        self.ended.take()
    }

    /// Returns the size in bytes of the states of all rows that have not ended and of the row that ended last.
    pub fn state_bytes(&self) -> usize {
        let held = [self.ctx.state(), self.ended.as_ref()].into_iter().flatten();
        held.map(State::bytes).sum::<usize>() + self.plain.state_bytes()
    }

    fn drop_finished(&mut self) -> Result<()> {
        let mut at = 0;
        while let Some(row) = self.rows.get(at) {
            if !row.done {
                at += 1;
                continue;
            }
            self.ended = match row.id {
                Some(id) => Some(decoder(&mut self.own, &mut self.plain).release(id)?),
                // The prompt has not been read. The context still holds the past state, if one was given.
                None => self.ctx.state_mut().map(|state| state.take_row(at)),
            };
            self.rows.remove(at);
        }
        Ok(())
    }

    /// Reads the prompts, packed, and chooses the first token of each row.
    fn prefill(&mut self) -> Result<Vec<Choice>> {
        let device = &self.model.info().device;
        let budget = if device.is_cpu() { PREFILL } else { 4 * PREFILL };
        let mut last: Vec<Option<Tensor>> = vec![None; self.rows.len()];
        // A past state already holds the first tokens of its row.
        let mut read: Vec<usize> = (0..self.rows.len()).map(|row| self.ctx.position(row)).collect();
        while last.iter().any(Option::is_none) {
            let (mut packed, mut ids) = (Vec::new(), Vec::new());
            for (i, row) in self.rows.iter().enumerate() {
                let len = (row.ids.len() - read[i]).min(budget - ids.len());
                if len > 0 {
                    ids.extend_from_slice(&row.ids[read[i]..read[i] + len]);
                    packed.push((i, len));
                    read[i] += len;
                }
            }
            self.ctx.pack_rows(&packed);
            let hidden = self.model.hidden(&Tensor::new(ids, device)?.unsqueeze(0)?, &mut self.ctx)?;
            let ends = self.ctx.last_positions(&hidden)?;
            for (at, (i, _)) in packed.into_iter().enumerate() {
                if read[i] == self.rows[i].ids.len() {
                    last[i] = Some(ends.narrow(0, at, 1)?);
                }
            }
        }
        let last: Vec<Tensor> = last.into_iter().flatten().collect();
        self.first = self.model.head(&Tensor::cat(&last, 0)?)?.to_vec2()?;
        let summaries = summaries(&*self.model, &self.first);
        let mut choices = Vec::with_capacity(self.rows.len());
        for ((row, logits), summary) in self.rows.iter_mut().zip(&self.first).zip(&summaries) {
            let (vocab, prompt_len) = (row.request.vocab, row.request.ids.len());
            let (sampling, draw) = (&row.request.options.sampling, row.sampler.draw());
            choices.push(Choice::of((logits, summary), sampling, vocab, (&row.ids, prompt_len), draw));
            let mut state = self.ctx.state_mut().map(|state| state.take_row(0)).unwrap_or_default();
            // Lets a conversation return to the state at the end of its prompt.
            state.mark(0);
            let (ids, sampling) = (row.ids.clone(), sampling.clone());
            let admission = Admission { state, ids, prompt_len, sampling, vocab };
            row.id = Some(decoder(&mut self.own, &mut self.plain).admit(admission)?);
        }
        Ok(choices)
    }

    fn decode(&mut self) -> Result<Vec<Choice>> {
        self.first.clear();
        if let Some(taps) = self.ctx.take_taps() {
            self.plain.replace_taps(Some(taps));
        }
        let draws: Vec<f64> = self.rows.iter_mut().map(|row| row.sampler.draw()).collect();
        let steps = self.rows.iter().zip(&draws).filter_map(|(row, draw)| {
            Some(RowStep { row: row.id?, tokens: row.ids.last_chunk::<1>()?, draws: std::slice::from_ref(draw) })
        });
        let steps: Vec<RowStep<'_>> = steps.collect();
        let choices = decoder(&mut self.own, &mut self.plain).step(&steps)?;
        Ok(choices.into_iter().flatten().collect())
    }
}

fn decoder<'a>(own: &'a mut Option<Box<dyn StepDecoder>>, plain: &'a mut PlainDecoder) -> &'a mut dyn StepDecoder {
    match own {
        Some(own) => &mut **own,
        None => plain,
    }
}

/// Summarizes each row of logits on the model's threads.
fn summaries(model: &dyn CausalLm, rows: &[Vec<f32>]) -> Vec<ops::RowSummary> {
    let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
    let mut summaries = Vec::new();
    model.on_threads(&mut || summaries = ops::row_summaries(&rows));
    summaries
}
