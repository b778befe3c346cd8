//! Checkpoints of a run: writing, resuming, and keeping the best.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use pricket_nn::{CausalLm, Context};
use pricket_weights::{clip, parse_json};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{TrainOptions, Trainer};
use crate::files::{read_small, read_tensors, write_tensors, write_text};
use crate::sample::Sample;
use crate::{Error, Result};

/// The evaluation with the lowest loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Number of the training step after which it took place.
    pub step: u64,
    /// Loss in nats per counted token id.
    pub loss: f64,
}

/// Content of a checkpoint's trainer.json.
#[derive(Serialize, Deserialize)]
struct SavedState {
    step: u64,
    micro_batches: u64,
    samples: String,
    /// Hash of the evaluation samples, if there are any.
    #[serde(default)]
    eval_samples: Option<String>,
    #[serde(default)]
    best: Option<Best>,
    #[serde(default)]
    evaluations_since_best: u32,
    base: String,
    /// Settings of the adapter, or the model's configuration. `product` is an earlier name.
    #[serde(alias = "product")]
    target: Value,
    options: TrainOptions,
}

/// Prefix of a checkpoint's directory name, before the step.
const CHECKPOINT: &str = "checkpoint-";

/// Prefix of the directory name of the best adapter or model, before the step.
const BEST: &str = "best-";

impl Trainer {
    /// Writes the adapter or model in its current state into a directory.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        self.target.write(directory, &self.tuned.parameters)
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
        whole_directory(&path, |part| self.write_checkpoint(part))?;
        self.saved = Some(self.step);
        // The checkpoint refers to the best step by now, so older ones are not needed to resume.
        if let Some(best) = self.best {
            self.saved_best = Some(best.step);
            remove_older(directory, [self.saved_best, None])?;
        }
        let mut steps = checkpoints(directory)?;
        steps.retain(|(step, _)| *step < self.step);
        for (_, old) in steps.iter().rev().skip(keep.max(1) - 1) {
            std::fs::remove_dir_all(old).map_err(Error::io(old))?;
        }
        Ok(path)
    }

    /// Writes the adapter or model into `directory/best-STEP`, if the current step is the [best](Trainer::best) so far.
    ///
    /// Older ones are deleted, except the one that the last checkpoint refers to. An interrupted write leaves no incomplete directory under this name.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if it cannot be written.
    pub fn save_best(&self, directory: &Path) -> Result<()> {
        if self.best.is_none_or(|best| best.step != self.step) {
            return Ok(());
        }
        let path = directory.join(format!("{BEST}{}", self.step));
        if path.exists() {
            // A run that ended before its first checkpoint may have left it, with other settings.
            std::fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
        whole_directory(&path, |part| self.write(part))?;
        remove_older(directory, [Some(self.step), self.saved_best])
    }

    /// Sets the parameters to those of the best step, as written by [`Trainer::save_best`], and returns that step.
    ///
    /// # Errors
    /// Returns [`Error::Adapter`] if there was no evaluation, or a tensor is missing. Returns [`Error::Io`] if a file
    /// cannot be read.
    pub fn restore_best(&mut self, directory: &Path) -> Result<Best> {
        let none = || Error::Adapter { origin: directory.display().to_string(), what: "no step was evaluated".into() };
        let best = self.best.ok_or_else(none)?;
        self.set_parameters(&directory.join(format!("{BEST}{}", best.step)))?;
        Ok(best)
    }

    /// Sets the parameters to those that [`Trainer::write`] wrote into a directory.
    fn set_parameters(&self, path: &Path) -> Result<()> {
        let tensors = self.target.read(path)?;
        for parameter in &self.tuned.parameters {
            let var = &parameter.var;
            let found = tensors.get(&parameter.name).filter(|found| found.dims() == var.dims());
            let found = found.ok_or_else(|| Error::Adapter {
                origin: path.display().to_string(),
                what: format!("has no tensor {} of this run", parameter.name),
            })?;
            let found = parameter.rows.apply(found)?.to_dtype(var.dtype())?.to_device(var.device())?;
            var.set(&found.contiguous()?)?;
        }
        Ok(())
    }

    fn write_checkpoint(&self, directory: &Path) -> Result<()> {
        self.write(directory)?;
        let state = self.optimizer.state(&self.tuned.parameters);
        write_tensors(&directory.join("optimizer.safetensors"), &state)?;
        let progress = SavedState {
            step: self.step,
            micro_batches: self.micro_batches,
            samples: self.samples_digest.clone(),
            eval_samples: self.eval_digest.clone(),
            best: self.best,
            evaluations_since_best: self.evaluations_since_best,
            base: self.base.clone(),
            target: self.target.settings(),
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
        let progress: SavedState = serde_json::from_value(json).map_err(|e| wrong(format!("trainer.json: {e}")))?;
        if progress.samples != self.samples_digest {
            return Err(wrong("was made with other samples; give the same data or another directory".into()));
        }
        if progress.eval_samples != self.eval_digest {
            return Err(wrong(
                "was made with other evaluation samples; give the same data or another directory".into(),
            ));
        }
        if progress.base != self.base {
            return Err(wrong("was made with another base model; give the same model or another directory".into()));
        }
        let now = self.target.settings();
        if let Some((key, before)) =
            progress.target.as_object().into_iter().flatten().find(|(key, value)| now[*key] != **value)
        {
            return Err(wrong(format!("was made with {key} {before}, now it is {}; give another directory", now[key])));
        }
        let settings = |options: &TrainOptions| serde_json::to_value(options).unwrap_or_default();
        let (then, now) = (settings(&progress.options), settings(&self.options));
        if let Some((key, before)) = then.as_object().into_iter().flatten().find(|(key, value)| now[*key] != **value) {
            return Err(wrong(format!("was made with {key} {before}, now it is {}; give another directory", now[key])));
        }
        self.set_parameters(&path)?;
        let state = read_tensors(&path.join("optimizer.safetensors"))?;
        self.optimizer.restore(&self.tuned.parameters, state, progress.step)?;
        (self.step, self.micro_batches, self.order) = (progress.step, progress.micro_batches, None);
        (self.best, self.evaluations_since_best) = (progress.best, progress.evaluations_since_best);
        self.saved_best = progress.best.map(|best| best.step);
        // Steps after the checkpoint are repeated, so their best weights are written again.
        for (_, old) in numbered(directory, BEST)?.into_iter().filter(|(step, _)| *step > self.step) {
            std::fs::remove_dir_all(&old).map_err(Error::io(old))?;
        }
        self.saved = Some(progress.step);
        Ok(Some(path))
    }
}

/// Fills a temporary directory and renames it to `path` when it is complete.
fn whole_directory(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let part = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let written = fill(&part).and_then(|()| std::fs::rename(&part, path).map_err(Error::io(path)));
    if written.is_err() {
        drop(std::fs::remove_dir_all(&part));
    }
    written
}

/// Returns the directories named by a prefix and a step, ordered by step.
fn numbered(directory: &Path, prefix: &str) -> Result<Vec<(u64, PathBuf)>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(Error::io(directory))? {
        let path = entry.map_err(Error::io(directory))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(step) = name.strip_prefix(prefix).and_then(|step| step.parse().ok()).filter(|_| path.is_dir()) {
            out.push((step, path));
        }
    }
    out.sort();
    Ok(out)
}

