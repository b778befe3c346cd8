//! The training loop: shuffled batches, training steps, checkpoints and resumption.
//!
//! A training step computes the gradients of one batch in micro-batches, clips them, and updates the parameters. The
//! order of the samples and the dropout depend only on the seed and the step, so a resumed run gives the same results.

mod checkpoint;
mod options;
mod target;

use std::sync::atomic::Ordering;

use candle_core::{DType, Tensor};
use pricket_nn::{CausalLm, Context, ModelInfo};

pub use checkpoint::Best;
pub(crate) use options::default_warmup;
pub use options::{Evaluation, Normalization, TrainOptions};
pub use target::TrainTarget;

use crate::data::{best_fit, in_order};
use crate::gradients::{Gradients, add_gradients, losses};
use crate::lora::Tuned;
use crate::optimizer::Optimizer;
use crate::random::{number_of, shuffled};
use crate::sample::Sample;
use crate::{Error, Result};

/// Maximum number of samples of a training step.
const MAX_BATCH: usize = 1 << 20;

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
    /// Loss of the evaluation samples after the update, in nats per counted token id, if the step was evaluated.
    pub eval_loss: Option<f64>,
}

/// Trains an adapter or a model on samples.
#[derive(Debug)]
pub struct Trainer {
    target: TrainTarget,
    tuned: Tuned,
    samples: Vec<Sample>,
    /// Samples for evaluation.
    eval_samples: Vec<Sample>,
    /// Indices of the samples in each pack. Without packing, each sample is a pack of its own.
    packs: Vec<Vec<usize>>,
    options: TrainOptions,
    optimizer: Optimizer,
    step: u64,
    /// The evaluation with the lowest loss so far.
    best: Option<Best>,
    /// Number of evaluations since the best one.
    evaluations_since_best: u32,
    /// Number of the current epoch, and the order of its packs.
    order: Option<(u64, Vec<usize>)>,
    /// Number of micro-batches computed so far, which seeds the dropout.
    micro_batches: u64,
    /// Fingerprint of the base model; see [`fingerprint`].
    base: String,
    /// Step of the last checkpoint that this run wrote or resumed from.
    saved: Option<u64>,
    /// Best step that the last checkpoint refers to.
    saved_best: Option<u64>,
    /// Hashes of the samples and of the evaluation samples, which checkpoints hold.
    samples_digest: String,
    eval_digest: Option<String>,
}

impl Trainer {
    /// Creates a run at step 0.
    ///
    /// For an adapter, `tuned` is the result of [`Lora::train`]. For a whole model, its parameters are
    /// [`Weights::parameters`].
    ///
    /// [`Lora::train`]: crate::Lora::train
    /// [`Weights::parameters`]: pricket_nn::Weights::parameters
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a setting is out of range, no token id is counted, or a sample does not fit the
    /// model.
    pub fn new(target: TrainTarget, tuned: Tuned, samples: Vec<Sample>, options: TrainOptions) -> Result<Self> {
        if options.batch == 0 || options.micro_batch_tokens == 0 {
            return Err(Error::Input("batch or micro_batch_tokens is 0; expected at least 1".into()));
        }
        if options.batch > MAX_BATCH {
            return Err(Error::Input(format!("batch is {}; expected at most {MAX_BATCH}", options.batch)));
        }
        if options.evaluation.is_some_and(|evaluation| evaluation.every == 0) {
            return Err(Error::Input("the number of steps between evaluations is 0; expected at least 1".into()));
        }
        if options.clip.is_some_and(|clip| !(clip > 0.0 && clip.is_finite())) {
            return Err(Error::Input(format!("clip is {:?}; expected a positive number", options.clip)));
        }
        check_samples(&samples, tuned.model.info())?;
        let optimizer = Optimizer::new(options.optimizer.clone(), &tuned.parameters)?;
        let base = match &target {
            TrainTarget::Adapter(_) => checkpoint::fingerprint(&*tuned.model, &samples[0])?,
            // A checkpoint of a whole model holds all weights, so there is no base to compare.
            TrainTarget::Model { .. } => String::new(),
        };
        let lens: Vec<usize> = samples.iter().map(|sample| sample.ids().len()).collect();
        let packs = match options.pack {
            Some(capacity) => {
                if let Some((i, len)) = lens.iter().enumerate().find(|(_, len)| **len > capacity) {
                    let what = format!("sample {} has {len} token ids; a pack has {capacity}", i + 1);
                    return Err(Error::Input(what));
                }
                best_fit(&lens, capacity)
            }
            None => (0..samples.len()).map(|i| vec![i]).collect(),
        };
        let samples_digest = checkpoint::digest(&samples);
        Ok(Self {
            target,
            tuned,
            samples,
            eval_samples: Vec::new(),
            packs,
            options,
            optimizer,
            step: 0,
            best: None,
            evaluations_since_best: 0,
            order: None,
            micro_batches: 0,
            base,
            saved: None,
            saved_best: None,
            samples_digest,
            eval_digest: None,
        })
    }

