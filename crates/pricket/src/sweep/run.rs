//! Figures over checkpoints: one after the other, resumably, in shares that add up.

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

/// Measures checkpoints and writes a line for each figure.
///
/// A file of results is only ever appended to, a measure of a checkpoint at a time: a sweep that was killed goes on where
/// it was, and files of shares are put together by `cat`. While a checkpoint is measured, the next is fetched and loaded.
///
/// A row that is there is kept only if it was computed from the same: hashes of the task's definition, of documents and examples,
/// and of the weights (or the commit) are in it. Otherwise the checkpoint is measured again, and the new row supersedes the old
/// one, which stays in the file: readers take the newest.
#[derive(Clone)]
pub struct Sweep {
    /// The models and their steps.
    pub models: Vec<Checkpoints>,
    /// The steps of each model.
    pub steps: Steps,
    /// What is measured.
    pub measures: Vec<Measure>,
    /// How tasks are put, and how continuations are scored; [`EvalOptions::default`] by default.
    pub options: EvalOptions,
    /// The share of the checkpoints that is measured; all by default.
    pub shard: Shard,
    /// The file of results.
    pub out: PathBuf,
    /// Whether checkpoints are measured again whose rows have no hashes of what they were computed from, as rows of earlier
    /// versions have none. By default they are kept, with a warning.
    pub remeasure: bool,
    /// Whether the next checkpoint is loaded while one is measured; true by default.
    pub prefetch: bool,
    /// The Hub, and the bytes that the models pricket fetched may take in its cache; those used longest ago are deleted. Datasets
    /// stay. None by default.
    pub budget: Option<(Hub, u64)>,
    /// Changes how checkpoints are loaded; by default as [`crate::load`] loads them.
    pub configure: Configure,
    /// What `configure` says that changes figures, such as the type of the weights: part of every row, so that a sweep that
    /// goes on in another way measures anew.
    pub setup: BTreeMap<String, String>,
}

impl std::fmt::Debug for Sweep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sweep({} models, {} measures, to {})", self.models.len(), self.measures.len(), self.out.display())
    }
}

/// What a sweep did.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Swept {
    /// Checkpoints that were measured.
    pub checkpoints: usize,
    /// Rows that were written.
    pub rows: usize,
    /// Rows that were there.
    pub kept: usize,
    /// Rows that were measured again, because an earlier run was broken off while it wrote them.
    pub recomputed: usize,
    /// Checkpoints that could not be measured, and why. They are in the file, and are tried again by the next run.
    pub failed: Vec<(String, String)>,
    /// What is odd about the checkpoints: those with the same weights, and those that are known to be wrong.
    pub warnings: Vec<String>,
}

struct Job<'a> {
    model: &'a Checkpoints,
    checkpoint: &'a Checkpoint,
    /// Measures, and hashes of what they are computed from.
    measures: Vec<(&'a Measure, Value)>,
}

impl Sweep {
    /// A sweep of `models` at `steps` into the file `out`.
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

