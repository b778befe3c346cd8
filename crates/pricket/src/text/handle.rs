//! [`Pricket`], the handle of a loaded model: generation and scoring of text.

use std::sync::Arc;

use pricket_hub::InUse;
use pricket_lm::{
    Comparison, Continuation, Engine, EngineOptions, EvalOptions, FinishReason, GenerateOptions, Generation,
    Loglikelihood, Outcome, PromptFormat, Request, ScoreOptions, ScoredToken, Speculation, SpeculationOptions, Task,
    Tokenizer, Update, evaluate, loglikelihoods, token_logprobs,
};
use pricket_nn::{CausalLm, ModelInfo, Parameter};
use serde_json::Value;

use crate::loading::provenance::Provenance;
use crate::{Error, Result};

/// A loaded model that generates and scores text. Owned, cheap to clone, and safe to share between threads.
#[derive(Clone)]
pub struct Pricket {
    parts: Arc<Parts>,
}

#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) model: Arc<dyn CausalLm>,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) config: Value,
    pub(crate) threads: usize,
    pub(crate) eos: Vec<u32>,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) warnings: Vec<String>,
    pub(crate) notes: Vec<String>,
    pub(crate) in_model_order: bool,
    pub(crate) format: PromptFormat,
    pub(crate) provenance: Provenance,
    /// Guard that protects cached files from eviction while the model is loaded.
    pub(crate) _in_use: Option<Arc<InUse>>,
    /// Canonical names of the tensors and their names on file, for files in the Hub's layout.
    #[cfg_attr(not(feature = "train"), allow(dead_code, reason = "adapters read it"))]
    pub(crate) names_on_file: Vec<(String, String)>,
}

impl std::fmt::Debug for Pricket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let info = self.info();
        write!(f, "Pricket({}, {} layers of {}, {} weights)", info.family, info.layers, info.d_model, info.parameters)
    }
}

/// Continuation of a prompt.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Generated text, without prompt, stop string and special tokens.
    pub text: String,
    /// Generated tokens, including the end token.
    pub ids: Vec<u32>,
    /// Log-probability of each generated token, in nats.
    pub logprobs: Vec<f32>,
    /// Tokens of the prompt.
    pub prompt_ids: Vec<u32>,
    /// Reason for the end of the text.
    pub finish: FinishReason,
}

impl Pricket {
    pub(crate) fn new(parts: Parts) -> Self {
        Self { parts: Arc::new(parts) }
    }

    /// Returns the description of the model.
    pub fn info(&self) -> &ModelInfo {
        self.parts.model.info()
    }

    /// Returns the underlying model, which works on token ids and tensors.
    pub fn model(&self) -> Arc<dyn CausalLm> {
        Arc::clone(&self.parts.model)
    }

    /// Returns the configuration (config.json) of the model.
    pub fn config(&self) -> &Value {
        &self.parts.config
    }

    /// Returns the number of CPU threads.
    pub fn threads(&self) -> usize {
        self.parts.threads
    }

    /// Returns the ids of the end tokens.
    pub fn eos_ids(&self) -> &[u32] {
        &self.parts.eos
    }

    /// Returns the trainable variables, if the model was loaded with [`crate::Loader::train`].
    pub fn parameters(&self) -> &[Parameter] {
        &self.parts.parameters
    }

    /// Returns the origin of the model: repository, revision, commit, file hashes, license.
    pub fn provenance(&self) -> &Provenance {
        &self.parts.provenance
    }

    /// Returns warnings about the checkpoint.
    pub fn warnings(&self) -> &[String] {
        &self.parts.warnings
    }

    /// Returns notes on choices made while loading that settings can change, such as the prompt format or the tokenizer
    /// of another repository.
    pub fn notes(&self) -> &[String] {
        &self.parts.notes
    }

    #[cfg(feature = "train")]
    pub(crate) fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Returns whether the rows of fused matrices were in the model's order on file.
    pub(crate) fn in_model_order(&self) -> bool {
        self.parts.in_model_order
    }

