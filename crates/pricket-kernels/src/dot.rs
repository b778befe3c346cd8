use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::cpu::{Path, path};

/// Lanes summed independently: enough to keep the multipliers of every instruction set here busy.
const LANES: usize = 64;

/// The loop of every product; the instruction set comes from the function that it stands in.
macro_rules! dot_body {
    ($a:ident, $b:ident, $widen:expr, $madd:expr) => {{
        let (widen, madd) = ($widen, $madd);
        let mut sums = [0f32; LANES];
        let (a_lanes, b_lanes) = ($a.chunks_exact(LANES), $b.chunks_exact(LANES));
        let tail: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(x, y)| x * widen(*y)).sum();
        for (x, y) in a_lanes.zip(b_lanes) {
            for lane in 0..LANES {
                sums[lane] = madd(x[lane], widen(y[lane]), sums[lane]);
            }
        }
        fold(sums) + tail
    }};
}

/// Sums lanes pairwise, as the vector loops leave them.
fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

fn wide_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm_loadu_si128, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_epi16, _mm256_loadu_ps, _mm256_setzero_ps,
        _mm256_storeu_ps, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{LANES, bf16, f16, fold, wide_bf16};

    #[target_feature(enable = "avx512f,avx512vl")]
    pub(super) fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
        dot_body!(a, b, |y: f32| y, f32::mul_add)
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn dot_fma(a: &[f32], b: &[f32]) -> f32 {
        dot_body!(a, b, |y: f32| y, f32::mul_add)
    }

    #[target_feature(enable = "avx512f,avx512vl")]
    pub(super) fn dot_bf16_avx512(a: &[f32], b: &[bf16]) -> f32 {
        dot_body!(a, b, wide_bf16, f32::mul_add)
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn dot_bf16_fma(a: &[f32], b: &[bf16]) -> f32 {
        dot_body!(a, b, wide_bf16, f32::mul_add)
    }

    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    pub(super) fn dot_f16_avx512(a: &[f32], b: &[f16]) -> f32 {
        let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let tail: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(x, y)| x * y.to_f32()).sum();
        let mut sums = [_mm512_setzero_ps(); LANES / 16];
        for (x, y) in a_lanes.zip(b_lanes) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: both chunks hold LANES elements.
                let (x, y) = unsafe {
                    (_mm512_loadu_ps(x.as_ptr().add(16 * i)), _mm256_loadu_epi16(y.as_ptr().add(16 * i).cast()))
                };
                *sum = _mm512_fmadd_ps(x, _mm512_cvtph_ps(y), *sum);
            }
        }
        let mut lanes = [0f32; LANES];
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: sixteen lanes of the sixty-four.
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr().add(16 * i), sum) };
        }
        fold(lanes) + tail
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dot_f16_fma(a: &[f32], b: &[f16]) -> f32 {
        let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let tail: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(x, y)| x * y.to_f32()).sum();
        let mut sums = [_mm256_setzero_ps(); LANES / 8];
        for (x, y) in a_lanes.zip(b_lanes) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: both chunks hold LANES elements.
                let (x, y) =
                    unsafe { (_mm256_loadu_ps(x.as_ptr().add(8 * i)), _mm_loadu_si128(y.as_ptr().add(8 * i).cast())) };
                *sum = _mm256_fmadd_ps(x, _mm256_cvtph_ps(y), *sum);
            }
        }
        let mut lanes = [0f32; LANES];
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: eight lanes of the sixty-four.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr().add(8 * i), sum) };
        }
        fold(lanes) + tail
    }
}

/// Calls the first of a function's forms that the processor has.
macro_rules! dispatch {
    ($avx512:ident, $fma:ident, $a:ident, $b:ident, $plain:expr) => {{
        assert_eq!($a.len(), $b.len(), "inner product of slices of different lengths");
        #[cfg(target_arch = "x86_64")]
        {
            if path() >= Path::Avx512 {
                // SAFETY: the processor has the instructions.
                return unsafe { x86::$avx512($a, $b) };
            }
            if path() >= Path::Avx2 {
                // SAFETY: the processor has the instructions.
                return unsafe { x86::$fma($a, $b) };
            }
        }
        $plain
    }};
}

