/// Lanes summed independently: enough to keep the multipliers of every instruction set here busy.
const LANES: usize = 32;

macro_rules! dot_body {
    ($a:ident, $b:ident, $madd:expr) => {{
        let madd = $madd;
        let mut sums = [0f32; LANES];
        let (a_lanes, b_lanes) = ($a.chunks_exact(LANES), $b.chunks_exact(LANES));
        let tail: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(x, y)| x * y).sum();
        for (x, y) in a_lanes.zip(b_lanes) {
            for lane in 0..LANES {
                sums[lane] = madd(x[lane], y[lane], sums[lane]);
            }
        }
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                sums[lane] += sums[lane + width];
            }
            width /= 2;
        }
        sums[0] + tail
    }};
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl")]
fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
    dot_body!(a, b, |x: f32, y: f32, sum: f32| x.mul_add(y, sum))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dot_fma(a: &[f32], b: &[f32]) -> f32 {
    dot_body!(a, b, |x: f32, y: f32, sum: f32| x.mul_add(y, sum))
}

/// The inner product of two slices of one length, summed in f32.
///
/// # Panics
/// If the lengths differ.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot of slices of different lengths");
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
            // SAFETY: the processor has the instructions.
            return unsafe { dot_avx512(a, b) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the instructions.
            return unsafe { dot_fma(a, b) };
        }
    }
    dot_body!(a, b, |x: f32, y: f32, sum: f32| x * y + sum)
}

#[cfg(test)]
mod tests {
    use super::dot;

    proptest::proptest! {
        #[test]
        fn equals_the_sum_in_f64(pairs in proptest::collection::vec((-1f32..1.0, -1f32..1.0), 0..300)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let exact: f64 = a.iter().zip(&b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
            proptest::prop_assert!((f64::from(dot(&a, &b)) - exact).abs() < 1e-4);
        }
    }
}
