//! Runs the Llama of candle-transformers with weights and tokenizer loaded by pricket, and a generation loop in plain
//! candle.
//!
//! `cargo run --example candle --features candle-transformers -- --model models/tiny-llama`

#[path = "common/finish.rs"]
mod finish;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use clap::Parser;
use pricket::candle::{DType, Device, Tensor};
use pricket::interop;

/// Continue a prompt with the Llama of candle-transformers. pricket fetches and reads the files and tokenizes;
/// candle-transformers computes the model and samples.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Llama model without biases: a repository of the Hub, a directory in Hub layout, or a weight file
    #[arg(long, short, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama"))]
    model: PathBuf,
    /// Text to continue
    #[arg(long, short, default_value = "The whale")]
    prompt: String,
    /// Number of new tokens
    #[arg(long, short = 'n', default_value_t = 40)]
    max_tokens: usize,
    /// Sampling temperature; 0 always takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Random seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> ExitCode {
    finish::finish(run(&Args::parse()))
}

fn run(args: &Args) -> anyhow::Result<()> {
    // Opens a directory, a file in any format that pricket reads, or a repository.
    let opened = interop::open(&args.model)?;
    let kind = opened.config["model_type"].as_str().unwrap_or_default();
    ensure!(kind == "llama", "{}: the model type is {kind:?}; this example runs llama only", args.model.display());
    let config = serde_json::from_value::<LlamaConfig>(opened.config.clone())?.into_config(false);
    let tokenizer = opened.tokenizer.as_ref().context("the model has no tokenizer")?;

    let device = Device::Cpu;
    let model = Llama::load(opened.var_builder(DType::F32, &device), &config)?;
    let mut cache = Cache::new(true, DType::F32, &config, &device)?;

    let sampling = match args.temperature {
        0.0 => Sampling::ArgMax,
        temperature => Sampling::All { temperature },
    };
    let mut sampler = LogitsProcessor::from_sampling(args.seed, sampling);
    let mut ids = tokenizer.encode_from_start(&args.prompt)?;
    let (mut past, prompt) = (0, ids.len());
    while ids.len() < prompt + args.max_tokens {
        let input = Tensor::new(&ids[past..], &device)?.unsqueeze(0)?;
        let logits = model.forward(&input, past, &mut cache)?.squeeze(0)?;
        past = ids.len();
        ids.push(sampler.sample(&logits)?);
    }
    writeln!(std::io::stdout(), "{}", tokenizer.decode(&ids))?;
    Ok(())
}
