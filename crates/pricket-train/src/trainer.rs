//! The training loop: shuffled batches, training steps, checkpoints and resumption.
//!
//! A training step computes the gradients of one batch in micro-batches, clips them, and updates the parameters. The
//! order of the samples and the dropout depend only on the seed and the step, so a resumed run gives the same results.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Tensor};
use pricket_nn::{CausalLm, Context, Parameter};
use pricket_weights::{clip, parse_json};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::files::{read_small, read_tensors, write_tensors, write_text};
use crate::gradients::{Checkpointing, Gradients, add_gradients};
use crate::lora::{Lora, Tuned};
use crate::optimizer::{Optimizer, OptimizerConfig, Rule};
use crate::random::{number_of, shuffled};
use crate::sample::{Sample, micro_batches};
use crate::schedule::{Decay, Schedule};
use crate::{Error, Result};

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

/// Settings of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainOptions {
    /// Number of training steps.
    pub steps: u64,
    /// Number of samples per training step.
    pub batch: usize,
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
    /// Gradient checkpointing. Does not change any result.
    #[serde(skip, default = "per_block")]
    pub checkpointing: Checkpointing,
}

/// Default of [`TrainOptions::checkpointing`], which is not saved.
fn per_block() -> Checkpointing {
    Checkpointing::PerBlock
}

impl TrainOptions {
    /// Creates settings: AdamW at `lr`, warm-up over 3 % of the steps, then linear decay to 0. Batches have 16 samples,
    /// micro-batches 2048 token ids, and gradients are clipped at norm 1.
    pub fn new(steps: u64, lr: f64) -> Self {
        Self {
            steps,
            batch: 16,
            micro_batch_tokens: 2048,
            normalization: Normalization::Tokens,
            optimizer: OptimizerConfig::new(Rule::AdamW, lr),
            schedule: Schedule { warmup_steps: steps * 3 / 100, total_steps: steps, decay: Decay::Linear },
            clip: Some(1.0),
            seed: 0,
            checkpointing: Checkpointing::PerBlock,
        }
    }
}

/// Report of a training step.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct StepReport {
    /// Number of the step, counted from 1.
    pub step: u64,
    /// Loss before the update, in nats per counted token id.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Number of token ids read.
    pub tokens: usize,
    /// Number of token ids counted in the loss.
    pub counted: usize,
}

/// The object that a run trains and writes.
#[derive(Clone, Debug)]
pub enum TrainTarget {
    /// An adapter, in PEFT's format.
    Adapter(Box<Lora>),
    /// A whole model in Hub layout: config.json, and all parameters in model.safetensors.
    Model {
        /// Content of config.json.
        config: Value,
    },
}

impl TrainTarget {
    /// Writes the adapter or model with the current values of its parameters.
    fn write(&self, directory: &Path, parameters: &[Parameter]) -> Result<()> {
        match self {
            TrainTarget::Adapter(lora) => lora.trained(parameters)?.write(directory),
            TrainTarget::Model { config } => {
                std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
                let mut tensors = BTreeMap::new();
                for Parameter { name, var, rows } in parameters {
                    tensors.insert(name.clone(), rows.undo(&var.as_tensor().detach().to_device(&Device::Cpu)?)?);
                }
                // The file is written in f32, whatever type was loaded.
                let mut config = config.clone();
                for key in ["torch_dtype", "dtype"] {
                    if config[key].is_string() {
                        config[key] = "float32".into();
                    }
                }
                let json = serde_json::to_string_pretty(&config).unwrap_or_default();
                write_text(&directory.join("config.json"), &(json + "\n"))?;
                // The weights are written last, so that an interrupted write leaves no directory that loads as a model.
                write_tensors(&directory.join("model.safetensors"), &tensors)
            }
        }
    }

    /// Returns the settings that must be equal to resume from a checkpoint.
    fn settings(&self) -> Value {
        match self {
            TrainTarget::Adapter(lora) => lora.config().to_json(),
            TrainTarget::Model { config } => config.clone(),
        }
    }

