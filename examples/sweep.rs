//! Measures the checkpoints of models over training, one JSON line per metric, and draws the results. Interrupted
//! sweeps resume.
//!
//! `cargo run --example sweep`

#[path = "common/bar.rs"]
mod bar;
#[path = "common/compute.rs"]
mod compute;
#[path = "common/finish.rs"]
mod finish;
#[path = "common/size.rs"]
mod size;
#[path = "common/tasks.rs"]
mod tasks;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::ensure;
use bar::Bar;
use clap::Parser;
use pricket::hub::Steps;
use pricket::lm::Limit;
use pricket::plots::{Layout, Legend};
use pricket::sweep::{self, CurveOptions, Measure, Shard};
use pricket::weights::counted;
use pricket::{EvalOptions, Hub, Loader, Sweep};
use serde_json::{Value, json};

/// The text that is scored without `--tasks`, `--slices` or `--text`.
const TEXT: &str = "My fellow citizens, the people of the United States have a great country. In the year of our Lord the \
    Congress met, and the President of the United States spoke of the army and of the peace that we all wish for.";

/// Measure the checkpoints of models, and draw the results. A sweep that is started again with the same --out resumes.
/// The exit code is 2 if a checkpoint failed.
#[derive(Parser)]
#[command(version)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag")]
struct Args {
    /// Models to measure: repositories of the Hub, or directories with revisions/ [default: models/tiny]
    #[arg(long, short, value_delimiter = ',', value_name = "MODEL")]
    models: Vec<String>,
    /// Training steps to measure, separated by commas: all, final, log (0, powers of two up to 512, then 1000, 2000,
    /// 4000, ...), numbers such as 0,512, or ranges FIRST..LAST:INTERVAL such as 0..143000:10000
    #[arg(long, default_value = "all")]
    steps: Steps,
    /// Tasks to evaluate: names or files (.yaml of lm-evaluation-harness, or .toml); see `score --help`
    #[arg(long, value_delimiter = ',', value_name = "TASK")]
    tasks: Vec<String>,
    /// Directory with the documents of the tasks; names and default as in `score --help`
    #[arg(long, value_name = "DIR", requires = "tasks")]
    data: Option<PathBuf>,
    /// JSON lines file with the keys "text" and "slice" (or "meta.pile_set_name", as in the Pile), the name of the
    /// text's group; without a name, "all". The loss of each group is measured
    #[arg(long, value_name = "FILE")]
    slices: Option<PathBuf>,
    /// Plain text files of any length. The loss, perplexity and bits per byte of each are measured
    #[arg(long, value_delimiter = ',', value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Number of few-shot examples before each question [default: the task's own number, 0 for built-in tasks]
    #[arg(long, value_name = "N", requires = "tasks")]
    num_fewshot: Option<usize>,
    /// Maximum number of documents per task, or a fraction of them, such as 0.5 [default: all]
    #[arg(long, value_name = "N", requires = "tasks")]
    limit: Option<Limit>,
    /// Number of tokens scored per window of a long text, from 1 to the model's context [default: the context, without
    /// overlap]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,
    /// Number of bootstrap samples for the standard error of perplexities; 0 for no standard error
    #[arg(long, default_value_t = 1000, requires = "tasks")]
    bootstrap_iters: usize,
    /// JSON lines file to which the results are appended
    #[arg(long, default_value = "sweep.jsonl")]
    out: PathBuf,
    /// Shard of the checkpoints to measure, as INDEX/COUNT, such as 0/4; INDEX counts from 0 [default: in a Slurm array
    /// job its SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, otherwise all checkpoints]
    #[arg(long, value_name = "INDEX/COUNT")]
    shard: Option<Shard>,
    /// Maximum size of the model commits in the cache that pricket fetched, such as 50GB. Before a checkpoint is
    /// fetched, the least recently used commits are deleted [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    disk_budget: Option<u64>,
    /// Measure again where a row in --out has no hashes of its documents and weights (rows of earlier pricket versions)
    /// [default: such rows are kept, with a warning]
    #[arg(long)]
    remeasure: bool,
    /// Do not load the next checkpoint while one is measured. Takes longer, but halves the memory
    #[arg(long)]
    no_prefetch: bool,
    /// Draw curves over training to an .svg or .png file (.pdf with the feature pdf), with one panel for each metric of
    /// each task or slice. Can be given several times
    #[arg(long, value_name = "FILE")]
    plot: Vec<PathBuf>,
    /// Draw a table of the results at the last step of each model, as an .svg or .png file (.pdf with the feature pdf)
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// Write the results to a .csv file: model, revision, step, metric, value and standard error
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Metrics to include in --plot, --table and --csv, such as piqa/acc [default: all]
    #[arg(long, value_delimiter = ',', value_name = "METRIC")]
    metrics: Vec<String>,
    /// Draw models whose names differ only in the number after -seed as one curve: their mean, with a band of one
    /// standard deviation
    #[arg(long)]
    mean_of_seeds: bool,
    /// Do not draw the published results of the models in addition to the measured ones
    #[arg(long)]
    no_published: bool,
    /// Draw all tasks and slices that have the same metric in one panel
    #[arg(long, alias = "together")]
    panel_per_metric: bool,
    /// Title above the panels
    #[arg(long, default_value = "", hide_default_value = true)]
    title: String,
    /// Width and height of a panel in CSS pixels, from 200x150 to 4000x4000
    #[arg(long, alias = "panel", value_name = "WxH", default_value = "440x330", value_parser = panel_size)]
    panel_size: (u32, u32),
    /// Position of the legend
    #[arg(long, value_enum, default_value_t = LegendPlace::Right)]
    legend: LegendPlace,
    /// Result files of earlier sweeps to draw. Nothing is measured
    #[arg(long, value_delimiter = ',', value_name = "FILE", conflicts_with_all = ["models", "tasks", "slices", "text"])]
    from: Vec<PathBuf>,
    #[command(flatten)]
    compute: compute::ComputeArgs,
    /// Print each written row as a JSON object, and a summary at the end
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.compute.limit_candle_threads();
    match run(&args) {
        Ok(code) => code,
        Err(e) => finish::finish(Err(e)),
    }
}

