//! Runs sweeps: measures checkpoints one by one and appends rows to a result file. Sweeps can be resumed and sharded.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pricket_hub::{Hub, NoProgress, Steps};
use pricket_lm::{Documents, EvalOptions, slice_losses};
use serde_json::{Value, json};

use crate::loading::load::Loader;
use crate::suites::checkpoints::{Checkpoint, Checkpoints};
use crate::sweep::inputs::{self, Hashes};
use crate::sweep::measure::{Measure, SLICE_METRICS, TEXT_METRICS, stem};
use crate::sweep::results::{Rows, Wanted};
use crate::sweep::shard::Shard;
use crate::text::handle::Pricket;
use crate::{Error, Result};

type Configure = Arc<dyn Fn(Loader) -> Result<Loader> + Send + Sync>;

/// A sweep: measures checkpoints and writes one JSON line per value.
///
/// Rows are appended to the result file, one measure of one checkpoint at a time. An interrupted sweep resumes where it
/// stopped, and the files of shards can be concatenated. While a checkpoint is measured, the next one is fetched and
/// loaded.
///
/// A row contains hashes of its inputs: the task's definition, documents, examples, and the weights (or the commit). An
/// existing row is kept only if the hashes match. Otherwise the checkpoint is measured again. The old row stays in the
/// file; readers use the newest row.
#[derive(Clone)]
pub struct Sweep {
    /// Models with their training steps.
    pub models: Vec<Checkpoints>,
    /// Training steps to measure of each model.
    pub steps: Steps,
    /// Measures to compute.
    pub measures: Vec<Measure>,
    /// Options for tasks and scoring; [`EvalOptions::default`] by default.
    pub options: EvalOptions,
    /// Shard of the checkpoints to measure; all checkpoints by default.
    pub shard: Shard,
    /// Path of the result file.
    pub out: PathBuf,
    /// Whether to measure again if existing rows have no hashes of their inputs (rows of earlier versions). By default
    /// such rows are kept, with a warning.
    pub remeasure: bool,
    /// Whether the next checkpoint is loaded while one is measured; true by default.
    pub prefetch: bool,
    /// Disk budget: the Hub, and the maximum size in bytes of the models that pricket fetched into its cache. The least
    /// recently used models are deleted; datasets are not. No limit by default.
    pub budget: Option<(Hub, u64)>,
    /// Function that changes the loader of each checkpoint; by default checkpoints are loaded as by [`crate::load`].
    pub configure: Configure,
    /// Description of the changes in `configure` that affect results, such as the type of the weights. It is part of
    /// every row; if it changes, checkpoints are measured again.
    pub setup: BTreeMap<String, String>,
}

impl std::fmt::Debug for Sweep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sweep({} models, {} measures, to {})", self.models.len(), self.measures.len(), self.out.display())
    }
}

/// Summary of a sweep.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct SweepSummary {
    /// Number of measured checkpoints.
    pub checkpoints: usize,
    /// Number of rows written.
    pub rows: usize,
    /// Number of existing rows kept.
    pub kept: usize,
    /// Number of rows measured again because an earlier run was interrupted while writing them.
    pub recomputed: usize,
    /// Checkpoints that could not be measured, with the error messages. The result file records them, and the next run
    /// tries them again.
    pub failed: Vec<(String, String)>,
    /// Warnings about checkpoints: identical weights, and known problems.
    pub warnings: Vec<String>,
}

struct Job<'a> {
    model: &'a Checkpoints,
    checkpoint: &'a Checkpoint,
    /// Measures with the hashes of their inputs.
    measures: Vec<(&'a Measure, Value)>,
}

impl Sweep {
    /// Creates a sweep of `models` at `steps` that writes to the file `out`.
    pub fn new(models: Vec<Checkpoints>, steps: Steps, measures: Vec<Measure>, out: impl Into<PathBuf>) -> Self {
        Self {
            models,
            steps,
            measures,
            options: EvalOptions::default(),
            shard: Shard::default(),
            out: out.into(),
            remeasure: false,
            prefetch: true,
            budget: None,
            configure: Arc::new(Ok),
            setup: BTreeMap::new(),
        }
    }

