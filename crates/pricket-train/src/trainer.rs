//! The loop: batches in an order that the seed decides, steps, checkpoints, and going on after an interruption.

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

/// What the losses of a step are divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// The number of ids that count in all micro-batches, as transformers' Trainer does since 4.46.
    #[default]
    Tokens,
    /// The mean over micro-batches of each one's mean.
    MicroBatches,
}

/// How to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainOptions {
    /// Number of optimizer steps.
    pub steps: u64,
    /// Samples of a step.
    pub batch: usize,
    /// Token ids that are computed at once; a step of more is accumulated.
    pub micro_batch_tokens: usize,
    /// What the losses of a step are divided by.
    pub normalization: Normalization,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// The learning rate over the run.
    pub schedule: Schedule,
    /// Largest length of the gradient; not clipped if `None`.
    pub clip: Option<f64>,
    /// Decides the order of the samples and the dropout.
    pub seed: u64,
    /// Whether the results of operations are kept, or computed again. Changes no result.
    #[serde(skip, default = "per_block")]
    pub checkpointing: Checkpointing,
}

fn per_block() -> Checkpointing {
    Checkpointing::PerBlock
}

impl TrainOptions {
    /// AdamW at `lr`, with a linear decay to 0 after a warm-up over 3 % of the steps, batches of 16 samples, gradients clipped at 1.
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

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct StepReport {
    /// Its number, from 1.
    pub step: u64,
    /// The loss before the step, in nats for each id that counts.
    pub loss: f64,
    /// The learning rate.
    pub lr: f64,
    /// Length of the gradient before clipping.
    pub grad_norm: f64,
    /// Token ids read.
    pub tokens: usize,
    /// Ids that counted.
    pub counted: usize,
}

/// The result of a run.
#[derive(Clone, Debug)]
pub enum Product {
    /// An adapter, in PEFT's files.
    Adapter(Box<Lora>),
    /// A whole model in Hub layout: its config.json, and all parameters in model.safetensors.
    Model {
        /// The config.json.
        config: Value,
    },
}

impl Product {
    /// Writes it with the values that its variables have now.
    fn write(&self, directory: &Path, parameters: &[Parameter]) -> Result<()> {
        match self {
            Product::Adapter(lora) => lora.trained(parameters)?.write(directory),
            Product::Model { config } => {
                std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
                let mut tensors = BTreeMap::new();
                for Parameter { name, var, rows } in parameters {
                    tensors.insert(name.clone(), rows.undo(&var.as_tensor().detach().to_device(&Device::Cpu)?)?);
                }
                // The file is f32, whatever the configuration said of the one that was loaded.
                let mut config = config.clone();
                for key in ["torch_dtype", "dtype"] {
                    if config[key].is_string() {
                        config[key] = "float32".into();
                    }
                }
                let json = serde_json::to_string_pretty(&config).unwrap_or_default();
                write_text(&directory.join("config.json"), &(json + "\n"))?;
                // The weights last: without them nobody takes the directory for a model.
                write_tensors(&directory.join("model.safetensors"), &tensors)
            }
        }
    }

    /// The settings that a run with the same checkpoints must share.
    fn settings(&self) -> Value {
        match self {
            Product::Adapter(lora) => lora.config().to_json(),
            Product::Model { config } => config.clone(),
        }
    }