    /// Reads the tensors written by [`TrainTarget::write`].
    fn read(&self, directory: &Path) -> Result<BTreeMap<String, Tensor>> {
        match self {
            TrainTarget::Adapter(_) => Ok(Lora::read(directory)?.tensors()),
            TrainTarget::Model { .. } => read_tensors(&directory.join("model.safetensors")),
        }
    }
}

/// Trains an adapter or a model on samples.
#[derive(Debug)]
pub struct Trainer {
    target: TrainTarget,
    tuned: Tuned,
    samples: Vec<Sample>,
    options: TrainOptions,
    optimizer: Optimizer,
    step: u64,
    /// Number of the current epoch, and the order of its samples.
    order: Option<(u64, Vec<usize>)>,
    /// Number of micro-batches computed so far, which seeds the dropout.
    micro_batches: u64,
    /// Fingerprint of the base model; see [`fingerprint`].
    base: String,
    /// Step of the last checkpoint that this run wrote or resumed from.
    saved: Option<u64>,
}

/// Content of a checkpoint's trainer.json.
#[derive(Serialize, Deserialize)]
struct Progress {
    step: u64,
    micro_batches: u64,
    samples: String,
    base: String,
    product: Value,
    options: TrainOptions,
}

/// Prefix of a checkpoint's directory name, before the step.
const CHECKPOINT: &str = "checkpoint-";

impl Trainer {
    /// Creates a run at step 0.
    ///
    /// For an adapter, `tuned` is the result of [`Lora::train`]. For a whole model, its parameters are
    /// [`Weights::parameters`].
    ///
    /// [`Weights::parameters`]: pricket_nn::Weights::parameters
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a setting is out of range, no token id is counted, or a sample does not fit the
    /// model.
    pub fn new(target: TrainTarget, tuned: Tuned, samples: Vec<Sample>, options: TrainOptions) -> Result<Self> {
        let counted: usize = samples.iter().map(Sample::counted).sum();
        if counted == 0 {
            return Err(Error::Input(format!(
                "none of {} samples has a token id that counts in the loss",
                samples.len()
            )));
        }
        if options.batch == 0 || options.micro_batch_tokens == 0 {
            return Err(Error::Input("batch or micro_batch_tokens is 0; expected at least 1".into()));
        }
        if options.clip.is_some_and(|clip| !(clip > 0.0 && clip.is_finite())) {
            return Err(Error::Input(format!("clip is {:?}; expected a positive number", options.clip)));
        }
        let info = tuned.model.info();
        let longest = samples.iter().enumerate().max_by_key(|(_, sample)| sample.ids().len());
        if let (Some((i, sample)), Some(limit)) = (longest, info.context)
            && sample.ids().len() > limit
        {
            let (number, len) = (i + 1, sample.ids().len());
            let what =
                format!("sample {number} has {len} token ids; the model's context is {limit}; truncate the sample");
            return Err(Error::Input(what));
        }
        let all = samples.iter().enumerate().flat_map(|(i, sample)| sample.ids().iter().map(move |id| (i, *id)));
        if let Some((i, id)) = all.into_iter().find(|(_, id)| *id as usize >= info.vocab) {
            return Err(Error::Input(format!("sample {}: id {id} is outside the vocabulary of {}", i + 1, info.vocab)));
        }
        let optimizer = Optimizer::new(options.optimizer.clone(), &tuned.parameters)?;
        let base = match &target {
            TrainTarget::Adapter(_) => fingerprint(&*tuned.model, &samples[0])?,
            // A checkpoint of a whole model holds all weights, so there is no base to compare.
            TrainTarget::Model { .. } => String::new(),
        };
        Ok(Self {
            target,
            tuned,
            samples,
            options,
            optimizer,
            step: 0,
            order: None,
            micro_batches: 0,
            base,
            saved: None,
        })
    }

    /// Returns the number of training steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Returns the settings of the run.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// Returns the model in its current state. Every training step changes it.
    pub fn tuned(&self) -> &Tuned {
        &self.tuned
    }

