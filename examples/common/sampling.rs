//! How tokens are chosen, as flags.

use pricket::lm::PromptFormat;
use pricket::{GenerateOptions, Pricket, SamplingParams};

/// How tokens are chosen.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct SamplingArgs {
    /// Maximum number of new tokens; -1 for no limit but the model's context
    #[arg(long, short = 'n', default_value = "128", value_name = "N", value_parser = count, allow_negative_numbers = true)]
    pub(crate) max_tokens: usize,
    /// Divides the logits; 0 always takes the most likely token
    #[arg(long, short, default_value_t = 0.8)]
    temperature: f32,
    /// Choose among the K most likely tokens; 0 or -1 for all
    #[arg(long, default_value = "0", value_name = "K", value_parser = count, allow_negative_numbers = true)]
    top_k: usize,
    /// Choose among the most likely tokens that together have probability P [default: 0.95]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
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
    /// Random seed [default: the time]
    #[arg(long)]
    seed: Option<u64>,
}

/// A number; -1 is without a limit, as in other programs.
fn count(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(usize::MAX),
        text => text.parse().map_err(|_| "expected a number, or -1 for no limit".into()),
    }
}

impl SamplingArgs {
    /// The options that these flags say.
    pub(crate) fn options(&self) -> GenerateOptions {
        let clock = || std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos() as u64);
        GenerateOptions {
            max_tokens: self.max_tokens,
            sampling: SamplingParams {
                temperature: self.temperature,
                // No limit is the same as none.
                top_k: if self.top_k == usize::MAX { 0 } else { self.top_k },
                // At temperature 0 nothing is left to choose among; what is asked for in spite of it is refused.
                top_p: self.top_p.unwrap_or(if self.temperature == 0.0 { 1.0 } else { 0.95 }),
                min_p: self.min_p,
                typical_p: self.typical_p,
                repetition_penalty: self.repetition_penalty,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                no_repeat_ngram_size: self.no_repeat_ngram_size,
            },
            seed: self.seed.unwrap_or_else(clock),
            ..GenerateOptions::default()
        }
    }
}

/// The format that a flag says: a name, a file, or `auto` for the model's own.
pub(crate) fn prompt_format(name: &str, pricket: &Pricket) -> pricket::Result<PromptFormat> {
    if name == "auto" { Ok(pricket.prompt_format().clone()) } else { pricket::text::prompt_format(name) }
}
