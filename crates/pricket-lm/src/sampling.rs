use std::cmp::Ordering;

use candle_transformers::generation::Sampling as CandleSampling;
use pricket_nn::ops;
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen from logits, in transformers' terms and order: penalties, temperature, top-k, top-p,
/// min-p, typical-p.
///
/// ```
/// use pricket_lm::Sampling;
/// let sampling = Sampling { temperature: 0.8, top_k: 40, ..Sampling::default() };
/// let mut scores = vec![1.0, 3.0, 2.0];
/// Sampling { temperature: 1.0, top_k: 1, ..Sampling::default() }.process(&mut scores, &[], 0);
/// assert_eq!(scores, [f32::NEG_INFINITY, 3.0, f32::NEG_INFINITY]);
/// # drop(sampling);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0, the default, always takes the most likely token.
    pub temperature: f32,
    /// Keeps the k most likely tokens, ties included; 0, the default, keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens that together have this probability; 1, the default, keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the most likely one's probability; 0, the default, keeps all.
    pub min_p: f32,
    /// Keeps the most typical tokens (Meister et al. 2022, arXiv:2202.00666) that together have this probability; 1, the
    /// default, keeps all.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occur in prompt or continuation (Keskar et al.
    /// 2019, arXiv:1909.05858); 1, the default, for none.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token that occurs in the continuation; 0, the default, for none.
    pub presence_penalty: f32,
    /// Subtracted for each time that a token occurs in the continuation; 0, the default, for none.
    pub frequency_penalty: f32,
    /// No run of this many tokens occurs twice; 0, the default, for no such rule.
    pub no_repeat_ngram_size: usize,
}

impl Default for Sampling {
    /// Greedy decoding.
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

impl From<CandleSampling> for Sampling {
    fn from(sampling: CandleSampling) -> Self {
        let at = |temperature: f64| Self { temperature: temperature as f32, ..Self::default() };
        match sampling {
            CandleSampling::ArgMax => Self::greedy(),
            // Adding Gumbel noise and taking the maximum is another way to draw from the same distribution.
            CandleSampling::All { temperature } | CandleSampling::GumbelSoftmax { temperature } => at(temperature),
            CandleSampling::TopK { k, temperature } => Self { top_k: k, ..at(temperature) },
            CandleSampling::TopP { p, temperature } => Self { top_p: p as f32, ..at(temperature) },
            CandleSampling::TopKThenTopP { k, p, temperature } => Self { top_k: k, top_p: p as f32, ..at(temperature) },
        }
    }
}

impl Sampling {
    /// Always the most likely token: the default.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// The model's own distribution, unchanged: a temperature of 1.
    pub fn unchanged() -> Self {
        Self { temperature: 1.0, ..Self::default() }
    }

    /// Says what is wrong with a setting, if anything is.
    ///
    /// # Errors
    /// [`crate::Error::Input`], naming the setting.
    pub fn check(&self) -> crate::Result<()> {
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
            return Err(crate::Error::Input(format!("{name} must be {rule}, found {value}")));
        }
        let chooses = [
            ("top_k", self.top_k > 0),
            ("top_p", self.top_p < 1.0),
            ("min_p", self.min_p > 0.0),
            ("typical_p", self.typical_p < 1.0),
        ];
        match chooses.iter().find(|(_, is_set)| *is_set && self.temperature == 0.0) {
            Some((name, _)) => Err(crate::Error::Input(format!(
                "{name} has no effect at temperature 0, which always takes the most likely token; set a temperature"
            ))),
            None => Ok(()),
        }
    }

    /// Whether it takes the most likely token, whatever came before.
    pub fn is_argmax(&self) -> bool {
        let unpenalized =
            self.repetition_penalty == 1.0 && self.presence_penalty == 0.0 && self.frequency_penalty == 0.0;
        self.temperature == 0.0 && unpenalized && self.no_repeat_ngram_size == 0
    }

