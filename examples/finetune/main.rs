//! Fine-tunes a model with LoRA on a file of examples, and writes an adapter in PEFT's format.
//!
//! `cargo run --example finetune -- --model EleutherAI/pythia-410m --data examples.jsonl --out runs/first`

mod args;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod log;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use pricket::loading::{Precision, available_memory};
use pricket::nn::Progress;
use pricket::train::{Gradients, Lora, LoraConfig, Recipe, Sample, TrainTarget, Trainer, Tuned, add_gradients};
use pricket::weights::counted;
use pricket::{Loader, Pricket};

use crate::args::Args;
use crate::data::Data;
use crate::log::{Log, duration, size};

fn main() -> ExitCode {
    let args = Args::parse();
    args.model.compute.limit_candle_threads();
    common::finish(run(&args))
}

fn run(args: &Args) -> anyhow::Result<()> {
    let recipe = args.recipe()?;
    ensure!(!recipe.data.is_empty(), "no examples given; give --data or a recipe that names a dataset");
    let compute = &args.model.compute;
    ensure!(
        compute.adapter.is_empty(),
        "--adapter cannot be used in training; use --from-adapter to continue training an adapter"
    );
    ensure!(
        !recipe.full || compute.dtype == Precision::Auto,
        "--dtype cannot be used with --full, which trains in f32"
    );
    ensure!(recipe.full || args.from_scratch.is_none(), "--from-scratch requires --full");
    ensure!(recipe.is_evaluated() || !args.best, "--best requires --eval-data or --eval-examples");
    if let Some(out) = args.out.as_deref().filter(|_| !args.estimate) {
        check_directory(out, args.resume)?;
    }
    common::interruptible()?;
    let files = data::files(&recipe.data, recipe.split.as_deref().unwrap_or("train"))?;
    // Invalid data are reported before the model is loaded.
    let records = pricket::train::read_records(&files)?;

    let pricket = load(args, &recipe)?;
    let data = Data::new(&recipe, &pricket, &records)?;
    drop(records);
    data.describe(pricket.tokenizer().ok(), recipe.pack);
    let options = recipe.options(&data.training.samples)?;
    let (target, tuned) = if recipe.full { whole(&pricket) } else { adapter(args, &recipe, &pricket)? };
    let mut trainer = Trainer::new(target, tuned, data.training.samples, options)?;
    if !data.evaluation.is_empty() {
        trainer = trainer.with_evaluation(data.evaluation)?;
    }
    if args.estimate {
        return estimate(&pricket, &trainer);
    }
    check_memory(args, &pricket, &trainer)?;
    let out = args.out.as_deref().context("--out is missing")?;
    if args.resume {
        match trainer.resume(out)? {
            Some(checkpoint) => common::tell(format_args!("continuing from {}", checkpoint.display())),
            None if holds(out) == Held::Checkpoints => {
                bail!("{} has checkpoints of another program; change --out", out.display())
            }
            None => common::tell(format_args!("{} has no checkpoint; starting a new run", out.display())),
        }
    }
    train(args, &recipe, &pricket, &mut trainer, out)
}

/// Checks that a run can write into a directory, and creates it.
fn check_directory(out: &Path, resume: bool) -> anyhow::Result<()> {
    let shown = out.display();
    match holds(out) {
        Held::Checkpoints if !resume => {
            bail!("{shown} already holds a run; continue it with --resume, or change --out")
        }
        Held::Result => bail!("{shown} holds an adapter or a model, but no checkpoint to resume; change --out"),
        _ => {}
    }
    std::fs::create_dir_all(out).with_context(|| shown.to_string())?;
    common::check_output(&out.join("log.jsonl"), &[])
}

