use candle_core::{DType, Device, Tensor};

use crate::Result;

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of the first `dims` of each head's dimensions, in the
/// "rotate half" form of GPT-NeoX: dimension `i` is paired with `i + dims / 2`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// Rotated dimensions of a head, even; the rest pass through.
    pub dims: usize,
    /// Base of the geometric series of frequencies.
    pub base: f64,
    /// Positions are divided by this (linear scaling; 1 for none).
    pub factor: f64,
}

impl Rotary {
    /// Cosines and sines of `[rows, len, dims / 2]` for `positions` of `rows` rows of `len`.
    pub(crate) fn angles(
        &self,
        positions: &[usize],
        len: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let pairs = self.dims / 2;
        // In f32 step by step, as the reference computes them: at position 2000 the rounding shows.
        let frequency = |i: usize| (self.base.powf(-((2 * i) as f64) / self.dims as f64) as f32) / self.factor as f32;
        let frequencies: Vec<f32> = (0..pairs).map(frequency).collect();
        let angles: Vec<f32> = positions.iter().flat_map(|&p| frequencies.iter().map(move |f| p as f32 * f)).collect();
        let shape = (positions.len() / len.max(1), len, pairs);
        let table = |f: fn(f32) -> f32| -> Result<Tensor> {
            let values: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
            Ok(Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?)
        };
        Ok((table(f32::cos)?, table(f32::sin)?))
    }
}
