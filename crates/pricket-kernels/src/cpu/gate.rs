//! Gated products, `f(gate) · x`, and RWKV's token shift, which mixes each position with the one before it.

#![allow(clippy::undocumented_unsafe_blocks, reason = "arithmetic; its only condition is documented at the trait")]
#![allow(clippy::inline_always, reason = "it must be compiled with the instruction set of its caller")]

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use crate::cpu::detect::isa;
use crate::cpu::isa::by_isa;
use crate::cpu::lanes::{Floats, LANES};
use crate::cpu::pool::{parallel, parallel_chunks, zeros};
use crate::cpu::shared::{Shared, f32_slice};

/// Elements of a task: enough to make the cost of handing it out negligible.
const TASK: usize = 16 << 10;

/// The activation function of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x sigmoid(x)` (Elfwing et al. 2017, arXiv:1702.03118).
    Silu,
    /// `sigmoid(x)`.
    Sigmoid,
}

/// `f(gate) · x`, elementwise in f32. The backward pass computes the gradients of both.
#[derive(Clone, Copy, Debug)]
pub struct GatedOp {
    /// The function `f` of the gate.
    pub gate: Gate,
}

/// Returns `1 / (1 + e⁻ˣ)`.
#[inline(always)]
unsafe fn sigmoid<L: Floats>(x: L::Float) -> L::Float {
    unsafe {
        // `min` returns its second operand if either is NaN, so this operand order propagates NaN.
        let negative = L::min(L::splat(88.0), L::mul(x, L::splat(-1.0)));
        L::div(L::splat(1.0), L::add(L::splat(1.0), L::exp(negative)))
    }
}

/// Returns `f(g)` and its derivative.
#[inline(always)]
unsafe fn gate<L: Floats>(kind: Gate, g: L::Float) -> (L::Float, L::Float) {
    unsafe {
        let (s, one) = (sigmoid::<L>(g), L::splat(1.0));
        // 1 - s, computed as sigmoid(-g): the difference would lose precision.
        let rest = sigmoid::<L>(L::mul(g, L::splat(-1.0)));
        match kind {
            Gate::Silu => (L::mul(g, s), L::mul(s, L::madd(g, rest, one))),
            Gate::Sigmoid => (s, L::mul(s, rest)),
        }
    }
}

/// Returns `f(g)`.
#[inline(always)]
unsafe fn value<L: Floats>(kind: Gate, g: L::Float) -> L::Float {
    unsafe {
        match kind {
            Gate::Silu => L::mul(g, sigmoid::<L>(g)),
            Gate::Sigmoid => sigmoid::<L>(g),
        }
    }
}

#[inline(always)]
unsafe fn forward<L: Floats>(kind: Gate, g: &[f32], x: &[f32], out: &mut [f32]) {
    unsafe {
        let (whole, rest) = g.as_chunks::<LANES>();
        for ((g, x), out) in whole.iter().zip(x.as_chunks::<LANES>().0).zip(out.as_chunks_mut::<LANES>().0) {
            L::store(out.as_mut_ptr(), L::mul(value::<L>(kind, L::floats(g.as_ptr())), L::floats(x.as_ptr())));
        }
        let (mut edge, at) = ([0f32; LANES], g.len() - rest.len());
        edge[..rest.len()].copy_from_slice(rest);
        L::store(edge.as_mut_ptr(), value::<L>(kind, L::floats(edge.as_ptr())));
        for ((out, x), f) in out[at..].iter_mut().zip(&x[at..]).zip(edge) {
            *out = f * x;
        }
    }
}

/// Writes the gradients of the gate and of `x`.
#[inline(always)]
unsafe fn backward<L: Floats>(
    kind: Gate,
    g: &[f32],
    x: &[f32],
    grad: &[f32],
    (gate_grad, x_grad): (&mut [f32], &mut [f32]),
) {
    // No closures: they would not be compiled with the instruction set of this function.
    for at in (0..g.len()).step_by(LANES) {
        let len = LANES.min(g.len() - at);
        let part = at..at + len;
        let (mut edges, mut first, mut second) = ([[0f32; LANES]; 3], [0f32; LANES], [0f32; LANES]);
        edges[0][..len].copy_from_slice(&g[part.clone()]);
        edges[1][..len].copy_from_slice(&x[part.clone()]);
        edges[2][..len].copy_from_slice(&grad[part.clone()]);
        unsafe {
            let (f, slope) = gate::<L>(kind, L::floats(edges[0].as_ptr()));
            let grad = L::floats(edges[2].as_ptr());
            L::store(first.as_mut_ptr(), L::mul(grad, L::mul(L::floats(edges[1].as_ptr()), slope)));
            L::store(second.as_mut_ptr(), L::mul(grad, f));
        }
        gate_grad[part.clone()].copy_from_slice(&first[..len]);
        x_grad[part].copy_from_slice(&second[..len]);
    }
}

by_isa! {
    fn dispatch(kind: Gate, g: &[f32], x: &[f32], out: &mut [f32]) = forward
}

by_isa! {
    fn dispatch_back(kind: Gate, g: &[f32], x: &[f32], grad: &[f32], out: (&mut [f32], &mut [f32])) = backward
}