    /// Runs the sweep. `tell` is called with every row that is written.
    ///
    /// # Errors
    /// - [`Error::Cancelled`] if the work was canceled.
    /// - [`Error::Io`], [`Error::Malformed`] or [`Error::Output`] if the result file cannot be used, for example
    ///   because another sweep writes to it.
    /// - [`Error::Source`] or [`Error::Hub`] if a model does not have the requested training steps.
    ///
    /// A checkpoint or a task that fails does not end the sweep; see [`SweepSummary::failed`].
    pub fn run(&self, mut tell: impl FnMut(&Value)) -> Result<SweepSummary> {
        self.check()?;
        let mut rows = Rows::open(&self.out)?;
        let mut swept = SweepSummary { recomputed: rows.torn, ..SweepSummary::default() };
        let jobs = self.jobs(&rows, &mut swept)?;
        let outcome = std::thread::scope(|scope| -> Result<Vec<String>> {
            // A channel without capacity: at most one checkpoint is loaded in addition to the one being measured.
            let (send, receive) = sync_channel(0);
            let (release, released) = channel();
            let load = |job: &Job<'_>, wait: &mut dyn FnMut() -> Result<bool>| {
                self.make_room(job, wait)?;
                let model = (self.configure)(Loader::new(job.model.source(job.checkpoint)))?.load()?;
                let stamps = inputs::stamps(model.provenance());
                Ok((model, stamps))
            };
            // A measure whose documents fail at one checkpoint of a model fails at all of them.
            let hopeless = FailedMeasures::default();
            let mut ahead = None;
            if self.prefetch {
                let (jobs, hopeless) = (&jobs, hopeless.clone());
                scope.spawn(move || {
                    let mut held = 0;
                    jobs.iter().all(|job| {
                        held -= released.try_iter().count();
                        if hopeless.all(job) {
                            return send.send(None).is_ok();
                        }
                        let loaded = load(job, &mut || {
                            if held == 0 {
                                return Ok(false);
                            }
                            // If the sweep has ended, stops fetching.
                            released.recv().map_err(|_| Error::Cancelled)?;
                            held -= 1;
                            Ok(true)
                        });
                        held += 1;
                        send.send(Some(loaded)).is_ok()
                    })
                });
                ahead = Some(receive);
            }
            for job in &jobs {
                let loaded = match &ahead {
                    Some(receive) => receive.recv().unwrap_or(Some(Err(Error::Cancelled))),
                    None => (!hopeless.all(job)).then(|| load(job, &mut || Ok(false))),
                };
                // A skipped checkpoint was not loaded, so nothing is released.
                let Some(loaded) = loaded else { continue };
                self.measure(job, loaded, &hopeless, &mut rows, &mut swept, &mut tell)?;
                // At the end of the sweep there is no receiver.
                let _ = release.send(());
                if let Some((hub, budget)) = &self.budget {
                    hub.cache().evict(*budget, &NoProgress)?;
                }
            }
            Ok(hopeless.warnings(&jobs))
        });
        swept.warnings.extend(outcome?);
        swept.warnings.extend(rows.twins());
        Ok(swept)
    }

    /// Evicts models from the cache, so that the cache including this checkpoint stays within the disk budget. Models
    /// in use are not evicted: `wait` blocks until one more checkpoint has been measured, and returns false if none is
    /// in use.
    fn make_room(&self, job: &Job<'_>, wait: &mut dyn FnMut() -> Result<bool>) -> Result<()> {
        let Some((hub, budget)) = &self.budget else { return Ok(()) };
        loop {
            // Computed again in each round, because an eviction may have deleted files of this checkpoint.
            let needed = job.model.bytes_to_fetch(job.checkpoint);
            if needed > *budget {
                let id = job.model.id(job.checkpoint);
                return Err(Error::Budget { id: id.clone(), needed, budget: *budget });
            }
            let left = hub.cache().evict(budget - needed, &NoProgress)?.left;
            let needed = job.model.bytes_to_fetch(job.checkpoint);
            if left.saturating_add(needed) <= *budget || !wait()? {
                return Ok(());
            }
        }
    }

    /// Refuses measures with the same metric, and a stride that no measure uses.
    fn check(&self) -> Result<()> {
        let metrics: Vec<String> = self.measures.iter().filter_map(Measure::metrics).flatten().collect();
        if let Some(i) = (1..metrics.len()).find(|&i| metrics[..i].contains(&metrics[i])) {
            return Err(Error::Options(format!("two measures have the metric {}; use different names", metrics[i])));
        }
        if self.options.score.stride.is_some() && !self.measures.iter().any(Measure::has_windows) {
            return Err(Error::Options("stride only affects whole texts, but no measure scores whole texts".into()));
        }
        Ok(())
    }

    /// Returns the current identity of a checkpoint, if existing rows have hashes to compare with.
    fn identity(&self, rows: &Rows, model: &Checkpoints, at: &Checkpoint) -> Option<Value> {
        let row = rows.newest(model, at)?.values().find(|row| row["inputs"].is_object())?;
        if let Some(commit) = &at.commit {
            return Some(json!({ "commit": commit }));
        }
        let loader = (self.configure)(Loader::new(model.source(at))).ok()?;
        inputs::current(loader.opened().ok()?.provenance, row)
    }

    /// Returns the checkpoints of this shard that still have something to measure.
    fn jobs<'a>(&'a self, rows: &Rows, swept: &mut SweepSummary) -> Result<Vec<Job<'a>>> {
        let (mut jobs, mut number, mut unproven) = (Vec::new(), 0, 0);
        let mut hashes = Hashes::default();
        let inputs: Vec<Value> =
            self.measures.iter().map(|measure| hashes.measure(measure, self.options.shots)).collect::<Result<_>>()?;
        for model in &self.models {
            for checkpoint in model.select(&self.steps)? {
                number += 1;
                if !self.shard.holds(number - 1) {
                    continue;
                }
                if checkpoint.known_bad {
                    let id = model.id(checkpoint);
                    swept.warnings.extend(checkpoint.known.iter().map(|known| format!("{id}: {known}")));
                }
                let weights = self.identity(rows, model, checkpoint);
                let mut measures = Vec::new();
                for (measure, inputs) in self.measures.iter().zip(&inputs) {
                    match rows.there(model, checkpoint, &self.wanted(measure), inputs, weights.as_ref()) {
                        Some(found) => {
                            swept.kept += found.rows;
                            unproven += found.unproven;
                        }
                        None => measures.push((measure, inputs.clone())),
                    }
                }
                if !measures.is_empty() {
                    jobs.push(Job { model, checkpoint, measures });
                }
            }
        }
        if unproven > 0 {
            swept.warnings.push(format!(
                "{}: {} kept without hashes of their inputs; documents or weights may have changed; use remeasure to compute them again",
                self.out.display(),
                pricket_weights::counted(unproven, "row")
            ));
        }
        Ok(jobs)
    }

    /// Computes the measures of a checkpoint and writes their rows, or a row with the error.
    fn measure(
        &self,
        job: &Job<'_>,
        loaded: Result<(Pricket, Value)>,
        hopeless: &FailedMeasures,
        rows: &mut Rows,
        swept: &mut SweepSummary,
        tell: &mut impl FnMut(&Value),
    ) -> Result<()> {
        let mut about = json!({
            "model": job.model.model, "revision": job.checkpoint.revision, "step": job.checkpoint.step,
            "pricket": env!("CARGO_PKG_VERSION"),
        });
        match self.measure_all(job, loaded, hopeless, &mut about, rows, swept, tell) {
            Ok(measured) => swept.checkpoints += usize::from(measured > 0),
            Err(Failure::Everywhere(e)) => return Err(e),
            Err(Failure::Here(e)) => {
                about["error"] = json!(e.to_string());
                swept.failed.push((job.model.id(job.checkpoint), e.to_string()));
                rows.append(vec![about], tell)?;
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the checkpoint and the outputs of the sweep")]
    fn measure_all(
        &self,
        job: &Job<'_>,
        loaded: Result<(Pricket, Value)>,
        hopeless: &FailedMeasures,
        about: &mut Value,
        rows: &mut Rows,
        swept: &mut SweepSummary,
        tell: &mut impl FnMut(&Value),
    ) -> Result<usize, Failure> {
        let ((model, stamps), mut measured) = (loaded.map_err(Failure::of)?, 0);
        let provenance = model.provenance().clone().hashed().map_err(Failure::Here)?;
        if inputs::stamps(&provenance) != stamps {
            let what = format!("{}: the files were changed after loading", job.model.id(job.checkpoint));
            return Err(Failure::Here(Error::Source(what)));
        }
        about["provenance"] = provenance.to_json();
        about["stamps"] = stamps;
        let weights = inputs::identity(&provenance);
        for (measure, inputs) in job.measures.iter().filter(|(measure, _)| !hopeless.has(job, measure)) {
            let start = Instant::now();
            let figures = match self.figures(&model, measure) {
                Ok(figures) => figures,
                // Invalid documents of one task do not end the other measures.
                Err(e @ (Error::Text(_) | Error::Documents(_) | Error::Malformed { .. } | Error::Empty(_))) => {
                    let what = e.to_string();
                    let mut row = about.clone();
                    row["measure"] = json!(measure.name());
                    row["error"] = json!(what);
                    swept.failed.push((job.model.id(job.checkpoint), what));
                    rows.append(vec![row], tell).map_err(Failure::Everywhere)?;
                    hopeless.add(job, measure);
                    continue;
                }
                Err(e) => return Err(Failure::of(e)),
            };
            measured += 1;
            let settings = measure.settings(&self.options, &self.setup);
            let row = |(metric, value, stderr, documents): Measured| {
                let mut row = about.clone();
                row["metric"] = json!(metric);
                row["value"] = json!(value);
                row["stderr"] = json!(stderr);
                row["documents"] = json!(documents);
                row["measure"] = json!(measure.name());
                row["settings"] = settings.clone();
                row["inputs"] = inputs.clone();
                row["inputs"]["weights"] = weights.clone();
                row["seconds"] = json!(start.elapsed().as_secs_f64());
                row
            };
            let found: Vec<Value> = figures.into_iter().map(row).collect();
            swept.rows += found.len();
            rows.append(found, tell).map_err(Failure::Everywhere)?;
        }
        Ok(measured)
    }

    /// Returns the conditions under which existing rows of a measure are kept.
    fn wanted(&self, measure: &Measure) -> Wanted {
        let settings = measure.settings(&self.options, &self.setup);
        Wanted { metrics: measure.metrics(), settings, needs_hashes: self.remeasure }
    }

    /// Computes the values of a measure.
    fn figures(&self, model: &Pricket, measure: &Measure) -> Result<Vec<Measured>> {
        let slices = |documents: &mut dyn Iterator<Item = pricket_lm::Result<Value>>, metrics: &[&str]| -> Result<_> {
            let score = &self.options.score;
            let losses = slice_losses(&*model.model(), model.tokenizer()?, documents, model.prefix_id(), score)?;
            let figures = |(name, slice): (String, pricket_lm::SliceLoss)| {
                let count = slice.documents as usize;
                let value = |metric: &str| match metric {
                    "loss" => slice.loss(),
                    "perplexity" => slice.perplexity(),
                    _ => slice.bits_per_byte(),
                };
                metrics
                    .iter()
                    .map(|metric| (format!("{name}/{metric}"), value(metric), None, count))
                    .collect::<Vec<_>>()
            };
            Ok(losses.into_iter().flat_map(figures).collect())
        };
        match measure {
            Measure::Task { task, documents, examples } => {
                let examples = if task.shots(self.options.shots) > 0 && !examples.is_empty() {
                    Documents::open_all(examples)?.collect::<Result<Vec<Value>, _>>()?
                } else {
                    Vec::new()
                };
                let outcome = model.evaluate(task, Documents::open_all(documents)?, &examples, &self.options)?;
                let name = |f: &pricket_lm::Figure| format!("{}/{}", task.name(), f.name());
                let figure = |f: &pricket_lm::Figure| (name(f), f.value, f.stderr, outcome.documents);
                Ok(outcome.figures.iter().map(figure).collect())
            }
            Measure::Slices(path) => slices(&mut Documents::open(path)?, &SLICE_METRICS),
            Measure::TextFile(path) => {
                let document = json!({"text": pricket_lm::read_utf8(path)?, "slice": stem(path)});
                slices(&mut std::iter::once(Ok(document)), &TEXT_METRICS)
            }
            Measure::Text { name, text } => {
                slices(&mut std::iter::once(Ok(json!({"text": text, "slice": name}))), &SLICE_METRICS)
            }
        }
    }
}

/// Pairs of model and measure that failed because of the measure's documents.
#[derive(Clone, Default)]
struct FailedMeasures(Arc<Mutex<BTreeSet<(String, String)>>>);

impl FailedMeasures {
    fn known(&self) -> MutexGuard<'_, BTreeSet<(String, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, job: &Job<'_>, measure: &Measure) {
        self.known().insert((job.model.model.clone(), measure.name()));
    }

    fn has(&self, job: &Job<'_>, measure: &Measure) -> bool {
        self.known().contains(&(job.model.model.clone(), measure.name()))
    }

    /// Returns whether every measure of this checkpoint is known to fail.
    fn all(&self, job: &Job<'_>) -> bool {
        job.measures.iter().all(|(measure, _)| self.has(job, measure))
    }

    fn warnings(&self, jobs: &[Job<'_>]) -> Vec<String> {
        let of = |(model, measure): &(String, String)| {
            let tried =
                |job: &&Job<'_>| job.model.model == *model && job.measures.iter().any(|(m, _)| m.name() == *measure);
            let others = jobs.iter().filter(tried).count().saturating_sub(1);
            (others > 0).then(|| {
                format!(
                    "{model}: {measure}: failed because of its documents, so {others} other checkpoints were skipped"
                )
            })
        };
        self.known().iter().filter_map(of).collect()
    }
}

/// Metric, value, standard error, documents.
type Measured = (String, f64, Option<f64>, usize);

/// The error of a checkpoint.
enum Failure {
    /// An error of this checkpoint only.
    Here(Error),
    /// An error that ends the sweep.
    Everywhere(Error),
}

impl Failure {
    fn of(e: Error) -> Self {
        if matches!(e, Error::Cancelled) { Self::Everywhere(e) } else { Self::Here(e) }
    }
}
