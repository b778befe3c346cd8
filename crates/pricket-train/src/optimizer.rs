//! Optimizers: AdamW and LION, as computed by torch, composer, llm-foundry and lion-pytorch.
//!
//! Weights shrink first, `p ← p (1 - decay)`. Then the rule is applied to the gradient `g` at step `t`:
//!
//! ```text
//! AdamW:  m ← β₁ m + (1 - β₁) g
//!         v ← β₂ v + (1 - β₂) g²
//!         p ← p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)
//! LION:   p ← p - lr · sign(β₁ m + (1 - β₁) g)
//!         m ← β₂ m + (1 - β₂) g
//! ```

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use pricket_nn::Parameter;
use serde::{Deserialize, Serialize};

use crate::gradients::Gradients;
use crate::{Error, Result};

/// An update rule. `lr` is the learning rate of the step, `lr₀` that before the schedule, and `wd` the weight decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// torch's `AdamW` (Loshchilov and Hutter 2017, arXiv:1711.05101). Weights shrink by `lr · wd`.
    #[serde(rename = "adamw")]
    AdamW,
    /// composer's `DecoupledAdamW`. Weights shrink by `wd · lr / lr₀`.
    #[serde(rename = "decoupled_adamw")]
    DecoupledAdamW,
    /// LION of the paper (Chen et al. 2023, arXiv:2302.06675) and of lion-pytorch. Weights shrink by `lr · wd`.
    Lion,
    /// llm-foundry's `DecoupledLionW`, which trained MPT. Weights shrink by `wd · lr / lr₀`.
    #[serde(rename = "decoupled_lionw", alias = "decoupled_lion")]
    DecoupledLion,
}

impl Rule {
    pub(crate) fn is_lion(self) -> bool {
        matches!(self, Rule::Lion | Rule::DecoupledLion)
    }

    fn is_decoupled(self) -> bool {
        matches!(self, Rule::DecoupledAdamW | Rule::DecoupledLion)
    }
}

impl std::str::FromStr for Rule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "adamw" => Ok(Rule::AdamW),
            "decoupled_adamw" => Ok(Rule::DecoupledAdamW),
            "lion" => Ok(Rule::Lion),
            "decoupled_lionw" | "decoupled_lion" => Ok(Rule::DecoupledLion),
            _ => Err(Error::Input(format!(
                "{name:?} is not a known optimizer; use adamw, decoupled_adamw, lion or decoupled_lionw"
            ))),
        }
    }
}

/// Settings of an optimizer.
///
/// ```
/// use pricket_train::{OptimizerConfig, Rule};
/// // The settings that trained Pythia.
/// let config = OptimizerConfig { betas: (0.9, 0.95), weight_decay: 0.1, ..OptimizerConfig::new(Rule::AdamW, 1e-3) };
/// assert_eq!(config.eps, 1e-8);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// Update rule.
    pub rule: Rule,
    /// Learning rate before the schedule.
    pub lr: f64,
    /// Decay rates of the two moments, each from 0 to below 1.
    pub betas: (f64, f64),
    /// Added to the square root of the second moment. Not used by LION.
    pub eps: f64,
    /// Weight decay of matrices and embeddings.
    pub weight_decay: f64,
    /// Whether biases and norms decay as well, as in llm-foundry. Default: false, as in transformers' Trainer.
    pub decay_vectors: bool,
    /// Learning rates of single parameters: an ending of their names and a multiple of `lr`. The first match is used.
    ///
    /// `("lora_B.weight", 16.0)` is LoRA+ (Hayou et al. 2024, arXiv:2402.12354).
    pub lr_ratios: Vec<(String, f64)>,
}

