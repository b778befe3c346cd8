//! Fine-tunes a model with LoRA on a file of examples, and writes an adapter that PEFT reads too.
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
    Bias, Checkpointing, Initial, Lora, LoraConfig, Normalization, OptimizerConfig, Product, Rule, Sample, Schedule,
    Select, TrainOptions, Trainer, Tuned, read_records,
};
use pricket::weights::counted;
use pricket::{Loader, Pricket};
use serde_json::json;

/// Fine-tunes a model with LoRA. The data are JSON lines: {"text"}, {"prompt", "completion"}, {"instruction", "context",
/// "response"}, {"messages"} or {"input_ids", "labels"}; prompts are not counted in the loss.
#[derive(Parser)]
#[command(version)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag")]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// The examples, one JSON object a line
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Directory for the adapter, its checkpoints and log.jsonl
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
    /// Continues the run in --out from its last checkpoint
    #[arg(long)]
    resume: bool,
    /// How instructions and messages are spelled: a format's name, a file of one, or auto for the model's own
    #[arg(long, value_name = "NAME", default_value = "auto")]
    prompt_format: String,
    /// Token ids that are kept of an example [default: what the model reads, at most 2048]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Writes no end token after each response
    #[arg(long)]
    no_end_token: bool,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Trains all weights and writes a whole model, instead of an adapter
    #[arg(long, conflicts_with_all = LORA_ARGS)]
    full: bool,
    /// Begins from random weights of this config.json, with --full and a --tokenizer
    #[arg(long, value_name = "CONFIG", requires_all = ["full", "tokenizer"], conflicts_with = "model")]
    from_scratch: Option<PathBuf>,
    /// One JSON object for each step on standard output instead of text
    #[arg(long)]
    json: bool,
}

/// Flags that say something of an adapter.
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

/// The adapter.
#[derive(clap::Args)]
struct LoraArgs {
    /// Rank
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Scale of the change, divided by the rank [default: twice the rank]
    #[arg(long)]
    alpha: Option<f64>,
    /// Share of the inputs of an adapter that is dropped
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Layers to adapt: names or ends of names, all-linear, or a regular expression after "re:"
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "all-linear")]
    targets: Vec<String>,
    /// Layers not to adapt, likewise
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    exclude: Vec<String>,
    /// Numbers of the blocks to adapt [default: all]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    layers: Vec<usize>,
    /// Scales by alpha / sqrt(rank)
    #[arg(long)]
    rslora: bool,
    /// Learns the length of each row as well (DoRA)
    #[arg(long)]
    dora: bool,
    /// Modules that are trained in full and stored with the adapter, such as embed_in,embed_out
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    modules_to_save: Vec<String>,
    /// Biases that are trained
    #[arg(long, value_enum, default_value_t = BiasArg::None)]
    bias: BiasArg,
    /// First values of the adapter
    #[arg(long, value_enum, default_value_t = InitialArg::Kaiming)]
    initial: InitialArg,
    /// Begins from this adapter, with its settings, instead of a new one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["rank", "alpha", "dropout", "targets", "exclude", "layers", "rslora", "dora", "modules_to_save", "bias", "initial"])]
    from: Option<PathBuf>,
}

