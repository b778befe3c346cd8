//! Converts a model to GGUF or to Hub layout, with or without quantization, from any format that pricket reads.
//!
//! `cargo run --example quantize -- --model EleutherAI/pythia-160m --out pythia-160m-q4_0.gguf --quantize q4_0`

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::ensure;
use clap::Parser;
use pricket::convert::{ConvertOptions, Converted, Target};
use pricket::lm::Comparison;
use pricket::loading::Precision;
use pricket::weights::Dtype;
use pricket::weights::counted;
use pricket::{Pricket, ScoreOptions};
use serde_json::json;

/// The default text of --report. It shows the effect of quantization, but is too short for a perplexity to publish.
const TEXT: &str = include_str!("../README.md");

/// Help text of `--quantize`, which applies to the output of this example.
const QUANTIZE: &str = "Quantize the weight matrices of the output: to q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, \
    q5_k or q6_k of ggml (in a .gguf file only), or to nf4 or fp4 of bitsandbytes (in a directory only; nf4_f32 and \
    fp4_f32 keep f32 scales)";

/// Help text of `--dtype`, which applies to the output of this example.
const DTYPE: &str = "Type of the output's weights: auto (as in the input, but f32 for nf4 and fp4, and in a directory \
    for all quantized weights), f32, bf16 or f16. Not with --quantize";

/// Convert a model to a GGUF file (if --out ends in .gguf) or to a directory in Hub layout (any other --out).
/// --quantize or --dtype sets the type of the output. With --report and without --out, convert in memory and write
/// nothing.
#[derive(Parser)]
#[command(
    version,
    mut_arg("quantize", |arg| arg.help(QUANTIZE)),
    mut_arg("dtype", |arg| arg.help(DTYPE)),
)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// Convert random weights in the architecture of a published model, instead of --model, to measure the conversion;
    /// names as in `bench --help`
    #[arg(long, conflicts_with_all = ["model", "report"])]
    shape: Option<String>,
    /// Output: a file name that ends in .gguf, or a directory
    #[arg(long, short, required_unless_present = "report")]
    out: Option<PathBuf>,
    /// Replace an existing output
    #[arg(long, requires = "out")]
    overwrite: bool,
    /// Compare the new model with the original: size, perplexity, Kullback-Leibler divergence, and agreement of the
    /// most likely token
    #[arg(long)]
    report: bool,
    /// Plain text file for --report [default: pricket's README]
    #[arg(long, value_name = "FILE", requires = "report")]
    text: Option<PathBuf>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.model.compute.limit_candle_threads();
    common::finish(run(&args))
}

fn run(args: &Args) -> anyhow::Result<()> {
    // The text is read before the conversion, so that a wrong file name fails early.
    let text = args.text.as_ref().map(pricket::lm::read_utf8).transpose()?;
    let (quantization, four_bit) = (args.model.compute.quantization()?, args.model.compute.four_bit());
    if let Some(out) = &args.out {
        let is_gguf = out.extension().is_some_and(|end| end == "gguf");
        ensure!(
            is_gguf || quantization.is_none(),
            "--quantize writes GGUF only, except for nf4 and fp4; give --out a name that ends in .gguf"
        );
    } else {
        let changes = quantization.is_some() || four_bit.is_some() || args.model.compute.dtype != Precision::Auto;
        ensure!(changes, "--report without --out requires --quantize or --dtype");
    }
    common::interruptible()?;
    // --quantize and --dtype apply to the new model only.
    let mut source = args.model.clone();
    (source.compute.quantize, source.compute.dtype) = (None, Precision::Auto);
    let written = args.out.as_ref().map(|out| convert(args, &source, out)).transpose()?;
    let mut compared = None;
    if args.report {
        let made = match &args.out {
            Some(out) => {
                common::ModelArgs { model: Some(out.clone()), revision: None, file: None, ..source.without_adapters() }
            }
            None => args.model.clone(),
        };
        let (source, made) = (source.load("tiny")?, made.load("tiny")?);
        let score = ScoreOptions { progress: Arc::new(common::Bar::default()), ..ScoreOptions::default() };
        let report = source.compare(&made, text.as_deref().unwrap_or(TEXT), &score)?;
        let prefix = source.tokenizer()?.id_to_token(source.prefix_id());
        compared = Some(Compared { report, prefix: prefix.unwrap_or_default(), made });
    }
    if args.json {
        show_json(written.as_ref(), compared.as_ref())
    } else {
        show(args, written.as_ref(), compared.as_ref())
    }
}

