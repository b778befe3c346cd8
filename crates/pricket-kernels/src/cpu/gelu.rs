//! GELU, `x Φ(x)`, in its erf and tanh forms, with its derivative.

#![allow(clippy::undocumented_unsafe_blocks, reason = "arithmetic; its only condition is documented at the trait")]
#![allow(clippy::inline_always, reason = "it must be compiled with the instruction set of its caller")]
#![allow(clippy::excessive_precision, reason = "coefficients are written as they were fitted")]

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::cpu::detect::isa;
use crate::cpu::isa::{Isa, by_isa};
use crate::cpu::lanes::{Floats, LANES};
use crate::cpu::pool::{parallel_chunks, zeros};
use crate::cpu::shared::f32_slice;

/// Elements of a task: enough to make the cost of handing it out negligible.
const TASK: usize = 16 << 10;

/// The form of the GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), `x Φ(x)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// The exact form, with the error function.
    Erf,
    /// The tanh approximation, `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    Tanh,
}

/// A [`Gelu`], elementwise in f32, with a gradient.
///
/// Both forms use rational minimax approximations. They are within 1e-6 of the exact value over ±12, where a unit in
/// the last place of f32 is 9.5e-7. Without fused multiply-add instructions the bound is 1.2e-6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeluOp {
    /// The form of the function.
    pub form: Gelu,
    /// Whether to round the argument and the value to f16, as ggml's table does.
    pub as_ggml: bool,
}

/// Evaluates the polynomial `p(x²)` by Horner's rule, with the highest coefficient first.
#[inline(always)]
unsafe fn polynomial<L: Floats, const N: usize>(x2: L::Float, coefficients: [f32; N]) -> L::Float {
    // SAFETY: this is arithmetic, here and below; the caller has the instructions.
    unsafe {
        let mut sum = L::splat(coefficients[0]);
        for &c in &coefficients[1..] {
            sum = L::madd(sum, x2, L::splat(c));
        }
        sum
    }
}

/// Clamps `x` to ±`limit`. NaN stays NaN.
#[inline(always)]
unsafe fn clamp<L: Floats>(x: L::Float, limit: f32) -> L::Float {
    unsafe { L::min(L::splat(limit), L::max(L::splat(-limit), x)) }
}

/// Approximates the error function within 3e-7. The error is smaller for larger `x`, because GELU multiplies it by `x`.
/// The quotient of an odd polynomial of degree 13 and an even one of degree 8, saturated at ±4.
#[inline(always)]
unsafe fn erf<L: Floats>(x: L::Float) -> L::Float {
    unsafe {
        let x = clamp::<L>(x, 4.0);
        let x2 = L::mul(x, x);
        let odd =
            [1.949_150_4e-8, -2.121_429_4e-6, 1.782_147_3e-4, 5.125_005e-3, 5.492_831_8e-2, 2.327_295e-1, 1.128_377_4];
        let even = [1.309_642_9e-3, 1.718_042e-2, 1.285_862_5e-1, 5.395_68e-1, 1.0];
        L::div(L::mul(x, polynomial::<L, 7>(x2, odd)), polynomial::<L, 5>(x2, even))
    }
}

/// Approximates the hyperbolic tangent within 5e-7: the quotient of an odd polynomial of degree 13 and an even one of
/// degree 6, saturated where the value in f32 is 1.
#[inline(always)]
unsafe fn tanh<L: Floats>(x: L::Float) -> L::Float {
    unsafe {
        let x = clamp::<L>(x, 7.905_311);
        let x2 = L::mul(x, x);
        let odd = [
            -2.760_768_5e-16,
            2.000_187_9e-13,
            -8.604_672e-11,
            5.122_297e-8,
            1.485_722_4e-5,
            6.372_619e-4,
            4.893_524_6e-3,
        ];
        let even = [1.198_258_4e-6, 1.185_347e-4, 2.268_434_6e-3, 4.893_525e-3];
        L::div(L::mul(x, polynomial::<L, 7>(x2, odd)), polynomial::<L, 4>(x2, even))
    }
}

#[inline(always)]
unsafe fn gelu<L: Floats>(op: GeluOp, x: L::Float) -> L::Float {
    unsafe {
        let x = if op.as_ggml { L::through_half(x) } else { x };
        let curve = match op.form {
            Gelu::Erf => erf::<L>(L::mul(x, L::splat(std::f32::consts::FRAC_1_SQRT_2))),
            Gelu::Tanh => {
                let cube = L::mul(L::mul(x, x), L::mul(x, L::splat(0.044_715)));
                tanh::<L>(L::mul(L::splat(0.797_884_56), L::add(cube, x)))
            }
        };
        let y = L::mul(L::mul(L::splat(0.5), x), L::add(L::splat(1.0), curve));
        if op.as_ggml { L::through_half(y) } else { y }
    }
}

