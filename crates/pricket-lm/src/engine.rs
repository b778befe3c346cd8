//! The engine that runs requests in one batch: continuing prompts, and scoring tokens.
//!
//! Rows join and leave the batch between steps (continuous batching, Yu et al. 2022, "Orca", OSDI). In each step every
//! row that has read its prompt gets its next token, and prompts are read in parts beside them, within a budget of
//! tokens. A prompt that begins like a prompt read before continues from a copy of its state.
//!
//! The engine has no threads and no queue of its own outside of [`Engine::step`]: a caller submits requests, calls
//! `step` until it returns `None`, and handles the updates.

mod lane;
mod prefixes;
mod queue;
mod request;
mod row;
mod scheduler;
mod speculation;

use std::sync::Arc;

use pricket_nn::{CausalLm, Recording, Taps};

pub use request::{FinishReason, GenerateOptions, ModelId, Request, RequestId, Score, Update};
pub(crate) use scheduler::Scheduler;
use speculation::Speculator;
pub use speculation::{Speculation, SpeculationOptions};

use crate::Result;

/// Options of an [`Engine`].
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Maximum number of requests in the batch; 64 by default. Others wait.
    pub rows: usize,
    /// Number of tokens that a step reads at most, over all rows. A row that has read its prompt always reads its
    /// token, and prompts always have a quarter of the budget. Defaults to 512 on the CPU and 2,048 on other devices.
    pub step_tokens: Option<usize>,
    /// Maximum size in bytes of the states (KV caches) of all rows and of kept states together, without the states of a
    /// draft model and of the model's own decoder. A request joins when the state of its prompt and all its new tokens
    /// fits. `None`, the default, for no limit.
    pub memory: Option<u64>,
    /// Maximum size in bytes of the states that are kept after their requests ended, for prompts that begin with the
    /// same tokens. Defaults to the size of 2,048 positions. 0 keeps none.
    pub prefix_memory: Option<u64>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { rows: 64, step_tokens: None, memory: None, prefix_memory: None }
    }
}

/// Scheduler of requests to one or more models over the same weights.
///
/// Requests are continued in one batch, and each gets the text that it gets alone. Logits may differ by rounding, since
/// kernels add numbers in another order for another number of rows. So a text may differ where the two likeliest tokens
/// are almost equally likely, unless the order of summation is fixed
/// ([`Pool::with_fixed_order`](pricket_nn::ops::Pool::with_fixed_order)).
///
/// ```
/// # use std::sync::Arc;
/// # use pricket_nn::Weights;
/// # let config = pricket_gpt_neox::Config::from_json(&serde_json::json!({
/// #     "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}))?;
/// # let store = Arc::new(pricket_weights::Random::new(pricket_weights::Dtype::F32, 0));
/// # let weights = Weights::as_stored(store, pricket_gpt_neox::NAMES);
/// # let model: Arc<dyn pricket_nn::CausalLm> = Arc::new(pricket_gpt_neox::load(&config, &weights)?);
/// use pricket_lm::{Engine, EngineOptions, GenerateOptions, Request};
/// let mut engine = Engine::new(model, EngineOptions::default())?;
/// let four = GenerateOptions { max_tokens: 4, ..Default::default() };
/// let first = engine.submit(Request::new(vec![5, 6, 7], four.clone()))?;
/// engine.step()?;
/// // A second request joins while the first one is running, and a third one scores tokens.
/// engine.submit(Request::new(vec![5, 6, 9], four))?;
/// engine.submit(Request::score(vec![1, 2, 3], 1))?;
/// let (mut tokens, mut scores) = (0, 0);
/// while let Some(updates) = engine.step()? {
///     for update in updates {
///         tokens += update.tokens.len();
///         scores += update.scores.len();
///     }
/// }
/// assert_eq!((first.0, tokens, scores), (0, 3 + 4, 2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Engine {
    models: Vec<Arc<dyn CausalLm>>,
    draft: Option<(Arc<dyn CausalLm>, SpeculationOptions)>,
    scheduler: Scheduler,
    options: EngineOptions,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine({} running, {} waiting)", self.running(), self.waiting())
    }
}

impl Clone for Engine {
    /// Returns an engine over the same models that has the same kept states, and no requests and taps.
    fn clone(&self) -> Self {
        let fresh = || -> Result<Scheduler> {
            let mut scheduler = Scheduler::new(&*self.models[0], &self.options)?;
            for model in &self.models[1..] {
                scheduler.add_model(&**model);
            }
            if let Some((draft, options)) = &self.draft {
                scheduler.set_speculator(Speculator::new(&**draft, *options)?);
            }
            scheduler.set_prefixes(self.scheduler.prefixes().clone());
            Ok(scheduler)
        };
        let scheduler = fresh().expect("the options were checked when this engine was created");
        Self { models: self.models.clone(), draft: self.draft.clone(), scheduler, options: self.options.clone() }
    }
}

