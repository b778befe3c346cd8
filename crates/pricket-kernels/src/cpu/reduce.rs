//! Reductions of rows (maximum, argmax, log-sum-exp), softmax, and sums of tensors.

#![allow(clippy::inline_always, reason = "loops must be compiled into the functions that enable the instructions")]

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use crate::cpu::detect::isa;
use crate::cpu::isa::by_isa;
use crate::cpu::lanes::{Floats, LANES};
use crate::cpu::pool::{parallel_chunks, zeros};
use crate::cpu::shared::f32_slice;

/// Maximum, argmax and log-sum-exp of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowSummary {
    /// The largest element.
    pub max: f32,
    /// The index of the first largest element.
    pub argmax: usize,
    /// `ln Σ exp(x - max)`, with the precision of f32.
    pub log_sum: f64,
    /// Whether every element is finite.
    pub finite: bool,
}

/// Summarizes a row in two passes. If the row is empty or has a NaN, `max` and `log_sum` are NaN.
pub fn row_summary(row: &[f32]) -> RowSummary {
    let (max, finite) = largest(isa(), row);
    if row.is_empty() || max.is_nan() {
        return RowSummary { max: f32::NAN, argmax: 0, log_sum: f64::NAN, finite: false };
    }
    let sum = sum_of_exponentials(isa(), row, max);
    RowSummary { max, argmax: row.iter().position(|&x| x == max).unwrap_or(0), log_sum: sum.ln(), finite }
}

/// Returns the [`row_summary`] of each row, computed on the installed pool.
pub fn row_summaries(rows: &[&[f32]]) -> Vec<RowSummary> {
    let mut out = vec![RowSummary { max: f32::NAN, argmax: 0, log_sum: f64::NAN, finite: false }; rows.len()];
    parallel_chunks(&mut out, 1, |i, out| out[0] = row_summary(rows[i]));
    out
}

/// Returns the index of the first largest element of a row, or 0 for an empty row.
pub fn argmax(row: &[f32]) -> usize {
    let (max, _) = largest(isa(), row);
    row.iter().position(|&x| x == max).unwrap_or(0)
}

by_isa! {
    /// Returns the largest element, or NaN if the row has one, and whether all elements are finite.
    fn largest(row: &[f32]) -> (f32, bool) = largest_body
}

#[inline(always)]
unsafe fn largest_body<L: Floats>(row: &[f32]) -> (f32, bool) {
    let (whole, rest) = row.as_chunks::<LANES>();
    let (mut lanes, mut zeros) = ([0f32; LANES], [0f32; LANES]);
    // SAFETY: the loads and stores are whole vectors of the row and of two arrays.
    unsafe {
        let (mut max, mut zero) = (L::splat(f32::NEG_INFINITY), L::splat(0.0));
        for x in whole {
            let x = L::floats(x.as_ptr());
            max = L::max(max, x);
            // Zero times an infinity or NaN is NaN, and the sum stays NaN.
            zero = L::madd(x, L::splat(0.0), zero);
        }
        L::store(lanes.as_mut_ptr(), max);
        L::store(zeros.as_mut_ptr(), zero);
    }
    let zero = zeros.iter().sum::<f32>() + rest.iter().map(|x| x * 0.0).sum::<f32>();
    let max = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let broken = zero.is_nan() && row.iter().any(|x| x.is_nan());
    (if broken { f32::NAN } else { max }, !zero.is_nan())
}

by_isa! {
    /// Returns `Σ exp(x - max)`. Each part of the row is summed in f32, and the parts in f64.
    fn sum_of_exponentials(row: &[f32], max: f32) -> f64 = sum_of_exponentials_body
}

#[inline(always)]
unsafe fn sum_of_exponentials_body<L: Floats>(row: &[f32], max: f32) -> f64 {
    let mut total = 0f64;
    for part in row.chunks(64 * LANES) {
        let (whole, rest) = part.as_chunks::<LANES>();
        let mut edge = [f32::NEG_INFINITY; LANES];
        edge[..rest.len()].copy_from_slice(rest);
        // SAFETY: the loads are whole vectors of the part; the rest of it is in `edge`, a whole vector too.
        unsafe {
            let (mut sum, shift) = (L::splat(0.0), L::splat(-max));
            for x in whole {
                sum = L::add(sum, L::exp(L::add(L::floats(x.as_ptr()), shift)));
            }
            total += f64::from(L::sum(sum));
            L::store(edge.as_mut_ptr(), L::exp(L::add(L::floats(edge.as_ptr()), shift)));
        }
        total += edge[..rest.len()].iter().copied().map(f64::from).sum::<f64>();
    }
    total
}

by_isa! {
    /// Writes `scale exp(x - max)` of each element of a row to `out`, which has the same length.
    fn exponentials(row: &[f32], max: f32, scale: f32, out: &mut [MaybeUninit<f32>]) = exponentials_body
}