    /// Writes the adapter or model in its current state into a directory.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        self.target.write(directory, &self.tuned.parameters)
    }

    /// Returns whether all training steps are done.
    pub fn is_done(&self) -> bool {
        self.step >= self.options.steps
    }

    /// Returns the samples of `step`, counted from 0. Every epoch has its own random order.
    fn batch(&mut self, step: u64) -> Vec<Sample> {
        let (n, from) = (self.samples.len() as u64, step * self.options.batch as u64);
        (from..from + self.options.batch as u64)
            .map(|at| {
                let epoch = at / n;
                if self.order.as_ref().is_none_or(|(known, _)| *known != epoch) {
                    let seed = number_of(&format!("epoch {epoch}"), self.options.seed);
                    self.order = Some((epoch, shuffled(seed, self.samples.len())));
                }
                let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
                self.samples[order[(at % n) as usize]].clone()
            })
            .collect()
    }

    /// Takes a training step.
    ///
    /// # Errors
    /// Returns [`Error::NonFinite`] with the place and the micro-batch if the loss or a gradient is NaN or infinite.
    /// The parameters are then unchanged.
    pub fn advance(&mut self) -> Result<StepReport> {
        let before = self.micro_batches;
        let report = self.advance_inner();
        // Pass 0 disables dropout outside of training steps. A failed step does not count.
        self.tuned.passes.store(0, Ordering::Relaxed);
        if report.is_err() {
            self.micro_batches = before;
        }
        report
    }

    fn advance_inner(&mut self) -> Result<StepReport> {
        let batch = self.batch(self.step);
        let (tokens, counted) =
            (batch.iter().map(|sample| sample.ids().len()).sum(), batch.iter().map(Sample::counted).sum::<usize>());
        let parts = micro_batches(batch, self.options.micro_batch_tokens);
        let parts: Vec<_> = parts.into_iter().filter(|part| part.iter().any(|sample| sample.counted() > 0)).collect();
        let parameters = &self.tuned.parameters;
        let (mut sum, mut loss) = (Gradients::none(parameters), 0.0);
        let model = &*self.tuned.model;
        for (i, part) in parts.iter().enumerate() {
            let weight = match self.options.normalization {
                Normalization::Tokens => 1.0 / counted as f64,
                Normalization::MicroBatches => {
                    let counted: usize = part.iter().map(Sample::counted).sum();
                    1.0 / (counted * parts.len()) as f64
                }
            };
            self.micro_batches += 1;
            self.tuned.passes.store(self.micro_batches, Ordering::Relaxed);
            let nll = add_gradients(model, part, weight, parameters, self.options.checkpointing, &mut sum)?;
            if !nll.is_finite() {
                let what = match first_not_finite(model, part)? {
                    Some(place) => format!("the loss is {nll}: {place} contains NaN or infinity"),
                    None => format!("the loss is {nll}"),
                };
                return Err(Error::NonFinite { step: self.step + 1, micro_batch: i + 1, what });
            }
            loss += nll * weight;
        }
        let grad_norm = sum.clip(self.options.clip)?;
        if !grad_norm.is_finite() {
            let what = match sum.not_finite(parameters)? {
                Some(name) => format!("the gradient of {name} contains NaN or infinity"),
                None => "the gradient norm overflows".to_owned(),
            };
            return Err(Error::NonFinite { step: self.step + 1, micro_batch: parts.len(), what });
        }
        let multiplier = self.options.schedule.at(self.step);
        self.optimizer.step(parameters, &sum, multiplier)?;
        self.step += 1;
        let lr = self.options.optimizer.lr * multiplier;
        Ok(StepReport { step: self.step, loss, lr, grad_norm, tokens, counted })
    }

    /// Writes a checkpoint into `directory/checkpoint-STEP`: the adapter or model, the optimizer's tensors, and the
    /// position in the data.
    ///
    /// An interrupted write leaves no incomplete checkpoint under this name. The last `keep` checkpoints are kept, at
    /// least one; older ones are deleted.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if it cannot be written. Existing checkpoints are then unchanged. Returns
    /// [`Error::Adapter`] if the directory already holds this step of another run.
    pub fn save(&mut self, directory: &Path, keep: usize) -> Result<PathBuf> {
        let path = directory.join(format!("{CHECKPOINT}{}", self.step));
        if path.exists() {
            if self.saved == Some(self.step) {
                return Ok(path);
            }
            let what = "the checkpoint exists and belongs to another run; give another directory".into();
            return Err(Error::Adapter { origin: path.display().to_string(), what });
        }
        let part = directory.join(format!(".{CHECKPOINT}{}.{}.part", self.step, std::process::id()));
        let written =
            self.write_checkpoint(&part).and_then(|()| std::fs::rename(&part, &path).map_err(Error::io(&path)));
        if let Err(e) = written {
            drop(std::fs::remove_dir_all(&part));
            return Err(e);
        }
        self.saved = Some(self.step);
        let mut steps = checkpoints(directory)?;
        steps.retain(|(step, _)| *step < self.step);
        for (_, old) in steps.iter().rev().skip(keep.max(1) - 1) {
            std::fs::remove_dir_all(old).map_err(Error::io(old))?;
        }
        Ok(path)
    }

    fn write_checkpoint(&self, directory: &Path) -> Result<()> {
        self.write(directory)?;
        let state = self.optimizer.state(&self.tuned.parameters);
        write_tensors(&directory.join("optimizer.safetensors"), &state)?;
        let progress = Progress {
            step: self.step,
            micro_batches: self.micro_batches,
            samples: digest(&self.samples),
            base: self.base.clone(),
            product: self.target.settings(),
            options: self.options.clone(),
        };
        let json = serde_json::to_string_pretty(&progress).unwrap_or_default();
        write_text(&directory.join("trainer.json"), &(json + "\n"))
    }

    /// Resumes from the last checkpoint in `directory`, and returns its path, or `None` if there is no checkpoint.
    ///
    /// Deletes the temporary files of interrupted writes.
    ///
    /// # Errors
    /// Returns [`Error::Adapter`] if the checkpoint belongs to another run: its samples, base, settings or parameters
    /// differ.
    pub fn resume(&mut self, directory: &Path) -> Result<Option<PathBuf>> {
        if !directory.exists() {
            return Ok(None);
        }
        for entry in std::fs::read_dir(directory).map_err(Error::io(directory))? {
            let entry = entry.map_err(Error::io(directory))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Temporary files and directories are named `.NAME.PROCESS.part`.
            let part = name.strip_prefix('.').and_then(|rest| rest.strip_suffix(".part")?.rsplit_once('.'));
            if part.is_some_and(|(_, process)| process.parse::<u32>().is_ok()) {
                let path = entry.path();
                let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                removed.map_err(Error::io(path))?;
            }
        }
        let Some((_, path)) = checkpoints(directory)?.pop() else { return Ok(None) };
        let wrong = |what: String| Error::Adapter { origin: path.display().to_string(), what: clip(&what) };
        let json =
            parse_json(&read_small(&path.join("trainer.json"))?).map_err(|e| wrong(format!("trainer.json: {e}")))?;
        let progress: Progress = serde_json::from_value(json).map_err(|e| wrong(format!("trainer.json: {e}")))?;
        if progress.samples != digest(&self.samples) {
            return Err(wrong("was made with other samples; give the same data or another directory".into()));
        }
        if progress.base != self.base {
            return Err(wrong("was made with another base model; give the same model or another directory".into()));
        }
        let now = self.target.settings();
        if let Some((key, before)) =
            progress.product.as_object().into_iter().flatten().find(|(key, value)| now[*key] != **value)
        {
            return Err(wrong(format!("was made with {key} {before}, now it is {}; give another directory", now[key])));
        }
        let settings = |options: &TrainOptions| serde_json::to_value(options).unwrap_or_default();
        let (then, now) = (settings(&progress.options), settings(&self.options));
        if let Some((key, before)) = then.as_object().into_iter().flatten().find(|(key, value)| now[*key] != **value) {
            return Err(wrong(format!("was made with {key} {before}, now it is {}; give another directory", now[key])));
        }
        let tensors = self.target.read(&path)?;
        for parameter in &self.tuned.parameters {
            let var = &parameter.var;
            let found = tensors.get(&parameter.name).filter(|found| found.dims() == var.dims());
            let found = found.ok_or_else(|| wrong(format!("has no tensor {} of this run", parameter.name)))?;
            let found = parameter.rows.apply(found)?.to_dtype(var.dtype())?.to_device(var.device())?;
            var.set(&found.contiguous()?)?;
        }
        let state = read_tensors(&path.join("optimizer.safetensors"))?;
        self.optimizer.restore(&self.tuned.parameters, state, progress.step)?;
        (self.step, self.micro_batches, self.order) = (progress.step, progress.micro_batches, None);
        self.saved = Some(progress.step);
        Ok(Some(path))
    }
}