/// Returns the derivative: `(1 + curve) / 2 + x curve' / 2`, with the curve as in [`gelu`].
#[inline(always)]
unsafe fn slope<L: Floats>(form: Gelu, x: L::Float) -> L::Float {
    unsafe {
        let one = L::splat(1.0);
        let (x, curve, steepness) = match form {
            Gelu::Erf => {
                // Limits the argument where the exponential is practically zero.
                let square = L::min(L::mul(x, x), L::splat(160.0));
                let density = L::mul(L::splat(0.797_884_56), L::exp(L::mul(square, L::splat(-0.5))));
                (x, erf::<L>(L::mul(x, L::splat(std::f32::consts::FRAC_1_SQRT_2))), density)
            }
            Gelu::Tanh => {
                // Beyond ±12 the slope is 0 or 1. The clamp keeps the product of a vanishing and a huge factor finite.
                let x = clamp::<L>(x, 12.0);
                let square = L::mul(x, x);
                let u = L::mul(L::splat(0.797_884_56), L::madd(L::mul(square, x), L::splat(0.044_715), x));
                let inner = L::madd(square, L::splat(0.797_884_56 * 3.0 * 0.044_715), L::splat(0.797_884_56));
                // 1 - tanh²(u), computed from exponentials: the difference would lose precision.
                let e = L::exp(L::mul(L::splat(-2.0), L::max(u, L::mul(u, L::splat(-1.0)))));
                let sum = L::add(one, e);
                (x, tanh::<L>(u), L::mul(L::div(L::mul(L::splat(4.0), e), L::mul(sum, sum)), inner))
            }
        };
        L::mul(L::splat(0.5), L::madd(x, steepness, L::add(one, curve)))
    }
}

/// Multiplies a gradient by the derivative at `x`, in place.
#[inline(always)]
unsafe fn back_in_place<L: Floats>(form: Gelu, x: &[f32], grad: &mut [f32]) {
    let (whole, rest) = x.as_chunks::<LANES>();
    // SAFETY: the loads and stores are whole vectors of the slices and of an array.
    unsafe {
        for (x, grad) in whole.iter().zip(grad.as_chunks_mut::<LANES>().0) {
            let slope = slope::<L>(form, L::floats(x.as_ptr()));
            L::store(grad.as_mut_ptr(), L::mul(slope, L::floats(grad.as_ptr())));
        }
        let mut edge = [0f32; LANES];
        edge[..rest.len()].copy_from_slice(rest);
        L::store(edge.as_mut_ptr(), slope::<L>(form, L::floats(edge.as_ptr())));
        for (grad, slope) in grad[x.len() - rest.len()..].iter_mut().zip(edge) {
            *grad *= slope;
        }
    }
}

by_isa! {
    fn dispatch_back(form: Gelu, x: &[f32], grad: &mut [f32]) = back_in_place
}

#[inline(always)]
unsafe fn in_place<L: Floats>(op: GeluOp, x: &mut [f32]) {
    let (whole, rest) = x.as_chunks_mut::<LANES>();
    // SAFETY: the loads and stores are whole vectors of the slice and of an array.
    unsafe {
        for x in whole {
            L::store(x.as_mut_ptr(), gelu::<L>(op, L::floats(x.as_ptr())));
        }
        if rest.is_empty() {
            return;
        }
        let mut edge = [0f32; LANES];
        edge[..rest.len()].copy_from_slice(rest);
        L::store(edge.as_mut_ptr(), gelu::<L>(op, L::floats(edge.as_ptr())));
        rest.copy_from_slice(&edge[..rest.len()]);
    }
}

by_isa! {
    fn dispatch(op: GeluOp, x: &mut [f32]) = in_place
}

impl GeluOp {
    /// Applies the function to every element, in place.
    pub(crate) fn apply(self, isa: Isa, x: &mut [f32]) {
        dispatch(isa, self, x);
    }

    /// Returns the function of every element, computed on the installed pool.
    pub(crate) fn of(self, x: &[f32]) -> Vec<f32> {
        let mut y = zeros(x.len());
        parallel_chunks(&mut y, TASK, |i, y| {
            y.copy_from_slice(&x[i * TASK..][..y.len()]);
            self.apply(isa(), y);
        });
        y
    }