/// A comparison, the new model, and the text of the token before the compared text.
struct Compared {
    report: Comparison,
    prefix: String,
    made: Pricket,
}

fn convert(args: &Args, source: &common::ModelArgs, out: &Path) -> anyhow::Result<Converted> {
    let wanted = args.model.compute.quantization()?.map(Target::Quantized);
    let wanted = wanted.or(args.model.compute.four_bit().map(Target::FourBit));
    let target = match (wanted, args.model.compute.dtype) {
        (Some(wanted), Precision::Auto) => wanted,
        (Some(_), _) => anyhow::bail!("--quantize and --dtype both set the type of the matrices; give only one"),
        (None, Precision::F32) => Target::F32,
        (None, Precision::F16) => Target::F16,
        (None, Precision::BF16) => Target::BF16,
        (None, _) => Target::Stored,
    };
    let loader = match &args.shape {
        Some(shape) => common::random(shape, Precision::F32)?,
        None => source.source("tiny")?,
    };
    let options = ConvertOptions { target, overwrite: args.overwrite };
    let done = source.configure(loader)?.convert(out, &options)?;
    for warning in &done.warnings {
        common::tell(format_args!("warning: {warning}"));
    }
    for note in &done.notes {
        common::tell(format_args!("note: {note}"));
    }
    Ok(done)
}

fn show_json(written: Option<&Converted>, compared: Option<&Compared>) -> anyhow::Result<()> {
    let report = compared.map(|Compared { report, prefix, .. }| {
        json!({
            "tokens": report.tokens, "given": prefix, "reference_perplexity": report.reference_perplexity,
            "perplexity": report.perplexity, "kl_divergence": report.kl_divergence,
            "worst_kl_divergence": report.worst_kl_divergence, "top_1_agreement": report.top_1_agreement,
        })
    });
    let info = compared.map(|compared| compared.made.info());
    let json = json!({
        "path": written.map(|done| &done.path),
        "bytes": written.map(|done| done.bytes),
        "memory_bytes": info.map(|info| info.weight_bytes),
        "parameters": written.map(|done| done.parameters).or(info.map(|info| info.parameters)),
        "bits_per_weight": written.map(Converted::bits_per_weight),
        "memory_bits_per_weight": info.map(in_memory),
        "notes": written.map_or(&[][..], |done| &done.notes), "warnings": written.map_or(&[][..], |done| &done.warnings),
        "report": report,
    });
    writeln!(std::io::stdout(), "{json}")?;
    Ok(())
}

/// Returns the bits per weight in memory.
fn in_memory(info: &pricket::nn::ModelInfo) -> f64 {
    8.0 * info.weight_bytes as f64 / info.parameters.max(1) as f64
}

fn show(args: &Args, written: Option<&Converted>, compared: Option<&Compared>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if let Some(done) = written {
        let (bytes, bits) = (counted(done.bytes as usize, "byte"), done.bits_per_weight());
        writeln!(out, "{}: {bytes}, {bits:.2} bits per weight including metadata:", done.path.display())?;
        for found in pricket::inspect(&done.path)?.types() {
            let share = 100.0 * found.elements as f64 / done.parameters.max(1) as f64;
            let scales = if matches!(found.dtype, Dtype::Block(_)) { " including block scales" } else { "" };
            writeln!(out, "  {share:.1} % of the weights as {}: {:.2} bits each{scales}", found.dtype, found.bits())?;
        }
    } else if let Some(Compared { made, .. }) = compared {
        let info = made.info();
        let bytes = counted(info.weight_bytes as usize, "byte");
        writeln!(out, "in memory: {bytes}, {:.2} bits per weight", in_memory(info))?;
    }
    if let Some(Compared { report, prefix, .. }) = compared {
        let text = args.text.as_ref().map_or("pricket's README".into(), |path| path.display().to_string());
        let tokens = counted(report.tokens, "token");
        writeln!(out, "over {tokens} of {text}, scored after {prefix}:")?;
        writeln!(out, "perplexity         {:.4}, original {:.4}", report.perplexity, report.reference_perplexity)?;
        let (mean, worst) = (report.kl_divergence, report.worst_kl_divergence);
        writeln!(out, "KL divergence      {mean:.6} nats per token, at most {worst:.4}")?;
        writeln!(out, "top-1 agreement    {:.2} %", 100.0 * report.top_1_agreement)?;
    }
    Ok(())
}
