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

/// A loaded model: text in, text out. Cheap to clone, owned, and safe to share between threads.
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
    /// Files in the cache stay there while somebody has them loaded.
    pub(crate) _in_use: Option<Arc<InUse>>,
    /// Canonical names of its tensors, and names on file where that is in the Hub's layout.
    #[cfg_attr(not(feature = "train"), allow(dead_code, reason = "adapters read it"))]
    pub(crate) names_on_file: Vec<(String, String)>,
}

impl std::fmt::Debug for Pricket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let info = self.info();
        write!(f, "Pricket({}, {} layers of {}, {} weights)", info.family, info.layers, info.d_model, info.parameters)
    }
}

/// A continued prompt.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The continuation, without prompt, stop string and special tokens.
    pub text: String,
    /// Its tokens, end token included.
    pub ids: Vec<u32>,
    /// The log-probability of each under the model.
    pub logprobs: Vec<f32>,
    /// The prompt's tokens.
    pub prompt_ids: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
}

impl Pricket {
    pub(crate) fn new(parts: Parts) -> Self {
        Self { parts: Arc::new(parts) }
    }

    /// What the model is.
    pub fn info(&self) -> &ModelInfo {
        self.parts.model.info()
    }

    /// The model itself, for everything that is not text.
    pub fn model(&self) -> Arc<dyn CausalLm> {
        Arc::clone(&self.parts.model)
    }

    /// The config.json it was loaded by.
    pub fn config(&self) -> &Value {
        &self.parts.config
    }

    /// CPU threads that it computes with.
    pub fn threads(&self) -> usize {
        self.parts.threads
    }

    /// The model's end tokens.
    pub fn eos_ids(&self) -> &[u32] {
        &self.parts.eos
    }

    /// The variables, if it was loaded with [`crate::Loader::train`].
    pub fn parameters(&self) -> &[Parameter] {
        &self.parts.parameters
    }

    /// Where it came from: repository, revision, commit, file hashes, license.
    pub fn provenance(&self) -> &Provenance {
        &self.parts.provenance
    }

    /// What a careful user should know about this checkpoint.
    pub fn warnings(&self) -> &[String] {
        &self.parts.warnings
    }

    /// What was decided while loading and may be decided otherwise: the prompt format, a tokenizer from elsewhere.
    pub fn notes(&self) -> &[String] {
        &self.parts.notes
    }

    #[cfg(feature = "train")]
    pub(crate) fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Whether its fused matrices were in the model's order on file.
    pub(crate) fn in_model_order(&self) -> bool {
        self.parts.in_model_order
    }

    /// How conversations are spelled for this model: as its card says, else as its configuration or its tokenizer's tokens
    /// tell; `plain` if nothing does.
    pub fn prompt_format(&self) -> &PromptFormat {
        &self.parts.format
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the checkpoint came without one.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || {
            let named = self.parts.config["tokenizer_name"].as_str();
            let of = named.map_or(String::new(), |name| format!(", that of {}", pricket_weights::clip(name)));
            let what = format!("the checkpoint has none; give one{of} to read or write text");
            Error::Tokenizer { origin: "tokenizer.json".into(), what }
        };
        self.parts.tokenizer.as_ref().ok_or_else(missing)
    }

