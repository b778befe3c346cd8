use std::sync::Arc;

use candle_core::{IndexOp, Tensor};
use pricket_nn::{Cache, CausalLm, Context, Error as NnError};

use crate::diagnose::diagnose;
use crate::score::{logprob_of, summaries};
use crate::{Error, Result, Sampler, Sampling};

/// Prompt positions read at a time: it bounds the memory that reading a long prompt takes.
const PREFILL: usize = 512;

/// A prompt and how to continue it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt, at least one token.
    pub ids: Vec<u32>,
    /// New tokens at most.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Where the row's random numbers begin.
    pub seed: u64,
    /// Tokens that end the row; the one that does is its last.
    pub eos: Vec<u32>,
    /// Ids from here on are never chosen: the model's padding beyond its tokenizer. `None` for no limit.
    pub vocab: Option<usize>,
    /// Allows positions beyond the length that the model was trained for.
    pub beyond_trained_length: bool,
}

impl Request {
    /// The most likely continuation of `ids`, 128 tokens, no end token.
    pub fn greedy(ids: Vec<u32>) -> Self {
        Self {
            ids,
            max_tokens: 128,
            sampling: Sampling::greedy(),
            seed: 0,
            eos: Vec::new(),
            vocab: None,
            beyond_trained_length: false,
        }
    }
}

/// Why a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// An end token was chosen.
    Eos,
    /// [`Request::max_tokens`] were written.
    Length,
    /// The model's context is full.
    Context,
}

/// A token that a row was given.
#[derive(Clone, Debug)]
pub struct Token {
    /// The row: index of the request.
    pub row: usize,
    /// The token.
    pub id: u32,
    /// Its log-probability under the model, before penalties and filters.
    pub logprob: f32,
    /// Set if the row ends with this token.
    pub finish: Option<Finish>,
}

/// A batch being continued, one token a row and step.
///
/// Prompts may differ in length: they are padded on the left inside. A row that ends leaves the batch, and what the
/// others get does not depend on it: several prompts together give the text that each gives alone.
pub struct Generation {
    model: Arc<dyn CausalLm>,
    ctx: Context,
    /// Rows still running, in the order of the batch.
    rows: Vec<Row>,
    /// Whether the prompts have been read.
    started: bool,
    /// Logits that the last step chose from, `[rows][vocab]`.
    logits: Vec<Vec<f32>>,
}

struct Row {
    index: usize,
    request: Request,
    ids: Vec<u32>,
    sampler: Sampler,
    done: bool,
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Generation({} rows running, position {})", self.rows.len(), self.ctx.position())
    }
}

impl Generation {
    /// A batch of `requests`; nothing is computed yet.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty prompt or an impossible setting, [`NnError::ContextExceeded`] for a prompt that
    /// the model cannot read.
    pub fn new(model: Arc<dyn CausalLm>, requests: Vec<Request>) -> Result<Self> {
        let limit = model.info().context;
        for request in &requests {
            request.sampling.check()?;
            if request.ids.is_empty() {
                return Err(Error::Input("a prompt needs at least one token".into()));
            }
            let vocab = model.info().vocab;
            if let Some(id) = request.ids.iter().find(|&&id| id as usize >= vocab) {
                return Err(Error::Input(format!("token {id} is outside the model's vocabulary of {vocab}")));
            }
            let asked = request.ids.len();
            if let Some(limit) = limit.filter(|&limit| asked > limit && !request.beyond_trained_length) {
                return Err(NnError::ContextExceeded { asked, limit }.into());
            }
        }
        let beyond = requests.iter().any(|r| r.beyond_trained_length);
        let row = |(index, request): (usize, Request)| Row {
            index,
            ids: request.ids.clone(),
            sampler: Sampler::new(request.sampling.clone(), request.seed),
            done: request.max_tokens == 0,
            request,
        };
        let rows: Vec<Row> = requests.into_iter().enumerate().map(row).filter(|row| !row.done).collect();
        let ctx = Context::new().with_cache(Cache::with_type(model.info().cache));
        let ctx = if beyond { ctx.beyond_trained_length() } else { ctx };
        Ok(Self { model, ctx, rows, started: false, logits: Vec::new() })
    }

    /// Begins from a cache that holds the first tokens of the prompt, as many as it is long: those are not read again.
    ///
    /// # Errors
    /// [`Error::Input`] for more than one prompt, or if no token of it would be left to read.
    pub fn with_past(mut self, past: Cache) -> Result<Self> {
        let read = past.len();
        match &self.rows[..] {
            [] => {}
            [row] if read < row.ids.len() => self.ctx = self.ctx.with_cache(past),
            [row] => return Err(Error::Input(format!("a past of {read} for a prompt of {}", row.ids.len()))),
            rows => return Err(Error::Input(format!("a past belongs to one prompt, not to {}", rows.len()))),
        }
        Ok(self)
    }