impl OptimizerConfig {
    /// Creates settings with the defaults of the library that defines the rule, without weight decay.
    pub fn new(rule: Rule, lr: f64) -> Self {
        let betas = match rule {
            Rule::AdamW => (0.9, 0.999),
            Rule::DecoupledAdamW => (0.9, 0.95),
            Rule::Lion | Rule::DecoupledLion => (0.9, 0.99),
        };
        Self { rule, lr, betas, eps: 1e-8, weight_decay: 0.0, decay_vectors: false, lr_ratios: Vec::new() }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let is_share = |beta: f64| (0.0..1.0).contains(&beta);
        let problem = match self {
            _ if !(self.lr.is_finite() && self.lr > 0.0) => format!("lr is {}; expected a positive number", self.lr),
            _ if !is_share(self.betas.0) || !is_share(self.betas.1) => {
                format!("betas are {:?}; expected numbers from 0 to below 1", self.betas)
            }
            _ if !(self.eps.is_finite() && self.eps >= 0.0) => format!("eps is {}; expected 0 or more", self.eps),
            _ if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) => {
                format!("weight_decay is {}; expected 0 or more", self.weight_decay)
            }
            _ if self.rule.is_decoupled() && self.weight_decay >= 1.0 => {
                format!("weight_decay is {}; expected less than 1 for a decoupled rule", self.weight_decay)
            }
            _ => match self.lr_ratios.iter().find(|(_, ratio)| !(ratio.is_finite() && *ratio > 0.0)) {
                Some((end, ratio)) => {
                    format!("the learning rate of {end} is {ratio} times lr; expected a positive number")
                }
                None => return Ok(()),
            },
        };
        Err(Error::Input(problem))
    }

    fn ratio(&self, name: &str) -> f64 {
        self.lr_ratios.iter().find(|(end, _)| name.ends_with(end.as_str())).map_or(1.0, |(_, ratio)| *ratio)
    }
}

/// An optimizer over a list of parameters. Moments are stored in f32.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    step: u64,
    slots: Vec<Slot>,
}

/// The optimizer's tensors of one parameter.
#[derive(Debug)]
struct Slot {
    /// First moment.
    first: Tensor,
    /// Second moment. `None` for LION.
    second: Option<Tensor>,
    /// The weight in f32, for a parameter of another type.
    master: Option<Tensor>,
}

impl Optimizer {
    /// Creates an optimizer whose moments are zero.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a setting is out of range, or if a learning rate of its own matches no parameter.
    pub fn new(config: OptimizerConfig, parameters: &[Parameter]) -> Result<Self> {
        config.check()?;
        let has = |end: &str| parameters.iter().any(|parameter| parameter.name.ends_with(end));
        if let Some((end, _)) = config.lr_ratios.iter().find(|(end, _)| !has(end)) {
            return Err(Error::Input(format!("lr_ratios: no parameter has a name that ends in {end}")));
        }
        let slot = |parameter: &Parameter| -> Result<Slot> {
            let tensor = parameter.var.as_tensor();
            let zeros = || Tensor::zeros(tensor.shape(), DType::F32, tensor.device());
            let second = if config.rule.is_lion() { None } else { Some(zeros()?) };
            let is_f32 = tensor.dtype() == DType::F32;
            let master = (!is_f32).then(|| tensor.detach().to_dtype(DType::F32)).transpose()?;
            Ok(Slot { first: zeros()?, second, master })
        };
        let slots = parameters.iter().map(slot).collect::<Result<_>>()?;
        Ok(Self { config, step: 0, slots })
    }

