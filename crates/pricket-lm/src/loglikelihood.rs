//! Batched log-likelihoods of continuations: the sum of `log p(token | preceding tokens)` over the tokens of a
//! continuation.

use std::collections::HashMap;
use std::sync::Arc;

use pricket_nn::{CausalLm, Context, Error as NnError, NoProgress, Progress};

use crate::engine::{EngineOptions, Request, Scheduler, Score};
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
/// tokens. A context shared by several requests is read once, as is the common beginning of contexts. The head is
/// applied only to the scored positions, a block at a time.
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
    let mut results = vec![Loglikelihood { sum: 0.0, is_greedy: true, tokens: 0, cut: 0 }; requests.len()];
    // The contexts, each with the indices of its requests.
    let mut contexts: Vec<(&[u32], Vec<usize>)> = Vec::new();
    let mut by_context: HashMap<&[u32], usize> = HashMap::new();
    for (i, Continuation { context, ids }) in requests.iter().enumerate() {
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
        let known = *by_context.entry(context).or_insert_with(|| {
            contexts.push((context, Vec::new()));
            contexts.len() - 1
        });
        contexts[known].1.push(i);
    }
    let longest = |(context, of): &(&[u32], Vec<usize>)| {
        context.len() + of.iter().map(|&i| requests[i].ids.len()).max().unwrap_or(0)
    };
    contexts.sort_by_key(|context| std::cmp::Reverse(longest(context)));
    let vocab = model.info().vocab;
    for Continuation { context, ids } in requests {
        if let Some(id) = context.iter().chain(ids).find(|&&id| id as usize >= vocab) {
            return Err(Error::Input(format!("token {id} is outside the model's vocabulary of {vocab}")));
        }
    }
    let jobs = contexts.iter().map(|(context, of)| {
        let branches = of.iter().map(|&i| requests[i].ids.clone()).collect();
        Request::score_branches(context.to_vec(), branches)
    });
    let read = |of: &[usize]| of.iter().map(|&i| requests[i].ids.len() - 1).sum::<usize>();
    let total = contexts.iter().map(|(context, of)| context.len() + read(of)).sum();
    score(model, jobs, total, options, |job, score| {
        let result = &mut results[contexts[job].1[score.branch]];
        result.sum += score.logprob;
        result.is_greedy &= score.is_greedy;
    })?;
    Ok(results)
}

/// Runs requests that only score and read `total` tokens, and calls `each` with the index of a request and a score.
pub(crate) fn score(
    model: &dyn CausalLm,
    requests: impl Iterator<Item = Request>,
    total: usize,
    options: &ScoreOptions,
    mut each: impl FnMut(usize, Score),
) -> Result<()> {
    let batch = options.batch_tokens.unwrap_or(if model.info().device.is_cpu() { 1024 } else { 16_384 });
    let engine = EngineOptions { rows: batch, step_tokens: Some(batch), ..EngineOptions::default() };
    let mut scheduler = Scheduler::new(model, &engine)?.with_whole_prompts();
    let mut requests = requests.fuse();
    options.progress.begin("scoring", total as u64, "tokens");
    let mut run = || -> Result<()> {
        loop {
            if options.progress.cancelled() {
                return Err(NnError::Cancelled.into());
            }
            // Few requests wait at a time, to bound the memory.
            while scheduler.waiting() < batch
                && let Some(mut request) = requests.next()
            {
                request.options.beyond_trained_length = true;
                scheduler.submit(&[model], request)?;
            }
            let Some(updates) = scheduler.step(&[model], None)? else { return Ok(()) };
            for update in updates {
                update.finish.transpose()?;
                // Requests are numbered in the order in which they were submitted.
                update.scores.into_iter().for_each(|score| each(update.request.0 as usize, score));
            }
            let read = scheduler.read();
            options.progress.update((read.all + read.shared).min(total as u64));
        }
    };
    let outcome = run();
    options.progress.end();
    outcome
}

/// Creates a [`Context`] without a length limit. [`ScoreOptions::check`] has already checked the length.
pub(crate) fn roomy() -> Context {
    Context::new().beyond_trained_length()
}
