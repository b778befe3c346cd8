//! ALiBi: attention with linear biases.
//!
//! The score of a query at position `i` and a key at position `j` gets the bias `-slope · (i - j)`, with one slope for
//! each head.

/// Attention with linear biases (Press et al. 2022, arXiv:2108.12409): the score of a key `n` positions back is lowered
/// by `n` times the slope of its head. Only the slopes are stored, so there is no maximum length.
#[derive(Clone, Debug, PartialEq)]
pub struct Alibi {
    pub(crate) slopes: Vec<f32>,
}

impl Alibi {
    /// Returns ALiBi with the slopes of the paper's code and of llm-foundry (`gen_slopes`).
    ///
    /// The slopes are `2^(-i · bias_max / n)` for `i` from 1 to `n`, where `n` is `heads` rounded up to a power of two.
    /// If `heads` is not a power of two, the slopes with even `i` come first, then those with odd `i`, and the first
    /// `heads` of them are used.
    pub fn new(heads: usize, bias_max: f64) -> Self {
        let n = heads.next_power_of_two();
        let all = Self::geometric(n, bias_max).slopes;
        if n == heads {
            return Self { slopes: all };
        }
        let (odd, even) = (all.iter().skip(1).step_by(2), all.iter().step_by(2));
        Self { slopes: odd.chain(even).copied().take(heads).collect() }
    }

    /// Returns ALiBi with the slopes of MosaicGPT: `2^(-i · bias_max / heads)` for `i` from 1 to `heads`, for any
    /// number of heads.
    pub fn geometric(heads: usize, bias_max: f64) -> Self {
        let slope = |i: usize| (-(i as f64) * bias_max / heads as f64).exp2() as f32;
        Self { slopes: (1..=heads).map(slope).collect() }
    }

    /// Returns the slopes, one for each head.
    pub fn slopes(&self) -> &[f32] {
        &self.slopes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula of the paper's appendix, written differently: the slopes of the next lower power of two, then every
    /// other slope of the next higher one.
    fn published(heads: usize, bias_max: f64) -> Vec<f32> {
        let lower = 1 << heads.ilog2();
        let slope = |i: usize, n: usize| (2f64.powf(-bias_max / n as f64)).powi(i as i32) as f32;
        let mut out: Vec<f32> = (1..=lower).map(|i| slope(i, lower)).collect();
        out.extend((1..=2 * lower).step_by(2).map(|i| slope(i, 2 * lower)).take(heads - lower));
        out
    }

    #[test]
    fn slopes_are_those_of_the_paper() {
        for heads in [4, 6, 8, 12, 16, 20, 32, 64] {
            for bias_max in [8.0, 16.0] {
                let (found, expected) = (Alibi::new(heads, bias_max).slopes, published(heads, bias_max));
                assert_eq!(found.len(), heads);
                for (a, b) in found.iter().zip(&expected) {
                    assert!((a - b).abs() <= 1e-6 * b, "{heads} heads, {bias_max}: {found:?} {expected:?}");
                }
            }
        }
        let storywriter = Alibi::new(32, 16.0).slopes;
        assert!((storywriter[0] - 0.5f32.sqrt()).abs() < 1e-6 && (storywriter[31] - 1.525_879e-5).abs() < 1e-10);
        assert_eq!(Alibi::new(12, 8.0).slopes[..2], [0.5, 0.25]);
        assert_eq!(Alibi::geometric(16, 8.0), Alibi::new(16, 8.0));
    }
}
