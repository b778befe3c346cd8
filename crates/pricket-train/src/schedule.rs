//! Learning-rate schedules, as computed by transformers (`optimization.py`) and composer (`optim/scheduler.py`).
//!
//! The learning rate of a step is `lr · multiplier(step)`. The multiplier rises linearly from 0 to 1 during the
//! warm-up, and then follows a [`Decay`].

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The decay of the learning rate after the warm-up, as a multiplier of the full rate.
///
/// In the formulas, `x` goes from 0 at the end of the warm-up to 1 at the last step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decay {
    /// 1.
    Constant,
    /// `1 - x`, at least 0.
    Linear,
    /// `(1 - min) · (1 + cos(2π · cycles · x)) / 2 + min`. With 0.5 cycles it ends at `min`, and rises again after the
    /// last step.
    Cosine {
        /// Periods of the cosine. transformers' default: 0.5.
        cycles: f64,
        /// Smallest multiplier.
        min: f64,
    },
    /// A half cosine from 1 to 0, repeated `cycles` times.
    CosineRestarts {
        /// Number of repetitions. transformers' default: 1.
        cycles: f64,
    },
    /// `(1 - end) · (1 - x)^power + end`.
    Polynomial {
        /// Exponent. transformers' default: 1.
        power: f64,
        /// Multiplier at the last step.
        end: f64,
    },
    /// `1 / sqrt((step - warmup + timescale) / timescale)`. The timescale is the warm-up, or 10,000 steps without a
    /// warm-up.
    InverseSqrt,
    /// 1, then a half cosine down to `min` over the last `decay_steps` steps (Hu et al. 2024, arXiv:2404.06395).
    ///
    /// The warm-up begins at `min`, not at 0.
    WarmupStableDecay {
        /// Number of steps of the final decay.
        decay_steps: u64,
        /// Multiplier at the first and the last step.
        min: f64,
    },
    /// composer's cosine, `alpha_f + (1 - alpha_f) · (1 + cos(πx)) / 2`, which stays at `alpha_f` after the last step.
    ComposerCosine {
        /// Multiplier at the last step.
        alpha_f: f64,
    },
    /// composer's linear decay, `1 + x · (alpha_f - 1)`, which stays at `alpha_f` after the last step.
    ComposerLinear {
        /// Multiplier at the last step.
        alpha_f: f64,
    },
}