    /// Text to ids, after the token that the tokenizer's configuration puts before a text, if it names one.
    ///
    /// # Errors
    /// As [`Pricket::tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer()?.encode_from_start(text)?)
    }

    /// Ids to text, special tokens included.
    ///
    /// # Errors
    /// As [`Pricket::tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(self.tokenizer()?.decode(ids))
    }

    /// Continues `prompt`.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] for a prompt longer than the model can read, [`Error::NonFinite`] if it overflows.
    pub fn generate(&self, prompt: &str, options: &GenerateOptions) -> Result<Completion> {
        let mut stream = self.stream(prompt, options)?;
        while stream.advance()?.is_some() {}
        Ok(stream.into_completion())
    }

    /// Continues several prompts at once; each gives the text that it gives alone.
    ///
    /// # Errors
    /// As [`Pricket::generate`].
    pub fn generate_batch(&self, prompts: &[&str], options: &GenerateOptions) -> Result<Vec<Completion>> {
        let mut batch = Batch::new(self, prompts, options)?;
        while batch.step()?.is_some() {}
        Ok(batch.rows.into_iter().map(|row| row.completion).collect())
    }

    /// Continues `prompt`, giving text as it is written. Nothing is computed before the first `next`.
    ///
    /// # Errors
    /// As [`Pricket::generate`].
    pub fn stream(&self, prompt: &str, options: &GenerateOptions) -> Result<Stream> {
        Ok(Stream { batch: Batch::new(self, &[prompt], options)? })
    }

    /// The log-probability of each token of `text` but the first, given those before it.
    ///
    /// # Errors
    /// [`Error::Empty`] for a text of fewer than two tokens, [`Error::ContextExceeded`] for one that is longer than the model can
    /// read.
    pub fn logprobs(&self, text: &str) -> Result<Vec<ScoredToken>> {
        let ids = self.encode(text)?;
        if ids.len() < 2 {
            let what =
                "a text of fewer than two tokens has no log-probabilities: each token is scored given those before it";
            return Err(Error::Empty(what));
        }
        self.with_text(token_logprobs(&*self.parts.model, &ids)?)
    }

    /// Compares another model with this one over a text: perplexities, Kullback-Leibler divergence, agreement. Both have one
    /// tokenizer; mostly the other one is quantized from this one.
    ///
    /// # Errors
    /// As [`compare`](pricket_lm::compare).
    pub fn compare(&self, other: &Self, text: &str, options: &ScoreOptions) -> Result<Comparison> {
        let ids = self.tokenizer()?.encode(text)?;
        Ok(pricket_lm::compare(&*self.model(), &*other.model(), &ids, self.prefix_id(), options)?)
    }

    /// The log-probability of every token of a text of any length: the first given [`Pricket::prefix_id`], the others given what comes
    /// before them. A text that is longer than the model reads at once is scored in windows, every token once
    /// ([`Continuation::windows`](pricket_lm::Continuation::windows)). `exp` of the negative mean is the perplexity that tasks, slices
    /// and sweeps have of the same text.
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
    /// [`Error::Empty`] for a text without a token; [`Error::Cancelled`]; what the model says.
    pub fn score(&self, text: &str, options: &ScoreOptions) -> Result<Vec<ScoredToken>> {
        let ids = self.tokenizer()?.encode(text)?;
        if ids.is_empty() {
            return Err(Error::Empty("a text without a token has no log-probabilities"));
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

    /// The token that texts begin with where nothing else is given: what the tokenizer puts before a text, else `<|endoftext|>`, else
    /// `bos_token_id`.
    pub fn prefix_id(&self) -> u32 {
        let begin = self.parts.tokenizer.as_ref().and_then(Tokenizer::begin);
        let named = self.parts.tokenizer.as_ref().and_then(|tokenizer| tokenizer.token_to_id("<|endoftext|>"));
        let configured = || self.parts.config["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok());
        begin.or(named).or_else(configured).or(self.parts.eos.first().copied()).unwrap_or(0)
    }

    /// How likely each continuation is after its context: pairs of both, as lm-evaluation-harness takes them. A context that
    /// several share is read once.
    ///
    /// # Errors
    /// As [`pricket_lm::loglikelihoods`].
    pub fn loglikelihoods(&self, pairs: &[(&str, &str)], options: &ScoreOptions) -> Result<Vec<Loglikelihood>> {
        let (tokenizer, prefix) = (self.tokenizer()?, self.prefix_id());
        let encode =
            |&(context, continuation): &(&str, &str)| Continuation::encode(tokenizer, prefix, context, continuation);
        let requests = pairs.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        Ok(loglikelihoods(&*self.parts.model, &requests, options)?)
    }

    /// Puts a task to the model: see [`pricket_lm::evaluate`]. The prefix of `options` is the model's own.
    ///
    /// # Errors
    /// As [`pricket_lm::evaluate`].
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

    /// The tokens of a prompt; an empty one is the beginning of a document.
    pub(crate) fn prompt_ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(prompt)?;
        if ids.is_empty() {
            let begin = self.parts.config["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok());
            ids.push(begin.or(self.parts.eos.first().copied()).unwrap_or(0));
        }
        Ok(ids)
    }

    /// The request that continues `ids`, row `row` of a batch, under `options`, stop strings left to the caller.
    fn request(&self, row: usize, ids: Vec<u32>, options: &GenerateOptions) -> Request {
        let seed = options.row_seeds.get(row).copied().unwrap_or(options.seed);
        Request {
            ids,
            options: GenerateOptions { seed, ..options.clone() },
            eos: self.parts.eos.clone(),
            vocab: self.parts.tokenizer.as_ref().map(Tokenizer::vocab_size),
        }
    }

    /// Continues prompts of ids, for models without a tokenizer.
    ///
    /// # Errors
    /// As [`Pricket::generate`].
    pub fn generation(&self, prompts: Vec<Vec<u32>>, options: &GenerateOptions) -> Result<Generation> {
        let requests = prompts.into_iter().enumerate().map(|(row, ids)| self.request(row, ids, options)).collect();
        Ok(Generation::new(self.model(), requests)?)
    }
}

/// A batch of texts being written.
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
                // Where no token is asked for, none is missing.
                finish: if options.max_tokens == 0 { FinishReason::Length } else { FinishReason::Unfinished },
            },
        };
        let rows = prompts.iter().map(row).collect();
        Ok(Self { generation: pricket.generation(prompts, options)?, rows, is_reply: false })
    }

    /// One token a row; gives the text that became certain, by row.
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

/// Text as it is written: an iterator over pieces, never half a character, none of them a part of a stop string.
#[derive(Debug)]
pub struct Stream {
    batch: Batch,
}

impl Stream {
    /// Leaves out the beginning of a stop string at the end of a text that the length limit cuts off. Use it for replies in a prompt
    /// format. Other streams return every character.
    #[must_use]
    pub fn as_reply(mut self) -> Self {
        self.batch.is_reply = true;
        self
    }

    fn advance(&mut self) -> Result<Option<String>> {
        Ok(self.batch.step()?.map(|mut pieces| pieces.pop().map_or_else(String::new, |(_, text)| text)))
    }

    /// The reply to ids, of which `past` holds the first.
    pub(crate) fn of_ids(pricket: &Pricket, ids: Vec<u32>, past: State, options: &GenerateOptions) -> Result<Self> {
        let mut batch = Batch::of_ids(pricket, vec![ids], options)?;
        if past.len(0) > 0 {
            batch.generation = batch.generation.with_past(past)?;
        }
        Ok(Self { batch }.as_reply())
    }

    /// Every id that was read, and the state after them. It ends the reply.
    pub(crate) fn take_past(&mut self) -> (Vec<u32>, State) {
        let state = self.batch.generation.take_state().unwrap_or_default();
        let Completion { prompt_ids, ids, .. } = self.completion();
        let mut ids = [&prompt_ids[..], ids].concat();
        ids.truncate(state.len(0));
        (ids, state)
    }

    /// What has been written so far.
    pub fn completion(&self) -> &Completion {
        &self.batch.rows[0].completion
    }

    /// What was written.
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
