//! Rotary position embedding.
//!
//! At position `p`, pair `i` of the rotated dimensions of a head turns by the angle `p · base^(-2i / dims) / factor`:
//! `(a, b)` becomes `(a cos - b sin, b cos + a sin)`.

use candle_core::{DType, Device, Tensor};

use crate::Result;

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of the first `dims` dimensions of each head. It uses
/// the "rotate half" form of GPT-NeoX: dimension `i` is paired with dimension `i + dims / 2`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// Number of rotated dimensions of a head; even. The other dimensions stay unchanged.
    pub dims: usize,
    /// Base of the rotary frequencies.
    pub base: f64,
    /// Divisor of the positions (linear scaling); 1 for no scaling.
    pub factor: f64,
}

impl Rotary {
    /// Returns the cosines and the sines of the angles at `positions`, `[rows, len, dims / 2]` each. `positions` holds
    /// `len` positions for each row, row after row.
    pub(crate) fn angles(
        &self,
        positions: &[usize],
        len: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let pairs = self.dims / 2;
        // Every step is rounded to f32, as in the reference code: at position 2000 the rounding changes the result.
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
