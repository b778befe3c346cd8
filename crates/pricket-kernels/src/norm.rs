#![allow(clippy::inline_always, reason = "it must take the instruction set of the function it stands in")]

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, bail};

#[cfg(target_arch = "x86_64")]
use crate::cpu::Path;
use crate::detect::path;
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

/// A row: sums in f64, in sixteen lanes, because one chain of f32 additions loses the digits that the mean of a flat row
/// needs.
#[inline(always)]
fn row(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let (parts, rest) = x.as_chunks::<16>();
    let mut lanes = [0f64; 16];
    for part in parts {
        for i in 0..16 {
            lanes[i] += f64::from(part[i]);
        }
    }
    let mut sum: f64 = lanes.iter().sum();
    for x in rest {
        sum += f64::from(*x);
    }
    let mean = sum / x.len() as f64;
    lanes = [0f64; 16];
    for part in parts {
        for i in 0..16 {
            let centred = f64::from(part[i]) - mean;
            lanes[i] += centred * centred;
        }
    }
    let mut sum: f64 = lanes.iter().sum();
    for x in rest {
        sum += (f64::from(*x) - mean) * (f64::from(*x) - mean);
    }
    let (mean, scale) = (mean as f32, (1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt()) as f32);
    for ((out, x), (weight, bias)) in out.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
        *out = (x - mean) * scale * weight + bias;
    }
}

/// A row of a root-mean-square norm, its sum of squares likewise in f64.
#[inline(always)]
fn rms_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (parts, rest) = x.as_chunks::<16>();
    let mut lanes = [0f64; 16];
    for part in parts {
        for i in 0..16 {
            lanes[i] += f64::from(part[i]) * f64::from(part[i]);
        }
    }
    let sum: f64 = lanes.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    let scale = (1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt()) as f32;
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

fn dispatch_rms(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512vl,avx512dq")]
        fn avx512(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
            rms_row(x, weight, eps, out);
        }
        #[target_feature(enable = "avx2")]
        fn avx2(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
            rms_row(x, weight, eps, out);
        }
        if path() >= Path::Avx512 {
            // SAFETY: the processor has the instructions.
            return unsafe { avx512(x, weight, eps, out) };
        }
        if path() >= Path::Avx2 {
            // SAFETY: the processor has the instructions.
            return unsafe { avx2(x, weight, eps, out) };
        }
    }
    rms_row(x, weight, eps, out);
}

fn dispatch(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512vl,avx512dq")]
        fn avx512(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
            row(x, weight, bias, eps, out);
        }
        #[target_feature(enable = "avx2")]
        fn avx2(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
            row(x, weight, bias, eps, out);
        }
        if path() >= Path::Avx512 {
            // SAFETY: the processor has the instructions.
            return unsafe { avx512(x, weight, bias, eps, out) };
        }
        if path() >= Path::Avx2 {
            // SAFETY: the processor has the instructions.
            return unsafe { avx2(x, weight, bias, eps, out) };
        }
    }
    row(x, weight, bias, eps, out);
}

/// Rows that one task takes: enough that handing them out costs nothing.
const TASK: usize = 8;

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
        parallel_chunks(&mut out, TASK * width, |i, out| {
            for (out, x) in out.chunks_exact_mut(width).zip(x[i * TASK * width..].chunks_exact(width)) {
                dispatch(x, weight, bias, self.eps, out);
            }
        });
        Ok((CpuStorage::F32(out), dims.into()))
    }
}

/// Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467) over the last dimension of `x`, with a weight:
/// `x / sqrt(mean(x²) + eps) · weight`, f32, its sum in f64. It has no backward pass: training takes the plain twin.
#[derive(Clone, Copy, Debug)]
pub struct RmsNormOp {
    /// Added to the mean of squares.
    pub eps: f32,
}

impl CustomOp2 for RmsNormOp {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice("RMS norm", x, x_layout)?;
        let weight = f32_slice("RMS norm weight", weight, weight_layout)?;
        let dims = x_layout.dims();
        let width = dims.last().copied().unwrap_or(0);
        if width == 0 || weight.len() != width {
            bail!("RMS norm: x {dims:?} does not fit a weight of {}", weight.len());
        }
        let mut out = vec![0f32; x.len()];
        parallel_chunks(&mut out, TASK * width, |i, out| {
            for (out, x) in out.chunks_exact_mut(width).zip(x[i * TASK * width..].chunks_exact(width)) {
                dispatch_rms(x, weight, self.eps, out);
            }
        });
        Ok((CpuStorage::F32(out), dims.into()))
    }
}
