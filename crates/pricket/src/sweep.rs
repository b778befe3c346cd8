//! Figures over checkpoints: one after the other, resumably, in shares that add up.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pricket_hub::{Digest, Hub, Quiet, Steps};
use pricket_lm::{Documents, EvalOptions, Task, TaskKind, slice_losses};
use serde_json::{Value, json};

use crate::checkpoints::{Checkpoint, Checkpoints};
use crate::inputs::{self, Hashes};
use crate::{Error, Loader, Pricket, Result, results};

/// What is measured of each checkpoint.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "a sweep has a few")]
pub enum Measure {
    /// A task over local documents; its metrics are called `TASK/METRIC`.
    Task {
        /// The task.
        task: Task,
        /// Files of its documents, JSON lines or parquet.
        documents: Vec<PathBuf>,
        /// Those that examples are drawn from, where there are to be any.
        examples: Vec<PathBuf>,
    },
    /// The loss of every slice of a file of JSON lines: `SLICE/loss` in nats a token and `SLICE/bits_per_byte`.
    Slices(PathBuf),
    /// The loss of a file of plain text: `NAME/loss` in nats a token, `NAME/perplexity`, its `exp`, and `NAME/bits_per_byte`, where NAME
    /// is the file's without its extension. Every token is scored, the first after `<|endoftext|>`, in windows.
    TextFile(PathBuf),
    /// The loss of a text: `NAME/loss` and `NAME/bits_per_byte`.
    Text {
        /// What it is called.
        name: String,
        /// The text.
        text: String,
    },
}

/// The metrics of a slice.
const SLICE_METRICS: [&str; 2] = ["loss", "bits_per_byte"];

/// Those of a file of plain text.
const TEXT_METRICS: [&str; 3] = ["loss", "perplexity", "bits_per_byte"];

/// The name of a file without its extension, nor that of its compression.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    name.rsplit_once('.').map_or(name, |(stem, _)| if stem.is_empty() { name } else { stem }).to_owned()
}

impl Measure {
    /// The metrics that it gives, where that is known before.
    fn metrics(&self) -> Option<Vec<String>> {
        match self {
            Measure::Task { task, .. } => {
                Some(task.metrics().iter().map(|metric| format!("{}/{}", task.name(), metric.name())).collect())
            }
            Measure::Text { name, .. } => Some(SLICE_METRICS.iter().map(|metric| format!("{name}/{metric}")).collect()),
            Measure::TextFile(path) => {
                Some(TEXT_METRICS.iter().map(|metric| format!("{}/{metric}", stem(path))).collect())
            }
            Measure::Slices(_) => None,
        }
    }

    /// Whether it scores whole texts, in windows.
    fn has_windows(&self) -> bool {
        match self {
            Measure::Task { task, .. } => task.kind() == TaskKind::Perplexity,
            Measure::Text { .. } | Measure::TextFile(_) | Measure::Slices(_) => true,
        }
    }

    /// What it is called in the rows that belong to it.
    fn name(&self) -> String {
        match self {
            Measure::Task { task, .. } => format!("task {}", task.name()),
            Measure::Slices(path) => format!("slices {}", path.display()),
            Measure::TextFile(path) => format!("text file {}", path.display()),
            Measure::Text { name, .. } => format!("text {name}"),
        }
    }

    /// The settings of its rows: with other settings a checkpoint is measured again.
    fn settings(&self, sweep: &Sweep) -> Value {
        let options = &sweep.options;
        let bytes = |path: &Path| std::fs::metadata(path).map(|meta| meta.len()).ok();
        let mut settings = match self {
            Measure::Task { task, documents, .. } => {
                let version =
                    task.version().parse::<f64>().map_or_else(|_| json!(task.version()), |number| json!(number));
                let limit = options.limit.map(pricket_lm::Limit::to_json);
                let shots = task.shots(options.shots);
                json!({"version": version, "shots": shots, "limit": limit, "bytes": documents.iter().map(|path| bytes(path)).sum::<Option<u64>>()})
            }
            Measure::Slices(path) | Measure::TextFile(path) => {
                json!({"file": path.file_name().map(|name| name.to_string_lossy()), "bytes": bytes(path)})
            }
            Measure::Text { text, .. } => {
                json!({"sha256": Digest::Sha256(String::new()).of(text.as_bytes()).hex()})
            }
        };
        if let Some(length) = options.score.max_length {
            settings["max_length"] = json!(length);
        }
        if let Some(stride) = options.score.stride.filter(|_| self.has_windows()) {
            settings["stride"] = json!(stride);
        }
        if options.seed != EvalOptions::default().seed {
            settings["seed"] = json!(options.seed);
        }
        if !sweep.setup.is_empty() {
            settings["setup"] = json!(sweep.setup);
        }
        settings
    }
}

