use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, bail};

use crate::pool::parallel_chunks;
use crate::shared::f32_slice;

/// Layer norm over the last dimension of `x`, with weight and bias: f32, its statistics in f64.
///
/// The variance is taken of centred values in a second pass: the mean of squares less the square of the mean loses all
/// digits where the mean is large, and a residual stream has such rows. It has no backward pass: training takes the
/// plain twin.
#[derive(Clone, Copy, Debug)]
pub struct LayerNormOp {
    /// Added to the variance.
    pub eps: f32,
}

/// A sum in f64, in eight lanes: one chain of f32 additions loses the digits that the mean of a flat row needs.
fn sum(row: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let mut lanes = [0f64; 8];
    let parts = row.chunks_exact(8);
    let tail: f64 = parts.remainder().iter().map(|&x| f(x.into())).sum();
    for part in parts {
        for (lane, &x) in lanes.iter_mut().zip(part) {
            *lane += f(x.into());
        }
    }
    lanes.iter().sum::<f64>() + tail
}

impl CustomOp3 for LayerNormOp {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice("layer norm", x, x_layout)?;
        let weight = f32_slice("layer norm weight", weight, weight_layout)?;
        let bias = f32_slice("layer norm bias", bias, bias_layout)?;
        let dims = x_layout.dims();
        let width = dims.last().copied().unwrap_or(0);
        if width == 0 || weight.len() != width || bias.len() != width {
            bail!("layer norm: x {dims:?} does not fit weight {} and bias {}", weight.len(), bias.len());
        }
        let mut out = vec![0f32; x.len()];
        parallel_chunks(&mut out, width, |row, out| {
            let x = &x[row * width..][..width];
            let mean = sum(x, |v| v) / width as f64;
            let variance = sum(x, |v| (v - mean) * (v - mean)) / width as f64;
            let (mean, scale) = (mean as f32, (1.0 / (variance + f64::from(self.eps)).sqrt()) as f32);
            for ((out, x), (weight, bias)) in out.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
                *out = (x - mean) * scale * weight + bias;
            }
        });
        Ok((CpuStorage::F32(out), dims.into()))
    }
}