    /// Logits to scores: what is dropped becomes negative infinity. `ids` is prompt and continuation, which begins at
    /// `prompt_len`.
    pub fn process(&self, logits: &mut [f32], ids: &[u32], prompt_len: usize) {
        self.penalize(logits, ids, prompt_len);
        if self.temperature == 0.0 {
            return;
        }
        if self.temperature != 1.0 {
            let largest =
                logits.iter().copied().filter(|x| x.is_finite()).fold(0.0, |largest: f32, x| largest.max(x.abs()));
            // Probabilities do not change with what all logits have in common. Where the quotients would be infinite, the
            // largest logit becomes 0.
            let shift = if (largest / self.temperature).is_finite() { 0.0 } else { max(logits) };
            for x in logits.iter_mut() {
                // Equal infinities have no difference.
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

/// Softmax in f64; the sum over a large vocabulary would lose digits otherwise. Scores that a penalty made infinite share the
/// probability.
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

/// How many elements of `order`, taken in the order of `by`, have a mass whose sum `fits`; they come to its front, and what
/// is next comes behind them. Selects rather than sorts: of a vocabulary hardly more than the border is ever compared twice.
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

/// From the least likely up, drops while the sum stays within `1 - p`; the most likely stays.
fn top_p(scores: &mut [f32], p: f32) {
    let probabilities = softmax(scores);
    let mut order: Vec<usize> = (0..scores.len()).filter(|&i| scores[i] > f32::NEG_INFINITY).collect();
    // Of tied tokens the one with the smaller id counts as the more likely, as for greedy decoding.
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
    // The one that reaches `p` stays too.
    let limit = surprise[order[before.min(order.len() - 1)]];
    drop_where(scores, |i, _| surprise[i] > limit);
}

/// Draws tokens; the same seed gives the same tokens in every release and on every platform.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler for one row.
    pub fn new(sampling: Sampling, seed: u64) -> Self {
        Self { sampling, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Chooses a token; `logits` become scores on the way. Arguments as [`Sampling::process`].
    pub fn sample(&mut self, logits: &mut [f32], ids: &[u32], prompt_len: usize) -> u32 {
        self.sampling.process(logits, ids, prompt_len);
        if self.sampling.temperature == 0.0 {
            return ops::argmax(logits) as u32;
        }
        let probabilities = softmax(logits);
        let mut left = self.rng.random::<f64>();
        for (i, &p) in probabilities.iter().enumerate() {
            left -= p;
            if left < 0.0 {
                return i as u32;
            }
        }
        // Rounding left a sliver at the end.
        ops::argmax(logits) as u32
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use candle_transformers::generation::LogitsProcessor;
    use proptest::prelude::*;

    use super::*;

    /// How often each token is drawn.
    fn histogram(n: usize, mut draw: impl FnMut() -> u32) -> Vec<f64> {
        let mut counts = vec![0.0; n];
        for _ in 0..4000 {
            counts[draw() as usize] += 1.0 / 4000.0;
        }
        counts
    }

    #[test]
    fn draws_as_candles_sampler_does() {
        let logits = [1.0f32, -2.0, 0.5, 3.0, 2.0, -1.0];
        let tensor = Tensor::new(&logits, &Device::Cpu).unwrap();
        for sampling in [
            CandleSampling::All { temperature: 0.9 },
            CandleSampling::TopK { k: 3, temperature: 1.2 },
            CandleSampling::TopP { p: 0.8, temperature: 1.0 },
            CandleSampling::TopKThenTopP { k: 4, p: 0.9, temperature: 0.7 },
        ] {
            let mut theirs = LogitsProcessor::from_sampling(7, sampling.clone());
            let mut ours = Sampler::new(sampling.clone().into(), 7);
            let a = histogram(6, || theirs.sample(&tensor).unwrap());
            let b = histogram(6, || ours.sample(&mut logits.to_vec(), &[], 0));
            for (a, b) in a.iter().zip(&b) {
                assert!((a - b).abs() < 0.035, "{sampling:?}: {a} and {b}");
            }
        }
    }

    #[test]
    fn the_smallest_temperatures_and_penalties_draw_the_likeliest_token() {
        let logits = [1.0f32, -3.0, 3.5, 3.5 - 1e-6, -2.0];
        for temperature in [1e-45, 1e-40, 1e-38, 1e-20, 1e-9] {
            for (top_p, min_p, typical_p) in [(1.0, 0.0, 1.0), (0.9, 0.0, 1.0), (1.0, 0.1, 1.0), (1.0, 0.0, 0.9)] {
                let sampling = Sampling { temperature, top_p, min_p, typical_p, ..Sampling::default() };
                sampling.check().unwrap();
                for seed in 0..20 {
                    let id = Sampler::new(sampling.clone(), seed).sample(&mut logits.to_vec(), &[], 0);
                    assert_eq!(id, 2, "temperature {temperature}, seed {seed}");
                }
            }
        }
        // Tokens that are equal stay equal.
        let tied = Sampling { temperature: 1e-40, ..Sampling::default() };
        let counts = histogram(3, {
            let mut sampler = Sampler::new(tied, 1);
            move || sampler.sample(&mut [2.0, 2.0, 1.0], &[], 0)
        });
        assert!((counts[0] - 0.5).abs() < 0.05 && counts[2] == 0.0, "{counts:?}");
        // A penalty that overflows makes a token certain, not all of them undefined.
        let penalty = Sampling { repetition_penalty: 1e-38, ..Sampling::unchanged() };
        assert_eq!(Sampler::new(penalty, 3).sample(&mut [1.0, 50.0, 2.0], &[1], 1), 1);
    }

    #[test]
    fn presence_and_frequency_count_the_continuation_only() {
        let sampling = Sampling { presence_penalty: 1.0, frequency_penalty: 0.5, ..Sampling::unchanged() };
        let mut logits = vec![0.0; 4];
        sampling.process(&mut logits, &[0, 1, 1, 2], 2);
        assert_eq!(logits, [0.0, -1.5, -1.5, 0.0]);
    }

    proptest! {
        #[test]
        fn selecting_finds_what_sorting_finds(weights in prop::collection::vec(0u32..50, 1..90), share in 0f64..=1.0) {
            // Whole numbers have one sum, whatever the order.
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

        #[test]
        fn something_is_always_left(
            logits in prop::collection::vec(-20f32..20.0, 1..80),
            k in 0usize..90, p in 0.01f32..=1.0, m in 0f32..=1.0, typical in 0.01f32..=1.0, seed: u64,
        ) {
            let sampling = Sampling { top_k: k, top_p: p, min_p: m, typical_p: typical, ..Sampling::unchanged() };
            sampling.check().unwrap();
            let mut scores = logits.clone();
            let id = Sampler::new(sampling, seed).sample(&mut scores, &[], 0) as usize;
            prop_assert!(scores[id] > f32::NEG_INFINITY);
            prop_assert!(scores.iter().zip(&logits).all(|(s, l)| *s == f32::NEG_INFINITY || s == l));
        }
    }
}
