//! Peak arithmetic rate of the processor, as a reference for measured rates.

#![allow(clippy::inline_always, reason = "loops must be compiled into the functions that enable the instructions")]

use std::hint::black_box;
use std::time::Instant;

use crate::cpu::detect::isa;
use crate::cpu::isa::by_isa;
use crate::cpu::lanes::{Floats, LANES};
use crate::cpu::pool::{parallel, threads};

/// Number of independent sums: enough to keep every arithmetic unit busy.
const SUMS: usize = 12;

/// Measures the f32 arithmetic rate of the installed pool's threads, in operations per second. Multiply-adds run on
/// registers alone, and each counts as two operations. Returns the best of three short runs.
pub fn multiply_add_rate() -> f64 {
    const ROUNDS: usize = 2_000_000;
    let tasks = threads();
    let seconds = (0..3).map(|_| {
        let start = Instant::now();
        parallel(tasks, |task| {
            black_box(multiply_adds(isa(), ROUNDS, task as f32));
        });
        start.elapsed().as_secs_f64()
    });
    (2 * tasks * ROUNDS * SUMS * LANES) as f64 / seconds.fold(f64::INFINITY, f64::min)
}

by_isa! {
    /// Returns the totals, lane by lane, of sums of `rounds` multiply-adds each.
    fn multiply_adds(rounds: usize, start: f32) -> [f32; LANES] = multiply_adds_body
}

#[inline(always)]
unsafe fn multiply_adds_body<L: Floats>(rounds: usize, start: f32) -> [f32; LANES] {
    let mut out = [0f32; LANES];
    // SAFETY: `out` has room for a whole vector.
    unsafe {
        let (factor, mut sums) = (L::splat(black_box(0.999)), [L::splat(start); SUMS]);
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = L::madd(*sum, factor, factor);
            }
        }
        let mut total = L::splat(0.0);
        for sum in sums {
            total = L::add(total, sum);
        }
        L::store(out.as_mut_ptr(), total);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    #[test]
    fn every_path_does_the_same_arithmetic() {
        for isa in Isa::available() {
            let sums = multiply_adds(isa, 3, 1.0);
            let exact = (0..3).fold(1f64, |sum, _| sum * 0.999 + 0.999) * SUMS as f64;
            assert!(sums.iter().all(|&sum| (f64::from(sum) - exact).abs() < 1e-4), "{isa:?}: {sums:?} {exact}");
        }
    }
}
