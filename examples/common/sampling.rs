//! Flags for sampling.

use pricket::lm::PromptFormat;
use pricket::{GenerateOptions, Pricket, SamplingParams};

/// Sampling of tokens.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct SamplingArgs {
    /// Maximum number of new tokens, or -1 to fill the model's context
    #[arg(long, short = 'n', default_value = "128", value_name = "N", value_parser = count, allow_negative_numbers = true)]
    pub(crate) max_tokens: usize,
    /// Sampling temperature, by which logits are divided; 0 to always take the most likely token
    #[arg(long, short, default_value_t = 0.8)]
    temperature: f32,
    /// Sample from the K most likely tokens; 0 or -1 for all tokens
    #[arg(long, default_value = "0", value_name = "K", value_parser = count, allow_negative_numbers = true)]
    top_k: usize,
    /// Sample from the most likely tokens whose probabilities add up to P, from 0 to 1; 1 for all tokens [default:
    /// 0.95, or 1 at temperature 0]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Sample from the tokens with at least P times the probability of the most likely token, P from 0 to 1; 0 for all
    /// tokens
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    min_p: f32,
    /// Sample from the most typical tokens (locally typical sampling) whose probabilities add up to P, from 0 to 1; 1
    /// for all tokens
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    typical_p: f32,
    /// Penalty of tokens that occur in the prompt or the reply, above 0: positive logits are divided by it, negative
    /// ones multiplied; 1 for no change
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    repetition_penalty: f32,
    /// Number subtracted once from the logit of each token that occurs in the reply
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    presence_penalty: f32,
    /// Number subtracted from the logit of a token for each time that it occurs in the reply
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    frequency_penalty: f32,
    /// Length N of token sequences that may not occur twice; 0 to allow repetition
    #[arg(long, default_value_t = 0, value_name = "N")]
    no_repeat_ngram_size: usize,
    /// Random seed [default: the current time]
    #[arg(long)]
    seed: Option<u64>,
}

/// Parses a count, or -1 for no limit.
fn count(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(usize::MAX),
        text => text.parse().map_err(|_| "expected a number, or -1 for no limit".into()),
    }
}

impl SamplingArgs {
    /// Returns the generation options of these flags.
    pub(crate) fn options(&self) -> GenerateOptions {
        let clock = || std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos() as u64);
        GenerateOptions {
            max_tokens: self.max_tokens,
            sampling: SamplingParams {
                temperature: self.temperature,
                // 0 means no limit to the library.
                top_k: if self.top_k == usize::MAX { 0 } else { self.top_k },
                // The library rejects --top-p at temperature 0, so it has no default there.
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

/// Returns the prompt format of a flag: a name, a file, or `auto` for the model's own format.
pub(crate) fn prompt_format(name: &str, pricket: &Pricket) -> pricket::Result<PromptFormat> {
    if name == "auto" { Ok(pricket.prompt_format().clone()) } else { pricket::text::prompt_format(name) }
}