impl CustomOp2 for GatedOp {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, g: &CpuStorage, g_at: &Layout, x: &CpuStorage, x_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let (g, x) = (f32_slice("gate", g, g_at)?, f32_slice("gated", x, x_at)?);
        if g_at.dims() != x_at.dims() {
            bail!("gated: a gate of shape {:?} does not fit x of {:?}", g_at.dims(), x_at.dims());
        }
        let mut out = zeros(x.len());
        parallel_chunks(&mut out, TASK, |i, out| {
            let at = i * TASK..i * TASK + out.len();
            dispatch(isa(), self.gate, &g[at.clone()], &x[at], out);
        });
        Ok((CpuStorage::F32(out), x_at.dims().into()))
    }

    fn bwd(&self, g: &Tensor, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [g, x, grad] = [g, x, grad].map(|x| x.detach().contiguous());
        let both = g?.apply_op3_no_bwd(&x?, &grad?, &GatedBackwardOp { gate: self.gate })?;
        Ok((Some(both.get(0)?), Some(both.get(1)?)))
    }
}

/// The gradients of [`GatedOp`], stacked: `[2, ..]`, of the gate and of `x`.
#[derive(Debug)]
struct GatedBackwardOp {
    gate: Gate,
}

impl CustomOp3 for GatedBackwardOp {
    fn name(&self) -> &'static str {
        "gated-backward"
    }

    fn cpu_fwd(
        &self,
        g: &CpuStorage,
        g_at: &Layout,
        x: &CpuStorage,
        x_at: &Layout,
        grad: &CpuStorage,
        grad_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (g, x) = (f32_slice("gate", g, g_at)?, f32_slice("gated", x, x_at)?);
        let grad = f32_slice("gated gradient", grad, grad_at)?;
        let n = x.len();
        if (g.len(), grad.len()) != (n, n) {
            bail!("gated: a gradient of shape {:?} does not fit x of {:?}", grad_at.dims(), x_at.dims());
        }
        let mut out = zeros(2 * n);
        let shared = Shared::new(&mut out);
        parallel(n.div_ceil(TASK), |i| {
            let (at, len) = (i * TASK, TASK.min(n - i * TASK));
            let part = at..at + len;
            // SAFETY: each task writes to its own part of both halves.
            unsafe {
                let out = (shared.slice(at, len), shared.slice(n + at, len));
                dispatch_back(isa(), self.gate, &g[part.clone()], &x[part.clone()], &grad[part], out);
            }
        });
        let shape: Vec<usize> = [2].iter().chain(x_at.dims()).copied().collect();
        Ok((CpuStorage::F32(out), shape.into()))
    }
}

/// RWKV's token shift (Peng et al. 2023, arXiv:2305.13048, equation 11): `x · mix + before · (1 - mix)`, in f32.
///
/// Inputs: `x` and `before` of the same shape `[.., d]`, and `mix` of `[d]`. The backward pass computes the gradients
/// of all three.
#[derive(Clone, Copy, Debug)]
pub struct MixOp;

impl CustomOp3 for MixOp {
    fn name(&self) -> &'static str {
        "mix"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        before: &CpuStorage,
        before_at: &Layout,
        mix: &CpuStorage,
        mix_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, before) = (f32_slice("mix", x, x_at)?, f32_slice("mix before", before, before_at)?);
        let mix = f32_slice("mix factors", mix, mix_at)?;
        let d = mix.len();
        if x_at.dims() != before_at.dims() || x_at.dims().last() != Some(&d) {
            bail!("mix: x {:?} and before {:?} do not fit {d} factors", x_at.dims(), before_at.dims());
        }
        let mut out = zeros(x.len());
        let task = TASK.div_ceil(d.max(1)) * d;
        parallel_chunks(&mut out, task.max(1), |i, out| {
            let at = i * task..i * task + out.len();
            let rows = x[at.clone()].chunks_exact(d).zip(before[at].chunks_exact(d));
            for (out, (x, before)) in out.chunks_exact_mut(d).zip(rows) {
                for (((out, x), before), mix) in out.iter_mut().zip(x).zip(before).zip(mix) {
                    *out = x * mix + before * (1.0 - mix);
                }
            }
        });
        Ok((CpuStorage::F32(out), x_at.dims().into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        before: &Tensor,
        mix: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x, before, mix, grad) = (x.detach(), before.detach(), mix.detach(), grad.detach());
        let of_x = grad.broadcast_mul(&mix)?;
        let d = mix.elem_count();
        let of_mix = (&grad * (x - before)?)?.reshape(((), d))?.sum(0)?.reshape(mix.shape())?;
        Ok((Some(of_x.clone()), Some((grad - of_x)?), Some(of_mix)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    #[test]
    fn gates_and_their_slopes_are_close_to_f64_on_every_path() {
        let x: Vec<f32> = (-4000i32..=4000).map(|i| i as f32 * 0.025).chain([f32::NAN]).collect();
        let (ones, n) = (vec![1f32; x.len()], x.len() - 1);
        for (kind, isa) in Isa::available().flat_map(|isa| [(Gate::Silu, isa), (Gate::Sigmoid, isa)]) {
            let mut y = vec![0f32; x.len()];
            let (mut slope, mut value) = (y.clone(), y.clone());
            dispatch(isa, kind, &x, &ones, &mut y);
            dispatch_back(isa, kind, &x, &ones, &ones, (&mut slope, &mut value));
            for i in 0..n {
                let x = f64::from(x[i]);
                let s = 1.0 / (1.0 + (-x).exp());
                let (f, d) = match kind {
                    Gate::Silu => (x * s, s * (1.0 + x * (1.0 / (1.0 + x.exp())))),
                    Gate::Sigmoid => (s, s * (1.0 / (1.0 + x.exp()))),
                };
                let near = |found: f32, exact: f64| (f64::from(found) - exact).abs() < 1e-6 * exact.abs().max(0.1);
                assert!(near(y[i], f) && near(value[i], f) && near(slope[i], d), "{kind:?} {isa:?} at {x}");
            }
            assert!(y[n].is_nan() && slope[n].is_nan(), "{kind:?} {isa:?}");
        }
    }
}
