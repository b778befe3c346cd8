//! Scores a text, evaluates tasks as lm-evaluation-harness does, or measures the loss of named slices of documents.
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

/// Score a text, evaluate tasks, or measure the loss of named groups of texts (slices).
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// Text to score, or - to read it from standard input. Prints the log-probability of every token [default: a
    /// built-in sentence]
    #[arg(long, short, conflicts_with_all = ["text", "tasks", "slices"])]
    prompt: Option<String>,
    /// Plain text file of any length to score. Prints loss, perplexity and bits per byte
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tasks", "slices"])]
    text: Option<PathBuf>,
    /// Tasks to evaluate: names (lambada_openai, hellaswag, piqa, winogrande, arc_easy, arc_challenge, sciq, wikitext)
    /// or files (.yaml of lm-evaluation-harness, or .toml)
    #[arg(long, value_delimiter = ',', value_name = "TASK")]
    tasks: Vec<String>,
    /// Directory with the documents of the tasks: TASK.SPLIT.jsonl or TASK.SPLIT.parquet, for the split that the task
    /// evaluates (such as validation or test) and the split of its few-shot examples (usually train) [default: the
    /// files that the task's own file names, otherwise fetched from the Hub]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// JSON lines file with the keys "text" and "slice" (or "meta.pile_set_name", as in the Pile), the name of the
    /// text's group; without a name, "all". Prints the loss of each group
    #[arg(long, value_name = "FILE", conflicts_with = "tasks")]
    slices: Option<PathBuf>,
    /// Number of few-shot examples before each question. Several numbers, such as 0,5, are evaluated in turn [default:
    /// the task's own number, 0 for built-in tasks]
    #[arg(long, value_delimiter = ',', value_name = "N")]
    num_fewshot: Vec<usize>,
    /// Random seed for the choice of few-shot examples [default: 1234]
    #[arg(long, value_name = "N")]
    fewshot_seed: Option<u32>,
    /// Maximum number of documents per task, or a fraction of them, such as 0.5 [default: all]
    #[arg(long, value_name = "N")]
    limit: Option<Limit>,
    /// Number of bootstrap samples for the standard error of perplexities; 0 for no standard error [default: 100000]
    #[arg(long, value_name = "N")]
    bootstrap_iters: Option<usize>,
    /// Maximum number of tokens that the model reads at once, at least 1 [default: the model's context]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Allow a --max-length above the length that the model was trained for
    #[arg(long, requires = "max_length")]
    beyond_trained_length: bool,
    /// Number of tokens scored per window of a long text, from 1 to --max-length. A smaller number gives each token
    /// more context and takes longer [default: --max-length]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Maximum number of tokens per batch, at least 1 [default: 1024 on the CPU, 16384 on a GPU]
    #[arg(long, value_name = "N")]
    batch_tokens: Option<usize>,
    /// Write the results to a JSON file, those of tasks in the format of lm-evaluation-harness. Several values of
    /// --num-fewshot give one file each, such as results.5shot.json
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Also write the requests and answers of every document, to samples_TASK.jsonl next to --output
    #[arg(long, requires = "output")]
    log_samples: bool,
    /// Print one JSON object instead of text
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
    // Flags and output files are checked before a model is fetched.
    if let Some(path) = &args.output {
        ensure!(!args.tasks.is_empty() || args.slices.is_some(), "--output requires --tasks or --slices");
        common::check_output(path, &[])?;
    }
    // clap's `requires` is not checked if --prompt is given, because --prompt conflicts with --tasks.
    let of_tasks = [
        ("--data", args.data.is_some()),
        ("--num-fewshot", !args.num_fewshot.is_empty()),
        ("--limit", args.limit.is_some()),
        ("--fewshot-seed", args.fewshot_seed.is_some()),
        ("--bootstrap-iters", args.bootstrap_iters.is_some()),
        ("--log-samples", args.log_samples),
    ];
    if let Some((flag, _)) = of_tasks.iter().find(|(_, is_set)| *is_set && args.tasks.is_empty()) {
        bail!("{flag} requires --tasks");
    }
    let counts = &args.num_fewshot;
    ensure!((1..counts.len()).all(|i| !counts[..i].contains(&counts[i])), "--num-fewshot gives a number twice");
    common::interruptible()?;
    let asked = args.tasks.iter().map(|name| tasks::task(name)).collect::<anyhow::Result<Vec<_>>>()?;
    if let Some(i) = (1..asked.len()).find(|&i| asked[..i].iter().any(|task| task.name() == asked[i].name())) {
        bail!("--tasks has two tasks named {}; give each task once", asked[i].name());
    }
    let has_windows = asked.is_empty() || asked.iter().any(|task| task.kind() == TaskKind::Perplexity);
    ensure!(
        args.stride.is_none() || has_windows,
        "--stride applies to whole texts only, and none of the tasks scores them"
    );
    for task in &asked {
        if task.shots(counts.iter().copied().max()) == 0 && counts.iter().any(|&count| count > 0) {
            let name = task.name();
            ensure!(
                counts.len() == 1,
                "--num-fewshot: task {name} takes no examples; leave it out if --num-fewshot gives several numbers"
            );
            common::tell(format_args!("note: task {name} takes no examples, so --num-fewshot has no effect on it"));
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

/// A task, the files of its documents, and the files of its examples.
type Asked = (Task, (Vec<PathBuf>, Vec<PathBuf>));

/// Returns the extension of the results file for a number of examples, such as `5shot.json`.
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
                    // The results of the tasks before are still printed and written.
                    ended = Err(e);
                    break;
                }
                // Invalid documents of one task do not stop the other tasks.
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
    // Printed before the file is written, so that a full disk does not lose hours of work.
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

/// Prints the table of results, as lm-evaluation-harness does.
fn show_tasks(out: &mut impl Write, outcomes: &[(Task, Outcome)]) -> std::io::Result<()> {
    writeln!(out, "|task|version|n-shot|documents|metric|value|stderr|")?;
    writeln!(out, "|---|---:|---:|---:|---|---:|---:|")?;
    for (task, outcome) in outcomes {
        for figure in &outcome.figures {
            let stderr = figure.stderr.map_or_else(|| "N/A".into(), |x| format!("{x:.4}"));
            let (name, mut metric) = (task.name(), figure.metric.name().to_owned());
            if figure.filter != "none" {
                metric = format!("{metric} ({})", figure.filter);
            }
            let (version, shots, documents) = (task.version(), outcome.shots, outcome.documents);
            let value = figure.value;
            writeln!(out, "|{name}|{version}|{shots}|{documents}|{metric}|{value:.4}|{stderr}|")?;
        }
        if outcome.cut > 0 {
            common::tell(format_args!(
                "note: task {}: {} truncated on the left to fit the context",
                task.name(),
                counted(outcome.cut, "prompt")
            ));
        }
    }
    Ok(())
}

fn show_slices(args: &Args, model: &Pricket, slices: &BTreeMap<String, SliceLoss>) -> anyhow::Result<()> {
    ensure!(!slices.is_empty(), "--slices: the file has no documents");
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

/// Returns the text of the token before a text, after which its first token is scored.
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
    writeln!(out, "{tokens}, scored after {prefix}: loss {loss:.4} nats per token, perplexity {perplexity:.3}")?;
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
        "{gap}{}, scored after {prefix}: loss {:.4} nats per token, perplexity {:.3}; * marks the most likely token",
        counted(tokens.len(), "token"),
        nats / count,
        (nats / count).exp()
    ));
    Ok(())
}
