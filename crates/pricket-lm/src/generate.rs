//! A fixed batch of prompts, continued together.

use std::sync::Arc;

use pricket_nn::{CausalLm, Recording, Taps};

use crate::engine::{Engine, EngineOptions, FinishReason, Request, RequestId, SpeculationOptions, Update};
use crate::{Result, Speculation};

/// A token generated for one row.
#[derive(Clone, Debug)]
pub struct Token {
    /// Row of the token: the index of its request.
    pub row: usize,
    /// Id of the token.
    pub id: u32,
    /// Log-probability of the token under the model, before penalties and filters.
    pub logprob: f32,
    /// New text of the row, if its request has a tokenizer.
    pub text: String,
    /// Reason why the row ends with this token; `None` if the row goes on.
    pub finish: Option<FinishReason>,
}

/// A batch of prompts under generation: an [`Engine`] that gets all of its requests at the start.
///
/// Prompts may differ in length; they are packed, without padding. A row that ends leaves the batch. The rows do not
/// affect each other: each prompt gives the same text in a batch as alone.
#[derive(Debug)]
pub struct Generation {
    engine: Engine,
    /// Request of each row.
    requests: Vec<RequestId>,
    /// Logits from which the last tokens were chosen.
    logits: Vec<Vec<f32>>,
}

impl Generation {
    /// Creates a batch of `requests`. Does not run the model.
    ///
    /// # Errors
    /// Returns the errors of [`Engine::submit`].
    pub fn new(model: Arc<dyn CausalLm>, requests: Vec<Request>) -> Result<Self> {
        // No request comes later that could use the state of an ended one.
        let options = EngineOptions { rows: requests.len().max(1), prefix_memory: Some(0), ..EngineOptions::default() };
        Self::in_engine(Engine::new(model, options)?, requests)
    }

    /// Submits `requests` to an engine without requests. Prompts that begin like earlier ones continue from their
    /// states, if the engine keeps them.
    ///
    /// # Errors
    /// Returns the errors of [`Engine::submit`].
    pub fn in_engine(mut engine: Engine, requests: Vec<Request>) -> Result<Self> {
        let requests = requests.into_iter().map(|request| engine.submit(request)).collect::<Result<_>>()?;
        Ok(Self { engine, requests, logits: Vec::new() })
    }

    /// Ends all rows and returns the engine, with the states that it keeps.
    pub fn into_engine(mut self) -> Engine {
        for request in self.requests {
            self.engine.cancel(request);
        }
        self.engine
    }

    /// Speeds the batch up with a draft model; see [`Engine::with_draft`].
    ///
    /// # Errors
    /// Returns the errors of [`Engine::with_draft`].
    pub fn with_draft(self, draft: Arc<dyn CausalLm>, options: SpeculationOptions) -> Result<Self> {
        Ok(Self { engine: self.engine.with_draft(draft, options)?, ..self })
    }

    /// Records or edits activations at `taps` in every pass, including the passes over prompts. The model's own decoder
    /// ([`CausalLm::step_decoder`]) is then not used.
    #[must_use]
    pub fn with_taps(mut self, taps: Taps) -> Self {
        self.engine.set_taps(Some(taps));
        self
    }

    /// Takes the recording of the last pass.
    pub fn take_recording(&mut self) -> Recording {
        self.engine.take_recording()
    }

    /// Runs the model until there is at least one new token. Returns the new tokens, or `None` when all rows have ended.
    /// The rows of long prompts get their first token later than the others. With a draft model, a row may get several
    /// tokens.
    ///
    /// # Errors
    /// Returns [`Error::NonFinite`](crate::Error::NonFinite) if the model computes NaN or infinity, and an error if a
    /// tensor operation fails. After an error, all rows have ended.
    pub fn step(&mut self) -> Result<Option<Vec<Token>>> {
        self.logits.clear();
        let mut tokens = Vec::new();
        while tokens.is_empty() {
            let Some(updates) = self.engine.step()? else { return Ok(None) };
            for update in updates {
                if let Err(error) = self.add(update, &mut tokens) {
                    for request in std::mem::take(&mut self.requests) {
                        self.engine.cancel(request);
                    }
                    while self.engine.step()?.is_some() {}
                    return Err(error);
                }
            }
        }
        Ok(Some(tokens))
    }

    fn add(&mut self, update: Update, tokens: &mut Vec<Token>) -> Result<()> {
        let finish = update.finish.transpose()?;
        // Identifiers count up, so rows are in their order.
        let Ok(row) = self.requests.binary_search(&update.request) else { return Ok(()) };
        let count = update.tokens.len();
        let mut text = Some(update.text);
        for (i, choice) in update.tokens.into_iter().enumerate() {
            let is_last = i + 1 == count;
            tokens.push(Token {
                row,
                id: choice.id,
                logprob: choice.logprob,
                text: if is_last { text.take().unwrap_or_default() } else { String::new() },
                finish: finish.filter(|_| is_last),
            });
        }
        self.logits.extend(update.logits);
        Ok(())
    }

    /// Ends a row early. Has no effect if the row has already ended.
    pub fn stop(&mut self, row: usize) {
        if let Some(&request) = self.requests.get(row) {
            self.engine.cancel(request);
        }
    }

    /// Returns the logits from which the last step chose, in the order of its tokens, for requests that ask for them
    /// ([`Request::logits`]).
    pub fn logits(&self) -> &[Vec<f32>] {
        &self.logits
    }

    /// Returns the size in bytes of the states of all rows that have not ended. States in the model's own decoder do not
    /// count.
    pub fn state_bytes(&self) -> u64 {
        self.engine.state_bytes()
    }

    /// Returns the number of prompt tokens and new tokens that the model has read.
    pub fn tokens_read(&self) -> u64 {
        self.engine.tokens_read()
    }

    /// Returns the measurements of speculative decoding, if there is a draft model.
    pub fn speculation(&self) -> Option<Speculation> {
        self.engine.speculation()
    }
}
