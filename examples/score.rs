//! Log-probabilities and perplexity of a text; tasks with the numbers of lm-evaluation-harness; losses of named slices.
//!
//! `cargo run --example score -- --prompt "The whale is a large animal."`

mod common;
#[path = "common/tasks.rs"]
mod tasks;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::ensure;
use clap::Parser;
use common::Bar;
use pricket::lm::{Documents, Outcome, SliceLoss, results_json, slice_losses};
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
    /// Tasks, by name or as TOML files: lambada_openai, hellaswag, piqa, winogrande, arc_easy, arc_challenge, sciq, wikitext
    #[arg(long, value_delimiter = ',', value_name = "TASK")]
    tasks: Vec<String>,
    /// The directory with the tasks' documents: TASK.validation.jsonl or TASK.test.jsonl, and TASK.train.jsonl for examples, or
    /// parquet [default: fetched from the Hub's datasets]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// JSON lines with a text and the name of its slice: the loss of each slice is told
    #[arg(long, value_name = "FILE", conflicts_with = "tasks")]
    slices: Option<PathBuf>,
    /// Examples before each question
    #[arg(long, default_value_t = 0)]
    num_fewshot: usize,
    /// Where the drawing of examples begins
    #[arg(long, default_value_t = 1234)]
    fewshot_seed: u32,
    /// Documents of each task at most
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Draws of the bootstrap for the standard error of perplexities; 0 for none
    #[arg(long, default_value_t = 100_000)]
    bootstrap_iters: usize,
    /// Tokens that are read at once [default: the model's context]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Tokens of a batch [default: 1024 on the CPU, 16384 on a GPU]
    #[arg(long, value_name = "N")]
    batch_tokens: Option<usize>,
    /// Writes the results as lm-evaluation-harness does
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
    match run(&Args::parse()) {
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
    common::interruptible()?;
    let asked = args.tasks.iter().map(|name| tasks::task(name)).collect::<anyhow::Result<Vec<_>>>()?;
    let documents = asked.iter().map(|task| tasks::documents(args.data.as_deref(), task));
    let documents = documents.collect::<anyhow::Result<Vec<_>>>()?;
    let document = args.text.as_ref().map(pricket::lm::read_utf8).transpose()?;
    let model = args.model.load("tiny")?;
    let score = ScoreOptions {
        max_length: args.max_length,
        batch_tokens: args.batch_tokens,
        progress: Arc::new(Bar::default()),
    };
    if !asked.is_empty() {
        return run_tasks(args, &model, asked.into_iter().zip(documents), score);
    }
    if let Some(path) = &args.slices {
        let slices =
            slice_losses(&*model.model(), model.tokenizer()?, Documents::open(path)?, model.prefix_id(), &score)?;
        return show_slices(args, &model, &slices).map(|()| ExitCode::SUCCESS);
    }
    if let Some(text) = document {
        let documents = [Ok(json!({ "text": text }))];
        let slices = slice_losses(&*model.model(), model.tokenizer()?, documents, model.prefix_id(), &score)?;
        return show_text(args, &model, &slices["all"]).map(|()| ExitCode::SUCCESS);
    }
    run_text(args, &model, &text, &score).map(|()| ExitCode::SUCCESS)
}

fn run_tasks(
    args: &Args,
    model: &Pricket,
    asked: impl Iterator<Item = (Task, Vec<PathBuf>)>,
    score: ScoreOptions,
) -> anyhow::Result<ExitCode> {
    let options = EvalOptions {
        shots: args.num_fewshot,
        seed: args.fewshot_seed,
        limit: args.limit,
        bootstrap: args.bootstrap_iters,
        samples: args.log_samples,
        score,
        ..EvalOptions::default()
    };
    let start = Instant::now();
    let (mut outcomes, mut code, mut ended) = (Vec::new(), ExitCode::SUCCESS, Ok(()));
    for (task, documents) in asked {
        let outcome = || -> anyhow::Result<Outcome> {
            let mut examples = Vec::new();
            if options.shots > 0 {
                examples = Documents::open_all(tasks::examples(args.data.as_deref(), &task)?)?
                    .collect::<Result<Vec<Value>, _>>()?;
            }
            Ok(model.evaluate(&task, Documents::open_all(&documents)?, &examples, &options)?)
        };
        match outcome() {
            Ok(outcome) => outcomes.push((task, outcome)),
            Err(e) => {
                let of_documents = matches!(e.downcast_ref(), Some(pricket::Error::Input(_)))
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
    if let Some(path) = &args.output {
        common::write_whole(path, &(serde_json::to_string_pretty(&results)? + "\n"))?;
        for (task, outcome) in outcomes.iter().filter(|_| args.log_samples) {
            let lines: String =
                outcome.samples.iter().flat_map(|sample| [sample.to_json().to_string(), "\n".into()]).collect();
            common::write_whole(&path.with_file_name(format!("samples_{}.jsonl", task.name())), &lines)?;
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
                "note: {}: {} prompts were cut off on the left, for want of room",
                task.name(),
                outcome.cut
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
    Ok(model.tokenizer()?.decode(&[model.prefix_id()]))
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
    let (tokens, loss, perplexity) = (text.tokens, text.loss(), text.perplexity());
    writeln!(
        out,
        "{tokens} tokens, the first given {prefix}: loss {loss:.4} nats a token, perplexity {perplexity:.3}"
    )?;
    writeln!(out, "{} bytes: {:.4} bits per byte", text.bytes, text.bits_per_byte())?;
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
        "{gap}{count} tokens, the first given {prefix}: loss {:.4} nats a token, perplexity {:.3}; * none was likelier",
        nats / count,
        (nats / count).exp()
    ));
    Ok(())
}