    /// Sets the samples for evaluation, which takes place as [`TrainOptions::evaluation`] says.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if no token id is counted, or a sample does not fit the model.
    pub fn with_evaluation(mut self, samples: Vec<Sample>) -> Result<Self> {
        check_samples(&samples, self.tuned.model.info())?;
        self.eval_digest = Some(checkpoint::digest(&samples));
        self.eval_samples = samples;
        Ok(self)
    }

    /// Returns the samples.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Returns the number of packs, or of samples if they are not packed.
    pub fn packs(&self) -> usize {
        self.packs.len()
    }

    /// Returns the number of token ids of the largest micro-batch that can occur.
    pub(crate) fn largest_micro_batch(&self) -> usize {
        let lens = self.packs.iter().map(|pack| pack.iter().map(|&i| self.samples[i].ids().len()).sum::<usize>());
        let (mut longest, mut all) = (0, 0);
        for len in lens {
            longest = longest.max(len);
            all += len;
        }
        // A batch may be larger than the data, and may contain the end of one epoch and the beginning of the next.
        let epochs = self.options.batch.div_ceil(self.packs.len().max(1)) + 1;
        let batch = longest.saturating_mul(self.options.batch).min(epochs.saturating_mul(all));
        longest.max(self.options.micro_batch_tokens.min(batch))
    }

