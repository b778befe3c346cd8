//! Continues a prompt and prints the text as it is generated. Prints tokens per second on stderr at the end.
//!
//! `cargo run --example generate -- --prompt "The whale"`

mod common;
#[path = "common/draft.rs"]
mod draft;
#[path = "common/sampling.rs"]
mod sampling;

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::ensure;
use clap::Parser;
use pricket::lm::{EngineOptions, PromptFormat, RequestId, Turn};
use pricket::text::Completion;
use pricket::weights::counted;
use pricket::{FinishReason, GenerateOptions, Pricket};

/// Continue prompts.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// Text to continue, or - to read it from standard input. Can be given several times; the texts are then continued
    /// together
    #[arg(long, short, default_value = "My fellow citizens, the people of the United States")]
    prompt: Vec<String>,
    /// Number of continuations of each prompt, with the seeds SEED, SEED + 1 and so on
    #[arg(long, value_name = "N", default_value_t = 1)]
    samples: usize,
    /// Maximum number of texts that are continued at the same time
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().rows)]
    batch_size: usize,
    #[command(flatten)]
    sampling: sampling::SamplingArgs,
    #[command(flatten)]
    draft: draft::DraftArgs,
    /// Prompt format applied to --prompt as a user turn: a name listed by `chat --formats`, a TOML file (its first
    /// format is used), auto for the model's own format, or plain for no format
    #[arg(long, value_name = "NAME", default_value = "plain")]
    prompt_format: String,
    /// System text to use instead of the prompt format's own
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Text at which generation ends. Can be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Continue after the model's end token
    #[arg(long)]
    ignore_eos: bool,
    /// Allow prompt and reply together to exceed the length that the model was trained for
    #[arg(long)]
    beyond_trained_length: bool,
    /// Print one JSON object for each text instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.model.compute.limit_candle_threads();
    common::finish(run(args))
}

/// A text to continue.
struct Job {
    /// Prompt as given.
    shown: String,
    prompt: String,
    seed: u64,
}

fn run(mut args: Args) -> anyhow::Result<()> {
    ensure!(args.samples > 0 && args.batch_size > 0, "expected --samples and --batch-size of at least 1");
    let pricket = args.model.load("tiny")?;
    let draft = args.draft.load(&args.model.compute)?;
    let mut options = GenerateOptions {
        stop: std::mem::take(&mut args.stop),
        stop_at_eos: !args.ignore_eos,
        beyond_trained_length: args.beyond_trained_length,
        ..args.sampling.options()
    };
    let format = sampling::prompt_format(&args.prompt_format, &pricket)?;
    options.stop.extend(format.stop.iter().cloned());
    let mut jobs = Vec::new();
    for text in &args.prompt {
        let mut shown = text.clone();
        if shown == "-" {
            shown.clear();
            std::io::stdin().read_to_string(&mut shown)?;
        }
        let prompt = format.prompt(args.system.as_deref(), &[Turn::user(shown.clone())])?;
        for i in 0..args.samples as u64 {
            jobs.push(Job { shown: shown.clone(), prompt: prompt.clone(), seed: options.seed.wrapping_add(i) });
        }
    }
    if let [job] = &jobs[..] {
        return stream(&args, &pricket, draft.as_ref(), &format, job, &options);
    }
    batch(&args, &pricket, draft.as_ref(), &format, &jobs, &options)
}

type Draft = (Pricket, pricket::text::SpeculationOptions);

