//! Measures prefill and decoding speed, memory, and the share of the memory bandwidth that decoding reaches.
//!
//! `cargo run --release --example bench -- --shape 160m --dtype f16`

mod common;
#[path = "common/rates.rs"]
mod rates;
#[path = "common/serving.rs"]
mod serving;
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

/// Measure the speed of prefill, decoding and training, in tokens per second. Decoding is greedy. Its time includes the
/// conversion of tokens to text if the model has a tokenizer.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// Measure a model with random weights in the architecture of a published model, instead of --model: 14m to 12b
    /// (Pythia), neox-20b, incite-3b, mpt-1b, mpt-7b, open-llama-3b, rwkv4-430m, or another name in models/shapes.toml.
    /// The weights have the type of --dtype; auto is f16 on the CPU and bf16 on a GPU
    #[arg(long, conflicts_with = "model")]
    shape: Option<String>,
    /// Prompt lengths for which prefill is measured, in tokens. Lengths that do not fit the context are skipped
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    prefill: Vec<usize>,
    /// Prompt lengths after which decoding is measured, in tokens. Lengths that do not fit the context together with
    /// --new-tokens are skipped
    #[arg(long, value_delimiter = ',', default_value = "128,1792")]
    decode: Vec<usize>,
    /// Batch sizes for which decoding is measured, in addition to 1. The speed is the total over the batch
    #[arg(long, alias = "streams", value_delimiter = ',')]
    batch_sizes: Vec<usize>,
    #[command(flatten)]
    serving: serving::ServingArgs,
    /// Measure LoRA training (rank 16, all linear layers, AdamW, f32 adapters) on batches of this shape, such as 4x256.
    /// Can be given several times
    #[cfg(feature = "train")]
    #[arg(long, value_name = "ROWSxTOKENS")]
    train: Vec<train::Shape>,
    /// Fraction of the tokens of each training row, from its start, that is excluded from the loss, as a prompt is (0
    /// to below 1)
    #[cfg(feature = "train")]
    #[arg(long, alias = "masked", value_name = "FRACTION", default_value_t = 0.0)]
    masked_fraction: f64,
    /// Turn off gradient checkpointing in training, which recomputes each block in the backward pass
    #[cfg(feature = "train")]
    #[arg(long, alias = "no-checkpointing")]
    no_gradient_checkpointing: bool,
    /// Number of new tokens per decoding run, at least 2
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    /// Number of runs per measurement, at least 1. The median is reported; for training, the fastest step
    #[arg(long, default_value_t = 3)]
    runs: usize,
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
    ensure!(args.runs > 0 && args.new_tokens > 1, "expected --runs of at least 1 and --new-tokens of at least 2");
    let start = Instant::now();
    let pricket = load(args)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let info = pricket.info();
    let context = info.context.unwrap_or(usize::MAX);
    let mut rows = Vec::new();
    for &len in args.prefill.iter().filter(|&&len| len < context) {
        let rate = median(args.runs, || Ok(len as f64 / generate(&pricket, len, 1, 1)?.first))?;
        rows.push(Row { what: "prefill", prompt: len, streams: 1, rate, memory: None });
    }
    for &len in args.decode.iter().filter(|&&len| len + args.new_tokens <= context) {
        for &streams in std::iter::once(&1).chain(&args.batch_sizes) {
            let rate = median(args.runs, || {
                let Run { rest, tokens, .. } = generate(&pricket, len, args.new_tokens, streams)?;
                ensure!(rest > 0.0, "the system clock did not advance during a run");
                Ok(tokens as f64 / rest)
            })?;
            rows.push(Row { what: "decode", prompt: len, streams, rate, memory: None });
        }
    }
    #[cfg(feature = "train")]
    for shape in &args.train {
        let checkpointing = !args.no_gradient_checkpointing;
        let (rate, memory) = train::rate(&pricket, *shape, args.masked_fraction, checkpointing, args.runs)?;
        rows.push(Row { what: "train", prompt: shape.tokens, streams: shape.rows, rate, memory: Some(memory) });
    }
    let serving = args.serving.median(&pricket, args.runs, args.new_tokens)?;
    let threads = pricket.threads();
    // Each token reads every weight once, except an embedding that is not also the head: of it, each token reads one
    // row. MPT always uses its embedding as the head, whatever its configuration says.
    let tied = info.family == "mpt" || pricket.config()["tie_word_embeddings"] == true;
    let unread = if tied { 0 } else { info.dtype.bytes(info.vocab * info.d_model) as u64 };
    let read = info.weight_bytes - unread;
    // Taken before the bandwidth is measured, since that allocates a buffer as large as the model.
    let peak = peak_rss();
    let device = pricket::loading::device(&args.model.compute.device)?;
    let (bandwidth, arithmetic) = if device.is_cpu() {
        let mut arithmetic = 0.0;
        pricket.model().on_threads(&mut || arithmetic = multiply_add_rate());
        (rates::read_rate(info.weight_bytes as usize, threads), arithmetic)
    } else {
        // A device without enough memory, or without bf16, still reports the measurements above.
        rates::device_rates(&device).unwrap_or((f64::NAN, f64::NAN))
    };
    let share = |rate: f64| read as f64 * rate / bandwidth;
    let mut out = std::io::stdout().lock();
    if args.json {
        let row = |row: &Row| {
            let share = row.is_one_stream().then(|| share(row.rate));
            json!({
                "what": row.what, "prompt": row.prompt, "streams": row.streams, "tokens_per_second": row.rate,
                "share_of_bandwidth": share, "estimated_memory": row.memory,
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
                "serving": serving.map(serving::Serving::to_json),
            })
        )?;
        return Ok(());
    }
    writeln!(out, "{} weights in {}, loaded in {load_seconds:.2} s", info.parameters, info.dtype)?;
    for row in &rows {
        let mut about = String::new();
        if let Some(memory) = row.memory {
            about = format!("  {} rows; estimated memory {:.0} MiB", row.streams, mib(memory));
        } else if row.streams > 1 {
            about = format!("  batch size {}", row.streams);
        } else if row.is_one_stream() {
            about = format!("  {:.0} % of the bandwidth", 100.0 * share(row.rate));
        }
        writeln!(out, "{:8} {:5}  {:10.1} tokens/s{about}", row.what, row.prompt, row.rate)?;
    }
    if let Some(found) = serving {
        writeln!(out, "{found}")?;
    }
    let (bandwidth, arithmetic) = (bandwidth / 1e9, arithmetic / 1e9);
    let who = if device.is_cpu() { format!("{threads} threads read") } else { "the device moves".into() };
    let kind = if device.is_cpu() { "f32" } else { "bf16" };
    writeln!(out, "{who} {bandwidth:.1} GB/s; multiplication and addition: {arithmetic:.0} GFLOP/s in {kind}")?;
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
    let dtype = args.model.compute.dtype;
    Ok(args.model.configure(common::random(shape, dtype)?)?.precision(dtype).load()?)
}

