//! Measurement of training speed.

use std::time::Instant;

use anyhow::Context as _;
use pricket::Pricket;
use pricket::train::{Checkpointing, Lora, LoraConfig, Sample, TrainOptions, TrainTarget, Trainer};

/// Number of rows of a batch, and number of tokens per row.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) tokens: usize,
}

impl std::str::FromStr for Shape {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (rows, tokens) = text.split_once('x').context("expected ROWSxTOKENS, such as 4x256")?;
        Ok(Self { rows: rows.parse()?, tokens: tokens.parse()? })
    }
}

/// Measures LoRA training: the tokens per second of the best of `runs` steps, after one step that is not timed. Also
/// returns the estimated memory of model and training in bytes.
pub(crate) fn rate(
    pricket: &Pricket,
    shape: Shape,
    masked: f64,
    checkpointing: bool,
    runs: usize,
) -> anyhow::Result<(f64, u64)> {
    let (base, vocab) = (pricket.base()?, pricket.info().vocab as u32);
    let lora = Lora::new(LoraConfig { rank: 16, alpha: 32.0, ..LoraConfig::default() }, &base, 0)?;
    let tuned = lora.train(&base, 0)?;
    let first = (shape.tokens as f64 * masked) as usize;
    let sample = |row: usize| {
        let ids = (0..shape.tokens).map(|i| ((i + 31 * row) * 7919) as u32 % vocab).collect();
        Sample::masked(ids, (0..shape.tokens).map(|i| i >= first).collect())
    };
    let samples = (0..shape.rows).map(sample).collect::<Result<Vec<_>, _>>()?;
    let options = TrainOptions {
        batch: shape.rows,
        micro_batch_tokens: shape.rows * shape.tokens,
        checkpointing: if checkpointing { Checkpointing::PerBlock } else { Checkpointing::Off },
        ..TrainOptions::new(1 + runs as u64, 1e-4)
    };
    let mut trainer = Trainer::new(TrainTarget::Adapter(Box::new(lora)), tuned, samples, options)?;
    let memory = pricket.info().weight_bytes + trainer.memory()?.total();
    trainer.advance()?;
    let mut best = f64::INFINITY;
    for _ in 0..runs {
        let start = Instant::now();
        trainer.advance()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(((shape.rows * shape.tokens) as f64 / best, memory))
}
