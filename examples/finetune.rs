//! Fine-tunes a model with LoRA on a file of examples, and writes an adapter in PEFT's format.
//!
//! `cargo run --example finetune -- --model EleutherAI/pythia-410m --data examples.jsonl --out runs/first`

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use clap::{Parser, ValueEnum};
use pricket::loading::Precision;
use pricket::nn::Progress;
use pricket::train::{
    Bias, Checkpointing, Initial, Lora, LoraConfig, Normalization, OptimizerConfig, Rule, Sample, Schedule, Select,
    TrainOptions, TrainTarget, Trainer, Tuned, read_records,
};
use pricket::weights::counted;
use pricket::{Loader, Pricket};
use serde_json::json;

/// Fine-tune a model with LoRA, or all of its weights with --full. The examples are JSON lines with the keys {"text"},
/// {"prompt", "completion"}, {"instruction", "context", "response"}, {"messages"} or {"input_ids", "labels"}. Prompts
/// are not counted in the loss.
#[derive(Parser)]
#[command(version)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag")]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// JSON lines file with the examples
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Directory for the adapter, the checkpoints and log.jsonl
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
    /// Continue the run in --out from its last checkpoint
    #[arg(long)]
    resume: bool,
    /// Prompt format of instructions and messages: a name listed by `chat --formats`, a file, or auto for the model's
    /// own format
    #[arg(long, value_name = "NAME", default_value = "auto")]
    prompt_format: String,
    /// Maximum number of tokens per example, at least 2. Longer examples are truncated [default: the model's context,
    /// at most 2048]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Do not add an end token after each response
    #[arg(long)]
    no_end_token: bool,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Train all weights in f32 and write a whole model instead of an adapter
    #[arg(long, conflicts_with_all = LORA_ARGS)]
    full: bool,
    /// Start from random weights in the shape of this config.json. Requires --full and --tokenizer
    #[arg(long, value_name = "CONFIG", requires_all = ["full", "tokenizer"], conflicts_with = "model")]
    from_scratch: Option<PathBuf>,
    /// Print one JSON object per training step instead of text
    #[arg(long)]
    json: bool,
}

/// Flags that apply to adapters only.
const LORA_ARGS: [&str; 13] = [
    "initial",
    "lora_plus",
    "rank",
    "alpha",
    "dropout",
    "targets",
    "exclude",
    "layers",
    "rslora",
    "dora",
    "modules_to_save",
    "bias",
    "from",
];

/// Settings of the adapter.
#[derive(clap::Args)]
struct LoraArgs {
    /// Rank of the adapter, from 1 to 65536
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// LoRA alpha: the change is scaled by alpha / rank [default: twice the rank]
    #[arg(long)]
    alpha: Option<f64>,
    /// Dropout rate of the adapter's input, from 0 to below 1
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Layers to adapt: names or ends of names, all-linear, or "re:" and a regular expression
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "all-linear")]
    targets: Vec<String>,
    /// Layers not to adapt: names or ends of names, or "re:" and a regular expression
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    exclude: Vec<String>,
    /// Indices of the transformer blocks to adapt, such as 0,1,5 [default: all]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    layers: Vec<usize>,
    /// Scale the change by alpha / sqrt(rank) (rsLoRA)
    #[arg(long)]
    rslora: bool,
    /// Also train the magnitude of each row (DoRA)
    #[arg(long)]
    dora: bool,
    /// Modules to train in full and store with the adapter, such as embed_in,embed_out
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    modules_to_save: Vec<String>,
    /// Biases to train: none, all, or those of the adapted layers
    #[arg(long, value_enum, default_value_t = BiasArg::None)]
    bias: BiasArg,
    /// Distribution of the initial values of the A matrices
    #[arg(long, value_enum, default_value_t = InitialArg::Kaiming)]
    initial: InitialArg,
    /// Continue training this adapter, with its settings, instead of a new one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["rank", "alpha", "dropout", "targets", "exclude", "layers", "rslora", "dora", "modules_to_save", "bias", "initial"])]
    from: Option<PathBuf>,
}