/// A measurement.
struct Row {
    what: &'static str,
    prompt: usize,
    streams: usize,
    rate: f64,
    /// Estimated memory of training in bytes, with the weights.
    memory: Option<u64>,
}

impl Row {
    /// Returns whether each token of the measurement reads every weight once.
    fn is_one_stream(&self) -> bool {
        self.what == "decode" && self.streams == 1
    }
}

/// Times of a run.
struct Run {
    /// Seconds until every text has its first new token.
    first: f64,
    /// Seconds for the rest.
    rest: f64,
    /// Number of tokens generated in the rest of the time.
    tokens: usize,
}

/// Generates after prompts of `len` tokens.
fn generate(pricket: &Pricket, len: usize, new_tokens: usize, streams: usize) -> anyhow::Result<Run> {
    let vocab = pricket.info().vocab as u32;
    // The prompts differ from the first token on, so that none continues from the state of another.
    let prompt = |stream: u32| (0..len as u32).map(|i| (i * 7919 + stream * 31) % vocab).collect::<Vec<u32>>();
    let options = GenerateOptions { max_tokens: new_tokens, stop_at_eos: false, ..Default::default() };
    let mut generation = pricket.generation((0..streams as u32).map(prompt).collect(), &options)?;
    let text = pricket.tokenizer().ok().map(|tokenizer| TextStream::new(tokenizer, &[]));
    let mut texts = vec![text; streams];
    let mut begun = vec![false; streams];
    let mut step = || -> anyhow::Result<Option<(usize, bool)>> {
        let Some(tokens) = generation.step()? else { return Ok(None) };
        for token in &tokens {
            begun[token.row] = true;
            if let Some(text) = &mut texts[token.row] {
                std::hint::black_box(text.push(token.id));
            }
        }
        Ok(Some((tokens.len(), begun.iter().all(|&begun| begun))))
    };
    let start = Instant::now();
    while step()?.is_some_and(|(_, have_begun)| !have_begun) {}
    let (first, mut tokens) = (start.elapsed().as_secs_f64(), 0);
    while let Some((count, _)) = step()? {
        tokens += count;
    }
    Ok(Run { first, rest: start.elapsed().as_secs_f64() - first, tokens })
}

fn median(runs: usize, mut measure: impl FnMut() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let mut values = (0..runs).map(|_| measure()).collect::<anyhow::Result<Vec<_>>>()?;
    values.sort_by(f64::total_cmp);
    Ok(values[runs / 2])
}

/// Returns the peak memory of this process in bytes, if the system reports it.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
