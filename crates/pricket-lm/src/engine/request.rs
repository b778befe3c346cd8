//! Requests to an engine, and what it reports about them.

use pricket_nn::{CausalLm, Choice, Error as NnError, SamplingParams};

use crate::{Error, Result, Tokenizer};

/// Options for continuing a prompt.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Maximum number of new tokens; 128 by default.
    pub max_tokens: usize,
    /// Sampling parameters; greedy by default, as in [`SamplingParams::default`].
    pub sampling: SamplingParams,
    /// Random seed; 0 by default. All rows of a batch use it, so that a prompt gives the same text in a batch as alone.
    pub seed: u64,
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

/// Identifier of a request to an engine. Later requests have larger numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One of the models of an engine. The default is the model that the engine was created with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(pub(crate) usize);

/// A prompt and what to do with it: continue it, score its tokens, score continuations of it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub ids: Vec<u32>,
    /// Options for the continuation. A `max_tokens` of 0 asks for scores only.
    pub options: GenerateOptions,
    /// Ids of the model's end tokens. The end token that ends a row is the last token of the row.
    pub eos: Vec<u32>,
    /// Number of ids that may be chosen. Larger ids are padding of the model's vocabulary beyond its tokenizer. `None`
    /// for no limit.
    pub vocab: Option<usize>,
    /// Tokenizer that decodes the new tokens to text. Stop strings need one.
    pub tokenizer: Option<Tokenizer>,
    /// Whether the text is a reply in a prompt format. If the length limit cuts off a reply, its text does not include
    /// the beginning of a stop string at its end.
    pub is_reply: bool,
    /// Index of the first prompt token to score, at least 1. All later prompt tokens are scored too. `None` scores none.
    pub score_from: Option<usize>,
    /// Continuations to score, each directly after the prompt. The prompt is read once for all of them. Requires a
    /// `max_tokens` of 0.
    pub branches: Vec<Vec<u32>>,
    /// Whether updates contain the logits from which each token was chosen. Rows in the model's own decoder
    /// ([`CausalLm::step_decoder`]) have none.
    pub logits: bool,
    /// Priority; 0 by default. A request goes before those that arrived earlier, up to 32 of them for each priority
    /// level that it is higher. So requests with a low priority wait, but not forever.
    pub priority: i32,
    /// The model that reads the prompt.
    pub model: ModelId,
}

impl Request {
    /// Creates a request to continue `ids`, without end tokens or a vocabulary limit.
    pub fn new(ids: Vec<u32>, options: GenerateOptions) -> Self {
        Self {
            ids,
            options,
            eos: Vec::new(),
            vocab: None,
            tokenizer: None,
            is_reply: false,
            score_from: None,
            branches: Vec::new(),
            logits: false,
            priority: 0,
            model: ModelId::default(),
        }
    }

    /// Creates a request for the log-probabilities of `ids[from..]`, each given the tokens before it.
    pub fn score(ids: Vec<u32>, from: usize) -> Self {
        let options = GenerateOptions { max_tokens: 0, ..GenerateOptions::default() };
        Self { score_from: Some(from), ..Self::new(ids, options) }
    }

    /// Creates a request for the log-probabilities of the tokens of each continuation after `ids`.
    pub fn score_branches(ids: Vec<u32>, branches: Vec<Vec<u32>>) -> Self {
        let options = GenerateOptions { max_tokens: 0, ..GenerateOptions::default() };
        Self { branches, ..Self::new(ids, options) }
    }

    /// Returns whether the token `id` ends the row.
    pub(crate) fn ends(&self, id: u32) -> bool {
        (self.options.stop_at_eos && self.eos.contains(&id)) || self.options.stop_ids.contains(&id)
    }

    /// Returns the maximum number of positions that the model reads for the request.
    pub(crate) fn positions(&self, context: Option<usize>) -> usize {
        let written = self.ids.len().saturating_add(self.options.max_tokens.saturating_sub(1));
        let longest = written.max(self.longest_reading());
        let limit = context.filter(|_| !self.options.beyond_trained_length);
        limit.map_or(longest, |limit| longest.min(limit))
    }

    /// Returns the number of positions of the prompt and its longest continuation to score.
    pub(crate) fn longest_reading(&self) -> usize {
        self.ids.len() + self.branches.iter().map(|branch| branch.len() - 1).max().unwrap_or(0)
    }

    /// Returns whether there is nothing to score and nothing to continue.
    pub(crate) fn has_no_work(&self) -> bool {
        let scores = self.score_from.is_some_and(|from| from < self.ids.len()) || !self.branches.is_empty();
        self.options.max_tokens == 0 && !scores
    }

    /// Checks the request.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the request is impossible, or [`NnError::ContextExceeded`] if the prompt is longer
    /// than the model's context.
    pub(crate) fn check(&self, model: &dyn CausalLm) -> Result<()> {
        let Self { ids, options, branches, score_from, .. } = self;
        options.sampling.check()?;
        if ids.is_empty() {
            return Err(Error::Input("the prompt is empty; it needs at least one token".into()));
        }
        let vocab = model.info().vocab;
        if let Some(id) = ids.iter().chain(branches.iter().flatten()).find(|&&id| id as usize >= vocab) {
            return Err(Error::Input(format!("token {id} is outside the model's vocabulary of {vocab}")));
        }
        if branches.iter().any(Vec::is_empty) {
            return Err(Error::Input("a continuation to score is empty; it needs at least one token".into()));
        }
        if !branches.is_empty() && options.max_tokens > 0 {
            let what = "a prompt with continuations to score cannot be continued as well; set max_tokens to 0";
            return Err(Error::Input(what.into()));
        }
        if score_from.is_some_and(|from| from == 0 || from > ids.len()) {
            let what = format!("score_from: expected 1 to {}, found {}", ids.len(), score_from.unwrap_or(0));
            return Err(Error::Input(what));
        }
        if self.tokenizer.is_none() && options.stop.iter().any(|stop| !stop.is_empty()) {
            return Err(Error::Input("stop strings need a tokenizer, and the request has none".into()));
        }
        let asked = self.longest_reading();
        match model.info().context.filter(|&limit| asked > limit && !options.beyond_trained_length) {
            Some(limit) => Err(NnError::ContextExceeded { asked, limit }.into()),
            None => Ok(()),
        }
    }
}

/// Score of a token of a prompt or of a continuation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Index of the continuation; 0 for tokens of the prompt.
    pub branch: usize,
    /// Natural logarithm of the token's probability given the preceding tokens.
    pub logprob: f64,
    /// Whether greedy decoding would choose the token.
    pub is_greedy: bool,
    /// Whether no other token is more likely. Of tied tokens, greedy decoding chooses only one.
    pub is_likeliest: bool,
}

/// News about a request after a step.
#[derive(Debug)]
pub struct Update {
    /// The request.
    pub request: RequestId,
    /// Scores of the next tokens, in order.
    pub scores: Vec<Score>,
    /// New tokens, in order.
    pub tokens: Vec<Choice>,
    /// Logits from which each of `tokens` was chosen, if the request asks for them.
    pub logits: Vec<Vec<f32>>,
    /// Text that can be emitted now. Empty without a tokenizer. An end of text that may become a stop string or a
    /// character is held back.
    pub text: String,
    /// Reason why the request ended, or the error that ended it; `None` if it goes on.
    pub finish: Option<Result<FinishReason>>,
}

impl Update {
    pub(crate) fn new(request: RequestId) -> Self {
        Self { request, scores: Vec::new(), tokens: Vec::new(), logits: Vec::new(), text: String::new(), finish: None }
    }
}
