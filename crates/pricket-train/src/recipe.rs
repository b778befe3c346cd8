//! Recipes: the settings of a run as TOML.
//!
//! The keys are the flags of the example `finetune` that set the data and the run, with `_` for `-`. The settings of the
//! adapter are in the table `adapter`, with the keys of PEFT's adapter_config.json.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::data::best_fit;
use crate::trainer::default_warmup;
use crate::{
    Checkpointing, Error, Evaluation, LoraConfig, Normalization, OptimizerConfig, Result, Rule, Sample, Schedule,
    TrainOptions,
};

/// Settings of a run. Keys that are not set have the defaults of [`Recipe::options`] and [`Recipe::lora`].
///
/// ```
/// use pricket_train::Recipe;
/// let recipe = Recipe::from_toml("lr = 1e-4\nepochs = 2\n[adapter]\nr = 8")?;
/// assert_eq!(recipe.lora()?.rank, 8);
/// let samples = vec![pricket_train::Sample::new(vec![1, 2, 3])?; 32];
/// assert_eq!(recipe.options(&samples)?.steps, 4);
/// # Ok::<(), pricket_train::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag")]
pub struct Recipe {
    /// Name.
    pub name: String,
    /// Description.
    pub about: String,
    /// Source of the settings.
    pub source: String,
    /// Trains all weights instead of an adapter.
    pub full: bool,
    /// Files with the examples, or datasets of the Hub.
    pub data: Vec<String>,
    /// Split of a dataset. Default: train.
    pub split: Option<String>,
    /// Prompt format. Default: the model's own.
    pub prompt_format: Option<String>,
    /// Maximum number of token ids of an example. Default: the model's context, at most 2048.
    pub max_length: Option<usize>,
    /// Adds no end token after responses.
    pub no_end_token: bool,
    /// Leaves out examples that repeat an earlier one.
    pub drop_duplicates: bool,
    /// See [`TrainOptions::pack`].
    pub pack: Option<usize>,
    /// Files with examples for evaluation.
    pub eval_data: Vec<String>,
    /// Split of a dataset in `eval_data`. Default: validation.
    pub eval_split: Option<String>,
    /// Number of examples to take out of the data for evaluation.
    pub eval_examples: Option<usize>,
    /// Number of steps between evaluations. Default: a tenth of the steps.
    pub eval_every: Option<u64>,
    /// See [`Evaluation::patience`].
    pub patience: Option<u32>,
    /// Number of training steps. Default: computed from `epochs`.
    pub steps: Option<u64>,
    /// Number of passes over the examples. Default: 1.
    pub epochs: Option<f64>,
    /// See [`TrainOptions::batch`]. Default: 16.
    pub batch: Option<usize>,
    /// See [`TrainOptions::micro_batch_tokens`]. Default: 2048.
    pub micro_batch_tokens: Option<usize>,
    /// Learning rate. Default: 2e-4, or 2e-5 for LION.
    pub lr: Option<f64>,
    /// Optimizer. Default: AdamW.
    pub optimizer: Option<Rule>,
    /// Decay rates of the optimizer's moments.
    pub betas: Option<(f64, f64)>,
    /// Weight decay. Default: 0.
    pub weight_decay: Option<f64>,
    /// See [`OptimizerConfig::decay_vectors`].
    pub decay_vectors: bool,
    /// Learning rate of the B matrices as a multiple of `lr` (LoRA+).
    pub lora_plus: Option<f64>,
    /// Name of the schedule; see [`Schedule::named`]. Default: linear.
    pub schedule: Option<String>,
    /// Final learning rate as a fraction of `lr`.
    pub min_lr_rate: Option<f64>,
    /// Number of warm-up steps. Default: 3 % of the steps.
    pub warmup: Option<u64>,
    /// Maximum norm of the gradient, 0 for none. Default: 1.
    pub clip: Option<f64>,
    /// Normalization of the loss. Default: tokens.
    pub loss_normalization: Option<Normalization>,
    /// Turns gradient checkpointing off.
    pub no_gradient_checkpointing: bool,
    /// Random seed. Default: 0.
    pub seed: u64,
    /// Number of steps between checkpoints, 0 for none. Default: 100.
    pub save_every: Option<u64>,
    /// Number of checkpoints to keep. Default: 2.
    pub keep: Option<usize>,
    /// Settings of the adapter, with PEFT's keys. Defaults: rank 16, `lora_alpha` twice the rank, all linear layers.
    pub adapter: Map<String, Value>,
}

impl Recipe {
    /// Reads a recipe from TOML.
    ///
    /// # Errors
    /// Returns [`Error::Recipe`] with the line if the TOML is invalid or a key is unknown.
    pub fn from_toml(text: &str) -> Result<Self> {
        let recipe: Self = toml::from_str(text).map_err(|e| {
            let before = e.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            Error::Recipe(format!("line {}: {}", before.matches('\n').count() + 1, e.message()))
        })?;
        // TOML has infinity and NaN, which JSON, and so `with`, does not have.
        let (first, second) = recipe.betas.unwrap_or_default();
        let numbers =
            [recipe.epochs, recipe.lr, recipe.weight_decay, recipe.lora_plus, recipe.min_lr_rate, recipe.clip];
        match numbers.into_iter().flatten().chain([first, second]).find(|number| !number.is_finite()) {
            Some(number) => Err(Error::Recipe(format!("a value is {number}; expected a finite number"))),
            None => Ok(recipe),
        }
    }