fn run(args: &Args) -> anyhow::Result<ExitCode> {
    pricket::nn::ops::keep_freed_memory();
    // Output files are checked before the measurements.
    for path in args.plot.iter().chain(&args.table) {
        let forms = if cfg!(feature = "pdf") { &["svg", "png", "pdf"][..] } else { &["svg", "png"] };
        finish::check_output(path, forms)?;
    }
    if let Some(path) = &args.csv {
        finish::check_output(path, &["csv"])?;
    }
    bar::interruptible()?;
    if !args.from.is_empty() {
        ensure!(
            !args.plot.is_empty() || args.table.is_some() || args.csv.is_some(),
            "--from draws existing results; give --plot, --table or --csv"
        );
        draw(args, &args.from)?;
        return Ok(ExitCode::SUCCESS);
    }
    let tiny = [concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny").to_owned()];
    let names = if args.models.is_empty() { &tiny[..] } else { &args.models };
    let models = names.iter().map(pricket::checkpoints).collect::<Result<Vec<_>, _>>()?;
    let mut sweep = Sweep::new(models, args.steps.clone(), measures(args)?, &args.out);
    sweep.options = EvalOptions {
        shots: args.num_fewshot,
        limit: args.limit,
        bootstrap: args.bootstrap_iters,
        ..EvalOptions::default()
    };
    sweep.options.score.stride = args.stride.map(|n| n as usize);
    sweep.options.score.progress = Arc::new(Bar::default());
    (sweep.prefetch, sweep.remeasure) = (!args.no_prefetch, args.remeasure);
    sweep.shard = match args.shard {
        Some(shard) => shard,
        None => Shard::from_slurm()?.unwrap_or_default(),
    };
    sweep.budget = args.disk_budget.map(|budget| Ok::<_, pricket::Error>((Hub::from_env()?, budget))).transpose()?;
    let compute = args.compute.clone();
    // Flags are checked before a checkpoint is fetched.
    compute.configure(Loader::embedded("tiny")?)?;
    sweep.setup = compute.setup();
    sweep.configure =
        Arc::new(move |loader| Ok(compute.configure(loader)?.precision(compute.dtype).progress(Arc::new(bar::Hidden))));
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(out, "|model|revision|metric|value|stderr|\n|---|---|---|---:|---:|")?;
    }
    let mut broken = Ok(());
    let swept = sweep.run(|row| {
        let written = if args.json { writeln!(out, "{row}") } else { show(&mut out, row) };
        // A closed pipe on standard output does not end the sweep.
        broken = std::mem::replace(&mut broken, Ok(())).and(written);
    })?;
    if args.json {
        let failed: Vec<_> = swept.failed.iter().map(|(id, why)| json!({"checkpoint": id, "error": why})).collect();
        let summary = json!({
            "checkpoints": swept.checkpoints, "rows": swept.rows, "kept": swept.kept, "recomputed": swept.recomputed,
            "failed": failed, "warnings": swept.warnings,
        });
        writeln!(out, "{summary}").ok();
    }
    for warning in &swept.warnings {
        finish::tell(format_args!("warning: {warning}"));
    }
    for (id, why) in &swept.failed {
        finish::tell(format_args!("failed: {id}: {why}"));
    }
    finish::tell(format_args!(
        "{} measured, {} written to {}, {} kept, {} measured again",
        counted(swept.checkpoints, "checkpoint"),
        counted(swept.rows, "row"),
        args.out.display(),
        swept.kept,
        swept.recomputed
    ));
    if swept.rows + swept.kept > 0 {
        draw(args, std::slice::from_ref(&args.out))?;
    }
    Ok(if swept.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// Position of the legend.
#[derive(Clone, Copy, clap::ValueEnum)]
enum LegendPlace {
    Right,
    Below,
    None,
}

impl From<LegendPlace> for Legend {
    fn from(place: LegendPlace) -> Self {
        match place {
            LegendPlace::Right => Legend::Right,
            LegendPlace::Below => Legend::Below,
            LegendPlace::None => Legend::None,
        }
    }
}

/// Parses the size of a panel.
fn panel_size(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
    parts.ok_or_else(|| format!("{text:?}: expected WIDTHxHEIGHT, such as 440x330"))
}

/// Draws and writes the pictures and tables requested by flags, from these result files.
fn draw(args: &Args, files: &[PathBuf]) -> anyhow::Result<()> {
    if args.plot.is_empty() && args.table.is_none() && args.csv.is_none() {
        return Ok(());
    }
    let rows = sweep::read_rows(files)?;
    if let Some(path) = &args.csv {
        finish::write_whole(path, &sweep::csv(&rows, &args.metrics)?)?;
    }
    if !args.plot.is_empty() {
        let options = CurveOptions {
            mean_of_seeds: args.mean_of_seeds,
            published: !args.no_published,
            together: args.panel_per_metric,
            layout: Layout { title: args.title.clone(), panel: args.panel_size, legend: args.legend.into() },
        };
        let curves = sweep::curves(&rows, &args.metrics, &options)?;
        args.plot.iter().try_for_each(|path| curves.save(path))?;
    }
    if let Some(path) = &args.table {
        sweep::table(&rows, &args.metrics)?.save(path)?;
    }
    Ok(())
}

/// Prints a row of the table on standard output.
fn show(out: &mut impl Write, row: &Value) -> std::io::Result<()> {
    let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let number = |key: &str| row[key].as_f64().map_or(String::new(), |x| format!("{x:.4}"));
    if row["error"].is_string() {
        return writeln!(out, "|{}|{}|failed| | |", text("model"), text("revision"));
    }
    let (model, revision, metric) = (text("model"), text("revision"), text("metric"));
    writeln!(out, "|{model}|{revision}|{metric}|{}|{}|", number("value"), number("stderr"))
}

/// Returns the measures requested by flags.
fn measures(args: &Args) -> anyhow::Result<Vec<Measure>> {
    let mut measures = Vec::new();
    for name in &args.tasks {
        let (data, task) = (args.data.as_deref(), tasks::task(name)?);
        let documents = tasks::documents(data, &task)?;
        let examples = tasks::examples(data, &task, args.num_fewshot)?;
        measures.push(Measure::Task { task, documents, examples });
    }
    measures.extend(args.slices.clone().map(Measure::Slices));
    measures.extend(args.text.iter().cloned().map(Measure::TextFile));
    if measures.is_empty() {
        measures.push(Measure::Text { name: "text".into(), text: TEXT.into() });
    }
    Ok(measures)
}