/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn exponentials_body<L: Floats>(row: &[f32], max: f32, scale: f32, out: &mut [MaybeUninit<f32>]) {
    assert_eq!(row.len(), out.len(), "row and output differ in length");
    let out = out.as_mut_ptr().cast::<f32>();
    let (whole, rest) = row.as_chunks::<LANES>();
    let mut edge = [f32::NEG_INFINITY; LANES];
    edge[..rest.len()].copy_from_slice(rest);
    // SAFETY: `out` is as long as the row. Whole vectors are read and written, and then as many elements as are left.
    unsafe {
        let (shift, scale) = (L::splat(-max), L::splat(scale));
        for (i, x) in whole.iter().enumerate() {
            L::store(out.add(i * LANES), L::mul(L::exp(L::add(L::floats(x.as_ptr()), shift)), scale));
        }
        let last = L::mul(L::exp(L::add(L::floats(edge.as_ptr()), shift)), scale);
        L::store(edge.as_mut_ptr(), last);
        std::ptr::copy_nonoverlapping(edge.as_ptr(), out.add(whole.len() * LANES), rest.len());
    }
}

/// Softmax over the last dimension, in f32: `softmax(x)_i = exp(x_i - max x) / Σ_j exp(x_j - max x)`. It has no
/// backward pass.
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxOp;

impl CustomOp1 for SoftmaxOp {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice("softmax", x, at)?;
        let width = at.dims().last().copied().unwrap_or(1).max(1);
        let mut out = Vec::with_capacity(x.len());
        parallel_chunks(&mut out.spare_capacity_mut()[..x.len()], width, |i, out| {
            let row = &x[i * width..][..width];
            let RowSummary { max, log_sum, .. } = row_summary(row);
            exponentials(isa(), row, max, (-log_sum).exp() as f32, out);
        });
        // SAFETY: every row is written here; if a task panics, so does this thread.
        unsafe { out.set_len(x.len()) };
        Ok((CpuStorage::F32(out), at.dims().into()))
    }
}

/// Elements of a task: enough to make the cost of handing it out negligible.
const TASK: usize = 16 << 10;

/// The sum of two or three tensors of the same shape, added from left to right in f32.
#[derive(Clone, Copy, Debug)]
pub struct SumOp;

fn sum(parts: &[&[f32]]) -> Vec<f32> {
    let mut out = zeros(parts[0].len());
    parallel_chunks(&mut out, TASK, |i, out| {
        let len = out.len();
        let part = |j: usize| &parts[j][i * TASK..][..len];
        if parts.len() == 2 {
            out.iter_mut().zip(part(0)).zip(part(1)).for_each(|((out, a), b)| *out = a + b);
        } else {
            let parts = part(0).iter().zip(part(1)).zip(part(2));
            out.iter_mut().zip(parts).for_each(|(out, ((a, b), c))| *out = a + b + c);
        }
    });
    out
}

impl CustomOp2 for SumOp {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn cpu_fwd(&self, a: &CpuStorage, a_at: &Layout, b: &CpuStorage, b_at: &Layout) -> Result<(CpuStorage, Shape)> {
        if a_at.dims() != b_at.dims() {
            bail!("sum: the shapes {:?} and {:?} differ", a_at.dims(), b_at.dims());
        }
        let (a, b) = (f32_slice("sum", a, a_at)?, f32_slice("sum", b, b_at)?);
        Ok((CpuStorage::F32(sum(&[a, b])), a_at.dims().into()))
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of = |x: &Tensor| x.track_op().then(|| grad.clone());
        Ok((of(a), of(b)))
    }
}

impl CustomOp3 for SumOp {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_at: &Layout,
        b: &CpuStorage,
        b_at: &Layout,
        c: &CpuStorage,
        c_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if a_at.dims() != b_at.dims() || a_at.dims() != c_at.dims() {
            bail!("sum: the shapes {:?}, {:?} and {:?} differ", a_at.dims(), b_at.dims(), c_at.dims());
        }
        let (a, b, c) = (f32_slice("sum", a, a_at)?, f32_slice("sum", b, b_at)?, f32_slice("sum", c, c_at)?);
        Ok((CpuStorage::F32(sum(&[a, b, c])), a_at.dims().into()))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let of = |x: &Tensor| x.track_op().then(|| grad.clone());
        Ok((of(a), of(b), of(c)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    #[test]
    fn summaries_are_those_of_f64_on_every_path() {
        for len in [1, 15, 16, 17, 1024, 5000] {
            let row: Vec<f32> = (0..len).map(|i| ((i * 7919) % 1009) as f32 * 0.02 - 9.0).collect();
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exact: f64 = row.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum();
            for isa in Isa::available() {
                let (found, finite) = largest(isa, &row);
                assert!(found == max && finite, "{isa:?}");
                let sum = sum_of_exponentials(isa, &row, max);
                assert!((sum / exact - 1.0).abs() < 1e-6, "{isa:?} {sum} {exact}");
            }
            let summary = row_summary(&row);
            assert_eq!(summary.argmax, row.iter().position(|&x| x == max).unwrap());
        }
    }

    #[test]
    fn what_is_not_finite_is_told() {
        for at in [0, 20, 33] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut row = vec![1f32; 34];
                row[at] = bad;
                let summary = row_summary(&row);
                assert!(!summary.finite);
                // A row with a NaN or a positive infinity gives no finite log-likelihood.
                assert_eq!((f64::from(1.0 - summary.max) - summary.log_sum).is_finite(), bad == f32::NEG_INFINITY);
            }
        }
        assert!(!row_summary(&[]).finite);
        assert_eq!(argmax(&[f32::NEG_INFINITY, 3.0, 3.0]), 1);
    }
}
