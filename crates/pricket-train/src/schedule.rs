//! Learning-rate schedules, as transformers (`optimization.py`) and composer (`optim/scheduler.py`) compute them.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the learning rate falls after the warm-up. `x` is the share of the steps after the warm-up that has passed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decay {
    /// It stays.
    Constant,
    /// `1 - x`, down to 0.
    Linear,
    /// `(1 + cos(2π · cycles · x)) / 2`; half a cycle ends at 0, and rises again beyond the last step.
    Cosine {
        /// Periods of the cosine; 0.5 by default.
        cycles: f64,
        /// The lowest rate, as a share of the full one.
        min: f64,
    },
    /// A cosine from 1 to 0, `cycles` times.
    CosineRestarts {
        /// How often; 1 by default.
        cycles: f64,
    },
    /// `(1 - end) · (1 - x)^power + end`.
    Polynomial {
        /// The exponent; 1 by default.
        power: f64,
        /// The share of the rate that is left at the end.
        end: f64,
    },
    /// `1 / sqrt((step - warmup + timescale) / timescale)`; the timescale is the warm-up, or 10,000 steps without one.
    InverseSqrt,
    /// The full rate, then a cosine over the last `decay_steps` steps down to `min`, where the warm-up begins too (Hu et al.
    /// 2024, arXiv:2404.06395).
    WarmupStableDecay {
        /// Steps of the fall.
        decay_steps: u64,
        /// The share of the rate at both ends.
        min: f64,
    },
    /// composer's cosine, which stays at `alpha_f` from the last step on.
    ComposerCosine {
        /// The share of the rate that is left at the end.
        alpha_f: f64,
    },
    /// composer's line, which stays at `alpha_f` from the last step on.
    ComposerLinear {
        /// The share of the rate that is left at the end.
        alpha_f: f64,
    },
}

/// A warm-up, and what follows it.
///
/// ```
/// use pricket_train::{Decay, Schedule};
/// let schedule = Schedule { warmup_steps: 2, total_steps: 4, decay: Decay::Linear };
/// // The first step of a warm-up has rate 0, as in transformers.
/// assert_eq!([0, 1, 2, 3, 4].map(|step| schedule.at(step)), [0.0, 0.5, 1.0, 0.5, 0.0]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Steps in which the rate rises from 0.
    pub warmup_steps: u64,
    /// Steps of the run, those of the warm-up included. [`Decay::Constant`] and [`Decay::InverseSqrt`] do not read it.
    pub total_steps: u64,
    /// What follows the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// A schedule by the name that transformers' `get_scheduler` or composer has for it, with that library's defaults. Where it has
    /// none: `cosine_with_min_lr` ends at a tenth of the rate, `polynomial` at 0, and the last decay of `warmup_stable_decay` takes a
    /// fifth of the steps after the warm-up.
    ///
    /// # Errors
    /// [`Error::Input`] for an unknown name, with the names that are known.
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
        // transformers' `constant` has no warm-up.
        let warmup_steps = if name == "constant" { 0 } else { warmup_steps };
        Ok(Self { warmup_steps, total_steps, decay })
    }

    /// The same with this share of the rate left at the end.
    ///
    /// # Errors
    /// [`Error::Input`] for a decay that has no such share.
    pub fn with_min(self, share: f64) -> Result<Self> {
        let decay = match self.decay {
            Decay::Cosine { cycles, .. } => Decay::Cosine { cycles, min: share },
            Decay::Polynomial { power, .. } => Decay::Polynomial { power, end: share },
            Decay::WarmupStableDecay { decay_steps, .. } => Decay::WarmupStableDecay { decay_steps, min: share },
            Decay::ComposerCosine { .. } => Decay::ComposerCosine { alpha_f: share },
            Decay::ComposerLinear { .. } => Decay::ComposerLinear { alpha_f: share },
            Decay::Constant | Decay::Linear | Decay::CosineRestarts { .. } | Decay::InverseSqrt => {
                return Err(Error::Input(format!("the schedule {:?} has no lowest rate to set", self.decay)));
            }
        };
        Ok(Self { decay, ..self })
    }

    /// The rate of `step`, counted from 0, as a share of the full rate.
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
