//! Sampling: choosing a token from logits.
//!
//! Token `i` is drawn with the probability `softmax(scores / temperature)[i]`, where penalties change the scores first
//! and the filters top-k, top-p, min-p and typical-p set some of them to negative infinity.

use std::cmp::Ordering;

use crate::{Error, Result, ops};

/// Sampling settings, with the names of transformers and applied in its order: penalties, temperature, top-k, top-p,
/// min-p, typical-p.
///
/// ```
/// use pricket_nn::SamplingParams;
/// let sampling = SamplingParams { temperature: 0.8, top_k: 40, ..SamplingParams::default() };
/// let mut scores = vec![1.0, 3.0, 2.0];
/// SamplingParams { temperature: 1.0, top_k: 1, ..SamplingParams::default() }.process(&mut scores, &[], 0);
/// assert_eq!(scores, [f32::NEG_INFINITY, 3.0, f32::NEG_INFINITY]);
/// # drop(sampling);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divisor of the logits; 0, the default, always chooses the most likely token.
    pub temperature: f32,
    /// Keeps the `top_k` most likely tokens, ties included; 0, the default, keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens whose probabilities add up to this; 1, the default, keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the probability of the most likely token; 0, the default, keeps all.
    pub min_p: f32,
    /// Keeps the most typical tokens (Meister et al. 2022, arXiv:2202.00666) whose probabilities add up to this; 1, the
    /// default, keeps all.
    pub typical_p: f32,
    /// Penalty of tokens that occur in the prompt or the continuation (Keskar et al. 2019, arXiv:1909.05858). Positive
    /// logits are divided by it, negative ones multiplied; 1, the default, changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token that occurs in the continuation; 0, the default, changes nothing.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token for each time that it occurs in the continuation; 0, the default, changes
    /// nothing.
    pub frequency_penalty: f32,
    /// Length of token sequences that may not occur twice; 0, the default, allows all.
    pub no_repeat_ngram_size: usize,
}

impl Default for SamplingParams {
    /// Returns the settings of greedy decoding.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            no_repeat_ngram_size: 0,
        }
    }
}

#[cfg(feature = "candle-transformers")]
impl From<&candle_transformers::generation::Sampling> for SamplingParams {
    fn from(sampling: &candle_transformers::generation::Sampling) -> Self {
        use candle_transformers::generation::Sampling;
        let at = |temperature: f64| Self { temperature: temperature as f32, ..Self::default() };
        match *sampling {
            Sampling::ArgMax => Self::greedy(),
            // Adding Gumbel noise and taking the maximum draws from the same distribution.
            Sampling::All { temperature } | Sampling::GumbelSoftmax { temperature } => at(temperature),
            Sampling::TopK { k, temperature } => Self { top_k: k, ..at(temperature) },
            Sampling::TopP { p, temperature } => Self { top_p: p as f32, ..at(temperature) },
            Sampling::TopKThenTopP { k, p, temperature } => Self { top_k: k, top_p: p as f32, ..at(temperature) },
        }
    }
}

