//! Measurement of the engine: requests that arrive at random times.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::ensure;
use pricket::lm::{EngineOptions, RequestId};
use pricket::{GenerateOptions, Pricket};
use rand::{Rng, SeedableRng};

/// Requests to the engine.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ServingArgs {
    /// Measure the engine with this number of requests, of --new-tokens new tokens each. All run in one batch
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    /// Smallest and largest prompt length of the requests, in tokens. The lengths are spread evenly between them
    #[arg(long, value_name = "FROM-TO", default_value = "64-512", value_parser = range)]
    request_prompts: (usize, usize),
    /// Requests that arrive per second, at random times; 0 for all at the start
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    arrival_rate: f64,
    /// Maximum number of requests that run at the same time
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().rows)]
    slots: usize,
    /// Number of tokens that a step reads at most [default: 512 on the CPU, 2048 on a GPU]
    #[arg(long, value_name = "N")]
    step_tokens: Option<usize>,
    /// Run the requests that have arrived as one fixed batch after the other, for comparison: none joins a running
    /// batch
    #[arg(long)]
    fixed_batches: bool,
}

fn range(text: &str) -> Result<(usize, usize), String> {
    let wrong = || format!("expected two lengths such as 64-512, found {text:?}");
    let (from, to) = text.split_once('-').ok_or_else(wrong)?;
    let (from, to) = (from.parse().map_err(|_| wrong())?, to.parse().map_err(|_| wrong())?);
    if (1..=to).contains(&from) { Ok((from, to)) } else { Err(wrong()) }
}

/// Figures of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Serving {
    requests: usize,
    /// Prompt tokens of all requests.
    prompt: usize,
    /// New tokens of all requests.
    new: usize,
    /// Time from the first arrival to the last token.
    seconds: f64,
    /// Median and 95th percentile of the seconds from the arrival of a request to its first token.
    first: (f64, f64),
    /// Median and 95th percentile of the seconds between two tokens of a request.
    between: (f64, f64),
}

impl ServingArgs {
    /// Runs the requests.
    fn measure(&self, pricket: &Pricket, requests: usize, new_tokens: usize) -> anyhow::Result<Serving> {
        ensure!(requests > 0 && self.slots > 0, "expected --requests and --slots of at least 1");
        let rate = self.arrival_rate;
        ensure!(rate == 0.0 || (1e-3..1e6).contains(&rate), "expected --arrival-rate 0, or at least 0.001 per second");
        // The same requests in every run.
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let vocab = pricket.info().vocab as u32;
        let (mut prompts, mut arrivals, mut now) = (Vec::new(), Vec::new(), 0.0);
        let (least, most) = self.request_prompts;
        for i in 0..requests {
            // Evenly spread lengths in a mixed order, which other programs can repeat.
            let len = least + i * 7919 % requests * (most - least) / (requests - 1).max(1);
            prompts.push((0..len).map(|_| random.random_range(0..vocab)).collect::<Vec<u32>>());
            arrivals.push(Duration::from_secs_f64(now));
            if self.arrival_rate > 0.0 {
                // The times between arrivals have an exponential distribution.
                now -= (1.0 - random.random::<f64>()).ln() / self.arrival_rate;
            }
        }
        let options = GenerateOptions { max_tokens: new_tokens, stop_at_eos: false, ..Default::default() };
        let engine = EngineOptions { rows: self.slots, step_tokens: self.step_tokens, ..EngineOptions::default() };
        let mut engine = pricket.engine(engine)?;
        let prompt = prompts.iter().map(Vec::len).sum();
        let mut left = prompts.into_iter().zip(&arrivals).peekable();
        let mut arrived: HashMap<RequestId, (Duration, Option<Duration>)> = HashMap::new();
        let (mut firsts, mut gaps, mut new) = (Vec::new(), Vec::new(), 0);
        let start = Instant::now();
        loop {
            let may_join = !self.fixed_batches || engine.running() + engine.waiting() == 0;
            let mut joined = 0;
            while may_join
                && joined < if self.fixed_batches { self.slots } else { usize::MAX }
                && let Some((ids, &arrival)) = left.next_if(|(_, arrival)| **arrival <= start.elapsed())
            {
                let request = pricket::lm::Request { tokenizer: None, ..pricket.request(ids, &options) };
                arrived.insert(engine.submit(request)?, (arrival, None));
                joined += 1;
            }
            let Some(updates) = engine.step()? else {
                let Some((_, arrival)) = left.peek() else { break };
                std::thread::sleep(arrival.saturating_sub(start.elapsed()));
                continue;
            };
            let now = start.elapsed();
            for update in updates {
                update.finish.transpose()?;
                if update.tokens.is_empty() {
                    continue;
                }
                new += update.tokens.len();
                if let Some((arrival, last)) = arrived.get_mut(&update.request) {
                    match last.replace(now) {
                        None => firsts.push(now.saturating_sub(*arrival).as_secs_f64()),
                        Some(last) => gaps.push(now.saturating_sub(last).as_secs_f64()),
                    }
                }
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let (first, between) = (percentiles(firsts), percentiles(gaps));
        Ok(Serving { requests, prompt, new, seconds, first, between })
    }

    /// Measures as often as `runs` says, and returns the median run by time.
    pub(crate) fn median(&self, pricket: &Pricket, runs: usize, new_tokens: usize) -> anyhow::Result<Option<Serving>> {
        let Some(requests) = self.requests else { return Ok(None) };
        let measured = (0..runs).map(|_| self.measure(pricket, requests, new_tokens));
        let mut measured = measured.collect::<anyhow::Result<Vec<_>>>()?;
        measured.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        Ok(Some(measured[runs / 2]))
    }
}

impl Serving {
    fn rates(&self) -> (f64, f64) {
        ((self.prompt + self.new) as f64 / self.seconds, self.new as f64 / self.seconds)
    }

    pub(crate) fn to_json(self) -> serde_json::Value {
        let (total, new) = self.rates();
        serde_json::json!({
            "requests": self.requests, "prompt_tokens": self.prompt, "new_tokens": self.new, "seconds": self.seconds,
            "tokens_per_second": total, "new_tokens_per_second": new,
            "first_token_seconds": {"median": self.first.0, "p95": self.first.1},
            "between_tokens_seconds": {"median": self.between.0, "p95": self.between.1},
        })
    }
}

impl std::fmt::Display for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |(median, p95): (f64, f64)| format!("{:.0} ms (95th percentile {:.0} ms)", 1e3 * median, 1e3 * p95);
        let (total, new) = self.rates();
        writeln!(f, "{} requests in {:.1} s: {total:.1} tokens/s, {new:.1} new", self.requests, self.seconds)?;
        write!(f, "first token after {}; next tokens after {}", ms(self.first), ms(self.between))
    }
}

/// Returns the median and the 95th percentile; NaN if there are no values.
fn percentiles(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get((values.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN);
    (at(0.5), at(0.95))
}