    /// Returns the settings.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Returns the size of the optimizer's tensors in bytes.
    pub fn bytes(&self) -> usize {
        let tensors = self.slots.iter().flat_map(Slot::tensors);
        tensors.map(|(_, tensor)| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
    }

    /// Updates the parameters by one step. Parameters without a gradient are unchanged.
    ///
    /// `multiplier` is the schedule's share of the learning rate at this step, [`Schedule::at`](crate::Schedule::at).
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the number of parameters or gradients differs from the optimizer's, and an error if
    /// a tensor operation fails.
    pub fn step(&mut self, parameters: &[Parameter], gradients: &Gradients, multiplier: f64) -> Result<()> {
        if parameters.len() != self.slots.len() || gradients.of().len() != self.slots.len() {
            let (found, expected) = (parameters.len(), self.slots.len());
            return Err(Error::Input(format!("found {found} parameters; the optimizer has {expected}")));
        }
        self.step += 1;
        let OptimizerConfig { rule, betas: (b1, b2), eps, .. } = self.config;
        let t = self.step as f64;
        let corrections = (1.0 - b1.powf(t), 1.0 - b2.powf(t));
        for ((parameter, gradient), slot) in parameters.iter().zip(gradients.of()).zip(&mut self.slots) {
            let Some(gradient) = gradient else { continue };
            let g = gradient.to_dtype(DType::F32)?;
            let lr = self.config.lr * self.config.ratio(&parameter.name) * multiplier;
            let decay = match parameter.var.rank() {
                0 | 1 if !self.config.decay_vectors => 0.0,
                _ if rule.is_decoupled() => self.config.weight_decay * multiplier,
                _ => self.config.weight_decay * lr,
            };
            let mut p = slot.master.clone().unwrap_or_else(|| parameter.var.as_tensor().detach());
            if decay != 0.0 {
                p = (p * (1.0 - decay))?;
            }
            let mean = |old: &Tensor, new: &Tensor, beta: f64| -> Result<Tensor> {
                Ok(((old * beta)? + (new * (1.0 - beta))?)?)
            };
            let p = if let Some(second) = &mut slot.second {
                slot.first = mean(&slot.first, &g, b1)?;
                *second = mean(second, &g.sqr()?, b2)?;
                let root = ((second.sqrt()? * (1.0 / corrections.1.sqrt()))? + eps)?;
                (p - ((&slot.first / root)? * (lr / corrections.0))?)?
            } else {
                let direction = mean(&slot.first, &g, b1)?.sign()?;
                slot.first = mean(&slot.first, &g, b2)?;
                (p - (direction * lr)?)?
            };
            match &mut slot.master {
                Some(master) => {
                    parameter.var.set(&p.to_dtype(parameter.var.dtype())?)?;
                    *master = p;
                }
                None => parameter.var.set(&p)?,
            }
        }
        Ok(())
    }

    /// Returns the number of steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Returns the optimizer's tensors, named `first.`, `second.` or `master.` and the name of the parameter.
    pub(crate) fn state(&self, parameters: &[Parameter]) -> BTreeMap<String, Tensor> {
        let of = |(parameter, slot): (&Parameter, &Slot)| {
            let name = parameter.name.clone();
            slot.tensors().map(move |(kind, tensor)| (format!("{kind}.{name}"), tensor)).collect::<Vec<_>>()
        };
        parameters.iter().zip(&self.slots).flat_map(of).collect()
    }

    /// Restores the tensors returned by [`Optimizer::state`] and the number of steps.
    pub(crate) fn restore(
        &mut self,
        parameters: &[Parameter],
        mut state: BTreeMap<String, Tensor>,
        step: u64,
    ) -> Result<()> {
        for (parameter, slot) in parameters.iter().zip(&mut self.slots) {
            for (kind, tensor) in slot.tensors_mut() {
                let name = format!("{kind}.{}", parameter.name);
                let found = state.remove(&name).filter(|found| found.dims() == tensor.dims());
                let missing = || Error::Input(format!("optimizer.safetensors: {name} is missing or has another shape"));
                *tensor = found.ok_or_else(missing)?.to_device(tensor.device())?;
            }
        }
        if let Some(name) = state.keys().next() {
            return Err(Error::Input(format!("optimizer.safetensors: {name} matches no parameter of this run")));
        }
        self.step = step;
        Ok(())
    }
}

impl Slot {
    fn tensors(&self) -> impl Iterator<Item = (&'static str, Tensor)> + use<> {
        let parts = [("first", Some(&self.first)), ("second", self.second.as_ref()), ("master", self.master.as_ref())];
        let parts = parts.map(|(kind, tensor)| tensor.map(|tensor| (kind, tensor.clone())));
        parts.into_iter().flatten()
    }

    fn tensors_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        let Self { first, second, master } = self;
        let rest = [("second", second.as_mut()), ("master", master.as_mut())];
        [("first", first)].into_iter().chain(rest.into_iter().filter_map(|(kind, tensor)| Some((kind, tensor?))))
    }
}
