//! Runs candle-transformers' own Llama over weights that pricket finds and reads, in a loop of its own.
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

/// Continues a prompt with candle-transformers' Llama. Repository, cache, formats of weights and tokenizer are pricket's; the model
/// and the sampling are candle's.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// A repository of the Hub, a directory in its layout or a file of any format, of a Llama without biases
    #[arg(long, short, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama"))]
    model: PathBuf,
    /// The text to continue
    #[arg(long, short, default_value = "The whale")]
    prompt: String,
    /// Number of new tokens
    #[arg(long, short = 'n', default_value_t = 40)]
    max_tokens: usize,
    /// Sampling temperature; 0 takes the likeliest token
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
    // A directory, a file of any format that pricket reads, or a repository.
    let opened = interop::open(&args.model)?;
    let kind = opened.config["model_type"].as_str().unwrap_or_default();
    ensure!(kind == "llama", "{}: a model of type {kind:?}; this example runs llama", args.model.display());
    let config = serde_json::from_value::<LlamaConfig>(opened.config.clone())?.into_config(false);
    let tokenizer = opened.tokenizer.as_ref().context("there is no tokenizer")?;

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