/// Settings of the run.
#[derive(clap::Args)]
struct RunArgs {
    /// Number of training steps [default: computed from --epochs]
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Number of passes over the examples, such as 0.5
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    epochs: f64,
    /// Number of examples per training step
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// Maximum number of tokens computed at once. Gradients of larger batches are accumulated
    #[arg(long, value_name = "N", default_value_t = 2048)]
    micro_batch_tokens: usize,
    /// Learning rate [default: 2e-4, or 2e-5 for LION]
    #[arg(long)]
    lr: Option<f64>,
    /// Optimizer: adamw, decoupled_adamw, lion, or decoupled_lionw
    #[arg(long, value_name = "NAME", default_value = "adamw")]
    optimizer: Rule,
    /// Decay rates of the optimizer's two moments [default: 0.9,0.999 for adamw; 0.9,0.95 for decoupled_adamw; 0.9,0.99
    /// for LION]
    #[arg(long, value_name = "B1,B2", value_delimiter = ',')]
    betas: Vec<f64>,
    /// Weight decay of matrices
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// Apply weight decay to biases and norms as well
    #[arg(long)]
    decay_vectors: bool,
    /// Learning rate of the B matrices, as a multiple of --lr (LoRA+)
    #[arg(long, value_name = "RATIO")]
    lora_plus: Option<f64>,
    /// Learning-rate schedule, by its name in transformers or composer, such as constant, linear, cosine or
    /// warmup_stable_decay
    #[arg(long, value_name = "NAME", default_value = "linear")]
    schedule: String,
    /// Final learning rate as a fraction of --lr, from 0 to 1, for schedules that have one
    #[arg(long, value_name = "SHARE")]
    min_lr: Option<f64>,
    /// Number of warm-up steps, during which the learning rate rises from 0 [default: 3 % of the steps]
    #[arg(long, value_name = "N")]
    warmup: Option<u64>,
    /// Maximum gradient norm; 0 for no clipping
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// Normalization of the loss: mean over all tokens of a step, or mean of the micro-batch means
    #[arg(long, value_enum, default_value_t = NormalizeArg::Tokens)]
    normalize: NormalizeArg,
    /// Turn off gradient checkpointing, the recomputation of blocks in the backward pass: faster, with several times
    /// the memory
    #[arg(long)]
    no_checkpointing: bool,
    /// Random seed of the initial values, the order of the examples, and the dropout
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of training steps between checkpoints; 0 for no checkpoints
    #[arg(long, value_name = "N", default_value_t = 100)]
    save_every: u64,
    /// Number of checkpoints to keep, at least 1
    #[arg(long, value_name = "N", default_value_t = 2)]
    keep: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum BiasArg {
    None,
    All,
    LoraOnly,
}

#[derive(Clone, Copy, ValueEnum)]
enum InitialArg {
    Kaiming,
    Gaussian,
}

#[derive(Clone, Copy, ValueEnum)]
enum NormalizeArg {
    Tokens,
    MicroBatches,
}

impl LoraArgs {
    fn config(&self, pricket: &Pricket) -> LoraConfig {
        let select = |names: &[String]| match names {
            [] => None,
            [name] if name == "all-linear" => Some(Select::AllLinear),
            // Clap splits the pattern at its commas.
            [first, ..] if first.starts_with("re:") => Some(Select::Pattern(names.join(",")[3..].to_owned())),
            names => Some(Select::Names(names.to_vec())),
        };
        let provenance = pricket.provenance();
        LoraConfig {
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f64),
            dropout: self.dropout,
            targets: select(&self.targets).unwrap_or(Select::AllLinear),
            exclude: select(&self.exclude),
            layers: Some(self.layers.clone()).filter(|layers| !layers.is_empty()),
            rslora: self.rslora,
            dora: self.dora,
            modules_to_save: self.modules_to_save.clone(),
            bias: match self.bias {
                BiasArg::None => Bias::None,
                BiasArg::All => Bias::All,
                BiasArg::LoraOnly => Bias::LoraOnly,
            },
            initial: match self.initial {
                InitialArg::Kaiming => Initial::Kaiming,
                InitialArg::Gaussian => Initial::Gaussian,
            },
            base: provenance.repo.clone(),
            revision: provenance.repo.as_ref().and(provenance.revision.clone()).filter(|revision| revision != "main"),
            ..LoraConfig::default()
        }
    }
}