/// Deletes the directories of best steps, except those of the steps `kept`.
fn remove_older(directory: &Path, kept: [Option<u64>; 2]) -> Result<()> {
    for (step, old) in numbered(directory, BEST)? {
        if !kept.contains(&Some(step)) {
            std::fs::remove_dir_all(&old).map_err(Error::io(old))?;
        }
    }
    Ok(())
}

/// Returns the complete checkpoints in a directory, ordered by step.
fn checkpoints(directory: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut out = numbered(directory, CHECKPOINT)?;
    // Checkpoints of other training programs have the same directory names.
    out.retain(|(_, path)| path.join("trainer.json").is_file() && path.join("optimizer.safetensors").is_file());
    Ok(out)
}

/// Returns a hash that identifies the base model: the SHA-256 of the embedding of a sample's token ids.
pub(super) fn fingerprint(model: &dyn CausalLm, sample: &Sample) -> Result<String> {
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
pub(super) fn digest(samples: &[Sample]) -> String {
    let mut hash = Sha256::new();
    for sample in samples {
        hash.update((sample.ids().len() as u64).to_le_bytes());
        sample.ids().iter().for_each(|id| hash.update(id.to_le_bytes()));
        sample.targets().for_each(|(at, _)| hash.update((at as u64).to_le_bytes()));
    }
    hex(&hash.finalize())
}