impl Engine {
    /// Creates an engine for `model`.
    ///
    /// # Errors
    /// Returns [`Error::Input`](crate::Error::Input) if an option is out of range.
    pub fn new(model: Arc<dyn CausalLm>, options: EngineOptions) -> Result<Self> {
        let scheduler = Scheduler::new(&*model, &options)?;
        Ok(Self { models: vec![model], draft: None, scheduler, options })
    }

    /// Speeds decoding up with a draft model, which has the same tokens and is much smaller. The texts do not change.
    ///
    /// # Errors
    /// Returns [`Error::Input`](crate::Error::Input) if an option is out of range.
    pub fn with_draft(mut self, draft: Arc<dyn CausalLm>, options: SpeculationOptions) -> Result<Self> {
        self.scheduler.set_speculator(Speculator::new(&*draft, options)?);
        self.draft = Some((draft, options));
        Ok(self)
    }

    /// Adds a model for requests that name it in [`Request::model`], usually the same weights with an adapter
    /// ([`CausalLm::map_linears`]). A step has a pass for each model.
    pub fn add_model(&mut self, model: Arc<dyn CausalLm>) -> ModelId {
        let id = self.scheduler.add_model(&*model);
        self.models.push(model);
        ModelId(id)
    }

    /// Submits a request. It joins the batch in one of the next steps.
    ///
    /// # Errors
    /// Returns [`Error::Input`](crate::Error::Input) if the request is impossible or its state would exceed the memory limit, an error if
    /// sampling parameters are invalid, or [`pricket_nn::Error::ContextExceeded`] if the prompt is longer than the
    /// model's context.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        let Self { models, scheduler, .. } = self;
        scheduler.submit(&references(models), request)
    }

    /// Checks whether [`Engine::submit`] would accept a request.
    ///
    /// # Errors
    /// Returns the errors of [`Engine::submit`].
    pub fn check(&self, request: &Request) -> Result<()> {
        self.scheduler.check(&references(&self.models), request)
    }

    /// Ends all requests. Kept states stay, and are joined by the states of the ended requests.
    pub fn clear(&mut self) {
        self.scheduler.clear();
    }

    /// Ends a request early. The next step reports it as [`FinishReason::Unfinished`]. Returns false if it had already
    /// ended.
    pub fn cancel(&mut self, request: RequestId) -> bool {
        self.scheduler.cancel(request)
    }

    /// Runs a step: one token for each row that has read its prompt, and a part of the prompts. Returns the news, or
    /// `None` if no request is left.
    ///
    /// A request that fails, for example because its logits are not finite, ends with an error in its update. The others
    /// go on.
    ///
    /// # Errors
    /// Returns the error of the draft model. All requests have then ended.
    pub fn step(&mut self) -> Result<Option<Vec<Update>>> {
        let Self { models, draft, scheduler, .. } = self;
        let outcome = scheduler.step(&references(models), draft.as_ref().map(|(draft, _)| &**draft));
        if outcome.is_err() {
            scheduler.clear();
        }
        outcome
    }

    /// Records or edits activations in every pass of the first model. Its own decoder ([`CausalLm::step_decoder`]) is
    /// then not used, every prompt is read in full, and kept states are discarded.
    pub fn set_taps(&mut self, taps: Option<Taps>) {
        self.scheduler.set_taps(&*self.models[0], taps);
    }

    /// Takes the recording of the last pass.
    pub fn take_recording(&mut self) -> Recording {
        self.scheduler.take_recording()
    }

    /// Returns the number of requests that wait for a place in the batch.
    pub fn waiting(&self) -> usize {
        self.scheduler.waiting()
    }

    /// Returns the number of requests in the batch.
    pub fn running(&self) -> usize {
        self.scheduler.running()
    }

    /// Returns the number of tokens that the models have read so far, without draft tokens.
    pub fn tokens_read(&self) -> u64 {
        self.scheduler.read().all
    }

    /// Returns the number of tokens of prompts that the models have read so far. Tokens that a kept state held do not
    /// count.
    pub fn prompt_tokens_read(&self) -> u64 {
        self.scheduler.read().of_prompts
    }

    /// Returns the size in bytes of the states of all rows, of kept states and of a draft model. States in the model's
    /// own decoder do not count.
    pub fn state_bytes(&self) -> u64 {
        self.scheduler.state_bytes()
    }

    /// Returns the measurements of speculative decoding, if there is a draft model.
    pub fn speculation(&self) -> Option<Speculation> {
        self.scheduler.speculator().map(Speculator::report)
    }
}

fn references(models: &[Arc<dyn CausalLm>]) -> Vec<&dyn CausalLm> {
    models.iter().map(|model| &**model).collect()
}
