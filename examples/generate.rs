//! Continues a prompt, writing as it goes; tokens per second on stderr at the end.
//!
//! `cargo run --example generate -- --prompt "The whale"`

mod common;

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use pricket::{GenerateOptions, Sampling};

/// Continues a prompt.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// The text to continue; - reads it from standard input
    #[arg(long, short, default_value = "My fellow citizens, the people of the United States")]
    prompt: String,
    /// New tokens at most
    #[arg(long, short = 'n', default_value_t = 128)]
    max_tokens: usize,
    /// Divides the logits; 0 always takes the most likely token
    #[arg(long, short, default_value_t = 0.8)]
    temperature: f32,
    /// Choose among the K most likely tokens; 0 for all
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Choose among the most likely tokens that together have probability P
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f32,
    /// Choose among tokens with at least this share of the most likely one's probability
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    min_p: f32,
    /// Choose among the most typical tokens that together have probability P
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    typical_p: f32,
    /// Makes tokens that have occurred less likely; 1 for no change
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    repetition_penalty: f32,
    /// Subtracted from the logits of tokens already written
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    presence_penalty: f32,
    /// Subtracted for each time a token has been written
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    frequency_penalty: f32,
    /// No run of N tokens occurs twice; 0 for no such rule
    #[arg(long, default_value_t = 0, value_name = "N")]
    no_repeat_ngram_size: usize,
    /// Where the random numbers begin [default: somewhere new each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Ends the text; can be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Goes on after the model's end token
    #[arg(long)]
    ignore_eos: bool,
    /// Goes beyond the length that the model was trained for
    #[arg(long)]
    beyond_trained_length: bool,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    common::finish(run(Args::parse()))
}

fn run(args: Args) -> anyhow::Result<()> {
    let pricket = args.model.load()?;
    let mut prompt = args.prompt;
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt)?;
    }
    let clock = || std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos() as u64);
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampling: Sampling {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            typical_p: args.typical_p,
            repetition_penalty: args.repetition_penalty,
            presence_penalty: args.presence_penalty,
            frequency_penalty: args.frequency_penalty,
            no_repeat_ngram_size: args.no_repeat_ngram_size,
        },
        seed: args.seed.unwrap_or_else(clock),
        row_seeds: Vec::new(),
        stop: args.stop,
        stop_at_eos: !args.ignore_eos,
        beyond_trained_length: args.beyond_trained_length,
    };
    let mut stream = pricket.stream(&prompt, &options)?;
    let mut out = std::io::stdout().lock();
    let start = Instant::now();
    let mut first = None;
    if !args.json {
        write!(out, "{prompt}")?;
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
        // A blank line sets the figures apart where text and figures meet on a terminal.
        let gap = if std::io::stdout().is_terminal() { "\n" } else { "" };
        let decode = decode.map_or("-".into(), |rate| format!("{rate:.1}"));
        eprintln!(
            "{gap}{read} tokens read at {:.1} tokens/s, {written} written at {decode} tokens/s, {:?}, seed {}",
            read as f64 / prefill,
            completion.finish,
            options.seed
        );
    }
    Ok(())
}