    /// Returns the prompt format of conversations. It is chosen by the model card, the configuration, or the tokens of
    /// the tokenizer; `plain` if none of them names a format.
    pub fn prompt_format(&self) -> &PromptFormat {
        &self.parts.format
    }

    /// Returns the tokenizer.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the checkpoint has no tokenizer.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || {
            let named = self.parts.config["tokenizer_name"].as_str();
            let of = named.map_or(String::new(), |name| format!(" of {}", pricket_weights::clip(name)));
            let what = format!("the checkpoint has no tokenizer; text requires the tokenizer{of} (--tokenizer)");
            Error::Tokenizer { origin: "tokenizer.json".into(), what }
        };
        self.parts.tokenizer.as_ref().ok_or_else(missing)
    }

    /// Encodes text as token ids. If the tokenizer's configuration names a begin token, it comes first.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if there is no tokenizer or it cannot encode the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer()?.encode_from_start(text)?)
    }

    /// Decodes token ids as text, including special tokens.
    ///
    /// # Errors
    /// Returns the errors of [`Pricket::tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(self.tokenizer()?.decode(ids))
    }

    /// Continues `prompt`.
    ///
    /// # Errors
    /// Returns [`Error::ContextExceeded`] if the prompt is longer than the model's context, and [`Error::NonFinite`] if
    /// the model overflows.
    pub fn generate(&self, prompt: &str, options: &GenerateOptions) -> Result<Completion> {
        let mut stream = self.stream(prompt, options)?;
        while stream.advance()?.is_some() {}
        Ok(stream.into_completion())
    }

    /// Continues several prompts at once. Each prompt gives the same text as alone.
    ///
    /// # Errors
    /// Returns the errors of [`Pricket::generate`].
    pub fn generate_batch(&self, prompts: &[&str], options: &GenerateOptions) -> Result<Vec<Completion>> {
        let ids = prompts.iter().map(|prompt| self.encode_prompt(prompt)).collect::<Result<Vec<_>>>()?;
        self.complete(ids.into_iter().map(|ids| (ids, options.seed)), options)
    }

    /// Samples `count` continuations of `prompt` at once. The prompt is read once. Continuation `i` has the seed
    /// `options.seed + i` and is the text that this seed gives alone.
    ///
    /// ```
    /// use pricket::{GenerateOptions, SamplingParams};
    /// let options = GenerateOptions { max_tokens: 8, sampling: SamplingParams::unchanged(), ..Default::default() };
    /// let samples = pricket::tiny()?.samples("The people", 3, &options)?;
    /// assert_eq!(samples.len(), 3);
    /// # Ok::<(), pricket::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns the errors of [`Pricket::generate`].
    pub fn samples(&self, prompt: &str, count: usize, options: &GenerateOptions) -> Result<Vec<Completion>> {
        let ids = self.encode_prompt(prompt)?;
        let seeds = (0..count as u64).map(|i| options.seed.wrapping_add(i));
        self.complete(seeds.map(|seed| (ids.clone(), seed)), options)
    }

    /// Continues prompts, each with a random seed.
    fn complete(
        &self,
        prompts: impl Iterator<Item = (Vec<u32>, u64)>,
        options: &GenerateOptions,
    ) -> Result<Vec<Completion>> {
        self.tokenizer()?;
        let mut engine = self.engine(EngineOptions::default())?;
        let mut rows = Vec::new();
        for (ids, seed) in prompts {
            rows.push(Completion::new(&ids, options));
            engine.submit(self.request(ids, &GenerateOptions { seed, ..options.clone() }))?;
        }
        while let Some(updates) = engine.step()? {
            for update in updates {
                rows[update.request.0 as usize].add(update)?;
            }
        }
        Ok(rows)
    }

    /// Continues `prompt` and streams the text as it is generated. Nothing is computed before the first call of `next`.
    ///
    /// # Errors
    /// Returns the errors of [`Pricket::generate`].
    pub fn stream(&self, prompt: &str, options: &GenerateOptions) -> Result<Stream> {
        let request = self.request(self.encode_prompt(prompt)?, options);
        // No other request can use a kept state.
        let engine = self.engine(EngineOptions { prefix_memory: Some(0), ..EngineOptions::default() })?;
        Stream::new(self, engine, request)
    }

    /// Returns the log-probability of each token of `text` except the first, given the tokens before it.
    ///
    /// # Errors
    /// Returns [`Error::Empty`] if the text has fewer than two tokens, and [`Error::ContextExceeded`] if it is longer
    /// than the model's context.
    pub fn logprobs(&self, text: &str) -> Result<Vec<ScoredToken>> {
        let ids = self.encode(text)?;
        if ids.len() < 2 {
            let what = "the text has fewer than two tokens, and the first token has no log-probability";
            return Err(Error::Empty(what));
        }
        self.with_text(token_logprobs(&*self.parts.model, &ids)?)
    }

    /// Compares `other` with this model over a text: perplexities, Kullback-Leibler divergence, agreement of the most
    /// probable tokens. Both models must share a tokenizer. Usually `other` is a quantized copy of this model.
    ///
    /// # Errors
    /// Returns the errors of [`compare`](pricket_lm::compare).
    pub fn compare(&self, other: &Self, text: &str, options: &ScoreOptions) -> Result<Comparison> {
        let ids = self.tokenizer()?.encode(text)?;
        Ok(pricket_lm::compare(&*self.model(), &*other.model(), &ids, self.prefix_id(), options)?)
    }

    /// Returns the log-probability of every token of a text of any length. The first token is scored after
    /// [`Pricket::prefix_id`], the others after the tokens before them.
    ///
    /// A text longer than the model's context is scored in windows, each token once
    /// ([`Continuation::windows`](pricket_lm::Continuation::windows)). `exp` of the negative mean is the perplexity of
    /// the text, as tasks, slices and sweeps compute it.
    ///
    /// ```
    /// let tiny = pricket::tiny()?;
    /// let scored = tiny.score("The people of the United States", &pricket::ScoreOptions::default())?;
    /// let loss = -scored.iter().map(|token| f64::from(token.logprob)).sum::<f64>() / scored.len() as f64;
    /// assert_eq!(scored.len(), tiny.encode("The people of the United States")?.len());
    /// assert!(loss.exp() < 200.0);
    /// # Ok::<(), pricket::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns [`Error::Empty`] if the text has no tokens, [`Error::Cancelled`] if the progress cancels the work, and
    /// [`Error::NonFinite`] if the model overflows.
    pub fn score(&self, text: &str, options: &ScoreOptions) -> Result<Vec<ScoredToken>> {
        let ids = self.tokenizer()?.encode(text)?;
        if ids.is_empty() {
            return Err(Error::Empty("the text has no tokens, so it has no log-probabilities"));
        }
        self.with_text(pricket_lm::text_logprobs(&*self.parts.model, &ids, self.prefix_id(), options)?)
    }

    fn with_text(&self, mut scored: Vec<ScoredToken>) -> Result<Vec<ScoredToken>> {
        let tokenizer = self.tokenizer()?;
        for token in &mut scored {
            token.text = tokenizer.decode_part(&[token.id]);
        }
        Ok(scored)
    }

    /// Returns the token that is put before a text without context: the begin token of the tokenizer, or else
    /// `<|endoftext|>`, or else `bos_token_id`.
    pub fn prefix_id(&self) -> u32 {
        let begin = self.parts.tokenizer.as_ref().and_then(Tokenizer::begin);
        let named = self.parts.tokenizer.as_ref().and_then(|tokenizer| tokenizer.token_to_id("<|endoftext|>"));
        let configured = || self.parts.config["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok());
        begin.or(named).or_else(configured).or(self.parts.eos.first().copied()).unwrap_or(0)
    }

    /// Returns the log-likelihood of each continuation after its context, for pairs of context and continuation as in
    /// lm-evaluation-harness. A context shared by several pairs is read once.
    ///
    /// # Errors
    /// Returns the errors of [`pricket_lm::loglikelihoods`].
    pub fn loglikelihoods(&self, pairs: &[(&str, &str)], options: &ScoreOptions) -> Result<Vec<Loglikelihood>> {
        let (tokenizer, prefix) = (self.tokenizer()?, self.prefix_id());
        let encode =
            |&(context, continuation): &(&str, &str)| Continuation::encode(tokenizer, prefix, context, continuation);
        let requests = pairs.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        Ok(loglikelihoods(&*self.parts.model, &requests, options)?)
    }

    /// Evaluates the model on a task; see [`pricket_lm::evaluate`]. [`Pricket::prefix_id`] and [`Pricket::eos_ids`]
    /// replace the prefix and the end tokens of `options`.
    ///
    /// # Errors
    /// Returns the errors of [`pricket_lm::evaluate`].
    pub fn evaluate(
        &self,
        task: &Task,
        documents: impl IntoIterator<Item = pricket_lm::Result<Value>>,
        examples: &[Value],
        options: &EvalOptions,
    ) -> Result<Outcome> {
        let options = EvalOptions { prefix: self.prefix_id(), end: self.parts.eos.clone(), ..options.clone() };
        Ok(evaluate(&*self.parts.model, self.tokenizer()?, task, documents, examples, &options)?)
    }

    /// Encodes a prompt to continue, as [`Pricket::generate`] does. An empty prompt becomes the begin token of a
    /// document.
    ///
    /// # Errors
    /// Returns the errors of [`Pricket::encode`].
    pub fn encode_prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(prompt)?;
        if ids.is_empty() {
            let begin = self.parts.config["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok());
            ids.push(begin.or(self.parts.eos.first().copied()).unwrap_or(0));
        }
        Ok(ids)
    }

    /// Returns the request that continues `ids` in an engine of this model ([`Pricket::engine`]).
    pub fn request(&self, ids: Vec<u32>, options: &GenerateOptions) -> Request {
        Request {
            eos: self.parts.eos.clone(),
            vocab: self.parts.tokenizer.as_ref().map(Tokenizer::vocab_size),
            tokenizer: self.parts.tokenizer.clone(),
            ..Request::new(ids, options.clone())
        }
    }

    /// Creates an engine, which continues and scores prompts that arrive at any time in one batch.
    ///
    /// # Errors
    /// Returns [`Error::Options`] if an option is out of range.
    pub fn engine(&self, options: EngineOptions) -> Result<Engine> {
        Ok(Engine::new(self.model(), options)?)
    }

    /// Continues prompts of token ids. No tokenizer is needed, unless there are stop strings.
    ///
    /// # Errors
    /// Returns the errors of [`Pricket::generate`].
    pub fn generation(&self, prompts: Vec<Vec<u32>>, options: &GenerateOptions) -> Result<Generation> {
        let requests = prompts.into_iter().map(|ids| Request { logits: true, ..self.request(ids, options) });
        Ok(Generation::new(self.model(), requests.collect())?)
    }

    /// Adds a draft model, which speeds decoding up, to an engine of this model. Texts do not change; see
    /// [`Engine::with_draft`].
    ///
    /// # Errors
    /// Returns [`Error::Options`] if the tokenizers differ or an option is out of range, and [`Error::Tokenizer`] if a
    /// model has no tokenizer.
    pub fn with_draft(&self, engine: Engine, draft: &Self, options: SpeculationOptions) -> Result<Engine> {
        let (own, other) = (self.tokenizer()?, draft.tokenizer()?);
        if own.vocab_size() != other.vocab_size() || draft.info().vocab < own.vocab_size() {
            let (own, other) = (own.vocab_size(), other.vocab_size());
            let what = format!("the tokenizer of the draft model has {other} tokens, and that of the model {own}");
            return Err(Error::Options(what));
        }
        let differs = |&id: &u32| own.token_bytes(id) != other.token_bytes(id);
        match (0..own.vocab_size() as u32).find(differs) {
            Some(id) => Err(Error::Options(format!("token {id} of the draft model differs from that of the model"))),
            None => Ok(engine.with_draft(draft.model(), options)?),
        }
    }
}