    /// Returns the evaluation with the lowest loss so far.
    pub fn best(&self) -> Option<Best> {
        self.best
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

    /// Returns whether all training steps are done, or the run has ended early.
    pub fn is_done(&self) -> bool {
        self.step >= self.options.steps || self.has_ended_early()
    }

    /// Returns whether the evaluation loss has not improved for [`Evaluation::patience`] evaluations.
    pub fn has_ended_early(&self) -> bool {
        let patience = self.options.evaluation.and_then(|evaluation| evaluation.patience);
        let is_over = patience.is_some_and(|patience| self.evaluations_since_best >= patience.max(1));
        is_over && self.step < self.options.steps
    }

    /// Returns the packs of `step`, counted from 0. Every epoch has its own random order.
    fn batch(&mut self, step: u64) -> Vec<Vec<Sample>> {
        let (n, from) = (self.packs.len() as u64, step * self.options.batch as u64);
        (from..from + self.options.batch as u64)
            .map(|at| {
                let epoch = at / n;
                if self.order.as_ref().is_none_or(|(known, _)| *known != epoch) {
                    let seed = number_of(&format!("epoch {epoch}"), self.options.seed);
                    self.order = Some((epoch, shuffled(seed, self.packs.len())));
                }
                let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
                self.packs[order[(at % n) as usize]].iter().map(|&i| self.samples[i].clone()).collect()
            })
            .collect()
    }

    /// Returns the loss of the evaluation samples in nats per counted token id, or `None` if there are no samples.
    ///
    /// # Errors
    /// Returns [`Error::NonFinite`] if the loss is NaN or infinite, and an error if a tensor operation fails.
    pub fn evaluate(&self) -> Result<Option<f64>> {
        if self.eval_samples.is_empty() {
            return Ok(None);
        }
        let lens: Vec<usize> = self.eval_samples.iter().map(|sample| sample.ids().len()).collect();
        let (mut sum, counted) = (0.0, self.eval_samples.iter().map(Sample::counted).sum::<usize>());
        for (i, group) in best_fit(&lens, self.options.micro_batch_tokens).into_iter().enumerate() {
            let samples: Vec<Sample> = group.into_iter().map(|i| self.eval_samples[i].clone()).collect();
            let loss: f64 = losses(&*self.tuned.model, &samples)?.into_iter().sum();
            if !loss.is_finite() {
                let what = format!("the loss of the evaluation is {loss}");
                return Err(Error::NonFinite { step: self.step, micro_batch: i + 1, what });
            }
            sum += loss;
        }
        Ok(Some(sum / counted as f64))
    }

    /// Evaluates the run if the current step is due.
    fn evaluate_if_due(&mut self) -> Result<Option<f64>> {
        let Some(evaluation) = self.options.evaluation else { return Ok(None) };
        if !self.step.is_multiple_of(evaluation.every) && self.step < self.options.steps {
            return Ok(None);
        }
        let loss = self.evaluate()?;
        if let Some(loss) = loss {
            if self.best.is_none_or(|best| loss < best.loss) {
                (self.best, self.evaluations_since_best) = (Some(Best { step: self.step, loss }), 0);
            } else {
                self.evaluations_since_best += 1;
            }
        }
        Ok(loss)
    }

    /// Takes a training step.
    ///
    /// # Errors
    /// Returns [`Error::NonFinite`] with the place and the micro-batch if the loss or a gradient is NaN or infinite.
    /// The parameters are then unchanged. Returns the errors of [`Trainer::evaluate`] if the evaluation after the
    /// update fails.
    pub fn advance(&mut self) -> Result<StepReport> {
        let before = self.micro_batches;
        let report = self.advance_inner();
        // Pass 0 disables dropout outside of training steps. A failed step does not count.
        self.tuned.passes.store(0, Ordering::Relaxed);
        if report.is_err() {
            self.micro_batches = before;
        }
        let report = report?;
        Ok(StepReport { eval_loss: self.evaluate_if_due()?, ..report })
    }

    fn advance_inner(&mut self) -> Result<StepReport> {
        let batch = self.batch(self.step);
        let length = |pack: &Vec<Sample>| pack.iter().map(|sample| sample.ids().len()).sum::<usize>();
        let lens: Vec<usize> = batch.iter().map(length).collect();
        let (tokens, counted) = (lens.iter().sum(), batch.iter().flatten().map(Sample::counted).sum::<usize>());
        let capacity = self.options.micro_batch_tokens;
        let groups = match self.options.normalization {
            Normalization::Tokens => best_fit(&lens, capacity),
            // The loss depends on the composition of the micro-batches, so the order of the samples decides.
            Normalization::MicroBatches => in_order(&lens, capacity),
        };
        let parts = groups.into_iter().map(|group| group.iter().flat_map(|&i| batch[i].clone()).collect::<Vec<_>>());
        let parts: Vec<_> = parts.filter(|part| part.iter().any(|sample| sample.counted() > 0)).collect();
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
        Ok(StepReport { step: self.step, loss, lr, grad_norm, tokens, counted, eval_loss: None })
    }
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

/// Checks that samples have counted token ids and fit the model.
fn check_samples(samples: &[Sample], info: &ModelInfo) -> Result<()> {
    let counted: usize = samples.iter().map(Sample::counted).sum();
    if counted == 0 {
        return Err(Error::Input(format!("none of {} samples has a token id that counts in the loss", samples.len())));
    }
    let longest = samples.iter().enumerate().max_by_key(|(_, sample)| sample.ids().len());
    if let (Some((i, sample)), Some(limit)) = (longest, info.context)
        && sample.ids().len() > limit
    {
        let (number, len) = (i + 1, sample.ids().len());
        let what = format!("sample {number} has {len} token ids; the model's context is {limit}; truncate the sample");
        return Err(Error::Input(what));
    }
    let all = samples.iter().enumerate().flat_map(|(i, sample)| sample.ids().iter().map(move |id| (i, *id)));
    if let Some((i, id)) = all.into_iter().find(|(_, id)| *id as usize >= info.vocab) {
        return Err(Error::Input(format!("sample {}: id {id} is outside the vocabulary of {}", i + 1, info.vocab)));
    }
    Ok(())
}
