//! The flags of `finetune`. Those that a recipe can hold are collected as JSON and replace the recipe's keys.

use std::path::PathBuf;

use anyhow::ensure;
use clap::{Parser, ValueEnum};
use pricket::train::{Recipe, Rule};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::common::ModelArgs;

/// Fine-tune a model with LoRA, or all of its weights with --full. The examples are JSON lines, a JSON array or parquet
/// with the keys {"text"}, {"prompt", "completion"}, {"instruction", "context", "response"}, {"messages"} or
/// {"input_ids", "labels"}. Prompts are not counted in the loss.
#[derive(Parser)]
#[command(version)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Settings of the run: the name of a built-in recipe (dolly, dolly-lora, redpajama-chat, mpt-lion) or a TOML file,
    /// described in docs/fine-tuning.md. Flags on the command line override its keys
    #[arg(long, value_name = "NAME")]
    pub(crate) recipe: Option<String>,
    /// Directory for the adapter, the checkpoints, log.jsonl and loss.svg
    #[arg(long, short, value_name = "DIR", required_unless_present = "estimate")]
    pub(crate) out: Option<PathBuf>,
    /// Continue the run in --out from its last checkpoint
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print the estimated memory and time of the run, and do not train. The time is measured on one short example
    #[arg(long)]
    pub(crate) estimate: bool,
    /// Write the weights of the step with the lowest evaluation loss instead of the last ones. Implied by --patience
    #[arg(long)]
    pub(crate) best: bool,
    /// Train even if the estimated memory exceeds the free memory
    #[arg(long)]
    pub(crate) allow_any_memory: bool,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) lora: LoraArgs,
    /// Adapter to continue training, with its settings, instead of a new one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["full", "rank", "alpha", "dropout", "targets", "exclude", "layers", "rslora", "dora", "modules_to_save", "bias", "init_lora_weights"])]
    pub(crate) from_adapter: Option<PathBuf>,
    /// Train a new model with random weights in the shape of this config.json. Requires --full and --tokenizer
    #[arg(long, value_name = "CONFIG", requires = "tokenizer", conflicts_with = "model")]
    pub(crate) from_scratch: Option<PathBuf>,
    /// Print one JSON object per training step instead of text
    #[arg(long, conflicts_with = "estimate")]
    pub(crate) json: bool,
}

impl Args {
    /// Returns the recipe with the flags of the command line.
    pub(crate) fn recipe(&self) -> anyhow::Result<Recipe> {
        let recipe = self.recipe.as_deref().map(pricket::suites::recipe).transpose()?.unwrap_or_default();
        let mut flags = given(&self.run)?;
        let adapter = self.lora.keys()?;
        let is_full = recipe.full || flags.contains_key("full");
        ensure!(
            !is_full || adapter.is_empty(),
            "the recipe trains all weights, so settings of an adapter have no effect"
        );
        if let Some(from) = &self.from_adapter {
            let from = from.display();
            ensure!(!is_full, "the recipe trains all weights, so --from-adapter {from} has no effect");
            ensure!(recipe.adapter.is_empty(), "the recipe sets an adapter, which --from-adapter {from} would replace");
        }
        if !adapter.is_empty() {
            flags.insert("adapter".into(), Value::Object(adapter));
        }
        let recipe = recipe.with(&Value::Object(flags))?;
        if !recipe.full && self.from_adapter.is_none() {
            recipe.lora()?;
        }
        Ok(recipe)
    }
}

/// Returns the flags that were given, as JSON.
fn given(flags: &impl Serialize) -> anyhow::Result<Map<String, Value>> {
    let Value::Object(all) = serde_json::to_value(flags)? else { return Ok(Map::new()) };
    let is_given = |value: &Value| !matches!(value, Value::Null | Value::Bool(false)) && *value != json!([]);
    Ok(all.into_iter().filter(|(_, value)| is_given(value)).collect())
}

