//! Combining several adapters into one, as PEFT's `add_weighted_adapter` does.
//!
//! With weights `wᵢ` and scales `sᵢ`:
//!
//! - [`Lora::cat`]: `ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ`, by concatenating along the rank.
//! - [`Lora::linear`]: `ΔW = (Σ √(wᵢ sᵢ) Bᵢ) (Σ √(wᵢ sᵢ) Aᵢ)`.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use crate::config::{LoraConfig, Select};
use crate::lora::{Lora, LowRank};
use crate::targets::Targets;
use crate::{Error, Result};

impl Lora {
    /// Returns the exact weighted sum of adapters, whose rank is the sum of their ranks.
    ///
    /// Equals PEFT's `add_weighted_adapter(combination_type="cat")`.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if `parts` is empty, or if an adapter uses DoRA or stores modules in full.
    pub fn cat(parts: &[(&Lora, f64)]) -> Result<Self> {
        Self::combine(parts, |changes| {
            let a = changes.iter().map(|(low, weight)| &low.a * *weight).collect::<candle_core::Result<Vec<_>>>()?;
            let b: Vec<_> = changes.iter().map(|(low, _)| low.b.clone()).collect();
            Ok((Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?))
        })
    }

    /// Returns an adapter whose `A` and `B` are the sums of the parts' `A` and `B`, each multiplied by the square root
    /// of its weight.
    ///
    /// This differs from the weighted sum of the changes. All parts must have the same ranks. The sign of a negative
    /// weight is applied to `A`. Equals PEFT's `add_weighted_adapter(combination_type="linear")`.
    ///
    /// # Errors
    /// Returns the errors of [`Lora::cat`], and [`Error::Input`] if the ranks differ.
    pub fn linear(parts: &[(&Lora, f64)]) -> Result<Self> {
        Self::combine(parts, |changes| {
            let root = |weight: f64| weight.abs().sqrt();
            let ranks: BTreeSet<_> = changes.iter().filter_map(|(low, _)| low.a.dims().first().copied()).collect();
            if ranks.len() > 1 {
                return Err(Error::Input(format!(
                    "linear combines adapters of equal rank, found ranks {ranks:?}; cat combines different ranks"
                )));
            }
            let sum = |parts: Vec<Tensor>| -> Result<Tensor> {
                let mut parts = parts.into_iter();
                let first = parts.next().ok_or_else(|| Error::Input("no adapters to combine".into()))?;
                Ok(parts.try_fold(first, |sum, part| sum + part)?)
            };
            let a = changes.iter().map(|(low, weight)| &low.a * (weight.signum() * root(*weight)));
            let b = changes.iter().map(|(low, weight)| &low.b * root(*weight));
            Ok((sum(a.collect::<candle_core::Result<_>>()?)?, sum(b.collect::<candle_core::Result<_>>()?)?))
        })
    }

    /// Combines adapters. `join` receives the changes of one module and their weights, which include the scales.
    fn combine(parts: &[(&Lora, f64)], join: impl Fn(&[(&LowRank, f64)]) -> Result<(Tensor, Tensor)>) -> Result<Self> {
        let Some((first, _)) = parts.first() else { return Err(Error::Input("no adapters to combine".into())) };
        if let Some((lora, _)) = parts.iter().find(|(lora, _)| lora.config.dora || !lora.whole.is_empty()) {
            let what = "adapters with DoRA magnitudes or with modules stored in full cannot be combined";
            return Err(Error::Input(format!("{}: {what}", lora.origin)));
        }
        let targets = parts.iter().map(|(lora, _)| Targets::new(&lora.config)).collect::<Result<Vec<_>>>()?;
        let modules: BTreeSet<&String> = parts.iter().flat_map(|(lora, _)| lora.low.keys()).collect();
        let mut low = BTreeMap::new();
        for module in modules {
            let mut changes = Vec::new();
            for ((lora, weight), targets) in parts.iter().zip(&targets) {
                if let Some(found) = lora.low.get(module) {
                    changes.push((found, weight * targets.scale(module, found.b.dim(1)?)?));
                }
            }
            let (a, b) = join(&changes)?;
            low.insert(module.clone(), LowRank { a, b, magnitude: None });
        }
        let ranks: BTreeMap<&String, usize> =
            low.iter().filter_map(|(name, low)| Some((name, low.a.dim(0).ok()?))).collect();
        // `r` is the most common rank. `alpha` equals the rank, since the weights already include the scales.
        let mut counts = BTreeMap::<usize, usize>::new();
        for rank in ranks.values() {
            *counts.entry(*rank).or_default() += 1;
        }
        let rank = counts.iter().max_by_key(|(_, count)| **count).map_or(1, |(rank, _)| *rank);
        let others = ranks.iter().filter(|(_, other)| **other != rank);
        let pattern: Vec<(String, usize)> =
            others.map(|(name, rank)| (format!("^{}", fancy_regex::escape(name)), *rank)).collect();
        let config = LoraConfig {
            rank,
            alpha: rank as f64,
            alpha_pattern: pattern.iter().map(|(name, rank)| (name.clone(), *rank as f64)).collect(),
            rank_pattern: pattern,
            // Full module names, because the parts may adapt different modules.
            targets: Select::Names(low.keys().cloned().collect()),
            base: first.config.base.clone(),
            revision: first.config.revision.clone(),
            task_type: first.config.task_type.clone(),
            ..LoraConfig::default()
        };
        Ok(Self { config, origin: "the combined adapter".into(), low, whole: BTreeMap::new() })
    }
}
