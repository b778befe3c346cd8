//! Batched log-likelihoods of continuations: the sum of `log p(token | preceding tokens)` over the tokens of a
//! continuation.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Tensor;
use pricket_nn::{CausalLm, Context, Error as NnError, NoProgress, Progress, State};

use crate::diagnose::diagnose;
use crate::head::logprobs;
use crate::python::is_space;
use crate::{Error, Result, Tokenizer};

/// Continuation to score, with its context.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Continuation {
    /// Tokens of the context, at least one.
    pub context: Vec<u32>,
    /// Tokens to score.
    pub ids: Vec<u32>,
}

impl Continuation {
    /// Encodes `context` and `continuation` by the rules of lm-evaluation-harness.
    ///
    /// Spaces at the end of the context move to the continuation. The concatenation of the two texts is encoded. If the
    /// context alone has `n` tokens, the continuation is all tokens after the first `n`. An empty context becomes the
    /// token `prefix`.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if no token is left for the continuation. Returns an error if the tokenizer fails.
    pub fn encode(tokenizer: &Tokenizer, prefix: u32, context: &str, continuation: &str) -> Result<Self> {
        let kept = context.trim_end_matches(is_space);
        let whole = format!("{context}{continuation}");
        let (context, ids) = if kept.is_empty() {
            let all = tokenizer.encode(&whole)?;
            // The text may already begin with the prefix token.
            match all.split_first() {
                Some((&first, rest)) if first == prefix => (vec![prefix], rest.to_vec()),
                _ => (vec![prefix], all),
            }
        } else {
            let (context, all) = (tokenizer.encode_from_start(kept)?, tokenizer.encode_from_start(&whole)?);
            let ids = all.get(context.len()..).unwrap_or_default().to_vec();
            (context, ids)
        };
        if ids.is_empty() {
            let end = continuation.chars().take(40).collect::<String>();
            return Err(Error::Input(format!("no token is left for the continuation {end:?} after the context")));
        }
        Ok(Self { context, ids })
    }

    /// Splits a text of any length into windows that together score every token once. The model reads at most
    /// `max_length` tokens (at least 1) of each window.
    ///
    /// The first window begins with `prefix` and scores `max_length` tokens. Each later window scores the next `stride`
    /// tokens (1 to `max_length`), with as many preceding tokens as fit. With a stride of `max_length`, a full window
    /// overlaps the preceding window by one token. The last window is filled up with preceding tokens.
    pub fn windows(ids: &[u32], prefix: u32, max_length: usize, stride: usize) -> Vec<Self> {
        let max_length = max_length.max(1);
        let (mut windows, mut done) = (Vec::new(), 0);
        while done < ids.len() {
            let step = if done == 0 { max_length } else { stride.clamp(1, max_length) };
            let end = (done + step).min(ids.len());
            let context = if done == 0 { vec![prefix] } else { ids[end.saturating_sub(max_length + 1)..done].to_vec() };
            windows.push(Self { context, ids: ids[done..end].to_vec() });
            done = end;
        }
        windows
    }
}

/// Log-likelihood of a continuation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loglikelihood {
    /// Sum of the log-probabilities of the tokens, in nats.
    pub sum: f64,
    /// Whether each token was the most likely one, so that greedy decoding would produce the continuation.
    pub is_greedy: bool,
    /// Number of scored tokens.
    pub tokens: usize,
    /// Number of context tokens that were truncated on the left to fit the maximum length.
    pub cut: usize,
}

/// Options for scoring continuations.
#[derive(Clone)]
pub struct ScoreOptions {
    /// Maximum number of tokens that the model reads in one request, at least 1. Longer contexts are truncated on the
    /// left. Defaults to the context length of the model, or 2,048 for a model without a limit.
    pub max_length: Option<usize>,
    /// Number of tokens that each window of a long text scores, from 1 to `max_length`. A smaller stride gives each
    /// token more context and takes more time. Defaults to `max_length`, the smallest possible overlap.
    pub stride: Option<usize>,
    /// Whether `max_length` may exceed the length that the model was trained for. Defaults to false.
    pub beyond_trained_length: bool,
    /// Maximum number of tokens in a batch, at least 1. Defaults to 1,024 on the CPU and 16,384 on other devices.
    pub batch_tokens: Option<usize>,
    /// Receives the progress, in tokens.
    pub progress: Arc<dyn Progress>,
}