/// Returns the complete checkpoints in a directory, ordered by step.
fn checkpoints(directory: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(Error::io(directory))? {
        let path = entry.map_err(Error::io(directory))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Checkpoints of other training programs have the same directory names.
        let is_ours = || path.join("trainer.json").is_file() && path.join("optimizer.safetensors").is_file();
        if let Some(step) = name.strip_prefix(CHECKPOINT).and_then(|step| step.parse().ok()).filter(|_| is_ours()) {
            out.push((step, path));
        }
    }
    out.sort();
    Ok(out)
}

/// Returns a hash that identifies the base model: the SHA-256 of the embedding of a sample's token ids.
fn fingerprint(model: &dyn CausalLm, sample: &Sample) -> Result<String> {
    let ids = Tensor::new(sample.ids(), &model.info().device)?.unsqueeze(0)?;
    let embedded = model.embed(&ids, &mut Context::new())?.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let mut hash = Sha256::new();
    embedded.flatten_all()?.to_vec1::<f32>()?.into_iter().for_each(|value| hash.update(value.to_le_bytes()));
    Ok(hex(&hash.finalize()))
}

/// Formats bytes as lower-case hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |out, byte| out + &format!("{byte:02x}"))
}

/// Returns a hash that identifies a list of samples: the SHA-256 of their token ids and masks.
fn digest(samples: &[Sample]) -> String {
    let mut hash = Sha256::new();
    for sample in samples {
        hash.update((sample.ids().len() as u64).to_le_bytes());
        sample.ids().iter().for_each(|id| hash.update(id.to_le_bytes()));
        sample.targets().for_each(|(at, _)| hash.update((at as u64).to_le_bytes()));
    }
    hex(&hash.finalize())
}

/// Returns the name of the first place in the model whose output contains NaN or infinity.
fn first_not_finite(model: &dyn CausalLm, samples: &[Sample]) -> Result<Option<String>> {
    let ids: Vec<u32> = samples.iter().flat_map(|sample| sample.ids().iter().copied()).collect();
    let lens: Vec<usize> = samples.iter().map(|sample| sample.ids().len()).collect();
    let mut ctx = Context::new().with_packed(&lens);
    let is_finite = |x: &Tensor| -> Result<bool> {
        Ok(x.detach().to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite())
    };
    let mut x = model.embed(&Tensor::new(&ids[..], &model.info().device)?.unsqueeze(0)?, &mut ctx)?.detach();
    if !is_finite(&x)? {
        return Ok(Some("the embedding".into()));
    }
    for i in 0..model.info().layers {
        x = model.block(i, &x, &mut ctx)?.detach();
        if !is_finite(&x)? {
            return Ok(Some(format!("the output of block {i}")));
        }
    }
    Ok(if is_finite(&model.finish(&x)?)? { Some("the head".into()) } else { Some("the final norm".into()) })
}