/// Flags that are keys of a [`Recipe`].
#[derive(clap::Args, Serialize)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag")]
pub(crate) struct RunArgs {
    /// Examples: a JSON lines, JSON or parquet file, also compressed (.gz, .zst); or a dataset of the Hub, such as
    /// databricks/databricks-dolly-15k. Repeat the flag to combine several
    #[arg(long, value_name = "DATA")]
    data: Vec<String>,
    /// Split of the dataset in --data [default: train]
    #[arg(long, value_name = "NAME")]
    split: Option<String>,
    /// Prompt format of instructions and messages: a name listed by `chat --formats`, a TOML file (its first format is
    /// used), or auto for the model's own format [default: auto]
    #[arg(long, value_name = "NAME")]
    prompt_format: Option<String>,
    /// Maximum number of tokens per example, at least 2. Longer examples are truncated [default: the model's context,
    /// at most 2048]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Do not add an end token after each response
    #[arg(long)]
    no_end_token: bool,
    /// Leave out examples that repeat an earlier one
    #[arg(long)]
    drop_duplicates: bool,
    /// Combine examples into packs of at most this number of tokens, so that all training steps have about equally many
    /// tokens. Examples in a pack do not attend to each other. --batch then counts packs
    #[arg(long, value_name = "TOKENS")]
    pack: Option<usize>,
    /// Examples for evaluation, in the forms of --data. Repeat the flag to combine several
    #[arg(long, value_name = "DATA", conflicts_with = "eval_examples")]
    eval_data: Vec<String>,
    /// Split of the dataset in --eval-data [default: validation]
    #[arg(long, value_name = "NAME")]
    eval_split: Option<String>,
    /// Number of examples to take out of --data at random, for evaluation; 0 for no evaluation
    #[arg(long, value_name = "N")]
    eval_examples: Option<usize>,
    /// Number of training steps between evaluations, at least 1 [default: a tenth of the steps]
    #[arg(long, value_name = "N")]
    eval_every: Option<u64>,
    /// End the run after this number of evaluations in a row without a lower loss, at least 1, and write the best
    /// weights
    #[arg(long, value_name = "N")]
    patience: Option<u32>,
    /// Number of training steps [default: computed from --epochs]
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Number of passes over the examples, such as 0.5 [default: 1]
    #[arg(long, value_parser = finite, value_name = "N")]
    epochs: Option<f64>,
    /// Number of examples per training step, or of packs with --pack [default: 16]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Number of tokens computed at once. Gradients of larger batches are accumulated; a longer example is computed
    /// alone [default: 2048]
    #[arg(long, value_name = "N")]
    micro_batch_tokens: Option<usize>,
    /// Learning rate [default: 2e-4, or 2e-5 for LION]
    #[arg(long, value_parser = finite)]
    lr: Option<f64>,
    /// Optimizer: adamw, decoupled_adamw, lion, or decoupled_lionw [default: adamw]
    #[arg(long, value_name = "NAME")]
    optimizer: Option<Rule>,
    /// Decay rates of the optimizer: of the two moments of Adam, or of the update and the moment of LION [default:
    /// 0.9,0.999 for adamw; 0.9,0.95 for decoupled_adamw; 0.9,0.99 for LION]
    #[arg(long, value_name = "B1,B2", value_parser = pair)]
    betas: Option<(f64, f64)>,
    /// Weight decay [default: 0]
    #[arg(long, value_parser = finite)]
    weight_decay: Option<f64>,
    /// Apply weight decay to biases and norms too
    #[arg(long)]
    decay_vectors: bool,
    /// Learning rate of the B matrices as a multiple of --lr (LoRA+)
    #[arg(long, value_parser = finite, value_name = "RATIO", conflicts_with = "full")]
    lora_plus: Option<f64>,
    /// Learning-rate schedule: linear, constant, constant_with_warmup, cosine, cosine_with_min_lr, cosine_with_restarts,
    /// polynomial, inverse_sqrt or warmup_stable_decay as in transformers, composer_cosine_with_warmup or
    /// composer_linear_decay_with_warmup as in composer [default: linear]
    #[arg(long, value_name = "NAME")]
    schedule: Option<String>,
    /// Final learning rate as a fraction of --lr, from 0 to 1, for cosine, cosine_with_min_lr, polynomial,
    /// warmup_stable_decay and the composer schedules; an error with others [default: 0; 0.1 for cosine_with_min_lr]
    #[arg(long, value_parser = finite, value_name = "FRACTION")]
    min_lr_rate: Option<f64>,
    /// Number of warm-up steps, during which the learning rate rises linearly. The schedule constant has none [default:
    /// 3 % of the steps]
    #[arg(long, value_name = "N")]
    warmup: Option<u64>,
    /// Maximum gradient norm; 0 for no clipping [default: 1]
    #[arg(long, value_parser = finite)]
    clip: Option<f64>,
    /// Normalization of the loss: mean over all tokens of a step, or mean of the micro-batch means [default: tokens]
    #[arg(long, value_enum)]
    loss_normalization: Option<NormalizationArg>,
    /// Turn off gradient checkpointing, which recomputes each block in the backward pass. Training without it is
    /// faster, but takes several times the memory
    #[arg(long)]
    no_gradient_checkpointing: bool,
    /// Random seed of the initial values, the order of the examples, the evaluation split, and the dropout [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// Number of training steps between checkpoints; 0 for no checkpoints [default: 100]
    #[arg(long, value_name = "N")]
    save_every: Option<u64>,
    /// Number of checkpoints to keep, at least 1 [default: 2]
    #[arg(long, value_name = "N")]
    keep: Option<usize>,
    /// Train all weights in f32 and write a whole model instead of an adapter
    #[arg(long, conflicts_with_all = ["rank", "alpha", "dropout", "targets", "exclude", "layers", "rslora", "dora", "modules_to_save", "bias", "init_lora_weights"])]
    full: bool,
}

