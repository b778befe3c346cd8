//! Writes a model in another form: quantised or not, as GGUF or in Hub layout, from any form that is read.
//!
//! `cargo run --example quantize -- --model EleutherAI/pythia-160m --out pythia-160m-q4_0.gguf --quantize q4_0`

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use clap::Parser;
use pricket::{Comparison, ConvertOptions, Precision, Target};
use serde_json::json;

/// Text for --report where none is given: as good as any to see what quantising cost, not to publish a perplexity.
const TEXT: &str = include_str!("../README.md");

/// Writes a model as GGUF (an --out that ends in .gguf) or as safetensors in Hub layout (any other --out).
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// Random weights of a published shape instead of a model, to measure with (see `bench --help`)
    #[arg(long, conflicts_with_all = ["model", "report"])]
    shape: Option<String>,
    /// A file that ends in .gguf, or a directory
    #[arg(long, short)]
    out: PathBuf,
    /// Writes over what is there
    #[arg(long)]
    overwrite: bool,
    /// Compares the new model with the old one: size, perplexity, Kullback-Leibler divergence, agreement
    #[arg(long)]
    report: bool,
    /// The text for --report
    #[arg(long, value_name = "FILE", requires = "report")]
    text: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    common::finish(run(&Args::parse()))
}

fn run(args: &Args) -> anyhow::Result<()> {
    let target = match (args.model.compute.quantisation()?, args.model.compute.dtype) {
        (Some(quantisation), Precision::Auto) => Target::Quantised(quantisation),
        (Some(_), _) => anyhow::bail!("--quantize and --dtype both say what becomes of the matrices"),
        (None, Precision::F32) => Target::F32,
        (None, Precision::F16) => Target::F16,
        (None, Precision::BF16) => Target::BF16,
        (None, _) => Target::Stored,
    };
    let gguf = args.out.extension().is_some_and(|e| e == "gguf");
    ensure!(
        gguf || args.model.compute.quantize.is_none(),
        "safetensors hold no quantised blocks: give --out a name that ends in .gguf"
    );
    // What cannot be read is told before the conversion.
    let text = args.text.as_ref().map(|path| read_text(path)).transpose()?;
    common::interruptible()?;
    // What the flags say of the new file is not to be done to the old one as well.
    let mut source = args.model.clone();
    (source.compute.quantize, source.compute.dtype) = (None, Precision::Auto);
    let loader = match &args.shape {
        Some(shape) => common::random(shape, Precision::F32)?,
        None => source.source("tiny")?,
    };
    let loader = source.configure(loader)?;
    let done = loader.convert(&args.out, &ConvertOptions { target, overwrite: args.overwrite })?;
    for warning in &done.warnings {
        common::tell(format_args!("warning: {warning}"));
    }
    for note in &done.notes {
        common::tell(format_args!("note: {note}"));
    }
    let report = if args.report { Some(report(args, &source, text.as_deref())?) } else { None };
    let (path, bits) = (done.path.display(), done.bits_per_weight());
    if args.json {
        let report = report.map(|r| {
            json!({
                "tokens": r.tokens, "reference_perplexity": r.reference_perplexity, "perplexity": r.perplexity,
                "kl_divergence": r.kl_divergence, "worst_kl_divergence": r.worst_kl_divergence,
                "top_1_agreement": r.top_1_agreement,
            })
        });
        let json = json!({
            "path": done.path, "bytes": done.bytes, "parameters": done.parameters, "bits_per_weight": bits,
            "notes": done.notes, "warnings": done.warnings, "report": report,
        });
        writeln!(std::io::stdout(), "{json}")?;
        return Ok(());
    }
    writeln!(std::io::stdout(), "{path}: {} bytes, {bits:.2} bits a weight", done.bytes)?;
    if let Some(r) = report {
        let text = args.text.as_ref().map_or("pricket's README".into(), |path| path.display().to_string());
        writeln!(
            std::io::stdout(),
            "over {} tokens of {text}, each given those before it in its window of 512:",
            r.tokens
        )?;
        writeln!(
            std::io::stdout(),
            "perplexity         {:.4}, the source {:.4}",
            r.perplexity,
            r.reference_perplexity
        )?;
        writeln!(
            std::io::stdout(),
            "KL divergence      {:.6} nats a token, at worst {:.4}",
            r.kl_divergence,
            r.worst_kl_divergence
        )?;
        writeln!(std::io::stdout(), "same likeliest     {:.2} %", 100.0 * r.top_1_agreement)?;
    }
    Ok(())
}

/// Compares the model at `out` with the one that it was made of.
fn report(args: &Args, source: &common::ModelArgs, text: Option<&str>) -> anyhow::Result<Comparison> {
    let made = common::ModelArgs { model: Some(args.out.clone()), revision: None, file: None, ..source.clone() };
    let (source, made) = (source.load("tiny")?, made.load("tiny")?);
    Ok(pricket::compare(&source, &made, text.unwrap_or(TEXT), &common::Bar::default())?)
}

fn read_text(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("--text {}", path.display()))
}
