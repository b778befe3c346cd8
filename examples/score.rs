//! Log-probabilities and perplexity of a text; tasks with the numbers of lm-evaluation-harness; losses of named slices.
//!
//! `cargo run --example score -- --prompt "The whale is a large animal."`

mod common;
#[path = "common/tasks.rs"]
mod tasks;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use common::Bar;
use pricket::lm::{Documents, Limit, Outcome, SliceLoss, TaskKind, results_json, slice_losses};
use pricket::weights::counted;
use pricket::{EvalOptions, Pricket, ScoreOptions, Task};
use serde_json::{Value, json};

/// Scores a text, tasks, or slices of documents.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// The text whose tokens are scored; - reads it from standard input
    #[arg(long, short, conflicts_with_all = ["text", "tasks", "slices"])]
    prompt: Option<String>,
    /// A file of plain text, of any length: its loss, perplexity and bits per byte
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tasks", "slices"])]
    text: Option<PathBuf>,
    /// Tasks, by name (lambada_openai, hellaswag, piqa, winogrande, arc_easy, arc_challenge, sciq, wikitext) or as files: .yaml of
    /// lm-evaluation-harness, or .toml
    #[arg(long, value_delimiter = ',', value_name = "TASK")]
    tasks: Vec<String>,
    /// The directory with the tasks' documents: TASK.validation.jsonl or TASK.test.jsonl, and TASK.train.jsonl for examples, or
    /// parquet [default: fetched from the Hub's datasets]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// JSON lines with a text and the name of its slice: the loss of each slice is told
    #[arg(long, value_name = "FILE", conflicts_with = "tasks")]
    slices: Option<PathBuf>,
    /// Number of examples before each question; several numbers, as 0,5, measure each [default: the task's own, for built-in tasks 0]
    #[arg(long, value_delimiter = ',', value_name = "N")]
    num_fewshot: Vec<usize>,
    /// Random seed of the choice of examples [default: 1234]
    #[arg(long, value_name = "N")]
    fewshot_seed: Option<u32>,
    /// Documents of each task at most: a number, or a share such as 0.5
    #[arg(long, value_name = "N")]
    limit: Option<Limit>,
    /// Draws of the bootstrap for the standard error of perplexities; 0 for none [default: 100000]
    #[arg(long, value_name = "N")]
    bootstrap_iters: Option<usize>,
    /// Tokens that are read at once, at least 1 [default: the model's context]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Allows a --max-length beyond the length that the model was trained for
    #[arg(long, requires = "max_length")]
    beyond_trained_length: bool,
    /// Tokens that each window of a long text scores, from 1 to --max-length; fewer give each token more context [default: --max-length]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Tokens of a batch [default: 1024 on the CPU, 16384 on a GPU]
    #[arg(long, value_name = "N")]
    batch_tokens: Option<usize>,
    /// Writes the results as lm-evaluation-harness does; with several numbers of examples a file for each, as results.5shot.json
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Writes what was asked and answered of each document too: samples_TASK.jsonl beside the output
    #[arg(long, requires = "output")]
    log_samples: bool,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.model.compute.limit_candle_threads();
    match run(&args) {
        Ok(code) => code,
        Err(e) => common::finish(Err(e)),
    }
}

fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut text = args.prompt.clone().unwrap_or_else(|| "The whale is a large animal that lives in the sea.".into());
    if text == "-" {
        text.clear();
        std::io::stdin().read_to_string(&mut text)?;
    }
    // What cannot be asked or written is said before a model is fetched.
    if let Some(path) = &args.output {
        ensure!(!args.tasks.is_empty() || args.slices.is_some(), "--output writes the results of --tasks or --slices");
        common::check_output(path, &[])?;
    }
    // clap does not ask for --tasks beside a --prompt, which excludes it.
    let of_tasks = [
        ("--data", args.data.is_some()),
        ("--num-fewshot", !args.num_fewshot.is_empty()),
        ("--limit", args.limit.is_some()),
        ("--fewshot-seed", args.fewshot_seed.is_some()),
        ("--bootstrap-iters", args.bootstrap_iters.is_some()),
        ("--log-samples", args.log_samples),
    ];
    if let Some((flag, _)) = of_tasks.iter().find(|(_, is_set)| *is_set && args.tasks.is_empty()) {
        bail!("{flag} has an effect with --tasks only");
    }
    let counts = &args.num_fewshot;
    ensure!((1..counts.len()).all(|i| !counts[..i].contains(&counts[i])), "--num-fewshot names a number twice");
    common::interruptible()?;
    let asked = args.tasks.iter().map(|name| tasks::task(name)).collect::<anyhow::Result<Vec<_>>>()?;
    if let Some(i) = (1..asked.len()).find(|&i| asked[..i].iter().any(|task| task.name() == asked[i].name())) {
        bail!("--tasks has two tasks of the name {}, whose results would be one", asked[i].name());
    }
    let has_windows = asked.is_empty() || asked.iter().any(|task| task.kind() == TaskKind::Perplexity);
    ensure!(args.stride.is_none() || has_windows, "--stride has an effect on whole texts, and no task scores any");
    for task in &asked {
        if task.shots(counts.iter().copied().max()) == 0 && counts.iter().any(|&count| count > 0) {
            let name = task.name();
            ensure!(
                counts.len() == 1,
                "{name} is asked without examples, as its definition says: leave it out where --num-fewshot names several numbers"
            );
            common::tell(format_args!(
                "note: {name}: no examples, as its definition says; --num-fewshot has no effect on it"
            ));
        }
    }
    let documents = asked.iter().map(|task| tasks::documents(args.data.as_deref(), task));
    let documents = documents.collect::<anyhow::Result<Vec<_>>>()?;
    let counts: Vec<Option<usize>> =
        if args.num_fewshot.is_empty() { vec![None] } else { args.num_fewshot.iter().copied().map(Some).collect() };
    let most = counts.iter().copied().max().flatten();
    let examples = asked.iter().map(|task| tasks::examples(args.data.as_deref(), task, most));
    let examples = examples.collect::<anyhow::Result<Vec<_>>>()?;
    let document = args.text.as_ref().map(pricket::lm::read_utf8).transpose()?;
    let model = args.model.load("tiny")?;
    let score = ScoreOptions {
        max_length: args.max_length,
        stride: args.stride,
        beyond_trained_length: args.beyond_trained_length,
        batch_tokens: args.batch_tokens,
        progress: Arc::new(Bar::default()),
    };
    score.check(&*model.model())?;
    if !asked.is_empty() {
        let asked: Vec<Asked> = asked.into_iter().zip(documents.into_iter().zip(examples)).collect();
        let mut code = ExitCode::SUCCESS;
        for &shots in &counts {
            let output = args.output.as_ref().map(|path| match shots {
                Some(shots) if counts.len() > 1 => path.with_extension(of_shots(path, shots)),
                _ => path.clone(),
            });
            let of_count = run_tasks(args, &model, &asked, shots, output.as_deref(), score.clone())?;
            if of_count != ExitCode::SUCCESS {
                code = of_count;
            }
        }
        return Ok(code);
    }
    if let Some(path) = &args.slices {
        let slices =
            slice_losses(&*model.model(), model.tokenizer()?, Documents::open(path)?, model.prefix_id(), &score)?;
        return show_slices(args, &model, &slices).map(|()| ExitCode::SUCCESS);
    }
    if let Some(text) = document {
        let documents = [Ok(json!({ "text": text }))];
        let slices = slice_losses(&*model.model(), model.tokenizer()?, documents, model.prefix_id(), &score)?;
        let text =
            slices.get("all").filter(|text| text.tokens > 0).context("--text: expected at least one token of text")?;
        return show_text(args, &model, text).map(|()| ExitCode::SUCCESS);
    }
    run_text(args, &model, &text, &score).map(|()| ExitCode::SUCCESS)
}

/// A task, the files of its documents and those of its examples.
type Asked = (Task, (Vec<PathBuf>, Vec<PathBuf>));

/// The extension of a file of results for a number of examples: `5shot.json`.
fn of_shots(path: &Path, shots: usize) -> String {
    let extension = path.extension().map_or_else(String::new, |end| format!(".{}", end.to_string_lossy()));
    format!("{shots}shot{extension}")
}