/// Loads the model to train.
fn load(args: &Args, recipe: &Recipe) -> anyhow::Result<Pricket> {
    if let Some(path) = &args.from_scratch {
        let config = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let config = serde_json::from_str(&config).with_context(|| path.display().to_string())?;
        let loader = Loader::untrained(config, recipe.seed).with_context(|| path.display().to_string())?;
        return Ok(args.model.load_from(loader.train())?);
    }
    if recipe.full {
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

/// Returns a new adapter, or the adapter of `--from-adapter`, attached to the model.
fn adapter(args: &Args, recipe: &Recipe, pricket: &Pricket) -> anyhow::Result<(TrainTarget, Tuned)> {
    let base = pricket.base()?;
    let lora = if let Some(from) = &args.from_adapter {
        Lora::read(from)?
    } else {
        let provenance = pricket.provenance();
        let revision = provenance.repo.as_ref().and(provenance.revision.clone());
        let config = LoraConfig {
            base: provenance.repo.clone(),
            revision: revision.filter(|revision| revision != "main"),
            ..recipe.lora()?
        };
        Lora::new(config, &base, recipe.seed)?
    };
    let tuned = lora.train(&base, recipe.seed)?;
    common::tell(format_args!(
        "training {} of rank {} on {}: {}",
        if lora.config().dora { "DoRA" } else { "LoRA" },
        lora.config().rank,
        counted(lora.modules().count(), "layer"),
        counted(lora.weights(), "trained weight")
    ));
    Ok((TrainTarget::Adapter(Box::new(lora)), tuned))
}

/// Prints the memory and the time that a run needs.
fn estimate(pricket: &Pricket, trainer: &Trainer) -> anyhow::Result<()> {
    /// Number of tokens of the measured example.
    const MEASURED: usize = 512;
    let memory = trainer.memory()?;
    let base = pricket.info().weight_bytes;
    println!("estimated memory: {}", size(base + memory.total()));
    let tokens = counted(memory.micro_batch_tokens, "token");
    for (bytes, what) in [
        (base, "weights of the base model".to_owned()),
        (memory.parameters, "trained parameters".into()),
        (memory.gradients, "gradients".into()),
        (memory.optimizer, "optimizer".into()),
        (memory.block_inputs, format!("inputs of the blocks, at {tokens}")),
        (memory.activations, format!("activations, at {tokens}")),
        (memory.head, "head and loss".into()),
    ] {
        println!("{:>12}  {what}", size(bytes));
    }
    if let Some(available) = available_memory() {
        println!("free memory: {}, with the base model and the trained parameters loaded", size(available));
    }
    let samples = trainer.samples();
    let sample = samples.iter().max_by_key(|sample| sample.ids().len().min(MEASURED)).context("no samples")?;
    let ids = sample.ids().len().min(MEASURED);
    let sample = Sample::new(sample.ids()[..ids].to_vec())?;
    let (tuned, options) = (trainer.tuned(), trainer.options());
    let mut seconds = f64::INFINITY;
    for _ in 0..2 {
        let (start, mut sum) = (Instant::now(), Gradients::none(&tuned.parameters));
        let samples = std::slice::from_ref(&sample);
        add_gradients(&*tuned.model, samples, 1.0, &tuned.parameters, options.checkpointing, &mut sum)?;
        sum.norm()?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    let rate = ids as f64 / seconds;
    let all: usize = samples.iter().map(|sample| sample.ids().len()).sum();
    let per_step = all as f64 / trainer.packs() as f64 * options.batch as f64;
    println!(
        "estimated time: {} for {} of {per_step:.0} tokens on average, at {rate:.0} tokens/s (measured on {})",
        duration(options.steps as f64 * per_step / rate),
        counted(options.steps as usize, "step"),
        counted(ids, "token"),
    );
    Ok(())
}

/// Refuses a run that needs more memory than is free. Otherwise the system would kill the process during the run.
fn check_memory(args: &Args, pricket: &Pricket, trainer: &Trainer) -> anyhow::Result<()> {
    let needed = trainer.memory()?.to_allocate();
    match available_memory() {
        Some(available) if needed > available && pricket.info().device.is_cpu() && !args.allow_any_memory => bail!(
            "training needs about {} of memory besides the loaded model, {} is free; lower --micro-batch-tokens or \
             --max-length, quantize the base model with --quantize, or allow it with --allow-any-memory (--estimate \
             lists the parts)",
            size(needed),
            size(available)
        ),
        _ => Ok(()),
    }
}

/// Runs the training steps, and writes the log, the checkpoints and the result.
fn train(args: &Args, recipe: &Recipe, pricket: &Pricket, trainer: &mut Trainer, out: &Path) -> anyhow::Result<()> {
    let (save_every, keep) = (recipe.save_every.unwrap_or(100), recipe.keep.unwrap_or(2));
    let mut log = Log::open(out, trainer.steps(), trainer.options().steps, args.json)?;
    if trainer.steps() == 0
        && let Some(loss) = trainer.evaluate()?
    {
        log.evaluation(loss)?;
    }
    while !trainer.is_done() {
        if common::Hidden.cancelled() {
            let path = trainer.save(out, keep)?;
            log.finish()?;
            common::tell(format_args!("stopped; wrote {}; continue with --resume", path.display()));
            return Ok(());
        }
        let report = trainer.advance()?;
        log.step(&report)?;
        if report.eval_loss.is_some() {
            trainer.save_best(out)?;
        }
        if save_every > 0 && report.step.is_multiple_of(save_every) && !trainer.is_done() {
            trainer.save(out, keep)?;
        }
    }
    if save_every > 0 {
        trainer.save(out, keep)?;
    }
    if trainer.has_ended_early() {
        common::tell(format_args!("ended early at step {}: the evaluation loss did not improve", trainer.steps()));
    }
    if args.best || recipe.patience.is_some() {
        let best = trainer.restore_best(out)?;
        common::tell(format_args!("using step {}, whose evaluation loss is {:.4}", best.step, best.loss));
    }
    trainer.write(out)?;
    if recipe.full {
        let files = pricket.tokenizer().ok().map(pricket::lm::Tokenizer::to_files).transpose()?;
        for (name, bytes) in files.into_iter().flatten() {
            common::write_whole(&out.join(name), &bytes)?;
        }
        common::tell(format_args!("wrote {}; load it with --model {0}", out.display()));
    } else {
        common::tell(format_args!("wrote {}; load it with --adapter {0}", out.display()));
    }
    if let Err(e) = log.finish() {
        common::tell(format_args!("warning: loss.svg was not drawn: {e:#}"));
    }
    Ok(())
}

/// The content of an output directory.
#[derive(PartialEq)]
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
