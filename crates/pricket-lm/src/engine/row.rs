//! A request in the batch.

use std::collections::VecDeque;

use pricket_nn::{Choice, RowId, State};

use super::queue::Turn;
use super::request::{FinishReason, Request, RequestId, Update};
use crate::{Result, Sampler, TextStream};

/// A request in the batch: its tokens, and how many of them the model has read.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) turn: Turn,
    pub(super) request: Request,
    /// The prompt, then the current continuation to score or the new tokens.
    pub(super) ids: Vec<u32>,
    /// Number of `ids` that the model has read: the positions of the state.
    pub(super) read: usize,
    /// Number of `ids` that are given, not generated.
    given: usize,
    /// Index of the next token to score. Tokens from here to `given` are scored.
    scored: usize,
    /// Index of the current continuation to score.
    branch: usize,
    sampler: Sampler,
    /// Random numbers for the next tokens that were drawn and not used.
    draws: VecDeque<f64>,
    text: Option<TextStream>,
    /// Identifier of the row in the model's own decoder, once the prompt was read.
    pub(super) decoder: Option<RowId>,
    /// Bytes of memory set aside for the state.
    pub(super) reserved: u64,
    /// Lengths at which a pass ends, so that a recurrent state can be marked there.
    pub(super) stops: Vec<usize>,
    /// Whether another request waits for a part of the state.
    pub(super) is_awaited: bool,
    /// State after the prompt, for requests that wait for it, of a row that the model's own decoder continues.
    pub(super) handed: Option<State>,
    /// Position that was marked for the last draft tokens only.
    pub(super) draft_mark: Option<usize>,
    pub(super) finish: Option<Result<FinishReason>>,
}

impl Row {
    pub(super) fn new(turn: Turn, request: Request, reserved: u64) -> Self {
        let mut ids = request.ids.clone();
        let prompt = ids.len();
        ids.extend(request.branches.first().into_iter().flatten());
        let first = if request.branches.is_empty() { ids.len() } else { prompt };
        let text = request.tokenizer.as_ref().map(|tokenizer| TextStream::new(tokenizer, &request.options.stop));
        Self {
            turn,
            read: 0,
            given: ids.len(),
            scored: request.score_from.unwrap_or(first),
            branch: 0,
            sampler: Sampler::new(request.options.sampling.clone(), request.options.seed),
            draws: VecDeque::new(),
            text,
            decoder: None,
            reserved,
            // The continuations after the first begin from the end of the prompt.
            stops: if request.branches.len() > 1 { vec![prompt] } else { Vec::new() },
            is_awaited: false,
            handed: None,
            draft_mark: None,
            finish: None,
            ids,
            request,
        }
    }

    pub(super) fn id(&self) -> RequestId {
        self.turn.request()
    }

    /// Returns the number of new tokens that the row may still get.
    pub(super) fn left(&self) -> usize {
        self.request.options.max_tokens.saturating_sub(self.ids.len() - self.given)
    }

    pub(super) fn generates(&self) -> bool {
        self.request.options.max_tokens > 0
    }

    /// Returns the number of tokens that the model still has to read before the next token is chosen or all scores are
    /// known.
    pub(super) fn unread(&self) -> usize {
        // The last token of a row that only scores is not read.
        (self.ids.len() - usize::from(!self.generates())).saturating_sub(self.read)
    }

    /// Returns whether the prompt has been read, so that each step adds a token.
    pub(super) fn is_decoding(&self) -> bool {
        self.ids.len() > self.given
    }

    /// Returns whether the request still needs its state after the model has read all `ids`.
    pub(super) fn continues(&self) -> bool {
        self.generates() || self.later_branch().is_some() || self.is_awaited
    }

    /// Returns the next continuation of which more than the first token has to be scored.
    fn later_branch(&self) -> Option<usize> {
        let branches = self.request.branches.iter().enumerate().skip(self.branch + 1);
        branches.into_iter().find(|(_, branch)| branch.len() > 1).map(|(i, _)| i)
    }

    /// Returns the tokens to score that the next `len` tokens predict, as index among these tokens, continuation, and
    /// token. The end of the prompt predicts the first token of every continuation.
    pub(super) fn targets(&self, len: usize) -> Vec<(usize, usize, u32)> {
        let (branches, prompt) = (&self.request.branches, self.request.ids.len());
        let mut targets = Vec::new();
        for at in (self.scored.max(self.read + 1)..=self.read + len).take_while(|&at| at <= self.given) {
            let place = at - self.read - 1;
            if at == prompt {
                targets.extend(branches.iter().enumerate().map(|(i, branch)| (place, i, branch[0])));
            } else if at < self.given {
                targets.push((place, self.branch, self.ids[at]));
            }
        }
        targets
    }

    /// Starts after `read` tokens that the state already holds.
    pub(super) fn after(self, read: usize) -> Self {
        Self { read, ..self }
    }

    /// Notes that the model has read the next `len` tokens and that their targets were scored.
    pub(super) fn advance(&mut self, len: usize) {
        self.read += len;
        self.scored = self.scored.max(self.read + 1);
    }

    /// Returns the random numbers for the next `count` tokens.
    pub(super) fn draws(&mut self, count: usize) -> Vec<f64> {
        while self.draws.len() < count {
            self.draws.push_back(self.sampler.draw());
        }
        self.draws.iter().copied().take(count).collect()
    }

    /// Goes on with the next continuation. Returns the number of positions of the state to keep, or `None` if all
    /// continuations were scored.
    pub(super) fn next_branch(&mut self) -> Option<usize> {
        self.branch = self.later_branch()?;
        let prompt = self.request.ids.len();
        self.ids.truncate(prompt);
        self.ids.extend(&self.request.branches[self.branch]);
        (self.given, self.scored) = (self.ids.len(), prompt + 1);
        Some(prompt)
    }

    /// Adds a chosen token. `limit` is the length of the model's context.
    pub(super) fn push(&mut self, choice: Choice, limit: Option<usize>, update: &mut Update) {
        self.draws.pop_front();
        self.ids.push(choice.id);
        update.tokens.push(choice);
        let options = &self.request.options;
        let full = limit.is_some_and(|limit| self.ids.len() > limit) && !options.beyond_trained_length;
        let mut finish = if self.request.ends(choice.id) {
            Some(FinishReason::Eos)
        } else if self.left() == 0 {
            Some(FinishReason::Length)
        } else {
            full.then_some(FinishReason::Context)
        };
        if let Some(text) = &mut self.text {
            update.text.push_str(&text.push(choice.id));
            if text.stopped() {
                finish = Some(FinishReason::Stop);
            }
        }
        if let Some(finish) = finish {
            self.end(finish, update);
        }
    }

    /// Ends the row.
    pub(super) fn end(&mut self, finish: FinishReason, update: &mut Update) {
        let is_cut = matches!(finish, FinishReason::Length | FinishReason::Context);
        if let Some(text) = &mut self.text {
            // The held text may be the start of a stop string, which a reply does not include.
            update.text.push_str(&if is_cut && self.request.is_reply { text.finish_cut() } else { text.finish() });
        }
        self.finish = Some(Ok(finish));
    }
}
