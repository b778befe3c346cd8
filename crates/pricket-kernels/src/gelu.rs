#![allow(clippy::inline_always, reason = "it must take the instruction set of the function it stands in")]
#![allow(clippy::excessive_precision, reason = "coefficients stand as they were fitted")]

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape};
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::cpu::{Path, path};
use crate::pool::parallel_chunks;
use crate::shared::f32_slice;

/// Elements of a task: enough that handing it out costs nothing.
const TASK: usize = 16 << 10;

/// The GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), `x Φ(x)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// By the error function.
    Erf,
    /// By its tanh approximation, `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    Tanh,
}

/// A [`Gelu`] elementwise in f32.
///
/// Both forms are rational minimax functions, which the compiler turns into vector code: within 1.5e-6 of the exact value
/// over ±12, as torch's f32 is. It has no backward pass: training takes candle's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeluOp {
    /// Which one.
    pub form: Gelu,
    /// Round the argument and the value to f16, as ggml's table does.
    pub as_ggml: bool,
}

/// `p(x²)` by Horner's rule, highest coefficient first.
#[inline(always)]
fn polynomial<const N: usize>(x2: f32, coefficients: [f32; N], madd: impl Fn(f32, f32, f32) -> f32 + Copy) -> f32 {
    let mut sum = coefficients[0];
    for &c in &coefficients[1..] {
        sum = madd(sum, x2, c);
    }
    sum
}

/// The error function within 5e-7: odd over even, of degrees 13 and 8, saturated at ±4.
#[inline(always)]
fn erf(x: f32, madd: impl Fn(f32, f32, f32) -> f32 + Copy) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let odd =
        [-2.726_142_3e-10, 2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906e-4, -2.954_6e-3, -1.609_603_3e-2];
    let even = [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2];
    x * polynomial(x * x, odd, madd) / polynomial(x * x, even, madd)
}

/// The hyperbolic tangent within 5e-7: odd over even, of degrees 13 and 6, saturated where f32 is 1.
#[inline(always)]
fn tanh(x: f32, madd: impl Fn(f32, f32, f32) -> f32 + Copy) -> f32 {
    let x = x.clamp(-7.905_311, 7.905_311);
    let odd =
        [-2.760_768_5e-16, 2.000_187_9e-13, -8.604_672e-11, 5.122_297e-8, 1.485_722_4e-5, 6.372_619e-4, 4.893_524_6e-3];
    let even = [1.198_258_4e-6, 1.185_347e-4, 2.268_434_6e-3, 4.893_525e-3];
    x * polynomial(x * x, odd, madd) / polynomial(x * x, even, madd)
}

#[inline(always)]
fn gelu(form: Gelu, x: &[f32], y: &mut [f32], madd: impl Fn(f32, f32, f32) -> f32 + Copy) {
    // The branch is outside of the loops, so that each is one kind of arithmetic.
    match form {
        Gelu::Erf => {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2, madd));
            }
        }
        Gelu::Tanh => {
            for (y, &x) in y.iter_mut().zip(x) {
                let inner = 0.797_884_56 * madd(0.044_715 * x * x, x, x);
                *y = 0.5 * x * (1.0 + tanh(inner, madd));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl")]
fn gelu_avx512(form: Gelu, x: &[f32], y: &mut [f32]) {
    gelu(form, x, y, f32::mul_add);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn gelu_fma(form: Gelu, x: &[f32], y: &mut [f32]) {
    gelu(form, x, y, f32::mul_add);
}

fn dispatch(form: Gelu, x: &[f32], y: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if path() >= Path::Avx512 {
            // SAFETY: the processor has the instructions.
            return unsafe { gelu_avx512(form, x, y) };
        }
        if path() >= Path::Avx2 {
            // SAFETY: the processor has the instructions.
            return unsafe { gelu_fma(form, x, y) };
        }
    }
    gelu(form, x, y, |x, y, sum| x * y + sum);
}

impl CustomOp1 for GeluOp {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice("gelu", x, layout)?;
        let mut y = vec![0f32; x.len()];
        parallel_chunks(&mut y, TASK, |i, y| {
            let x = &x[i * TASK..][..y.len()];
            if !self.as_ggml {
                return dispatch(self.form, x, y);
            }
            let mut halves = [f16::ZERO; 512];
            for (x, y) in x.chunks(512).zip(y.chunks_mut(512)) {
                let (halves, mut wide) = (&mut halves[..x.len()], [0f32; 512]);
                halves.convert_from_f32_slice(x);
                halves.convert_to_f32_slice(&mut wide[..x.len()]);
                dispatch(self.form, &wide[..x.len()], y);
                halves.convert_from_f32_slice(y);
                halves.convert_to_f32_slice(y);
            }
        });
        Ok((CpuStorage::F32(y), layout.dims().into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;

    #[test]
    fn both_forms_are_close_to_f64_in_every_instruction_set() {
        let x: Vec<f32> = (-120_000i32..=120_000).map(|i| i as f32 * 1e-4).collect();
        let exact = Tensor::new(x.as_slice(), &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        for (form, exact) in [(Gelu::Erf, exact.gelu_erf()), (Gelu::Tanh, exact.gelu())] {
            let exact = exact.unwrap().to_vec1::<f64>().unwrap();
            let mut y = vec![0f32; x.len()];
            let check = |y: &[f32], name: &str| {
                let worst = y.iter().zip(&exact).map(|(&y, e)| (f64::from(y) - e).abs()).fold(0.0, f64::max);
                assert!(worst < 1.5e-6, "{form:?} {name}: {worst}");
            };
            dispatch(form, &x, &mut y);
            check(&y, "chosen");
            gelu(form, &x, &mut y, |x, y, sum| x * y + sum);
            check(&y, "plain");
            #[cfg(target_arch = "x86_64")]
            if Path::best() >= Path::Avx2 {
                // SAFETY: the processor has the instructions.
                unsafe { gelu_fma(form, &x, &mut y) };
                check(&y, "fma");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        let mut y = [0f32; 3];
        for form in [Gelu::Erf, Gelu::Tanh] {
            dispatch(form, &[f32::NAN, f32::INFINITY, 0.0], &mut y);
            assert!(y[0].is_nan() && y[1] == f32::INFINITY && y[2] == 0.0, "{y:?}");
        }
    }
}