/// The run.
#[derive(clap::Args)]
struct RunArgs {
    /// Optimizer steps [default: as --epochs says]
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Times that the data are read
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    epochs: f64,
    /// Examples of a step
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// Token ids that are computed at once; larger steps are accumulated
    #[arg(long, value_name = "N", default_value_t = 2048)]
    micro_batch_tokens: usize,
    /// Learning rate [default: 2e-4, or 2e-5 for LION]
    #[arg(long)]
    lr: Option<f64>,
    /// Optimizer: adamw, decoupled_adamw, lion, or decoupled_lionw
    #[arg(long, value_name = "NAME", default_value = "adamw")]
    optimizer: Rule,
    /// Decay rates of the optimizer's moments [default: those of the library that it comes from]
    #[arg(long, value_name = "B1,B2", value_delimiter = ',')]
    betas: Vec<f64>,
    /// Decay of matrices
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// Decays biases and norms as well
    #[arg(long)]
    decay_vectors: bool,
    /// Learning rate of the B matrices as a multiple of --lr (LoRA+)
    #[arg(long, value_name = "RATIO")]
    lora_plus: Option<f64>,
    /// Learning rate over the run, by transformers' or composer's name: constant, linear, cosine, warmup_stable_decay, ..
    #[arg(long, value_name = "NAME", default_value = "linear")]
    schedule: String,
    /// Share of the learning rate that is left at the end, for schedules that have one
    #[arg(long, value_name = "SHARE")]
    min_lr: Option<f64>,
    /// Steps in which the rate rises from 0 [default: 3 % of the steps]
    #[arg(long, value_name = "N")]
    warmup: Option<u64>,
    /// Largest length of the gradient; 0 does not clip
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// Divides the loss of a step by its tokens, or averages over micro-batches
    #[arg(long, value_enum, default_value_t = NormalizeArg::Tokens)]
    normalize: NormalizeArg,
    /// Keeps all results for the backward pass: faster, and several times the memory
    #[arg(long)]
    no_checkpointing: bool,
    /// Decides the first values, the order of the data and dropout
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Writes a checkpoint every so many steps; 0 writes none
    #[arg(long, value_name = "N", default_value_t = 100)]
    save_every: u64,
    /// Checkpoints to keep
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
            // A pattern may have commas.
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
        ensure!(self.batch > 0, "--batch is 0; a step needs at least one example");
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
            _ => bail!("--betas has {} numbers; expected two, as 0.9,0.95", self.betas.len()),
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
            bail!("{shown}: holds a run already; --resume continues it, or give another --out")
        }
        Held::Result => bail!("{shown}: holds an adapter or a model, and no checkpoint of a run; give another --out"),
        _ => {}
    }
    let compute = &args.model.compute;
    ensure!(
        compute.adapter.is_empty(),
        "--adapter: a new adapter is trained on the model alone; --from trains one further"
    );
    ensure!(!args.full || compute.dtype == Precision::Auto, "--dtype: --full trains all weights in f32");
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
    ensure!(length <= limit, "--max-length is {length}; the model reads {limit} at most");
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
    ensure!(!samples.is_empty(), "{}: no response is within --max-length {length}", args.data.display());
    describe(&samples, cut, empty, length, &format.name);

    let options = args.run.options(samples.len())?;
    let (product, tuned) = if args.full { whole(&pricket) } else { adapter(args, &pricket)? };
    let mut trainer = Trainer::new(product, tuned, samples, options)?;
    if args.resume {
        match trainer.resume(&args.out)? {
            Some(checkpoint) => common::tell(format_args!("continuing from {}", checkpoint.display())),
            None => common::tell(format_args!("{}: has no checkpoint, beginning", args.out.display())),
        }
    }
    trim_log(&log, trainer.steps())?;
    train(args, &pricket, &mut trainer, &log)
}

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
            "--full: train a checkpoint in the Hub's layout, not a GGUF or GGML file"
        );
        return Ok(pricket);
    }
    Ok(args.model.load("tiny")?)
}

/// All weights, as they are trained.
fn whole(pricket: &Pricket) -> (Product, Tuned) {
    let (model, parameters) = (pricket.model(), pricket.parameters().to_vec());
    let tuned = Tuned { model, parameters, passes: Arc::default() };
    (Product::Model { config: pricket.config().clone() }, tuned)
}

/// A new adapter, or one that is trained on.
fn adapter(args: &Args, pricket: &Pricket) -> anyhow::Result<(Product, Tuned)> {
    let base = pricket.base()?;
    let lora = match &args.lora.from {
        Some(from) => Lora::read(from)?,
        None => Lora::new(args.lora.config(pricket), &base, args.run.seed)?,
    };
    let tuned = lora.train(&base, args.run.seed)?;
    common::tell(format_args!(
        "{} of rank {} on {}: {}",
        if lora.config().dora { "DoRA" } else { "LoRA" },
        lora.config().rank,
        counted(lora.modules().count(), "layer"),
        counted(lora.weights(), "trained weight")
    ));
    Ok((Product::Adapter(Box::new(lora)), tuned))
}

fn train(args: &Args, pricket: &Pricket, trainer: &mut Trainer, log: &Path) -> anyhow::Result<()> {
    let total = trainer.options().steps;
    let mut log = std::fs::File::options().create(true).append(true).open(log)?;
    let mut out = std::io::stdout().lock();
    let (start, first, mut tokens) = (Instant::now(), trainer.steps(), 0);
    while !trainer.is_done() {
        if common::Hidden.cancelled() {
            let path = trainer.save(&args.out, args.run.keep)?;
            common::tell(format_args!("stopped; {} is written, and --resume continues", path.display()));
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
        common::tell(format_args!("wrote {}; --model {0} uses it", args.out.display()));
    } else {
        common::tell(format_args!("wrote {}; --adapter {0} uses it", args.out.display()));
    }
    Ok(())
}

/// Says what is trained on.
fn describe(samples: &[Sample], cut: usize, empty: usize, length: usize, format: &str) {
    let tokens: usize = samples.iter().map(|sample| sample.ids().len()).sum();
    let all: usize = samples.iter().map(Sample::counted).sum();
    let longest = samples.iter().map(|sample| sample.ids().len()).max().unwrap_or(0);
    common::tell(format_args!(
        "{}, {} ({all} count), the longest {longest}; prompts in the format {format}",
        counted(samples.len(), "example"),
        counted(tokens, "token")
    ));
    if cut > 0 {
        common::tell(format_args!("warning: {} cut at {length} tokens", counted(cut, "example")));
    }
    if empty > 0 {
        common::tell(format_args!("warning: {} left out, their prompts alone are longer", counted(empty, "example")));
    }
}

/// What a directory has.
enum Held {
    Checkpoints,
    Result,
    Nothing,
}

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

fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}