impl Default for ScoreOptions {
    fn default() -> Self {
        let progress = Arc::new(NoProgress);
        Self { max_length: None, stride: None, beyond_trained_length: false, batch_tokens: None, progress }
    }
}

impl std::fmt::Debug for ScoreOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScoreOptions")
            .field("max_length", &self.max_length)
            .field("stride", &self.stride)
            .field("beyond_trained_length", &self.beyond_trained_length)
            .field("batch_tokens", &self.batch_tokens)
            .finish_non_exhaustive()
    }
}

impl ScoreOptions {
    /// Returns the maximum number of tokens that `model` reads in one request under these options.
    pub fn max_length(&self, model: &dyn CausalLm) -> usize {
        self.max_length.or(model.info().context).unwrap_or(2048)
    }

    /// Checks these options for a model.
    ///
    /// # Errors
    /// Returns [`Error::Input`], naming the option and its range, if an option is out of range. Returns
    /// [`NnError::ContextExceeded`] if `max_length` exceeds the length that the model was trained for.
    pub fn check(&self, model: &dyn CausalLm) -> Result<()> {
        let room = self.max_length(model);
        for (name, value, most) in [
            ("max_length", self.max_length, usize::MAX),
            ("stride", self.stride, room),
            ("batch_tokens", self.batch_tokens, usize::MAX),
        ] {
            if let Some(value) = value.filter(|value| !(1..=most).contains(value)) {
                let range = if most == usize::MAX { "at least 1".into() } else { format!("1 to {most}") };
                return Err(Error::Input(format!("{name}: expected {range}, found {value}")));
            }
        }
        match model.info().context.filter(|&limit| room > limit && !self.beyond_trained_length) {
            Some(limit) => Err(NnError::ContextExceeded { asked: room, limit }.into()),
            None => Ok(()),
        }
    }

    /// Splits a text into the windows over which it is scored.
    pub(crate) fn windows(&self, model: &dyn CausalLm, ids: &[u32], prefix: u32) -> Result<Vec<Continuation>> {
        self.check(model)?;
        let room = self.max_length(model);
        Ok(Continuation::windows(ids, prefix, room, self.stride.unwrap_or(room)))
    }
}

/// Returns the log-likelihoods of `requests`, in the same order.
///
/// Requests are sorted by length, longest first, and packed into passes of at most [`ScoreOptions::batch_tokens`]
/// tokens. A context shared by several requests is read once. The head is applied only to the scored positions, a block
/// at a time.
///
/// # Errors
/// Returns the errors of [`ScoreOptions::check`]. Returns [`Error::Input`] if a token is outside the vocabulary, if a
/// context or continuation is empty, or if a continuation is longer than the maximum length. Returns
/// [`Error::NonFinite`] if the logits are not finite, [`NnError::Cancelled`] if the progress was canceled, or the error
/// of the model.
pub fn loglikelihoods(
    model: &dyn CausalLm,
    requests: &[Continuation],
    options: &ScoreOptions,
) -> Result<Vec<Loglikelihood>> {
    options.check(model)?;
    let room = options.max_length(model);
    let limit = options.batch_tokens.unwrap_or(if model.info().device.is_cpu() { 1024 } else { 16_384 });
    let mut results = vec![Loglikelihood { sum: 0.0, is_greedy: true, tokens: 0, cut: 0 }; requests.len()];
    let mut rows: Vec<Row<'_>> = Vec::new();
    let mut by_context: HashMap<&[u32], usize> = HashMap::new();
    for (i, request) in requests.iter().enumerate() {
        let Continuation { context, ids } = request;
        let vocab = model.info().vocab;
        if let Some(id) = context.iter().chain(ids).find(|&&id| id as usize >= vocab) {
            return Err(Error::Input(format!("token {id} is outside the model's vocabulary of {vocab} tokens")));
        }
        if ids.is_empty() || context.is_empty() || ids.len() > room {
            let (given, scored) = (context.len(), ids.len());
            let what = format!(
                "{scored} tokens after {given} cannot be scored; expected at least 1 of each and at most {room} scored"
            );
            return Err(Error::Input(what));
        }
        let cut = (context.len() + ids.len()).saturating_sub(room + 1);
        results[i].tokens = ids.len();
        results[i].cut = cut;
        let context = &context[cut..];
        let row = *by_context.entry(context).or_insert_with(|| {
            rows.push(Row { context, choices: Vec::new() });
            rows.len() - 1
        });
        rows[row].choices.push((i, ids));
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row.len()));
    let total: usize = rows.iter().map(Row::work).sum();
    let scoring = Scoring { model, requests, progress: &*options.progress };
    scoring.progress.begin("scoring", total as u64, "tokens");
    let outcome = scoring.run(&rows, limit, &mut results);
    scoring.progress.end();
    outcome.map(|()| results)
}

