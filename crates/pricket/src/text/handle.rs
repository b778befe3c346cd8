//! [`Pricket`], the handle of a loaded model: generation and scoring of text.

use std::sync::Arc;

use pricket_hub::InUse;
use pricket_lm::{
    Comparison, Continuation, EvalOptions, FinishReason, GenerateOptions, Generation, Loglikelihood, Outcome,
    PromptFormat, Request, ScoreOptions, ScoredToken, Task, TextStream, Tokenizer, evaluate, loglikelihoods,
    token_logprobs,
};
use pricket_nn::{CausalLm, ModelInfo, Parameter, State};
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
        let mut batch = Batch::new(self, prompts, options)?;
        while batch.step()?.is_some() {}
        Ok(batch.rows.into_iter().map(|row| row.completion).collect())
    }

    /// Continues `prompt` and streams the text as it is generated. Nothing is computed before the first call of `next`.
    ///
    /// # Errors
    /// Returns the errors of [`Pricket::generate`].
    pub fn stream(&self, prompt: &str, options: &GenerateOptions) -> Result<Stream> {
        Ok(Stream { batch: Batch::new(self, &[prompt], options)? })
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

    /// Evaluates the model on a task; see [`pricket_lm::evaluate`]. [`Pricket::prefix_id`] replaces the prefix of
    /// `options`.
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
        let options = EvalOptions { prefix: self.prefix_id(), ..options.clone() };
        Ok(evaluate(&*self.parts.model, self.tokenizer()?, task, documents, examples, &options)?)
    }

    /// Returns the tokens of a prompt. An empty prompt becomes the begin token of a document.
    pub(crate) fn prompt_ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(prompt)?;
        if ids.is_empty() {
            let begin = self.parts.config["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok());
            ids.push(begin.or(self.parts.eos.first().copied()).unwrap_or(0));
        }
        Ok(ids)
    }

    /// Returns the request for row `row` of a batch. The caller handles stop strings.
    fn request(&self, row: usize, ids: Vec<u32>, options: &GenerateOptions) -> Request {
        let seed = options.row_seeds.get(row).copied().unwrap_or(options.seed);
        Request {
            ids,
            options: GenerateOptions { seed, ..options.clone() },
            eos: self.parts.eos.clone(),
            vocab: self.parts.tokenizer.as_ref().map(Tokenizer::vocab_size),
        }
    }

    /// Continues prompts of token ids. No tokenizer is needed.
    ///
    /// # Errors
    /// Returns the errors of [`Pricket::generate`].
    pub fn generation(&self, prompts: Vec<Vec<u32>>, options: &GenerateOptions) -> Result<Generation> {
        let requests = prompts.into_iter().enumerate().map(|(row, ids)| self.request(row, ids, options)).collect();
        Ok(Generation::new(self.model(), requests)?)
    }
}

/// A batch of texts being generated.
#[derive(Debug)]
struct Batch {
    generation: Generation,
    rows: Vec<Row>,
    /// Whether the text is a turn of a conversation.
    is_reply: bool,
}

#[derive(Debug)]
struct Row {
    text: TextStream,
    completion: Completion,
}

impl Batch {
    fn new(pricket: &Pricket, prompts: &[&str], options: &GenerateOptions) -> Result<Self> {
        let ids = prompts.iter().map(|prompt| pricket.prompt_ids(prompt)).collect::<Result<Vec<_>>>()?;
        Self::of_ids(pricket, ids, options)
    }

    fn of_ids(pricket: &Pricket, prompts: Vec<Vec<u32>>, options: &GenerateOptions) -> Result<Self> {
        let tokenizer = pricket.tokenizer()?;
        let row = |prompt_ids: &Vec<u32>| Row {
            text: TextStream::new(tokenizer, &options.stop),
            completion: Completion {
                text: String::new(),
                ids: Vec::new(),
                logprobs: Vec::new(),
                prompt_ids: prompt_ids.clone(),
                // With a limit of 0 tokens, the text has already reached its length.
                finish: if options.max_tokens == 0 { FinishReason::Length } else { FinishReason::Unfinished },
            },
        };
        let rows = prompts.iter().map(row).collect();
        Ok(Self { generation: pricket.generation(prompts, options)?, rows, is_reply: false })
    }

    /// Generates one token per row. Returns pairs of row and new text; text that may belong to a stop string is held
    /// back.
    fn step(&mut self) -> Result<Option<Vec<(usize, String)>>> {
        let Some(tokens) = self.generation.step()? else { return Ok(None) };
        let mut out = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Row { text, completion } = &mut self.rows[token.row];
            completion.ids.push(token.id);
            completion.logprobs.push(token.logprob);
            let mut new = text.push(token.id);
            let finish = if text.stopped() {
                self.generation.stop(token.row);
                Some(FinishReason::Stop)
            } else {
                token.finish
            };
            if let Some(finish) = finish {
                let cut = matches!(finish, FinishReason::Length | FinishReason::Context);
                // The held text may be the start of a stop string, which a reply does not include.
                new.push_str(&if cut && self.is_reply { text.finish_cut() } else { text.finish() });
                completion.finish = finish;
            }
            completion.text.push_str(&new);
            out.push((token.row, new));
        }
        Ok(Some(out))
    }
}

/// Text as it is generated: an iterator over pieces. A piece never ends within a character and never contains part of a
/// stop string.
#[derive(Debug)]
pub struct Stream {
    batch: Batch,
}

impl Stream {
    /// Omits the beginning of a stop string at the end of a text that the length limit cuts off. Use it for replies in
    /// a prompt format. Other streams return every character.
    #[must_use]
    pub fn as_reply(mut self) -> Self {
        self.batch.is_reply = true;
        self
    }

    fn advance(&mut self) -> Result<Option<String>> {
        Ok(self.batch.step()?.map(|mut pieces| pieces.pop().map_or_else(String::new, |(_, text)| text)))
    }

    /// Creates the stream of a reply to `ids`. `past` is the state after the first of them.
    pub(crate) fn of_ids(pricket: &Pricket, ids: Vec<u32>, past: State, options: &GenerateOptions) -> Result<Self> {
        let mut batch = Batch::of_ids(pricket, vec![ids], options)?;
        if past.len(0) > 0 {
            batch.generation = batch.generation.with_past(past)?;
        }
        Ok(Self { batch }.as_reply())
    }

    /// Returns all token ids that the model has read and the state after them. Ends the generation.
    pub(crate) fn take_past(&mut self) -> (Vec<u32>, State) {
        let state = self.batch.generation.take_state().unwrap_or_default();
        let Completion { prompt_ids, ids, .. } = self.completion();
        let mut ids = [&prompt_ids[..], ids].concat();
        ids.truncate(state.len(0));
        (ids, state)
    }

    /// Returns the completion so far.
    pub fn completion(&self) -> &Completion {
        &self.batch.rows[0].completion
    }

    /// Ends the generation and returns the completion.
    pub fn into_completion(mut self) -> Completion {
        self.batch.rows.swap_remove(0).completion
    }
}

impl Iterator for Stream {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}