impl SamplingParams {
    /// Returns the settings of greedy decoding, which always chooses the most likely token. This is the default.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// Returns the settings that sample from the unchanged distribution of the model: temperature 1.
    pub fn unchanged() -> Self {
        Self { temperature: 1.0, ..Self::default() }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// Returns [`Error::Input`] naming the setting if it is out of range or has no effect.
    pub fn check(&self) -> Result<()> {
        let rules = [
            ("temperature", self.temperature, self.temperature >= 0.0, "at least 0"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0, at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "between 0 and 1"),
            ("typical_p", self.typical_p, self.typical_p > 0.0 && self.typical_p <= 1.0, "above 0, at most 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "above 0"),
            ("presence_penalty", self.presence_penalty, self.presence_penalty.is_finite(), "a number"),
            ("frequency_penalty", self.frequency_penalty, self.frequency_penalty.is_finite(), "a number"),
        ];
        if let Some((name, value, _, rule)) = rules.iter().find(|(_, value, holds, _)| !holds || !value.is_finite()) {
            return Err(Error::Input(format!("{name} must be {rule}, found {value}")));
        }
        let chooses = [
            ("top_k", self.top_k > 0),
            ("top_p", self.top_p < 1.0),
            ("min_p", self.min_p > 0.0),
            ("typical_p", self.typical_p < 1.0),
        ];
        match chooses.iter().find(|(_, is_set)| *is_set && self.temperature == 0.0) {
            Some((name, _)) => Err(Error::Input(format!(
                "{name} has no effect at temperature 0, which always chooses the most likely token; set a temperature"
            ))),
            None => Ok(()),
        }
    }

    /// Returns whether the most likely token is always chosen, independent of the previous tokens.
    pub fn is_argmax(&self) -> bool {
        let unpenalized =
            self.repetition_penalty == 1.0 && self.presence_penalty == 0.0 && self.frequency_penalty == 0.0;
        self.temperature == 0.0 && unpenalized && self.no_repeat_ngram_size == 0
    }

    /// Chooses a token and replaces `logits` by their scores; see [`SamplingParams::process`].
    ///
    /// At temperature 0 it returns the most likely token. Otherwise it adds up the probabilities in the order of ids
    /// and returns the token at which the sum exceeds `draw`, a random number from 0 to 1.
    pub fn choose(&self, logits: &mut [f32], ids: &[u32], prompt_len: usize, draw: f64) -> u32 {
        self.process(logits, ids, prompt_len);
        if self.temperature == 0.0 {
            return ops::argmax(logits) as u32;
        }
        let probabilities = softmax(logits);
        let mut left = draw;
        for (i, &p) in probabilities.iter().enumerate() {
            left -= p;
            if left < 0.0 {
                return i as u32;
            }
        }
        // Rounding errors may leave the sum of all probabilities below `draw`.
        ops::argmax(logits) as u32
    }

    /// Replaces logits by scores: applies penalties and temperature, and sets dropped tokens to negative infinity.
    ///
    /// `ids` holds the prompt, which has `prompt_len` tokens, and the continuation.
    pub fn process(&self, logits: &mut [f32], ids: &[u32], prompt_len: usize) {
        self.penalize(logits, ids, prompt_len);
        if self.temperature == 0.0 {
            return;
        }
        if self.temperature != 1.0 {
            let largest =
                logits.iter().copied().filter(|x| x.is_finite()).fold(0.0, |largest: f32, x| largest.max(x.abs()));
            // Subtracting a constant from all logits does not change the probabilities. The maximum is subtracted if
            // the quotients would overflow.
            let shift = if (largest / self.temperature).is_finite() { 0.0 } else { max(logits) };
            for x in logits.iter_mut() {
                // The difference of equal infinities is NaN.
                *x = if *x == shift { 0.0 } else { (*x - shift) / self.temperature };
            }
        }
        if self.top_k > 0 && self.top_k < logits.len() {
            top_k(logits, self.top_k);
        }
        if self.top_p < 1.0 {
            top_p(logits, self.top_p);
        }
        if self.min_p > 0.0 {
            min_p(logits, self.min_p);
        }
        if self.typical_p < 1.0 {
            typical_p(logits, self.typical_p);
        }
    }

    fn penalize(&self, logits: &mut [f32], ids: &[u32], prompt_len: usize) {
        if self.repetition_penalty != 1.0 {
            let mut seen = ids.to_vec();
            seen.sort_unstable();
            seen.dedup();
            for id in seen {
                if let Some(x) = logits.get_mut(id as usize) {
                    *x = if *x < 0.0 { *x * self.repetition_penalty } else { *x / self.repetition_penalty };
                }
            }
        }
        if self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 {
            let mut written = ids[prompt_len.min(ids.len())..].to_vec();
            written.sort_unstable();
            for run in written.chunk_by(|a, b| a == b) {
                if let Some(x) = logits.get_mut(run[0] as usize) {
                    *x -= self.presence_penalty + self.frequency_penalty * run.len() as f32;
                }
            }
        }
        let n = self.no_repeat_ngram_size;
        if n > 0 && ids.len() + 1 >= n {
            let tail = &ids[ids.len() + 1 - n..];
            for run in ids.windows(n).filter(|run| &run[..n - 1] == tail) {
                if let Some(x) = logits.get_mut(run[n - 1] as usize) {
                    *x = f32::NEG_INFINITY;
                }
            }
        }
    }
}

fn max(scores: &[f32]) -> f32 {
    scores.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Returns the softmax in f64, because an f32 sum over a large vocabulary loses digits. Scores that a penalty made
/// infinite share the probability.
fn softmax(scores: &[f32]) -> Vec<f64> {
    let max = max(scores);
    let weight = |&x: &f32| if x == max { 1.0 } else { f64::from(x - max).exp() };
    let weights: Vec<f64> = scores.iter().map(weight).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

fn drop_where(scores: &mut [f32], dropped: impl Fn(usize, f32) -> bool) {
    for (i, x) in scores.iter_mut().enumerate() {
        if dropped(i, *x) {
            *x = f32::NEG_INFINITY;
        }
    }
}

fn top_k(scores: &mut [f32], k: usize) {
    let mut sorted = scores.to_vec();
    let (_, &mut kth, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    drop_where(scores, |_, x| x < kth);
}

/// Returns how many elements of `order`, sorted by `by`, can be taken from the front while the sum of their `mass`
/// satisfies `fits`. Moves them to the front, and the next element behind them. Uses selection instead of sorting,
/// which takes linear time.
fn fitting(
    order: &mut [usize],
    by: impl Fn(&usize, &usize) -> Ordering,
    mass: &[f64],
    fits: impl Fn(f64) -> bool,
) -> usize {
    let (mut sum, mut from, mut to) = (0.0, 0, order.len());
    while from < to {
        let middle = from + (to - from) / 2;
        order[from..to].select_nth_unstable_by(middle - from, &by);
        let more = sum + order[from..=middle].iter().map(|&i| mass[i]).sum::<f64>();
        if fits(more) {
            (sum, from) = (more, middle + 1);
        } else {
            to = middle;
        }
    }
    from
}

/// Drops the least likely tokens while their probabilities add up to at most `1 - p`. Keeps at least the most likely
/// token.
fn top_p(scores: &mut [f32], p: f32) {
    let probabilities = softmax(scores);
    let mut order: Vec<usize> = (0..scores.len()).filter(|&i| scores[i] > f32::NEG_INFINITY).collect();
    // Of tied tokens, the one with the smaller id counts as more likely, as in greedy decoding.
    let by = |&a: &usize, &b: &usize| scores[a].total_cmp(&scores[b]).then(b.cmp(&a));
    let dropped = fitting(&mut order, by, &probabilities, |sum| sum <= 1.0 - f64::from(p));
    for &i in &order[..dropped.min(order.len().saturating_sub(1))] {
        scores[i] = f32::NEG_INFINITY;
    }
}

fn min_p(scores: &mut [f32], p: f32) {
    let probabilities = softmax(scores);
    let least = probabilities.iter().copied().fold(0.0, f64::max) * f64::from(p);
    drop_where(scores, |i, _| probabilities[i] < least);
}

fn typical_p(scores: &mut [f32], p: f32) {
    let probabilities = softmax(scores);
    let entropy: f64 = probabilities.iter().filter(|&&q| q > 0.0).map(|q| -q * q.ln()).sum();
    let surprise: Vec<f64> = probabilities.iter().map(|q| (-q.ln() - entropy).abs()).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let by = |&a: &usize, &b: &usize| surprise[a].total_cmp(&surprise[b]);
    let before = fitting(&mut order, by, &probabilities, |sum| sum < f64::from(p));
    // The token at which the sum reaches `p` is kept too.
    let limit = surprise[order[before.min(order.len() - 1)]];
    drop_where(scores, |i, _| surprise[i] > limit);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn selecting_finds_what_sorting_finds(weights in prop::collection::vec(0u32..50, 1..90), share in 0f64..=1.0) {
            // Sums of whole numbers do not depend on the order.
            let mass: Vec<f64> = weights.iter().map(|&w| f64::from(w)).collect();
            let limit = share * mass.iter().sum::<f64>();
            let by = |&a: &usize, &b: &usize| weights[a].cmp(&weights[b]).then(b.cmp(&a));
            let (mut sorted, mut order): (Vec<usize>, Vec<usize>) = ((0..mass.len()).collect(), (0..mass.len()).collect());
            sorted.sort_by(by);
            let mut sum = 0.0;
            let taken = sorted.iter().take_while(|&&i| { sum += mass[i]; sum <= limit }).count();
            prop_assert_eq!(fitting(&mut order, by, &mass, |sum| sum <= limit), taken);
            prop_assert_eq!(order.get(taken), sorted.get(taken));
            order.truncate(taken);
            order.sort_by(by);
            prop_assert_eq!(&order[..], &sorted[..taken]);
        }
    }
}