    /// The tensors that [`Product::write`] has written.
    fn read(&self, directory: &Path) -> Result<BTreeMap<String, Tensor>> {
        match self {
            Product::Adapter(_) => Ok(Lora::read(directory)?.tensors()),
            Product::Model { .. } => read_tensors(&directory.join("model.safetensors")),
        }
    }
}

/// Trains an adapter, or a model, on samples.
#[derive(Debug)]
pub struct Trainer {
    product: Product,
    tuned: Tuned,
    samples: Vec<Sample>,
    options: TrainOptions,
    optimizer: Optimizer,
    step: u64,
    /// An epoch and the order of its samples.
    order: Option<(u64, Vec<usize>)>,
    micro_batches: u64,
    /// Vectors of the first sample's tokens in the base, which tell bases apart.
    base: String,
    /// The step of the last checkpoint that this run has written or resumed from.
    saved: Option<u64>,
}

/// trainer.json of a checkpoint.
#[derive(Serialize, Deserialize)]
struct Progress {
    step: u64,
    micro_batches: u64,
    samples: String,
    base: String,
    product: Value,
    options: TrainOptions,
}

/// What the folder of a checkpoint is called, before the step.
const CHECKPOINT: &str = "checkpoint-";

impl Trainer {
    /// A run that begins. `tuned` is what [`Lora::train`] gave for an adapter; of a whole model it has [`Weights::parameters`].
    ///
    /// [`Weights::parameters`]: pricket_nn::Weights::parameters
    ///
    /// # Errors
    /// [`Error::Input`] for settings or samples that make no sense, before any work.
    pub fn new(product: Product, tuned: Tuned, samples: Vec<Sample>, options: TrainOptions) -> Result<Self> {
        let counted: usize = samples.iter().map(Sample::counted).sum();
        if counted == 0 {
            return Err(Error::Input(format!("{} samples, and none has an id that counts", samples.len())));
        }
        if options.batch == 0 || options.micro_batch_tokens == 0 {
            return Err(Error::Input("a step needs at least one sample, and a micro-batch one token".into()));
        }
        if options.clip.is_some_and(|clip| !(clip > 0.0 && clip.is_finite())) {
            return Err(Error::Input(format!("gradients clipped at {:?}; expected a positive number", options.clip)));
        }
        let info = tuned.model.info();
        let longest = samples.iter().enumerate().max_by_key(|(_, sample)| sample.ids().len());
        if let (Some((i, sample)), Some(limit)) = (longest, info.context)
            && sample.ids().len() > limit
        {
            let (number, len) = (i + 1, sample.ids().len());
            let what = format!("sample {number} has {len} token ids, and the model reads {limit}; truncate it");
            return Err(Error::Input(what));
        }
        let all = samples.iter().enumerate().flat_map(|(i, sample)| sample.ids().iter().map(move |id| (i, *id)));
        if let Some((i, id)) = all.into_iter().find(|(_, id)| *id as usize >= info.vocab) {
            return Err(Error::Input(format!("sample {}: id {id} is outside the vocabulary of {}", i + 1, info.vocab)));
        }
        let optimizer = Optimizer::new(options.optimizer.clone(), &tuned.parameters)?;
        let base = match &product {
            Product::Adapter(_) => fingerprint(&*tuned.model, &samples[0])?,
            // All of it is in the checkpoint.
            Product::Model { .. } => String::new(),
        };
        Ok(Self {
            product,
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

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// How it trains.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// The model as it is now; it changes with every step.
    pub fn tuned(&self) -> &Tuned {
        &self.tuned
    }

    /// Writes the result, as it is now, into a directory.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        self.product.write(directory, &self.tuned.parameters)
    }

    /// Whether all steps are done.
    pub fn is_done(&self) -> bool {
        self.step >= self.options.steps
    }

    /// The samples of step `step`, from 0: epoch after epoch, each in its own order.
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

    /// Takes a step.
    ///
    /// # Errors
    /// [`Error::NonFinite`] naming the layer and the micro-batch where the loss is NaN or infinite: no parameter has changed then.
    pub fn advance(&mut self) -> Result<StepReport> {
        let before = self.micro_batches;
        let report = self.advance_inner();
        // Outside of a step nothing is dropped, and a step that failed has not been.
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

    /// Writes `checkpoint-STEP` into `directory`: the adapter, the state of the optimizer and the place in the data. The folder has its
    /// name only when it is whole. Of older ones the last `keep - 1` stay.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written; the checkpoints that are there stay as they are.
    pub fn save(&mut self, directory: &Path, keep: usize) -> Result<PathBuf> {
        let path = directory.join(format!("{CHECKPOINT}{}", self.step));
        if path.exists() {
            if self.saved == Some(self.step) {
                return Ok(path);
            }
            let what = "is there already, and is not of this run".into();
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
            product: self.product.settings(),
            options: self.options.clone(),
        };
        let json = serde_json::to_string_pretty(&progress).unwrap_or_default();
        write_text(&directory.join("trainer.json"), &(json + "\n"))
    }

    /// Goes on from the last checkpoint in `directory`; returns its folder, or `None` if there is none. What an interrupted
    /// write left is removed.
    ///
    /// # Errors
    /// [`Error::Adapter`] if it is of another run: other samples, settings or parameters.
    pub fn resume(&mut self, directory: &Path) -> Result<Option<PathBuf>> {
        if !directory.exists() {
            return Ok(None);
        }
        for entry in std::fs::read_dir(directory).map_err(Error::io(directory))? {
            let entry = entry.map_err(Error::io(directory))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Files and folders that are being written are called so.
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
            return Err(wrong("was made with other samples; give the same data, or another folder".into()));
        }
        if progress.base != self.base {
            return Err(wrong("was made over another base; give the same model, or another folder".into()));
        }
        let now = self.product.settings();
        if let Some((key, before)) =
            progress.product.as_object().into_iter().flatten().find(|(key, value)| now[*key] != **value)
        {
            return Err(wrong(format!("was made with {key} {before}, now it is {}; give another folder", now[key])));
        }
        let settings = |options: &TrainOptions| serde_json::to_value(options).unwrap_or_default();
        let (then, now) = (settings(&progress.options), settings(&self.options));
        if let Some((key, before)) = then.as_object().into_iter().flatten().find(|(key, value)| now[*key] != **value) {
            return Err(wrong(format!("was made with {key} {before}, now it is {}; give another folder", now[key])));
        }
        let tensors = self.product.read(&path)?;
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

/// Whole checkpoints, by step.
fn checkpoints(directory: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(Error::io(directory))? {
        let path = entry.map_err(Error::io(directory))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Other trainers call theirs so too.
        let is_ours = || path.join("trainer.json").is_file() && path.join("optimizer.safetensors").is_file();
        if let Some(step) = name.strip_prefix(CHECKPOINT).and_then(|step| step.parse().ok()).filter(|_| is_ours()) {
            out.push((step, path));
        }
    }
    out.sort();
    Ok(out)
}

/// Tells bases apart, by the vectors that a sample's tokens have in them.
fn fingerprint(model: &dyn CausalLm, sample: &Sample) -> Result<String> {
    let ids = Tensor::new(sample.ids(), &model.info().device)?.unsqueeze(0)?;
    let embedded = model.embed(&ids, &mut Context::new())?.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let mut hash = Sha256::new();
    embedded.flatten_all()?.to_vec1::<f32>()?.into_iter().for_each(|value| hash.update(value.to_le_bytes()));
    Ok(hex(&hash.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |out, byte| out + &format!("{byte:02x}"))
}

/// Tells lists of samples apart.
fn digest(samples: &[Sample]) -> String {
    let mut hash = Sha256::new();
    for sample in samples {
        hash.update((sample.ids().len() as u64).to_le_bytes());
        sample.ids().iter().for_each(|id| hash.update(id.to_le_bytes()));
        sample.targets().for_each(|(at, _)| hash.update((at as u64).to_le_bytes()));
    }
    hex(&hash.finalize())
}

/// The first layer whose output contains NaN or infinity.
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