fn run_tasks(
    args: &Args,
    model: &Pricket,
    asked: &[Asked],
    shots: Option<usize>,
    output: Option<&Path>,
    score: ScoreOptions,
) -> anyhow::Result<ExitCode> {
    let options = EvalOptions {
        shots,
        seed: args.fewshot_seed.unwrap_or(EvalOptions::default().seed),
        limit: args.limit,
        bootstrap: args.bootstrap_iters.unwrap_or(EvalOptions::default().bootstrap),
        samples: args.log_samples,
        score,
        ..EvalOptions::default()
    };
    let start = Instant::now();
    let (mut outcomes, mut code, mut ended) = (Vec::new(), ExitCode::SUCCESS, Ok(()));
    for (task, (documents, examples)) in asked {
        let outcome = || -> anyhow::Result<Outcome> {
            let wanted = task.shots(shots) > 0 && !examples.is_empty();
            let examples =
                if wanted { Documents::open_all(examples)?.collect::<Result<Vec<Value>, _>>()? } else { Vec::new() };
            Ok(model.evaluate(task, Documents::open_all(documents)?, &examples, &options)?)
        };
        match outcome() {
            Ok(outcome) => outcomes.push((task.clone(), outcome)),
            Err(e) => {
                let of_documents = matches!(e.downcast_ref(), Some(pricket::Error::Text(_)))
                    || matches!(e.downcast_ref(), Some(pricket::lm::Error::Input(_)));
                if !of_documents {
                    // What was measured before is shown and written.
                    ended = Err(e);
                    break;
                }
                // What is wrong with one task's documents does not end the others.
                common::tell(format_args!("failed: {e:#}"));
                code = ExitCode::from(2);
            }
        }
    }
    if outcomes.is_empty() {
        return ended.map(|()| code);
    }
    let mut results = results_json(&outcomes, &options);
    let provenance = model.provenance().to_json();
    results["config"]["model_args"] = json!(args.model.model.as_ref().map(|path| path.display().to_string()));
    results["config"]["model_num_parameters"] = json!(model.info().parameters);
    results["config"]["model_dtype"] = json!(model.info().dtype.name());
    results["config"]["model_revision"] = json!(args.model.revision);
    results["config"]["activations"] = json!(args.model.compute.activations);
    results["max_length"] = json!(options.score.max_length(&*model.model()));
    results["date"] = json!(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64()));
    results["total_evaluation_time_seconds"] = json!(start.elapsed().as_secs_f64().to_string());
    results["pricket"] = json!({"version": env!("CARGO_PKG_VERSION"), "provenance": provenance});
    // Shown first: hours of work are not lost with a disk that is full.
    let mut out = std::io::stdout().lock();
    let shown = if args.json { writeln!(out, "{results}") } else { show_tasks(&mut out, &outcomes) };
    if let Some(path) = output {
        common::write_whole(path, &(serde_json::to_string_pretty(&results)? + "\n"))?;
        for (task, outcome) in outcomes.iter().filter(|_| args.log_samples) {
            let lines: String =
                outcome.samples.iter().flat_map(|sample| [sample.to_json().to_string(), "\n".into()]).collect();
            let of_several =
                shots.filter(|_| args.num_fewshot.len() > 1).map_or(String::new(), |n| format!(".{n}shot"));
            let name = format!("samples_{}{of_several}.jsonl", task.name());
            common::write_whole(&path.with_file_name(name), &lines)?;
        }
    }
    shown?;
    ended.map(|()| code)
}

/// The table that the harness prints.
fn show_tasks(out: &mut impl Write, outcomes: &[(Task, Outcome)]) -> std::io::Result<()> {
    writeln!(out, "|task|version|n-shot|documents|metric|value|stderr|")?;
    writeln!(out, "|---|---:|---:|---:|---|---:|---:|")?;
    for (task, outcome) in outcomes {
        for figure in &outcome.figures {
            let stderr = figure.stderr.map_or_else(|| "N/A".into(), |x| format!("{x:.4}"));
            let (name, metric) = (task.name(), figure.metric.name());
            let (version, shots, documents) = (task.version(), outcome.shots, outcome.documents);
            let value = figure.value;
            writeln!(out, "|{name}|{version}|{shots}|{documents}|{metric}|{value:.4}|{stderr}|")?;
        }
        if outcome.cut > 0 {
            common::tell(format_args!(
                "note: {}: {} cut off on the left to fit into the context",
                task.name(),
                counted(outcome.cut, "prompt")
            ));
        }
    }
    Ok(())
}