/// Context with its continuations.
struct Row<'a> {
    context: &'a [u32],
    choices: Vec<(usize, &'a [u32])>,
}

impl<'a> Row<'a> {
    /// Returns the tokens of a continuation that the model reads: all but the last one, which is only scored.
    fn read(&self, choice: usize) -> &'a [u32] {
        self.choices.get(choice).map_or(&[][..], |(_, ids)| &ids[..ids.len() - 1])
    }

    fn is_shared(&self) -> bool {
        self.choices.len() > 1
    }

    fn longest(&self) -> usize {
        self.choices.iter().map(|(_, ids)| ids.len()).max().unwrap_or(1)
    }

    /// Returns the number of tokens that the first pass reads for this row.
    fn len(&self) -> usize {
        if self.is_shared() { self.context.len() } else { self.context.len() + self.longest() - 1 }
    }

    /// Returns the total number of tokens that the model reads for this row.
    fn work(&self) -> usize {
        self.context.len() + self.choices.iter().map(|(_, ids)| ids.len() - 1).sum::<usize>()
    }
}

/// Continuation with computed hidden states: index of the request, tokens, and the hidden states that predict the
/// tokens, `[ids, d]`.
type Place<'a> = (usize, &'a [u32], Tensor);

struct Scoring<'a> {
    model: &'a dyn CausalLm,
    requests: &'a [Continuation],
    progress: &'a dyn Progress,
}

