//! Sampling of tokens with [`SamplingParams`] and a seeded random number generator (ChaCha8).

use pricket_nn::SamplingParams;
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Sampler of the tokens of one row. The same seed gives the same random numbers in every release and on every
/// platform.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Creates a sampler for one row.
    pub fn new(params: SamplingParams, seed: u64) -> Self {
        Self { params, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Returns the random number, in [0, 1), that selects the next token. At temperature 0, returns 0 and leaves the
    /// generator unchanged.
    pub fn draw(&mut self) -> f64 {
        if self.params.temperature == 0.0 { 0.0 } else { self.rng.random::<f64>() }
    }

    /// Chooses a token and returns its id. Overwrites `logits` with the processed scores. The arguments are those of
    /// [`SamplingParams::process`].
    pub fn sample(&mut self, logits: &mut [f32], ids: &[u32], prompt_len: usize) -> u32 {
        let draw = self.draw();
        self.params.choose(logits, ids, prompt_len, draw)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns the share of 4000 draws that each of `n` tokens gets.
    fn histogram(n: usize, mut draw: impl FnMut() -> u32) -> Vec<f64> {
        let mut counts = vec![0.0; n];
        for _ in 0..4000 {
            counts[draw() as usize] += 1.0 / 4000.0;
        }
        counts
    }

    #[test]
    fn the_smallest_temperatures_and_penalties_draw_the_likeliest_token() {
        let logits = [1.0f32, -3.0, 3.5, 3.5 - 1e-6, -2.0];
        for temperature in [1e-45, 1e-40, 1e-38, 1e-20, 1e-9] {
            for (top_p, min_p, typical_p) in [(1.0, 0.0, 1.0), (0.9, 0.0, 1.0), (1.0, 0.1, 1.0), (1.0, 0.0, 0.9)] {
                let sampling = SamplingParams { temperature, top_p, min_p, typical_p, ..SamplingParams::default() };
                sampling.check().unwrap();
                for seed in 0..20 {
                    let id = Sampler::new(sampling.clone(), seed).sample(&mut logits.to_vec(), &[], 0);
                    assert_eq!(id, 2, "temperature {temperature}, seed {seed}");
                }
            }
        }
        // Tokens with equal logits keep equal probabilities.
        let tied = SamplingParams { temperature: 1e-40, ..SamplingParams::default() };
        let counts = histogram(3, {
            let mut sampler = Sampler::new(tied, 1);
            move || sampler.sample(&mut [2.0, 2.0, 1.0], &[], 0)
        });
        assert!((counts[0] - 0.5).abs() < 0.05 && counts[2] == 0.0, "{counts:?}");
        // A logit that overflows to infinity must win; it must not turn all probabilities into NaN.
        let penalty = SamplingParams { repetition_penalty: 1e-38, ..SamplingParams::unchanged() };
        assert_eq!(Sampler::new(penalty, 3).sample(&mut [1.0, 50.0, 2.0], &[1], 1), 1);
    }

    #[test]
    fn presence_and_frequency_count_the_continuation_only() {
        let sampling = SamplingParams { presence_penalty: 1.0, frequency_penalty: 0.5, ..SamplingParams::unchanged() };
        let mut logits = vec![0.0; 4];
        sampling.process(&mut logits, &[0, 1, 1, 2], 2);
        assert_eq!(logits, [0.0, -1.5, -1.5, 0.0]);
    }

    proptest! {
        #[test]
        fn something_is_always_left(
            logits in prop::collection::vec(-20f32..20.0, 1..80),
            k in 0usize..90, p in 0.01f32..=1.0, m in 0f32..=1.0, typical in 0.01f32..=1.0, seed: u64,
        ) {
            let sampling = SamplingParams { top_k: k, top_p: p, min_p: m, typical_p: typical, ..SamplingParams::unchanged() };
            sampling.check().unwrap();
            let mut scores = logits.clone();
            let id = Sampler::new(sampling, seed).sample(&mut scores, &[], 0) as usize;
            prop_assert!(scores[id] > f32::NEG_INFINITY);
            prop_assert!(scores.iter().zip(&logits).all(|(s, l)| *s == f32::NEG_INFINITY || s == l));
        }
    }
}