    /// One token for every row still running; `None` when there is none.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the model overflows, and what it says otherwise. The batch is over then.
    pub fn step(&mut self) -> Result<Option<Vec<Token>>> {
        let tokens = self.advance();
        if tokens.is_err() {
            self.rows.clear();
        }
        tokens
    }

    fn advance(&mut self) -> Result<Option<Vec<Token>>> {
        if self.rows.iter().any(|row| row.done) {
            self.drop_finished()?;
        }
        if self.rows.is_empty() {
            return Ok(None);
        }
        let hidden = if self.started { self.decode()? } else { self.prefill()? };
        self.started = true;
        let logits = self.model.head(&hidden)?.i((.., 0))?.to_vec2::<f32>()?;
        let limit = self.model.info().context;
        let mut tokens = Vec::with_capacity(self.rows.len());
        let summaries = summaries(&*self.model, &logits);
        for ((row, logits), summary) in self.rows.iter_mut().zip(&logits).zip(summaries) {
            if !summary.finite {
                return Err(diagnose(&*self.model, &row.ids));
            }
            let vocab = row.request.vocab.unwrap_or(logits.len()).min(logits.len());
            let prompt_len = row.request.ids.len();
            let id = if row.request.sampling.is_argmax() && summary.argmax < vocab {
                summary.argmax as u32
            } else {
                row.sampler.sample(&mut logits[..vocab].to_vec(), &row.ids, prompt_len)
            };
            row.ids.push(id);
            let full = limit.is_some_and(|limit| row.ids.len() > limit) && !row.request.beyond_trained_length;
            let finish = if row.request.eos.contains(&id) {
                Some(Finish::Eos)
            } else if row.ids.len() - prompt_len >= row.request.max_tokens {
                Some(Finish::Length)
            } else {
                full.then_some(Finish::Context)
            };
            row.done = finish.is_some();
            tokens.push(Token { row: row.index, id, logprob: logprob_of(&summary, logits, id)?.0, finish });
        }
        self.logits = logits;
        Ok(Some(tokens))
    }

    /// Ends a row before its time.
    pub fn stop(&mut self, row: usize) {
        if let Some(row) = self.rows.iter_mut().find(|r| r.index == row) {
            row.done = true;
        }
    }

    /// The logits that the last step chose from, in the order of its tokens.
    pub fn logits(&self) -> &[Vec<f32>] {
        &self.logits
    }

    /// The model's context, to fork it or to record.
    pub fn context(&mut self) -> &mut Context {
        &mut self.ctx
    }

    fn drop_finished(&mut self) -> Result<()> {
        let keep: Vec<u32> = (0u32..).zip(&self.rows).filter(|(_, row)| !row.done).map(|(i, _)| i).collect();
        self.rows.retain(|row| !row.done);
        // The last row needs no copy of a cache that nobody will read.
        if self.started && !keep.is_empty() {
            self.ctx.select_rows(&keep)?;
        }
        Ok(())
    }

    /// Reads the prompts; gives the last position, `[rows, 1, d]`.
    fn prefill(&mut self) -> Result<Tensor> {
        let longest = self.rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        self.ctx.set_padding(self.rows.iter().map(|row| longest - row.ids.len()).collect());
        let padded = |row: &Row| -> Vec<u32> {
            let pad = std::iter::repeat_n(0, longest - row.ids.len());
            pad.chain(row.ids.iter().copied()).collect()
        };
        let ids: Vec<Vec<u32>> = self.rows.iter().map(padded).collect();
        let ids = Tensor::new(ids, &self.model.info().device)?;
        let mut last = None;
        for start in (self.ctx.position()..longest).step_by(PREFILL) {
            let len = PREFILL.min(longest - start);
            let hidden = self.model.hidden(&ids.narrow(1, start, len)?.contiguous()?, &mut self.ctx)?;
            last = Some(hidden.narrow(1, len - 1, 1)?);
        }
        last.ok_or_else(|| Error::Input("a prompt needs at least one token".into()))
    }

    fn decode(&mut self) -> Result<Tensor> {
        let last: Vec<u32> = self.rows.iter().map(|row| row.ids[row.ids.len() - 1]).collect();
        let ids = Tensor::new(last, &self.model.info().device)?.unsqueeze(1)?;
        Ok(self.model.hidden(&ids, &mut self.ctx)?)
    }
}