/// Parses a number that is not infinite or NaN.
fn finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| "expected a finite number".into())
}

/// Parses two numbers with a comma between them.
fn pair(text: &str) -> Result<(f64, f64), String> {
    let parse = |text: &str| finite(text.trim()).ok();
    let parsed = text.split_once(',').and_then(|(first, second)| Some((parse(first)?, parse(second)?)));
    parsed.ok_or_else(|| "expected two numbers, such as 0.9,0.95".into())
}

/// Settings of the adapter.
#[derive(clap::Args)]
pub(crate) struct LoraArgs {
    /// Rank of the adapter, from 1 to 65536 [default: 16]
    #[arg(long)]
    rank: Option<usize>,
    /// LoRA alpha: the low-rank product BA is multiplied by alpha / rank [default: twice the rank]
    #[arg(long, value_parser = finite)]
    alpha: Option<f64>,
    /// Dropout rate of the adapter's input, from 0 to below 1 [default: 0]
    #[arg(long, value_parser = finite)]
    dropout: Option<f64>,
    /// Modules to adapt: all-linear (every linear layer except the head); full names or their last components, such as
    /// query_key_value, separated by commas; or re:REGEX, which must match the full name [default: all-linear]
    #[arg(long, value_name = "NAMES")]
    targets: Option<String>,
    /// Modules not to adapt: names or re:REGEX, as for --targets
    #[arg(long, value_name = "NAMES")]
    exclude: Option<String>,
    /// Indices of the transformer blocks to adapt, such as 0,1,5 [default: all]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    layers: Vec<usize>,
    /// Multiply BA by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)
    #[arg(long)]
    rslora: bool,
    /// Also train the magnitude of each row (DoRA)
    #[arg(long)]
    dora: bool,
    /// Modules to train in full and store with the adapter, such as embed_in,embed_out
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    modules_to_save: Vec<String>,
    /// Biases to train: none, all, or those of the adapted layers [default: none]
    #[arg(long, value_enum)]
    bias: Option<BiasArg>,
    /// Distribution of the initial values of the A matrices [default: kaiming]
    #[arg(long, value_enum)]
    init_lora_weights: Option<InitialArg>,
}

impl LoraArgs {
    /// Returns the flags that were given, under PEFT's keys.
    fn keys(&self) -> anyhow::Result<Map<String, Value>> {
        let select = |names: &str| match names.strip_prefix("re:") {
            Some(pattern) => json!(pattern),
            None if names == "all-linear" => json!(names),
            None => json!(names.split(',').map(str::trim).collect::<Vec<_>>()),
        };
        given(&json!({
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets.as_deref().map(select),
            "exclude_modules": self.exclude.as_deref().map(select),
            "layers_to_transform": self.layers,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "modules_to_save": self.modules_to_save,
            "bias": self.bias,
            "init_lora_weights": self.init_lora_weights.map(|initial| match initial {
                InitialArg::Kaiming => json!(true),
                InitialArg::Gaussian => json!("gaussian"),
            }),
        }))
    }
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum BiasArg {
    None,
    All,
    #[value(alias = "lora_only")]
    LoraOnly,
}

#[derive(Clone, Copy, ValueEnum)]
enum InitialArg {
    Kaiming,
    Gaussian,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum NormalizationArg {
    Tokens,
    #[value(alias = "micro_batches")]
    MicroBatches,
}