/// Continues one text and prints it as it is generated.
fn stream(
    args: &Args,
    pricket: &Pricket,
    draft: Option<&Draft>,
    format: &PromptFormat,
    job: &Job,
    options: &GenerateOptions,
) -> anyhow::Result<()> {
    let mut stream = pricket.stream(&job.prompt, options)?;
    if format.name != "plain" {
        stream = stream.as_reply();
    }
    if let Some((draft, options)) = draft {
        stream = stream.with_draft(pricket, draft, *options)?;
    }
    let mut out = std::io::stdout().lock();
    let start = Instant::now();
    let mut first = None;
    if !args.json {
        write!(out, "{}{}", job.shown, if format.name == "plain" { "" } else { "\n" })?;
        out.flush()?;
    }
    for piece in &mut stream {
        let piece = piece?;
        first.get_or_insert_with(|| start.elapsed());
        if !args.json {
            write!(out, "{piece}")?;
            out.flush()?;
        }
    }
    let total = start.elapsed().as_secs_f64();
    let speculation = stream.speculation();
    let completion = stream.into_completion();
    let prefill = first.map_or(total, |t| t.as_secs_f64());
    let (read, written) = (completion.prompt_ids.len(), completion.ids.len());
    let decode = (written > 1).then(|| (written - 1) as f64 / (total - prefill));
    if args.json {
        let mut json = to_json(pricket, job, &completion);
        json["prefill_tokens_per_second"] = (read as f64 / prefill).into();
        json["decode_tokens_per_second"] = decode.into();
        if let Some(found) = &speculation {
            json["draft_acceptance"] = found.acceptance().into();
        }
        writeln!(out, "{json}")?;
    } else {
        writeln!(out)?;
        // On a terminal, a blank line separates the text from the figures.
        let gap = if std::io::stdout().is_terminal() { "\n" } else { "" };
        let decode = decode.map_or("-".into(), |rate| format!("{rate:.1}"));
        common::tell(format_args!(
            "{gap}prompt: {} at {:.1} tokens/s; generated: {written} at {decode} tokens/s; {}; seed {}",
            counted(read, "token"),
            read as f64 / prefill,
            completion.finish,
            job.seed
        ));
    }
    if let Some(found) = &speculation {
        draft::report(found);
    }
    Ok(())
}

/// Continues several texts together. Prints each text when it and all texts before it have ended.
fn batch(
    args: &Args,
    pricket: &Pricket,
    draft: Option<&Draft>,
    format: &PromptFormat,
    jobs: &[Job],
    options: &GenerateOptions,
) -> anyhow::Result<()> {
    let mut engine = pricket.engine(EngineOptions { rows: args.batch_size, ..EngineOptions::default() })?;
    if let Some((draft, options)) = draft {
        engine = pricket.with_draft(engine, draft, *options)?;
    }
    let mut texts = Vec::with_capacity(jobs.len());
    let mut read = 0;
    for job in jobs {
        let ids = pricket.encode_prompt(&job.prompt)?;
        read += ids.len();
        texts.push(Completion::new(&ids, options));
        let mut request = pricket.request(ids, &GenerateOptions { seed: job.seed, ..options.clone() });
        request.is_reply = format.name != "plain";
        engine.submit(request)?;
    }
    let mut out = std::io::stdout().lock();
    let (start, mut shown) = (Instant::now(), 0);
    let mut ended = vec![options.max_tokens == 0; jobs.len()];
    let mut failed = None;
    loop {
        while let (Some(job), Some(true)) = (jobs.get(shown), ended.get(shown)) {
            let text: &Completion = &texts[shown];
            if args.json {
                writeln!(out, "{}", to_json(pricket, job, text))?;
            } else {
                let gap = if format.name == "plain" { "" } else { "\n" };
                writeln!(out, "{}{gap}{}\n", job.shown, text.text)?;
            }
            out.flush()?;
            shown += 1;
        }
        let Some(updates) = engine.step()? else { break };
        for update in updates {
            let RequestId(row) = update.request;
            ended[row as usize] = update.finish.is_some();
            // The other texts go on.
            if let Err(error) = texts[row as usize].add(update) {
                failed.get_or_insert(error);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let written: usize = texts.iter().map(|text| text.ids.len()).sum();
    common::tell(format_args!(
        "{}: {} of prompts and {written} generated in {seconds:.1} s, {:.1} generated tokens/s; seed {}",
        counted(jobs.len(), "text"),
        counted(read, "token"),
        written as f64 / seconds,
        options.seed
    ));
    if let Some(found) = engine.speculation() {
        draft::report(&found);
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

fn to_json(pricket: &Pricket, job: &Job, text: &Completion) -> serde_json::Value {
    let finish: FinishReason = text.finish;
    serde_json::json!({
        "prompt": job.prompt, "text": text.text, "ids": text.ids, "prompt_ids": text.prompt_ids,
        "logprobs": text.logprobs, "finish": format!("{finish:?}").to_lowercase(), "seed": job.seed,
        "provenance": pricket.provenance().to_json(),
    })
}