impl Completion {
    /// Creates the completion of a prompt before its first token.
    pub fn new(prompt_ids: &[u32], options: &GenerateOptions) -> Self {
        Self {
            text: String::new(),
            ids: Vec::new(),
            logprobs: Vec::new(),
            prompt_ids: prompt_ids.to_vec(),
            // With a limit of 0 tokens, the text has already reached its length.
            finish: if options.max_tokens == 0 { FinishReason::Length } else { FinishReason::Unfinished },
        }
    }

    /// Adds the news of an engine about the completion.
    ///
    /// # Errors
    /// Returns the error with which the request ended.
    pub fn add(&mut self, update: Update) -> Result<()> {
        self.ids.extend(update.tokens.iter().map(|token| token.id));
        self.logprobs.extend(update.tokens.iter().map(|token| token.logprob));
        self.text.push_str(&update.text);
        if let Some(finish) = update.finish {
            self.finish = finish?;
        }
        Ok(())
    }
}

/// Text as it is generated: an iterator over pieces. A piece never ends within a character and never contains part of a
/// stop string.
#[derive(Debug)]
pub struct Stream {
    engine: Engine,
    /// The request, until the first step.
    request: Option<Request>,
    completion: Completion,
}

impl Stream {
    /// Creates a stream in an engine without requests, which may keep states of earlier streams.
    pub(crate) fn new(pricket: &Pricket, engine: Engine, request: Request) -> Result<Self> {
        pricket.tokenizer()?;
        engine.check(&request)?;
        let completion = Completion::new(&request.ids, &request.options);
        Ok(Self { engine, request: Some(request), completion })
    }