/// A share of the work: the checkpoints whose number leaves `index` when divided by `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Default for Shard {
    fn default() -> Self {
        Self { index: 0, count: 1 }
    }
}

impl Shard {
    /// Share `index` of `count`, from 0 on.
    ///
    /// # Errors
    /// [`Error::Input`] if there is no such share.
    pub fn new(index: usize, count: usize) -> Result<Self> {
        if index >= count {
            return Err(Error::Input(format!("share {index} of {count}: they are counted from 0")));
        }
        Ok(Self { index, count })
    }

    /// The share of a task of a Slurm array (`SLURM_ARRAY_TASK_ID`, `_MIN`, `_COUNT`), if this process is one.
    ///
    /// # Errors
    /// [`Error::Input`] if the variables are no numbers, or do not fit each other.
    pub fn from_slurm() -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Ok(text) = std::env::var(name) else { return Ok(None) };
            text.parse().map(Some).map_err(|_| Error::Input(format!("{name} is {text:?}, no number")))
        };
        let (Some(id), Some(count)) = (number("SLURM_ARRAY_TASK_ID")?, number("SLURM_ARRAY_TASK_COUNT")?) else {
            return Ok(None);
        };
        let first = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
        Self::new(id.saturating_sub(first), count).map(Some)
    }
}