/// Without fused multiply-add, which would be a call into the C library where the processor has none.
fn madd(x: f32, y: f32, sum: f32) -> f32 {
    x * y + sum
}

/// The inner product of two slices of one length, summed in f32.
///
/// # Panics
/// If the lengths differ.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    dispatch!(dot_avx512, dot_fma, a, b, dot_body!(a, b, |y: f32| y, madd))
}

/// As [`dot`], the second slice widened on the way.
///
/// # Panics
/// If the lengths differ.
pub fn dot_bf16(a: &[f32], b: &[bf16]) -> f32 {
    dispatch!(dot_bf16_avx512, dot_bf16_fma, a, b, dot_body!(a, b, wide_bf16, madd))
}

/// As [`dot`], the second slice widened on the way.
///
/// # Panics
/// If the lengths differ.
pub fn dot_f16(a: &[f32], b: &[f16]) -> f32 {
    dispatch!(dot_f16_avx512, dot_f16_fma, a, b, {
        let mut wide = [0f32; 512];
        let parts = a.chunks(512).zip(b.chunks(512));
        parts
            .map(|(a, b)| {
                let wide = &mut wide[..b.len()];
                b.convert_to_f32_slice(wide);
                dot_body!(a, wide, |y: f32| y, madd)
            })
            .sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f32, a: &[f32], b: impl Iterator<Item = f32>) -> bool {
        let exact: f64 = a.iter().zip(b).map(|(&x, y)| f64::from(x) * f64::from(y)).sum();
        (f64::from(found) - exact).abs() < 1e-4
    }

    proptest::proptest! {
        #[test]
        fn equals_the_sum_in_f64(pairs in proptest::collection::vec((-1f32..1.0, -1f32..1.0), 0..700)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let half: Vec<f16> = b.iter().map(|&x| f16::from_f32(x)).collect();
            let brain: Vec<bf16> = b.iter().map(|&x| bf16::from_f32(x)).collect();
            proptest::prop_assert!(close(dot(&a, &b), &a, b.iter().copied()));
            proptest::prop_assert!(close(dot_f16(&a, &half), &a, half.iter().map(|x| x.to_f32())));
            proptest::prop_assert!(close(dot_bf16(&a, &brain), &a, brain.iter().map(|x| x.to_f32())));
        }

        /// The forms that this processor would not choose.
        #[test]
        #[cfg(target_arch = "x86_64")]
        fn every_form_gives_the_same(pairs in proptest::collection::vec((-1f32..1.0, -1f32..1.0), 0..300)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let half: Vec<f16> = b.iter().map(|&x| f16::from_f32(x)).collect();
            let brain: Vec<bf16> = b.iter().map(|&x| bf16::from_f32(x)).collect();
            let (a, half, brain) = (&a[..], &half[..], &brain[..]);
            let b = &b[..];
            if Path::best() >= Path::Avx2 {
                // SAFETY: the processor has the instructions.
                let (f, h, w) = unsafe { (x86::dot_fma(a, b), x86::dot_f16_fma(a, half), x86::dot_bf16_fma(a, brain)) };
                proptest::prop_assert!(close(f, a, b.iter().copied()));
                proptest::prop_assert!(close(h, a, half.iter().map(|x| x.to_f32())));
                proptest::prop_assert!(close(w, a, brain.iter().map(|x| x.to_f32())));
            }
            proptest::prop_assert!(close(dot_body!(a, b, |y: f32| y, madd), a, b.iter().copied()));
            proptest::prop_assert!(close(dot_body!(a, brain, wide_bf16, madd), a, brain.iter().map(|x| x.to_f32())));
        }
    }
}
