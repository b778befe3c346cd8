//! Measures reading and writing speed, memory, and the share of the machine's bandwidth that decoding reaches.
//!
//! `cargo run --release --example bench -- --shape 160m --dtype f16`

mod common;
#[path = "common/rates.rs"]
mod rates;
#[cfg(feature = "train")]
#[path = "common/train.rs"]
mod train;

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::ensure;
use clap::Parser;
use pricket::lm::TextStream;
use pricket::nn::ops::multiply_add_rate;
use pricket::{GenerateOptions, Pricket};
use serde_json::json;

/// Measures prefill and decode. Decoding is `generate` end to end: a prompt, then new tokens, greedily, and their text where
/// the model has a tokenizer.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// Random weights of a published shape (14m to 12b, neox-20b, incite-3b, mpt-1b, mpt-7b, open-llama-3b, rwkv4-430m, and others of models/shapes.toml) instead of a model;
    /// --dtype says how they are stored, f16 if it is auto
    #[arg(long, conflicts_with = "model")]
    shape: Option<String>,
    /// Prompt lengths whose reading is timed
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    prefill: Vec<usize>,
    /// Prompt lengths from which decoding is timed
    #[arg(long, value_delimiter = ',', default_value = "128,1792")]
    decode: Vec<usize>,
    /// Numbers of prompts that are decoded in one batch too; tokens are counted together
    #[arg(long, value_delimiter = ',')]
    streams: Vec<usize>,
    /// Times steps of LoRA training (rank 16, all linear layers, AdamW, f32 adapters) on so many rows of so many tokens, as 4x256
    #[cfg(feature = "train")]
    #[arg(long, value_name = "ROWSxTOKENS")]
    train: Vec<train::Shape>,
    /// Share of the tokens that do not count in training, at the beginning of each row
    #[cfg(feature = "train")]
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    masked: f64,
    /// Keeps all results for the backward pass of training
    #[cfg(feature = "train")]
    #[arg(long)]
    no_checkpointing: bool,
    /// New tokens of a decoding run
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    /// Runs of each; the median is reported
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.model.compute.limit_candle_threads();
    common::finish(run(&args))
}

fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.runs > 0 && args.new_tokens > 1, "at least one run of two tokens is needed");
    let start = Instant::now();
    let pricket = load(args)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let info = pricket.info();
    let context = info.context.unwrap_or(usize::MAX);
    let mut rows = Vec::new();
    for &len in args.prefill.iter().filter(|&&len| len < context) {
        let rate = median(args.runs, || Ok(len as f64 / generate(&pricket, len, 1, 1)?.0))?;
        rows.push(Row { what: "prefill", prompt: len, streams: 1, rate });
    }
    for &len in args.decode.iter().filter(|&&len| len + args.new_tokens <= context) {
        for &streams in std::iter::once(&1).chain(&args.streams) {
            let rate = median(args.runs, || {
                let (first, rest) = generate(&pricket, len, args.new_tokens, streams)?;
                ensure!(first > 0.0, "the clock stands still");
                Ok((streams * (args.new_tokens - 1)) as f64 / rest)
            })?;
            rows.push(Row { what: "decode", prompt: len, streams, rate });
        }
    }
    #[cfg(feature = "train")]
    for shape in &args.train {
        let rate = median(1, || train::rate(&pricket, *shape, args.masked, !args.no_checkpointing, args.runs))?;
        rows.push(Row { what: "train", prompt: shape.tokens, streams: shape.rows, rate });
    }
    let threads = pricket.threads();
    // Every weight passes through the processor for each token, but the rows of an embedding that is not the head too.
    // MPT has no other head than its embedding, whatever its configuration says.
    let tied = info.family == "mpt" || pricket.config()["tie_word_embeddings"] == true;
    let unread = if tied { 0 } else { info.dtype.bytes(info.vocab * info.d_model) as u64 };
    let read = info.weight_bytes - unread;
    // Before the buffer whose reading is timed, which is as large as the model.
    let peak = peak_rss();
    let device = pricket::loading::device(&args.model.compute.device)?;
    let (bandwidth, arithmetic) = if device.is_cpu() {
        let mut arithmetic = 0.0;
        pricket.model().on_threads(&mut || arithmetic = multiply_add_rate());
        (rates::read_rate(info.weight_bytes as usize, threads), arithmetic)
    } else {
        // A device without room for it, or without the type, has measured what it was asked for all the same.
        rates::device_rates(&device).unwrap_or((f64::NAN, f64::NAN))
    };
    let share = |rate: f64| read as f64 * rate / bandwidth;
    let mut out = std::io::stdout().lock();
    if args.json {
        let row = |row: &Row| {
            let share = row.is_one_stream().then(|| share(row.rate));
            json!({
                "what": row.what, "prompt": row.prompt, "streams": row.streams, "tokens_per_second": row.rate,
                "share_of_bandwidth": share,
            })
        };
        let rows: Vec<_> = rows.iter().map(row).collect();
        let name = args.shape.clone().unwrap_or_else(|| info.family.into());
        writeln!(
            out,
            "{}",
            json!({
                "model": name, "provenance": pricket.provenance().to_json(), "parameters": info.parameters,
                "dtype": info.dtype.name().to_lowercase(), "weight_bytes": info.weight_bytes,
                "load_seconds": load_seconds, "peak_rss": peak, "bandwidth": bandwidth, "flops": arithmetic,
                "threads": threads, "rows": rows,
            })
        )?;
        return Ok(());
    }
    writeln!(out, "{} weights in {}, loaded in {load_seconds:.2} s", info.parameters, info.dtype)?;
    for row in &rows {
        let mut about = String::new();
        if row.streams > 1 {
            about = format!("  {} {}", row.streams, if row.what == "train" { "rows" } else { "streams" });
        } else if row.is_one_stream() {
            about = format!("  {:.0} % of the bandwidth", 100.0 * share(row.rate));
        }
        writeln!(out, "{:8} {:5}  {:10.1} tokens/s{about}", row.what, row.prompt, row.rate)?;
    }
    let (bandwidth, arithmetic) = (bandwidth / 1e9, arithmetic / 1e9);
    let who = if device.is_cpu() { format!("{threads} threads read") } else { "the device moves".into() };
    let kind = if device.is_cpu() { "f32" } else { "bf16" };
    writeln!(out, "{who} {bandwidth:.1} GB/s, and multiply and add {arithmetic:.0} GFLOP/s in {kind}")?;
    if let Some(peak) = peak {
        writeln!(out, "peak memory {:.0} MiB, weights {:.0} MiB", mib(peak), mib(info.weight_bytes))?;
    }
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn load(args: &Args) -> anyhow::Result<Pricket> {
    let Some(shape) = &args.shape else { return Ok(args.model.load("tiny")?) };
    Ok(args.model.configure(common::random(shape, args.model.compute.dtype)?)?.load()?)
}

/// A figure.
struct Row {
    what: &'static str,
    prompt: usize,
    streams: usize,
    rate: f64,
}

impl Row {
    /// Whether each of its tokens needed every weight once.
    fn is_one_stream(&self) -> bool {
        self.what == "decode" && self.streams == 1
    }
}

/// Seconds until the first tokens after prompts of `len`, and for the rest.
fn generate(pricket: &Pricket, len: usize, new_tokens: usize, streams: usize) -> anyhow::Result<(f64, f64)> {
    let vocab = pricket.info().vocab as u32;
    let prompt: Vec<u32> = (0..len as u32).map(|i| i * 7919 % vocab).collect();
    let options = GenerateOptions { max_tokens: new_tokens, stop_at_eos: false, ..Default::default() };
    let mut generation = pricket.generation(vec![prompt; streams], &options)?;
    let text = pricket.tokenizer().ok().map(|tokenizer| TextStream::new(tokenizer, &[]));
    let mut texts = vec![text; streams];
    let mut step = || -> anyhow::Result<bool> {
        let Some(tokens) = generation.step()? else { return Ok(false) };
        for token in &tokens {
            if let Some(text) = &mut texts[token.row] {
                std::hint::black_box(text.push(token.id));
            }
        }
        Ok(true)
    };
    let start = Instant::now();
    step()?;
    let first = start.elapsed().as_secs_f64();
    while step()? {}
    Ok((first, start.elapsed().as_secs_f64() - first))
}

fn median(runs: usize, mut measure: impl FnMut() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let mut values = (0..runs).map(|_| measure()).collect::<anyhow::Result<Vec<_>>>()?;
    values.sort_by(f64::total_cmp);
    Ok(values[runs / 2])
}

/// The most memory that this process ever held, where the system tells.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