/// A learning-rate schedule: a linear warm-up followed by a decay.
///
/// ```
/// use pricket_train::{Decay, Schedule};
/// let schedule = Schedule { warmup_steps: 2, total_steps: 4, decay: Decay::Linear };
/// // The first step of a warm-up has rate 0, as in transformers.
/// assert_eq!([0, 1, 2, 3, 4].map(|step| schedule.at(step)), [0.0, 0.5, 1.0, 0.5, 0.0]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Number of warm-up steps.
    pub warmup_steps: u64,
    /// Number of all steps, including the warm-up. Not used by [`Decay::Constant`] and [`Decay::InverseSqrt`].
    pub total_steps: u64,
    /// Decay after the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// Returns the schedule that transformers' `get_scheduler` or composer calls `name`, with that library's defaults.
    ///
    /// Where the library has no default, `cosine_with_min_lr` ends at a tenth of the learning rate, `polynomial` ends
    /// at 0, and the decay of `warmup_stable_decay` takes the last fifth of the steps after the warm-up.
    ///
    /// # Errors
    /// Returns [`Error::Input`] with the known names if `name` is unknown.
    pub fn named(name: &str, warmup_steps: u64, total_steps: u64) -> Result<Self> {
        let decay = match name {
            "constant" | "constant_with_warmup" => Decay::Constant,
            "linear" => Decay::Linear,
            "cosine" => Decay::Cosine { cycles: 0.5, min: 0.0 },
            "cosine_with_min_lr" => Decay::Cosine { cycles: 0.5, min: 0.1 },
            "cosine_with_restarts" => Decay::CosineRestarts { cycles: 1.0 },
            "polynomial" => Decay::Polynomial { power: 1.0, end: 0.0 },
            "inverse_sqrt" => Decay::InverseSqrt,
            "warmup_stable_decay" => {
                Decay::WarmupStableDecay { decay_steps: total_steps.saturating_sub(warmup_steps) / 5, min: 0.0 }
            }
            "composer_cosine_with_warmup" => Decay::ComposerCosine { alpha_f: 0.0 },
            "composer_linear_decay_with_warmup" => Decay::ComposerLinear { alpha_f: 0.0 },
            _ => {
                let known = "constant, constant_with_warmup, linear, cosine, cosine_with_min_lr, cosine_with_restarts, \
                             polynomial, inverse_sqrt, warmup_stable_decay, composer_cosine_with_warmup or \
                             composer_linear_decay_with_warmup";
                return Err(Error::Input(format!("{name:?} is not a known schedule; use {known}")));
            }
        };
        // transformers' `constant` ignores the warm-up.
        let warmup_steps = if name == "constant" { 0 } else { warmup_steps };
        Ok(Self { warmup_steps, total_steps, decay })
    }

    /// Sets the lowest multiplier of the decay, `min`, `end` or `alpha_f`.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the decay has no such setting.
    pub fn with_min(self, share: f64) -> Result<Self> {
        let decay = match self.decay {
            Decay::Cosine { cycles, .. } => Decay::Cosine { cycles, min: share },
            Decay::Polynomial { power, .. } => Decay::Polynomial { power, end: share },
            Decay::WarmupStableDecay { decay_steps, .. } => Decay::WarmupStableDecay { decay_steps, min: share },
            Decay::ComposerCosine { .. } => Decay::ComposerCosine { alpha_f: share },
            Decay::ComposerLinear { .. } => Decay::ComposerLinear { alpha_f: share },
            Decay::Constant | Decay::Linear | Decay::CosineRestarts { .. } | Decay::InverseSqrt => {
                return Err(Error::Input(format!("the schedule {:?} has no minimum learning rate to set", self.decay)));
            }
        };
        Ok(Self { decay, ..self })
    }

    /// Returns the multiplier of the learning rate at `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        let (step, warmup, total) = (step as f64, self.warmup_steps as f64, self.total_steps as f64);
        let floor = match self.decay {
            Decay::WarmupStableDecay { min, .. } => min,
            _ => 0.0,
        };
        if step < warmup {
            return step / warmup * (1.0 - floor) + floor;
        }
        let x = (step - warmup) / (total - warmup).max(1.0);
        let half_cosine = |x: f64| 0.5 * (1.0 + (PI * x).cos());
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => (1.0 - x).max(0.0),
            Decay::Cosine { cycles, min } => half_cosine(2.0 * cycles * x).max(0.0) * (1.0 - min) + min,
            Decay::CosineRestarts { .. } if x >= 1.0 => 0.0,
            Decay::CosineRestarts { cycles } => half_cosine((cycles * x).fract()),
            Decay::Polynomial { end, .. } if step > total => end,
            Decay::Polynomial { power, end } => (1.0 - end) * (1.0 - x).max(0.0).powf(power) + end,
            Decay::InverseSqrt => {
                let timescale = if self.warmup_steps == 0 { 10_000.0 } else { warmup };
                1.0 / ((step - warmup + timescale) / timescale).sqrt()
            }
            Decay::WarmupStableDecay { decay_steps, min } => {
                let decay = decay_steps as f64;
                let stable = total - warmup - decay;
                if step < warmup + stable {
                    1.0
                } else if step < total {
                    half_cosine((step - warmup - stable) / decay.max(1.0)) * (1.0 - min) + min
                } else {
                    min
                }
            }
            Decay::ComposerCosine { alpha_f } => alpha_f + (1.0 - alpha_f) * half_cosine(x.min(1.0)),
            Decay::ComposerLinear { alpha_f } => 1.0 + x.min(1.0) * (alpha_f - 1.0),
        }
    }
}