    /// Runs it. `tell` is given every row that is written.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; [`Error::Io`], [`Error::Malformed`] and [`Error::Output`] for the file of results, which another sweep may be writing; for
    /// steps that a model does not have. A checkpoint that fails, or a task whose documents cannot be asked, is no error: see
    /// [`Swept::failed`].
    pub fn run(&self, mut tell: impl FnMut(&Value)) -> Result<Swept> {
        self.check()?;
        let mut rows = Rows::open(&self.out)?;
        let mut swept = Swept { recomputed: rows.torn, ..Swept::default() };
        let jobs = self.jobs(&rows, &mut swept)?;
        let outcome = std::thread::scope(|scope| -> Result<Vec<String>> {
            // No room in between: at most one checkpoint is loaded beside the one that is measured.
            let (send, receive) = sync_channel(0);
            let (release, released) = channel();
            let load = |job: &Job<'_>, wait: &mut dyn FnMut() -> Result<bool>| {
                self.make_room(job, wait)?;
                let model = (self.configure)(Loader::new(job.model.source(job.checkpoint)))?.load()?;
                let stamps = inputs::stamps(model.provenance());
                Ok((model, stamps))
            };
            // A measure whose documents fail at one checkpoint of a model fails at all of them.
            let hopeless = Hopeless::default();
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
                            // The sweep has ended: fetches nothing more.
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
                // Nobody listens at the end.
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

    /// Makes room for a checkpoint that is to be fetched, so that with it no more than the budget is taken. What is in use stays:
    /// `wait` waits until one more checkpoint has been measured, and gives whether one was.
    fn make_room(&self, job: &Job<'_>, wait: &mut dyn FnMut() -> Result<bool>) -> Result<()> {
        let Some((hub, budget)) = &self.budget else { return Ok(()) };
        loop {
            // Computed again after each eviction, which may have deleted files of this checkpoint.
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

    /// Refuses measures whose rows could not be told apart, and a stride that no measure has.
    fn check(&self) -> Result<()> {
        let metrics: Vec<String> = self.measures.iter().filter_map(Measure::metrics).flatten().collect();
        if let Some(i) = (1..metrics.len()).find(|&i| metrics[..i].contains(&metrics[i])) {
            return Err(Error::Options(format!(
                "two measures have the metric {}; give them different names",
                metrics[i]
            )));
        }
        if self.options.score.stride.is_some() && !self.measures.iter().any(Measure::has_windows) {
            return Err(Error::Options("stride has an effect on whole texts, and no measure scores any".into()));
        }
        Ok(())
    }

    /// What is in a checkpoint now, if there are rows of it that say what was in it then.
    fn identity(&self, rows: &Rows, model: &Checkpoints, at: &Checkpoint) -> Option<Value> {
        let row = rows.newest(model, at)?.values().find(|row| row["inputs"].is_object())?;
        if let Some(commit) = &at.commit {
            return Some(json!({ "commit": commit }));
        }
        let loader = (self.configure)(Loader::new(model.source(at))).ok()?;
        inputs::current(loader.opened().ok()?.provenance, row)
    }

    /// The checkpoints of this share of which something is not measured yet.
    fn jobs<'a>(&'a self, rows: &Rows, swept: &mut Swept) -> Result<Vec<Job<'a>>> {
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
                "{}: {} kept without hashes of their inputs: their documents or weights may have changed; remeasure to be sure",
                self.out.display(),
                pricket_weights::counted(unproven, "row")
            ));
        }
        Ok(jobs)
    }

    /// Takes the measures of a checkpoint.
    fn measure(
        &self,
        job: &Job<'_>,
        loaded: Result<(Pricket, Value)>,
        hopeless: &Hopeless,
        rows: &mut Rows,
        swept: &mut Swept,
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

    #[allow(clippy::too_many_arguments, reason = "what the checkpoint is, and what the sweep writes to")]
    fn measure_all(
        &self,
        job: &Job<'_>,
        loaded: Result<(Pricket, Value)>,
        hopeless: &Hopeless,
        about: &mut Value,
        rows: &mut Rows,
        swept: &mut Swept,
        tell: &mut impl FnMut(&Value),
    ) -> Result<usize, Failure> {
        let ((model, stamps), mut measured) = (loaded.map_err(Failure::of)?, 0);
        let provenance = model.provenance().clone().hashed().map_err(Failure::Here)?;
        if inputs::stamps(&provenance) != stamps {
            let what = format!("{}: its files were written after it was loaded", job.model.id(job.checkpoint));
            return Err(Failure::Here(Error::Source(what)));
        }
        about["provenance"] = provenance.to_json();
        about["stamps"] = stamps;
        let weights = inputs::identity(&provenance);
        for (measure, inputs) in job.measures.iter().filter(|(measure, _)| !hopeless.has(job, measure)) {
            let start = Instant::now();
            let figures = match self.figures(&model, measure) {
                Ok(figures) => figures,
                // What is wrong with one task's documents does not end the others.
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

    /// What the rows of a measure have to be.
    fn wanted(&self, measure: &Measure) -> Wanted {
        let settings = measure.settings(&self.options, &self.setup);
        Wanted { metrics: measure.metrics(), settings, needs_hashes: self.remeasure }
    }

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
                let name = |metric: pricket_lm::Metric| format!("{}/{}", task.name(), metric.name());
                let figure = |f: &pricket_lm::Figure| (name(f.metric), f.value, f.stderr, outcome.documents);
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

/// Pairs of a model and a measure that failed because of the measure's documents.
#[derive(Clone, Default)]
struct Hopeless(Arc<Mutex<BTreeSet<(String, String)>>>);

impl Hopeless {
    fn known(&self) -> MutexGuard<'_, BTreeSet<(String, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, job: &Job<'_>, measure: &Measure) {
        self.known().insert((job.model.model.clone(), measure.name()));
    }

    fn has(&self, job: &Job<'_>, measure: &Measure) -> bool {
        self.known().contains(&(job.model.model.clone(), measure.name()))
    }

    /// Whether every measure of this checkpoint is known to fail.
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
                    "{model}: {measure}: failed because of its documents, so {others} other checkpoints were not tried"
                )
            })
        };
        self.known().iter().filter_map(of).collect()
    }
}

/// Metric, value, standard error, documents.
type Measured = (String, f64, Option<f64>, usize);

/// Why a checkpoint was not measured.
enum Failure {
    /// Because of itself.
    Here(Error),
    /// Because of what all of them share.
    Everywhere(Error),
}

impl Failure {
    fn of(e: Error) -> Self {
        if matches!(e, Error::Cancelled) { Self::Everywhere(e) } else { Self::Here(e) }
    }
}
