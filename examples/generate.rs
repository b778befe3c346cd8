//! Continues a prompt and prints the text as it is generated. Prints tokens per second on stderr at the end.
//!
//! `cargo run --example generate -- --prompt "The whale"`

mod common;
#[path = "common/sampling.rs"]
mod sampling;

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use pricket::GenerateOptions;
use pricket::lm::Turn;
use pricket::weights::counted;

/// Continue a prompt.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// Text to continue, or - to read it from standard input
    #[arg(long, short, default_value = "My fellow citizens, the people of the United States")]
    prompt: String,
    #[command(flatten)]
    sampling: sampling::SamplingArgs,
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
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.model.compute.limit_candle_threads();
    common::finish(run(args))
}

fn run(args: Args) -> anyhow::Result<()> {
    let pricket = args.model.load("tiny")?;
    let mut prompt = args.prompt;
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt)?;
    }
    let mut options = GenerateOptions {
        stop: args.stop,
        stop_at_eos: !args.ignore_eos,
        beyond_trained_length: args.beyond_trained_length,
        ..args.sampling.options()
    };
    let format = sampling::prompt_format(&args.prompt_format, &pricket)?;
    let shown = prompt.clone();
    prompt = format.prompt(args.system.as_deref(), &[Turn::user(prompt)])?;
    options.stop.extend(format.stop.iter().cloned());
    let mut stream = pricket.stream(&prompt, &options)?;
    if format.name != "plain" {
        stream = stream.as_reply();
    }
    let mut out = std::io::stdout().lock();
    let start = Instant::now();
    let mut first = None;
    if !args.json {
        write!(out, "{shown}{}", if format.name == "plain" { "" } else { "\n" })?;
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
    let completion = stream.into_completion();
    let prefill = first.map_or(total, |t| t.as_secs_f64());
    let (read, written) = (completion.prompt_ids.len(), completion.ids.len());
    let decode = (written > 1).then(|| (written - 1) as f64 / (total - prefill));
    if args.json {
        let finish = format!("{:?}", completion.finish).to_lowercase();
        let json = serde_json::json!({
            "prompt": prompt, "text": completion.text, "ids": completion.ids, "prompt_ids": completion.prompt_ids,
            "logprobs": completion.logprobs, "finish": finish, "seed": options.seed,
            "provenance": pricket.provenance().to_json(),
            "prefill_tokens_per_second": read as f64 / prefill, "decode_tokens_per_second": decode,
        });
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
            options.seed
        ));
    }
    Ok(())
}
