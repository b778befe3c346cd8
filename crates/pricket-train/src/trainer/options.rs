//! Settings of a training run.

use serde::{Deserialize, Serialize};

use crate::gradients::Checkpointing;
use crate::optimizer::{OptimizerConfig, Rule};
use crate::schedule::{Decay, Schedule};

/// Normalization of the loss of a training step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// Mean over the counted token ids of all micro-batches, as in transformers' Trainer since 4.46.
    #[default]
    Tokens,
    /// Mean over the micro-batches of the mean of each.
    MicroBatches,
}

/// When a run is evaluated, and when it ends early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Number of training steps between two evaluations, at least 1. The last step is always evaluated.
    pub every: u64,
    /// Ends the run after this number of evaluations in a row without a lower loss. `None` for no early end.
    pub patience: Option<u32>,
}

/// Settings of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainOptions {
    /// Number of training steps.
    pub steps: u64,
    /// Number of samples per training step, or of packs if `pack` is set.
    pub batch: usize,
    /// Combines samples into packs of at most this number of token ids, by [best fit](crate::best_fit). Training steps
    /// then have about equally many token ids. No packs if `None`.
    #[serde(default)]
    pub pack: Option<usize>,
    /// Maximum number of token ids computed at once. The gradients of a larger batch are accumulated.
    pub micro_batch_tokens: usize,
    /// Normalization of the loss.
    pub normalization: Normalization,
    /// Settings of the optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning-rate schedule.
    pub schedule: Schedule,
    /// Maximum L2 norm of the gradient. No clipping if `None`.
    pub clip: Option<f64>,
    /// Random seed of the order of the samples.
    pub seed: u64,
    /// Evaluation during the run. Requires [`Trainer::with_evaluation`](crate::Trainer::with_evaluation).
    #[serde(default)]
    pub evaluation: Option<Evaluation>,
    /// Gradient checkpointing. Does not change any result.
    #[serde(skip, default = "per_block")]
    pub checkpointing: Checkpointing,
}

/// Default of [`TrainOptions::checkpointing`], which is not saved.
fn per_block() -> Checkpointing {
    Checkpointing::PerBlock
}

/// Returns 3 % of the steps.
pub(crate) fn default_warmup(steps: u64) -> u64 {
    steps / 100 * 3 + steps % 100 * 3 / 100
}

impl TrainOptions {
    /// Creates settings: AdamW at `lr`, warm-up over 3 % of the steps, then linear decay to 0. Batches have 16 samples,
    /// micro-batches 2048 token ids, and gradients are clipped at norm 1.
    pub fn new(steps: u64, lr: f64) -> Self {
        Self {
            steps,
            batch: 16,
            pack: None,
            micro_batch_tokens: 2048,
            normalization: Normalization::Tokens,
            optimizer: OptimizerConfig::new(Rule::AdamW, lr),
            schedule: Schedule { warmup_steps: default_warmup(steps), total_steps: steps, decay: Decay::Linear },
            clip: Some(1.0),
            seed: 0,
            evaluation: None,
            checkpointing: Checkpointing::PerBlock,
        }
    }
}
