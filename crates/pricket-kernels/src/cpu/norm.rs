//! Layer norm, `(x - mean(x)) / sqrt(var(x) + eps) · weight + bias`, and root-mean-square norm,
//! `x / sqrt(mean(x²) + eps) · weight`, with their gradients.

#![allow(clippy::inline_always, reason = "it must be compiled with the instruction set of its caller")]

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor, bail};

#[cfg(target_arch = "x86_64")]
use crate::cpu::detect::isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::isa::InstructionSet;
use crate::cpu::pool::{parallel_chunks, zeros};
use crate::cpu::shared::f32_slice;

/// Layer norm (Ba et al. 2016, arXiv:1607.06450) over the last dimension of `x`, with a weight and a bias, in f32. Its
/// statistics are in f64.
///
/// The variance is computed from centered values in a second pass. The mean of squares less the square of the mean
/// loses all digits if the mean is large, and residual streams have such rows.
#[derive(Clone, Copy, Debug)]
pub struct LayerNormOp {
    /// Number added to the variance.
    pub eps: f32,
}

/// Normalizes a row. Sums are in f64 in sixteen lanes: a single chain of f32 additions loses the digits that the mean
/// of a nearly constant row needs.
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
            let centered = f64::from(part[i]) - mean;
            lanes[i] += centered * centered;
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

/// Normalizes a row by its root mean square; the sum of squares is in f64.
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
        if isa() >= InstructionSet::Avx512 {
            // SAFETY: an `Isa` proves that the processor has its instructions, which include the ones enabled here.
            return unsafe { avx512(x, weight, eps, out) };
        }
        if isa() >= InstructionSet::Avx2 {
            // SAFETY: an `Isa` proves that the processor has its instructions, which include the ones enabled here.
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
        if isa() >= InstructionSet::Avx512 {
            // SAFETY: an `Isa` proves that the processor has its instructions, which include the ones enabled here.
            return unsafe { avx512(x, weight, bias, eps, out) };
        }
        if isa() >= InstructionSet::Avx2 {
            // SAFETY: an `Isa` proves that the processor has its instructions, which include the ones enabled here.
            return unsafe { avx2(x, weight, bias, eps, out) };
        }
    }
    row(x, weight, bias, eps, out);
}

/// Rows of a task: enough to make the cost of handing it out negligible.
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
            bail!("layer norm: x {dims:?} does not fit a weight of {} and a bias of {}", weight.len(), bias.len());
        }
        let mut out = zeros(x.len());
        parallel_chunks(&mut out, TASK * width, |i, out| {
            for (out, x) in out.chunks_exact_mut(width).zip(x[i * TASK * width..].chunks_exact(width)) {
                dispatch(x, weight, bias, self.eps, out);
            }
        });
        Ok((CpuStorage::F32(out), dims.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x, grad) = (x.detach().contiguous()?, grad.detach().contiguous()?);
        let of_x = x.apply_op3_no_bwd(&weight.detach(), &grad, &NormBackwardOp { eps: self.eps, is_centered: true })?;
        let normed = || {
            let (ones, zeros) = (weight.detach().ones_like()?, bias.detach().zeros_like()?);
            x.apply_op3_no_bwd(&ones, &zeros, self)
        };
        let of_weight = weight.track_op().then(|| rows_sum(&(normed()? * &grad)?)).transpose()?;
        let of_bias = bias.track_op().then(|| rows_sum(&grad)).transpose()?;
        Ok((Some(of_x), of_weight, of_bias))
    }
}

/// Returns the sum over all dimensions but the last.
fn rows_sum(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    x.reshape((x.elem_count() / width.max(1), width))?.sum(0)
}

/// The gradient of a norm's input, given the input, the weight and the gradient of the output.
#[derive(Clone, Copy, Debug)]
struct NormBackwardOp {
    eps: f32,
    /// True for layer norm, false for root-mean-square norm.
    is_centered: bool,
}

/// Computes the gradient of a row: `(g - mean(g) - n mean(g n)) / deviation`, where `n` is the normalized row and `g`
/// the gradient times the weight. Root-mean-square norm leaves out `mean(g)`, because it does not center.
fn back_row(x: &[f32], weight: &[f32], grad: &[f32], op: NormBackwardOp, out: &mut [f32]) {
    let n = x.len() as f64;
    let mean = if op.is_centered { x.iter().map(|&x| f64::from(x)).sum::<f64>() / n } else { 0.0 };
    let square = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    let scale = 1.0 / (square + f64::from(op.eps)).sqrt();
    let (mut sum, mut along) = (0f64, 0f64);
    for ((&x, &w), &g) in x.iter().zip(weight).zip(grad) {
        let g = f64::from(g) * f64::from(w);
        sum += g;
        along += g * (f64::from(x) - mean) * scale;
    }
    let (sum, along) = (if op.is_centered { sum / n } else { 0.0 }, along / n);
    for (((&x, &w), &g), out) in x.iter().zip(weight).zip(grad).zip(out) {
        let normed = (f64::from(x) - mean) * scale;
        *out = ((f64::from(g) * f64::from(w) - sum - normed * along) * scale) as f32;
    }
}

impl CustomOp3 for NormBackwardOp {
    fn name(&self) -> &'static str {
        "norm-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice("norm", x, x_layout)?;
        let weight = f32_slice("norm weight", weight, weight_layout)?;
        let grad = f32_slice("norm gradient", grad, grad_layout)?;
        let width = weight.len();
        if width == 0 || x_layout.dims().last() != Some(&width) || grad.len() != x.len() {
            bail!(
                "norm: x {:?} does not fit a weight of {width} and a gradient of {:?}",
                x_layout.dims(),
                grad_layout.dims()
            );
        }
        let mut out = zeros(x.len());
        parallel_chunks(&mut out, TASK * width, |i, out| {
            let at = i * TASK * width;
            let rows = x[at..].chunks_exact(width).zip(grad[at..].chunks_exact(width));
            for (out, (x, grad)) in out.chunks_exact_mut(width).zip(rows) {
                back_row(x, weight, grad, *self, out);
            }
        });
        Ok((CpuStorage::F32(out), x_layout.dims().into()))
    }
}

/// Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467) over the last dimension of `x`, with a weight:
/// `x / sqrt(mean(x²) + eps) · weight`, in f32. The sum of squares is in f64.
#[derive(Clone, Copy, Debug)]
pub struct RmsNormOp {
    /// Number added to the mean of squares.
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
    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, grad) = (x.detach().contiguous()?, grad.detach().contiguous()?);
        let of_x =
            x.apply_op3_no_bwd(&weight.detach(), &grad, &NormBackwardOp { eps: self.eps, is_centered: false })?;
        let normed = || x.apply_op2_no_bwd(&weight.detach().ones_like()?, self);
        let of_weight = weight.track_op().then(|| rows_sum(&(normed()? * &grad)?)).transpose()?;
        Ok((Some(of_x), of_weight))
    }
}