    /// Returns the recipe with other settings. `settings` is a JSON object; its keys replace those of the recipe, and
    /// the keys of its `adapter` those of the recipe's adapter.
    ///
    /// # Errors
    /// Returns [`Error::Recipe`] if a key is unknown or a value has the wrong type.
    pub fn with(&self, settings: &Value) -> Result<Self> {
        let wrong = |e: serde_json::Error| Error::Recipe(e.to_string());
        let mut own = serde_json::to_value(self).map_err(wrong)?;
        for (key, value) in settings.as_object().into_iter().flatten() {
            // Of these pairs, one key replaces the other.
            for (one, other) in [("steps", "epochs"), ("eval_data", "eval_examples")] {
                if key == one {
                    own[other] = Value::Null;
                } else if key == other {
                    own[one] = Value::Null;
                }
            }
            if key == "full" && settings.get("adapter").is_none() {
                own["adapter"] = json!({});
            }
            match (key.as_str(), value) {
                ("adapter", Value::Object(adapter)) => {
                    for (key, value) in adapter {
                        own["adapter"][key] = value.clone();
                    }
                }
                _ => own[key] = value.clone(),
            }
        }
        // A list cannot be null.
        if own["eval_data"].is_null() {
            own["eval_data"] = json!([]);
        }
        serde_json::from_value(own).map_err(wrong)
    }

    /// Returns whether the run is evaluated.
    pub fn is_evaluated(&self) -> bool {
        !self.eval_data.is_empty() || self.eval_examples.is_some_and(|count| count > 0)
    }

    /// Returns the settings of the adapter.
    ///
    /// # Errors
    /// Returns [`Error::Recipe`] with the key if a setting is invalid or not implemented.
    pub fn lora(&self) -> Result<LoraConfig> {
        let mut adapter = self.adapter.clone();
        let rank = adapter.entry("r").or_insert(json!(16)).clone();
        adapter.entry("lora_alpha").or_insert_with(|| json!(rank.as_f64().map(|rank| 2.0 * rank)));
        adapter.entry("target_modules").or_insert(json!("all-linear"));
        LoraConfig::from_json(&Value::Object(adapter)).map_err(|e| match e {
            Error::Config { key, what } => Error::Recipe(format!("adapter.{key}: {what}")),
            e => e,
        })
    }

    /// Returns the settings of a run over `samples`.
    ///
    /// # Errors
    /// Returns [`Error::Recipe`] if a setting is out of range.
    pub fn options(&self, samples: &[Sample]) -> Result<TrainOptions> {
        let check = |is_good: bool, what: String| if is_good { Ok(()) } else { Err(Error::Recipe(what)) };
        let batch = self.batch.unwrap_or(16);
        let epochs = self.epochs.unwrap_or(1.0);
        check(batch > 0, "batch is 0; expected at least 1".into())?;
        check(epochs > 0.0 && epochs.is_finite(), format!("epochs is {epochs}; expected more than 0"))?;
        check(self.steps.is_none() || self.epochs.is_none(), "steps and epochs are both set; set one".into())?;
        check(self.steps != Some(0), "steps is 0; expected at least 1".into())?;
        check(self.eval_every != Some(0), "eval_every is 0; expected at least 1".into())?;
        check(self.patience != Some(0), "patience is 0; expected at least 1".into())?;
        let lens: Vec<usize> = samples.iter().map(|sample| sample.ids().len()).collect();
        let packs = self.pack.map_or(samples.len(), |capacity| best_fit(&lens, capacity).len());
        let steps = self.steps.unwrap_or_else(|| ((epochs * packs as f64 / batch as f64).ceil() as u64).max(1));
        let rule = self.optimizer.unwrap_or(Rule::AdamW);
        let lr = self.lr.unwrap_or(if rule.is_lion() { 2e-5 } else { 2e-4 });
        let defaults = OptimizerConfig::new(rule, lr);
        let warmup = self.warmup.unwrap_or_else(|| default_warmup(steps));
        let mut schedule = Schedule::named(self.schedule.as_deref().unwrap_or("linear"), warmup, steps)?;
        if let Some(rate) = self.min_lr_rate {
            check((0.0..=1.0).contains(&rate), format!("min_lr_rate is {rate}; expected 0 to 1"))?;
            schedule = schedule.with_min(rate)?;
        }
        check(!self.full || self.adapter.is_empty(), "full is set, so the table adapter has no effect".into())?;
        check(self.pack != Some(0), "pack is 0; expected at least 1".into())?;
        let is_evaluated = self.is_evaluated();
        let has_both = !self.eval_data.is_empty() && self.eval_examples.is_some();
        check(!has_both, "eval_data and eval_examples are both set; set one".into())?;
        check(
            is_evaluated || self.eval_examples == Some(0) || (self.eval_every.is_none() && self.patience.is_none()),
            "eval_every and patience need eval_data or eval_examples".into(),
        )?;
        Ok(TrainOptions {
            batch,
            pack: self.pack,
            micro_batch_tokens: self.micro_batch_tokens.unwrap_or(2048),
            normalization: self.loss_normalization.unwrap_or_default(),
            optimizer: OptimizerConfig {
                weight_decay: self.weight_decay.unwrap_or(0.0),
                decay_vectors: self.decay_vectors,
                betas: self.betas.unwrap_or(defaults.betas),
                lr_ratios: self.lora_plus.map(|ratio| ("lora_B.weight".to_owned(), ratio)).into_iter().collect(),
                ..defaults
            },
            schedule,
            clip: Some(self.clip.unwrap_or(1.0)).filter(|clip| *clip != 0.0),
            seed: self.seed,
            evaluation: is_evaluated
                .then(|| Evaluation { every: self.eval_every.unwrap_or((steps / 10).max(1)), patience: self.patience }),
            checkpointing: if self.no_gradient_checkpointing { Checkpointing::Off } else { Checkpointing::PerBlock },
            ..TrainOptions::new(steps, lr)
        })
    }
}