fn show_slices(args: &Args, model: &Pricket, slices: &BTreeMap<String, SliceLoss>) -> anyhow::Result<()> {
    ensure!(!slices.is_empty(), "there is no document");
    let rows: serde_json::Map<String, Value> = slices.iter().map(|(name, slice)| (name.clone(), row(slice))).collect();
    let results = json!({"slices": rows, "provenance": model.provenance().to_json()});
    let mut out = std::io::stdout().lock();
    let shown = if args.json { writeln!(out, "{results}") } else { show_table(&mut out, slices) };
    if let Some(path) = &args.output {
        common::write_whole(path, &(serde_json::to_string_pretty(&results)? + "\n"))?;
    }
    Ok(shown?)
}

fn row(slice: &SliceLoss) -> Value {
    json!({
        "documents": slice.documents, "tokens": slice.tokens, "bytes": slice.bytes, "loss": slice.loss(),
        "perplexity": slice.perplexity(), "bits_per_byte": slice.bits_per_byte(),
        "byte_perplexity": slice.byte_perplexity(), "word_perplexity": slice.word_perplexity(),
    })
}

/// What the first token of a text is scored given.
fn prefix(model: &Pricket) -> anyhow::Result<String> {
    let prefix = model.prefix_id();
    Ok(model.tokenizer()?.id_to_token(prefix).unwrap_or_else(|| prefix.to_string()))
}

fn show_text(args: &Args, model: &Pricket, text: &SliceLoss) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let (prefix, window) = (prefix(model)?, args.max_length.or(model.info().context));
    if args.json {
        let mut json = row(text);
        json["given"] = json!(prefix);
        json["max_length"] = json!(window);
        json["provenance"] = model.provenance().to_json();
        writeln!(out, "{json}")?;
        return Ok(());
    }
    let (tokens, loss, perplexity) = (counted(text.tokens as usize, "token"), text.loss(), text.perplexity());
    writeln!(out, "{tokens}, the first given {prefix}: loss {loss:.4} nats a token, perplexity {perplexity:.3}")?;
    writeln!(out, "{}: {:.4} bits per byte", counted(text.bytes as usize, "byte"), text.bits_per_byte())?;
    Ok(())
}

fn show_table(out: &mut impl Write, slices: &BTreeMap<String, SliceLoss>) -> std::io::Result<()> {
    writeln!(out, "|slice|documents|tokens|loss|perplexity|bits per byte|")?;
    writeln!(out, "|---|---:|---:|---:|---:|---:|")?;
    for (name, slice) in slices {
        let (loss, perplexity, bits) = (slice.loss(), slice.perplexity(), slice.bits_per_byte());
        writeln!(out, "|{name}|{}|{}|{loss:.4}|{perplexity:.3}|{bits:.4}|", slice.documents, slice.tokens)?;
    }
    Ok(())
}

fn run_text(args: &Args, model: &Pricket, text: &str, score: &ScoreOptions) -> anyhow::Result<()> {
    let (tokens, prefix) = (model.score(text, score)?, prefix(model)?);
    let nats: f64 = -tokens.iter().map(|token| f64::from(token.logprob)).sum::<f64>();
    let count = tokens.len() as f64;
    let mut out = std::io::stdout().lock();
    if args.json {
        let tokens: Vec<Value> = tokens
            .iter()
            .map(|t| json!({"id": t.id, "text": t.text, "logprob": t.logprob, "is_greedy": t.is_greedy}))
            .collect();
        let json = json!({
            "text": text, "given": prefix, "tokens": tokens, "loss": nats / count, "perplexity": (nats / count).exp(),
            "provenance": model.provenance().to_json(),
        });
        writeln!(out, "{json}")?;
        return Ok(());
    }
    for token in &tokens {
        let greedy = if token.is_greedy { " *" } else { "" };
        writeln!(out, "{:9.4}  {:?}{greedy}", token.logprob, token.text)?;
    }
    let gap = if std::io::stdout().is_terminal() { "\n" } else { "" };
    common::tell(format_args!(
        "{gap}{}, the first given {prefix}: loss {:.4} nats a token, perplexity {:.3}; * marks the likeliest token",
        counted(tokens.len(), "token"),
        nats / count,
        (nats / count).exp()
    ));
    Ok(())
}