impl std::str::FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        let (index, count) =
            parts.ok_or_else(|| Error::Input(format!("{text:?} is no share; 0/4 is the first of 4")))?;
        Self::new(index, count)
    }
}

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
    /// [`Error::Cancelled`]; [`Error::Io`] and [`Error::Input`] for the file of results, which another sweep may be writing; for
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
                let model = (self.configure)(Loader::new(job.model.id(job.checkpoint)))?.load()?;
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
                    hub.cache().evict(*budget, &Quiet)?;
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
                return Err(Error::Input(format!("{id} takes {needed} bytes, more than the disk budget of {budget}")));
            }
            let left = hub.cache().evict(budget - needed, &Quiet)?.left;
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
            return Err(Error::Input(format!(
                "two measures have the metric {}; give them different names",
                metrics[i]
            )));
        }
        if self.options.score.stride.is_some() && !self.measures.iter().any(Measure::has_windows) {
            return Err(Error::Input("stride has an effect on whole texts, and no measure scores any".into()));
        }
        Ok(())
    }

    /// What is in a checkpoint now, if there are rows of it that say what was in it then.
    fn identity(&self, rows: &Rows, model: &Checkpoints, at: &Checkpoint) -> Option<Value> {
        let row = rows.newest(model, at)?.values().find(|row| row["inputs"].is_object())?;
        if let Some(commit) = &at.commit {
            return Some(json!({ "commit": commit }));
        }
        let loader = (self.configure)(Loader::new(model.id(at))).ok()?;
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
                if (number - 1) % self.shard.count != self.shard.index {
                    continue;
                }
                if checkpoint.known_bad {
                    let id = model.id(checkpoint);
                    swept.warnings.extend(checkpoint.known.iter().map(|known| format!("{id}: {known}")));
                }
                let weights = self.identity(rows, model, checkpoint);
                let mut measures = Vec::new();
                for (measure, inputs) in self.measures.iter().zip(&inputs) {
                    match rows.there(model, checkpoint, measure, inputs, weights.as_ref(), self) {
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
            return Err(Failure::Here(Error::Input(what)));
        }
        about["provenance"] = provenance.to_json();
        about["stamps"] = stamps;
        let weights = inputs::identity(&provenance);
        for (measure, inputs) in job.measures.iter().filter(|(measure, _)| !hopeless.has(job, measure)) {
            let start = Instant::now();
            let figures = match self.figures(&model, measure) {
                Ok(figures) => figures,
                // What is wrong with one task's documents does not end the others.
                Err(Error::Input(what)) => {
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
            let settings = measure.settings(self);
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

/// Rows of a measure that are there.
struct There {
    rows: usize,
    /// Those of them that have no hashes.
    unproven: usize,
}

/// A file of results.
struct Rows {
    path: PathBuf,
    file: File,
    /// Of each model and revision, the newest row of each metric and settings.
    found: BTreeMap<(String, String), BTreeMap<(String, String), Value>>,
    /// Rows of a measure that was broken off.
    torn: usize,
}

impl Rows {
    fn open(path: &Path) -> Result<Self> {
        let io = |error: std::io::Error| Error::Io { path: path.into(), error };
        // A device or a pipe has no end to read to.
        if std::fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
            return Err(Error::Input(format!("{}: not a regular file, so it cannot hold results", path.display())));
        }
        let mut file = File::options().read(true).append(true).create(true).open(path).map_err(io)?;
        file.try_lock().map_err(|e| match e {
            std::fs::TryLockError::WouldBlock => {
                Error::Input(format!("{}: another sweep writes to it", path.display()))
            }
            std::fs::TryLockError::Error(e) => io(e),
        })?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(io)?;
        let results = results::parse(path, &text)?;
        let mut rows = Self { path: path.into(), file, found: BTreeMap::new(), torn: results.torn };
        results.rows.iter().for_each(|row| rows.note(row));
        if results.whole < text.len() {
            rows.file.set_len(results.whole as u64).map_err(io)?;
            rows.file.seek(SeekFrom::End(0)).map_err(io)?;
        }
        Ok(rows)
    }

    fn note(&mut self, row: &Value) {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        if !row["metric"].is_null() {
            let of_revision = self.found.entry((text("model"), text("revision"))).or_default();
            of_revision.insert((text("metric"), row["settings"].to_string()), row.clone());
        }
    }

    fn newest(&self, model: &Checkpoints, at: &Checkpoint) -> Option<&BTreeMap<(String, String), Value>> {
        self.found.get(&(model.model.clone(), at.revision.clone()))
    }

    /// The rows of a measure, if all are there and were computed from the same.
    fn there(
        &self,
        model: &Checkpoints,
        at: &Checkpoint,
        measure: &Measure,
        inputs: &Value,
        weights: Option<&Value>,
        sweep: &Sweep,
    ) -> Option<There> {
        let (found, settings) = (self.newest(model, at)?, measure.settings(sweep));
        let is_null = |values: &Value| values.as_array().is_some_and(|hashes| hashes.contains(&Value::Null));
        let same = |row: &&Value| {
            let hashed = &row["inputs"];
            let (is_proven, weights) = (hashed.is_object(), weights.unwrap_or(&Value::Null));
            let equal = ["definition", "documents", "examples"].iter().all(|key| hashed[key] == inputs[key])
                && !is_null(&inputs["documents"])
                && !is_null(&inputs["examples"])
                && hashed["weights"] == *weights;
            row["settings"] == settings && if is_proven { equal } else { !sweep.remeasure }
        };
        let rows: Vec<&Value> = match measure.metrics() {
            Some(metrics) => {
                let of = |metric: String| found.get(&(metric, settings.to_string())).filter(same);
                metrics.into_iter().map(of).collect::<Option<_>>()?
            }
            None => found.values().filter(same).collect(),
        };
        let unproven = rows.iter().filter(|row| !row["inputs"].is_object()).count();
        (!rows.is_empty()).then_some(There { rows: rows.len(), unproven })
    }

    /// All rows of a measure in one write, on the disk before the next begins.
    fn append(&mut self, mut rows: Vec<Value>, tell: &mut impl FnMut(&Value)) -> Result<()> {
        let count = rows.len();
        rows.iter_mut().enumerate().for_each(|(i, row)| row["part"] = json!([i + 1, count]));
        let lines: String = rows.iter().flat_map(|row| [row.to_string(), "\n".into()]).collect();
        let written = self.file.write_all(lines.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|error| Error::Io { path: self.path.clone(), error })?;
        for row in &rows {
            self.note(row);
            tell(row);
        }
        Ok(())
    }

    /// Revisions of a model whose files of weights are the same. Of the first two steps that is so in every published suite.
    fn twins(&self) -> Vec<String> {
        let usual = |revisions: &BTreeSet<String>| revisions.iter().all(|r| r == "step0" || r == "step1");
        let mut by_weights: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
        for ((model, revision), rows) in &self.found {
            // Rows of one revision may be of several ages.
            for weights in rows.values().filter_map(weights_of) {
                by_weights.entry((model.clone(), weights)).or_default().insert(revision.clone());
            }
        }
        let twins = by_weights.iter().filter(|(_, revisions)| revisions.len() > 1 && !usual(revisions));
        let told = |((model, _), revisions): (&(String, String), &BTreeSet<String>)| {
            let names: Vec<&str> = revisions.iter().map(String::as_str).collect();
            format!("{model}: {} hold the same weights: not all of them are what their names say", names.join(" and "))
        };
        twins.map(told).collect()
    }
}

/// The hashes of a row's files of weights.
fn weights_of(row: &Value) -> Option<String> {
    let files = row["provenance"]["files"].as_array()?;
    let is_weights = |file: &&Value| {
        let path = file["path"].as_str().unwrap_or_default();
        [".safetensors", ".bin", ".gguf"].iter().any(|end| path.ends_with(end))
    };
    let hashes: Vec<&str> = files.iter().filter(is_weights).filter_map(|file| file["sha256"].as_str()).collect();
    (!hashes.is_empty()).then(|| hashes.join(" "))
}