impl Scoring<'_> {
    fn run(&self, rows: &[Row<'_>], limit: usize, results: &mut [Loglikelihood]) -> Result<()> {
        let (shared, alone): (Vec<&Row<'_>>, Vec<&Row<'_>>) = rows.iter().partition(|row| row.is_shared());
        let mut done = 0;
        for (rows, is_shared) in [(shared, true), (alone, false)] {
            let mut left = &rows[..];
            while !left.is_empty() {
                if self.progress.cancelled() {
                    return Err(NnError::Cancelled.into());
                }
                let lens = left.iter().scan(0, |total, row| {
                    *total += row.len();
                    Some(*total)
                });
                let count = lens.take_while(|&total| total <= limit).count().max(1);
                let (batch, rest) = left.split_at(count);
                if is_shared {
                    self.shared(batch, results)?;
                } else {
                    self.alone(batch, results)?;
                }
                done += batch.iter().map(|row| row.work()).sum::<usize>();
                self.progress.update(done as u64);
                left = rest;
            }
        }
        Ok(())
    }

    /// Reads tokens of several rows in one packed pass. Returns the hidden states of all positions, row after row.
    fn read(&self, rows: &[(usize, Vec<u32>)], ctx: &mut Context) -> Result<Tensor> {
        let lens: Vec<(usize, usize)> = rows.iter().map(|(row, ids)| (*row, ids.len())).collect();
        let ids: Vec<u32> = rows.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
        ctx.pack_rows(&lens);
        let input = Tensor::new(ids, &self.model.info().device)?.unsqueeze(0)?;
        Ok(self.model.hidden(&input, ctx)?.squeeze(0)?)
    }

    /// Scores contexts with one continuation each, in one pass.
    fn alone(&self, rows: &[&Row<'_>], results: &mut [Loglikelihood]) -> Result<()> {
        let ids = rows.iter().enumerate().map(|(i, row)| (i, [row.context, row.read(0)].concat()));
        let hidden = self.read(&ids.collect::<Vec<_>>(), &mut roomy())?;
        let (mut places, mut at) = (Vec::with_capacity(rows.len()), 0);
        for row in rows {
            let (request, ids) = row.choices[0];
            places.push((request, ids, hidden.narrow(0, at + row.context.len() - 1, ids.len())?));
            at += row.len();
        }
        self.score(&places, results)
    }

    /// Scores contexts with several continuations. Reads the contexts once. Then reads the first continuation of each
    /// from the state of its context, rewinds, reads the second, and so on.
    fn shared(&self, rows: &[&Row<'_>], results: &mut [Loglikelihood]) -> Result<()> {
        let mut ctx = roomy().with_state(State::with_type(self.model.info().cache));
        let contexts: Vec<_> = rows.iter().enumerate().map(|(i, row)| (i, row.context.to_vec())).collect();
        let hidden = self.read(&contexts, &mut ctx)?;
        let last = ctx.last_positions(&hidden.unsqueeze(0)?)?;
        if let Some(state) = ctx.state_mut() {
            (0..rows.len()).for_each(|row| state.mark(row));
        }
        for choice in 0..rows.iter().map(|row| row.choices.len()).max().unwrap_or(0) {
            let read: Vec<(usize, Vec<u32>)> = (0..).zip(rows).map(|(i, row)| (i, row.read(choice).to_vec())).collect();
            let read: Vec<(usize, Vec<u32>)> = read.into_iter().filter(|(_, ids)| !ids.is_empty()).collect();
            let more = if read.is_empty() { None } else { Some(self.read(&read, &mut ctx)?) };
            let (mut places, mut at) = (Vec::with_capacity(rows.len()), 0);
            for (i, row) in rows.iter().enumerate() {
                let Some(&(request, ids)) = row.choices.get(choice) else { continue };
                let first = last.narrow(0, i, 1)?;
                let states = match &more {
                    Some(more) if ids.len() > 1 => {
                        at += ids.len() - 1;
                        Tensor::cat(&[&first, &more.narrow(0, at + 1 - ids.len(), ids.len() - 1)?], 0)?
                    }
                    _ => first,
                };
                places.push((request, ids, states));
            }
            self.score(&places, results)?;
            for (i, row) in rows.iter().enumerate() {
                let kept = ctx.state_mut().map_or(0, |state| state.rewind(i, row.context.len()));
                // Read positions again that the state lost in the rewind.
                if kept < row.context.len() {
                    self.read(&[(i, row.context[kept..].to_vec())], &mut ctx)?;
                }
            }
        }
        Ok(())
    }

    /// Adds the log-probabilities of the tokens to the results of their requests.
    fn score(&self, places: &[Place<'_>], results: &mut [Loglikelihood]) -> Result<()> {
        let states: Vec<&Tensor> = places.iter().map(|(_, _, states)| states).collect();
        let targets: Vec<u32> = places.iter().flat_map(|(_, ids, _)| ids.iter().copied()).collect();
        let owners = places.iter().flat_map(|(request, ids, _)| std::iter::repeat_n(*request, ids.len()));
        let scored = logprobs(self.model, &Tensor::cat(&states, 0)?, &targets)?;
        for ((request, &id), (summary, logprob)) in owners.zip(&targets).zip(scored) {
            if !summary.finite {
                let Continuation { context, ids } = &self.requests[request];
                return Err(diagnose(self.model, &[&context[..], ids].concat()));
            }
            results[request].sum += logprob;
            results[request].is_greedy &= summary.argmax == id as usize;
        }
        Ok(())
    }
}

/// Creates a [`Context`] without a length limit. [`ScoreOptions::check`] has already checked the length.
pub(crate) fn roomy() -> Context {
    Context::new().beyond_trained_length()
}