    /// Multiplies a gradient by the derivative at `x`, on the installed pool. The derivative is that of the function
    /// without rounding.
    pub(crate) fn back(self, x: &[f32], grad: &mut [f32]) {
        assert_eq!(x.len(), grad.len(), "gradient and input differ in length");
        parallel_chunks(grad, TASK, |i, grad| {
            dispatch_back(isa(), self.form, &x[i * TASK..][..grad.len()], grad);
        });
    }
}

impl CustomOp1 for GeluOp {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.of(f32_slice("gelu", x, layout)?)), layout.dims().into()))
    }

    /// Computes the gradient of the function without rounding.
    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op = GeluBackwardOp(*self);
        Ok(Some(x.detach().contiguous()?.apply_op2_no_bwd(&grad.detach().contiguous()?, &op)?))
    }
}

/// The product of a gradient with the derivative of a [`Gelu`].
#[derive(Debug)]
struct GeluBackwardOp(GeluOp);

impl CustomOp2 for GeluBackwardOp {
    fn name(&self) -> &'static str {
        "gelu-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        grad: &CpuStorage,
        grad_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, grad) = (f32_slice("gelu", x, x_at)?, f32_slice("gelu gradient", grad, grad_at)?);
        if x.len() != grad.len() {
            bail!("gelu: a gradient of shape {:?} does not fit x of {:?}", grad_at.dims(), x_at.dims());
        }
        let mut out = grad.to_vec();
        self.0.back(x, &mut out);
        Ok((CpuStorage::F32(out), x_at.dims().into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::cpu::isa::InstructionSet;

    #[test]
    fn both_forms_are_close_to_f64_on_every_path() {
        let x: Vec<f32> = (-120_000i32..=120_000).map(|i| i as f32 * 1e-4).collect();
        let exact = Tensor::new(x.as_slice(), &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        for (form, exact) in [(Gelu::Erf, exact.gelu_erf()), (Gelu::Tanh, exact.gelu())] {
            let exact = exact.unwrap().to_vec1::<f64>().unwrap();
            for isa in Isa::available() {
                let mut y = x.clone();
                GeluOp { form, as_ggml: false }.apply(isa, &mut y);
                let worst = y.iter().zip(&exact).map(|(&y, e)| (f64::from(y) - e).abs()).fold(0.0, f64::max);
                let bound = if isa == InstructionSet::Scalar { 1.2e-6 } else { 1e-6 };
                assert!(worst < bound, "{form:?} {isa:?}: {worst}");
                GeluOp { form, as_ggml: true }.apply(isa, &mut y);
                assert!(y.iter().all(|&y| half::f16::from_f32(y).to_f32() == y), "{form:?} {isa:?}");
            }
        }
    }

    #[test]
    fn the_derivative_is_that_of_the_function() {
        let x: Vec<f64> = (-1200..=1200).map(|i| f64::from(i) * 1e-2).chain([-40.0, 40.0, 3.0]).collect();
        let at = |shift: f64| Tensor::new(x.iter().map(|x| x + shift).collect::<Vec<f64>>(), &Device::Cpu).unwrap();
        let narrow: Vec<f32> = x.iter().map(|&x| x as f32).collect();
        for form in [Gelu::Erf, Gelu::Tanh] {
            let of =
                |x: Tensor| if form == Gelu::Erf { x.gelu_erf() } else { x.gelu() }.unwrap().to_vec1::<f64>().unwrap();
            let exact: Vec<f64> = of(at(1e-5)).iter().zip(of(at(-1e-5))).map(|(a, b)| (a - b) / 2e-5).collect();
            for isa in Isa::available() {
                let mut grad = vec![2f32; x.len()];
                dispatch_back(isa, form, &narrow, &mut grad);
                let worst = grad.iter().zip(&exact).map(|(&y, e)| (f64::from(y) / 2.0 - e).abs()).fold(0.0, f64::max);
                assert!(worst < 2e-6, "{form:?} {isa:?}: {worst}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        for (form, isa) in Isa::available().flat_map(|isa| [(Gelu::Erf, isa), (Gelu::Tanh, isa)]) {
            let mut y = [f32::NAN, f32::INFINITY, 0.0];
            GeluOp { form, as_ggml: false }.apply(isa, &mut y);
            assert!(y[0].is_nan() && y[1] == f32::INFINITY && y[2] == 0.0, "{isa:?} {y:?}");
        }
    }
}