    /// Omits the beginning of a stop string at the end of a text that the length limit cuts off. Use it for replies in
    /// a prompt format, before the first piece is taken. Other streams return every character.
    #[must_use]
    pub fn as_reply(mut self) -> Self {
        if let Some(request) = &mut self.request {
            request.is_reply = true;
        }
        self
    }

    /// Speeds the stream up with a draft model: a much smaller model with the same tokenizer. The text does not change.
    ///
    /// # Errors
    /// Returns [`Error::Options`] if the tokenizers differ or an option is out of range.
    pub fn with_draft(self, pricket: &Pricket, draft: &Pricket, options: SpeculationOptions) -> Result<Self> {
        Ok(Self { engine: pricket.with_draft(self.engine, draft, options)?, ..self })
    }

    /// Returns the measurements of speculative decoding, if there is a draft model.
    pub fn speculation(&self) -> Option<Speculation> {
        self.engine.speculation()
    }

    pub(crate) fn advance(&mut self) -> Result<Option<String>> {
        if let Some(request) = self.request.take() {
            self.engine.submit(request)?;
        }
        while let Some(updates) = self.engine.step()? {
            // The engine has only one request, so there is at most one update.
            for update in updates {
                let text = (!update.tokens.is_empty()).then(|| update.text.clone());
                self.completion.add(update)?;
                if text.is_some() {
                    return Ok(text);
                }
            }
        }
        Ok(None)
    }

    /// Ends the stream and returns the engine, with the state after the tokens read.
    pub(crate) fn into_engine(mut self) -> Engine {
        self.engine.clear();
        self.engine
    }

    /// Returns the number of prompt tokens that the model has read for all streams of the engine.
    pub(crate) fn prompt_tokens_read(&self) -> u64 {
        self.engine.prompt_tokens_read()
    }

    /// Returns the completion so far.
    pub fn completion(&self) -> &Completion {
        &self.completion
    }

    /// Ends the generation and returns the completion.
    pub fn into_completion(self) -> Completion {
        self.completion
    }
}

impl Iterator for Stream {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}