impl RunArgs {
    fn options(&self, examples: usize) -> anyhow::Result<TrainOptions> {
        ensure!(self.batch > 0, "--batch is 0; expected at least 1");
        ensure!(self.epochs > 0.0 && self.epochs.is_finite(), "--epochs is {}; expected more than 0", self.epochs);
        let epochs = (self.epochs * examples as f64 / self.batch as f64).ceil() as u64;
        let steps = self.steps.unwrap_or(epochs.max(1));
        let is_lion = matches!(self.optimizer, Rule::Lion | Rule::DecoupledLion);
        let lr = self.lr.unwrap_or(if is_lion { 2e-5 } else { 2e-4 });
        let warmup = self.warmup.unwrap_or(steps * 3 / 100);
        let defaults = OptimizerConfig::new(self.optimizer, lr);
        let betas = match self.betas[..] {
            [] => defaults.betas,
            [first, second] => (first, second),
            _ => bail!("--betas has {} numbers; expected two, such as 0.9,0.95", self.betas.len()),
        };
        let mut schedule = Schedule::named(&self.schedule, warmup, steps)?;
        if let Some(share) = self.min_lr {
            ensure!((0.0..=1.0).contains(&share), "--min-lr is {share}; expected 0 to 1");
            schedule = schedule.with_min(share)?;
        }
        let ratios = self.lora_plus.map(|ratio| ("lora_B.weight".to_owned(), ratio));
        Ok(TrainOptions {
            batch: self.batch,
            micro_batch_tokens: self.micro_batch_tokens,
            normalization: match self.normalize {
                NormalizeArg::Tokens => Normalization::Tokens,
                NormalizeArg::MicroBatches => Normalization::MicroBatches,
            },
            optimizer: OptimizerConfig {
                weight_decay: self.weight_decay,
                decay_vectors: self.decay_vectors,
                betas,
                lr_ratios: ratios.into_iter().collect(),
                ..defaults
            },
            schedule,
            clip: Some(self.clip).filter(|clip| *clip != 0.0),
            seed: self.seed,
            checkpointing: if self.no_checkpointing { Checkpointing::Off } else { Checkpointing::PerBlock },
            ..TrainOptions::new(steps, lr)
        })
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.model.compute.limit_candle_threads();
    common::finish(run(&args))
}

fn run(args: &Args) -> anyhow::Result<()> {
    let records = read_records(&args.data)?;
    let shown = args.out.display();
    match holds(&args.out) {
        Held::Checkpoints if !args.resume => {
            bail!("{shown} already holds a run; continue it with --resume, or change --out")
        }
        Held::Result => bail!("{shown} holds an adapter or a model, but no checkpoint to resume; change --out"),
        _ => {}
    }
    let compute = &args.model.compute;
    ensure!(
        compute.adapter.is_empty(),
        "--adapter cannot be used in training; use --from to continue training an adapter"
    );
    ensure!(!args.full || compute.dtype == Precision::Auto, "--dtype cannot be used with --full, which trains in f32");
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let log = args.out.join("log.jsonl");
    common::check_output(&log, &[])?;
    common::interruptible()?;

    let pricket = load(args)?;
    let format = if args.prompt_format == "auto" {
        pricket.prompt_format().clone()
    } else {
        pricket::text::prompt_format(&args.prompt_format)?
    };
    let info = pricket.info();
    let limit = info.context.unwrap_or(usize::MAX);
    let length = args.max_length.unwrap_or(limit.min(2048));
    ensure!(length >= 2, "--max-length is {length}; expected 2 or more");
    ensure!(length <= limit, "--max-length is {length}; the model's context is {limit}");
    let end: Vec<u32> = pricket.eos_ids().first().copied().filter(|_| !args.no_end_token).into_iter().collect();
    let tokenizer = pricket.tokenizer().ok();
    let (mut samples, mut cut, mut empty) = (Vec::new(), 0, 0);
    for (i, record) in records.iter().enumerate() {
        let whole = record.sample(tokenizer, &format, &end);
        let whole = whole.with_context(|| format!("{}: record {}", args.data.display(), i + 1))?;
        cut += usize::from(whole.ids().len() > length);
        let sample = whole.truncated(length);
        if sample.counted() == 0 { empty += 1 } else { samples.push(sample) }
    }
    ensure!(
        !samples.is_empty(),
        "{}: every response begins after --max-length {length}; expected at least one before",
        args.data.display()
    );
    describe(&samples, cut, empty, length, &format.name);

    let options = args.run.options(samples.len())?;
    let (product, tuned) = if args.full { whole(&pricket) } else { adapter(args, &pricket)? };
    let mut trainer = Trainer::new(product, tuned, samples, options)?;
    if args.resume {
        match trainer.resume(&args.out)? {
            Some(checkpoint) => common::tell(format_args!("continuing from {}", checkpoint.display())),
            None => common::tell(format_args!("{} has no checkpoint; starting a new run", args.out.display())),
        }
    }
    trim_log(&log, trainer.steps())?;
    train(args, &pricket, &mut trainer, &log)
}

/// Loads the model to train.
fn load(args: &Args) -> anyhow::Result<Pricket> {
    if let Some(path) = &args.from_scratch {
        let config = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let config = serde_json::from_str(&config).with_context(|| path.display().to_string())?;
        let loader = Loader::untrained(config, args.run.seed).with_context(|| path.display().to_string())?;
        return Ok(args.model.load_from(loader.train())?);
    }
    if args.full {
        let pricket = args.model.load_from(args.model.source("tiny")?.train())?;
        ensure!(
            !pricket.names_on_file().is_empty(),
            "--full requires a checkpoint in Hub layout; GGUF and GGML files cannot be trained in full"
        );
        return Ok(pricket);
    }
    Ok(args.model.load("tiny")?)
}

/// Returns the model and all its parameters, for training with `--full`.
fn whole(pricket: &Pricket) -> (TrainTarget, Tuned) {
    let (model, parameters) = (pricket.model(), pricket.parameters().to_vec());
    let tuned = Tuned { model, parameters, passes: Arc::default() };
    (TrainTarget::Model { config: pricket.config().clone() }, tuned)
}

/// Returns a new adapter, or the adapter of `--from`, attached to the model.
fn adapter(args: &Args, pricket: &Pricket) -> anyhow::Result<(TrainTarget, Tuned)> {
    let base = pricket.base()?;
    let lora = match &args.lora.from {
        Some(from) => Lora::read(from)?,
        None => Lora::new(args.lora.config(pricket), &base, args.run.seed)?,
    };
    let tuned = lora.train(&base, args.run.seed)?;
    common::tell(format_args!(
        "training {} of rank {} on {}: {}",
        if lora.config().dora { "DoRA" } else { "LoRA" },
        lora.config().rank,
        counted(lora.modules().count(), "layer"),
        counted(lora.weights(), "trained weight")
    ));
    Ok((TrainTarget::Adapter(Box::new(lora)), tuned))
}

/// Runs the training steps, and writes the log, the checkpoints and the result.
fn train(args: &Args, pricket: &Pricket, trainer: &mut Trainer, log: &Path) -> anyhow::Result<()> {
    let total = trainer.options().steps;
    let mut log = std::fs::File::options().create(true).append(true).open(log)?;
    let mut out = std::io::stdout().lock();
    let (start, first, mut tokens) = (Instant::now(), trainer.steps(), 0);
    while !trainer.is_done() {
        if common::Hidden.cancelled() {
            let path = trainer.save(&args.out, args.run.keep)?;
            common::tell(format_args!("stopped; wrote {}; continue with --resume", path.display()));
            return Ok(());
        }
        let report = trainer.advance()?;
        tokens += report.tokens;
        let seconds = start.elapsed().as_secs_f64();
        let rate = tokens as f64 / seconds;
        let line = json!({
            "step": report.step, "loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm,
            "tokens": report.tokens, "counted": report.counted, "tokens_per_second": rate,
        });
        writeln!(log, "{line}")?;
        if args.json {
            writeln!(out, "{line}")?;
        } else if report.step.is_multiple_of((total / 50).max(1)) || report.step == total {
            let left = seconds / (report.step - first) as f64 * (total - report.step) as f64;
            writeln!(
                out,
                "step {}/{total}  loss {:.4}  lr {:.2e}  gradient {:.3}  {rate:.0} tokens/s  {} left",
                report.step,
                report.loss,
                report.lr,
                report.grad_norm,
                duration(left)
            )?;
        }
        if args.run.save_every > 0 && report.step.is_multiple_of(args.run.save_every) && !trainer.is_done() {
            trainer.save(&args.out, args.run.keep)?;
        }
    }
    if args.run.save_every > 0 {
        trainer.save(&args.out, args.run.keep)?;
    }
    trainer.write(&args.out)?;
    if args.full {
        let files = pricket.tokenizer().ok().map(pricket::lm::Tokenizer::to_files).transpose()?;
        for (name, bytes) in files.into_iter().flatten() {
            common::write_whole(&args.out.join(name), &bytes)?;
        }
        common::tell(format_args!("wrote {}; load it with --model {0}", args.out.display()));
    } else {
        common::tell(format_args!("wrote {}; load it with --adapter {0}", args.out.display()));
    }
    Ok(())
}

/// Prints a summary of the examples.
fn describe(samples: &[Sample], cut: usize, empty: usize, length: usize, format: &str) {
    let tokens: usize = samples.iter().map(|sample| sample.ids().len()).sum();
    let all: usize = samples.iter().map(Sample::counted).sum();
    let longest = samples.iter().map(|sample| sample.ids().len()).max().unwrap_or(0);
    common::tell(format_args!(
        "{}, {} ({all} counted in the loss), at most {longest} per example; prompt format {format}",
        counted(samples.len(), "example"),
        counted(tokens, "token")
    ));
    if cut > 0 {
        common::tell(format_args!("warning: {} truncated to {length} tokens", counted(cut, "example")));
    }
    if empty > 0 {
        common::tell(format_args!(
            "warning: {} skipped, because the prompt alone is longer",
            counted(empty, "example")
        ));
    }
}

/// The content of an output directory.
enum Held {
    Checkpoints,
    Result,
    Nothing,
}

/// Returns the content of an output directory.
fn holds(directory: &Path) -> Held {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    if names.iter().any(|name| name.starts_with("checkpoint-")) {
        return Held::Checkpoints;
    }
    let is_result = |name: &String| ["adapter_config.json", "config.json"].contains(&name.as_str());
    if names.iter().any(is_result) { Held::Result } else { Held::Nothing }
}

/// Removes the log lines of steps that will be repeated.
fn trim_log(path: &Path, steps: u64) -> anyhow::Result<()> {
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(()) };
    let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64();
    let kept: String = text
        .lines()
        .filter(|line| step(line).is_some_and(|step| step <= steps))
        .flat_map(|line| [line, "\n"])
        .collect();
    common::write_whole(path, &kept)
}

/// Formats a duration, such as `3 min 20 s`.
fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}
