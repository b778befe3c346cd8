//! Products of packed weights with [`QuantizedActivations`], in integers.
//!
//! Sums of products are exact integers with every instruction set. Three such products, which together have the
//! precision of f32, cost less than dequantizing the weights.

#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code, unused_variables, unused_unsafe, reason = "other architectures use the scalar kernels only")
)]
#![allow(clippy::inline_always, reason = "loops must be compiled into the functions that enable the instructions")]

use crate::block_type::BlockType;
use crate::cpu::gelu::GeluOp;
use crate::cpu::isa::{Isa, by_isa};
use crate::cpu::lanes::{LANES, Lanes};
use crate::cpu::packed::{Form, Packed, Scales};
use crate::cpu::pool::{parallel, threads};
use crate::cpu::quantized_activations::{FINER, GROUP, QuantizedActivations, SUMS, TERM, TERMS, words_of};
use crate::cpu::shared::Shared;

/// Rows of activations that are multiplied before the next ones; they stay in the second-level cache.
const ROWS: usize = 64;

/// Distance in bytes at which weights are prefetched.
const AHEAD: usize = 6 << 10;

/// One product: its operands, the function of the result, and the output.
struct Job<'a> {
    then: Option<GeluOp>,
    isa: Isa,
    weight: &'a Packed,
    x: &'a QuantizedActivations,
    bias: Option<&'a [f32]>,
    y: Shared<'a, f32>,
}

/// Computes `y = x Wᵀ + b`, followed by the function `then` if there is one. `y` is `[rows, weight rows]`.
pub(crate) fn multiply(
    x: &QuantizedActivations,
    weight: &Packed,
    bias: Option<&[f32]>,
    then: Option<GeluOp>,
    y: &mut [f32],
    isa: Isa,
) {
    let (n, _) = weight.shape();
    assert_eq!(y.len(), x.rows * n, "output is not [rows, out_features]");
    let job = Job { then, isa, weight, x, bias, y: Shared::new(y) };
    let tiles = n.div_ceil(LANES);
    // There are several tasks for each thread, but each has enough tiles to make loading the activations worthwhile.
    let share = tiles.div_ceil(8 * threads()).clamp(1, 32);
    parallel(tiles.div_ceil(share), |task| {
        let (from, to) = (task * share, ((task + 1) * share).min(tiles));
        dispatch(&job, from, to, isa);
    });
}

fn dispatch(job: &Job<'_>, from: usize, to: usize, isa: Isa) {
    macro_rules! forms {
        ($($kind:ident),*) => {
            match job.weight.kind() {
                $(BlockType::$kind => {
                    const FORM: Form = Form::of(BlockType::$kind).unwrap();
                    // SAFETY: each tile belongs to one task.
                    unsafe {
                        if job.x.terms == 1 {
                            multiply_tiles::<{ FORM.bits }, { FORM.scales as u8 }, 1>(isa, job, from, to);
                        } else {
                            multiply_tiles::<{ FORM.bits }, { FORM.scales as u8 }, 3>(isa, job, from, to);
                        }
                    }
                })*
                kind => unreachable!("{kind} is not packed"),
            }
        };
    }
    forms!(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_0V1, Q4_1V1, Q8_0V1, Q2K, Q3K, Q4K, Q5K, Q6K);
}

by_isa! {
    /// # Safety
    /// No other task has the tiles `[from, to)`.
    unsafe fn multiply_tiles<const BITS: usize, const SCALES: u8, const T: usize>(job: &Job<'_>, from: usize, to: usize) =
        tiles or plain
}

/// The scalar form, one step of a row at a time. Tests compare the vector forms with it.
///
/// # Safety
/// As for [`multiply_tiles`].
unsafe fn plain(job: &Job<'_>, from: usize, to: usize) {
    let (weight, x) = (job.weight, job.x);
    let (form, (n, _), width) = (weight.form(), weight.shape(), words_of(x.terms));
    for row in from * LANES..n.min(to * LANES) {
        let b = job.bias.map_or(0.0, |bias| bias[row]);
        for i in 0..x.rows {
            let group = GROUP.min(x.rows - i / GROUP * GROUP);
            let words = &x.words[(i / GROUP * GROUP * x.steps + i % GROUP) * width..];
            let mut sum = 0f32;
            for (step, x) in words.chunks(group * width).take(x.steps).enumerate() {
                let (q, scales) = weight.step(row, step);
                let float = |at: usize| f32::from_bits(x[at] as u32);
                for (half, (scale, min)) in scales.into_iter().enumerate() {
                    let mut product = 0f32;
                    for term in (0..job.x.terms).rev() {
                        let x = &x[TERMS + TERM * term..][..TERM];
                        let mut acc = x[1 + half];
                        for (x, q) in x[3 + 4 * half..7 + 4 * half].iter().zip(q[16 * half..].as_chunks::<4>().0) {
                            acc += x
                                .to_le_bytes()
                                .iter()
                                .zip(q)
                                .map(|(&x, &q)| i32::from(x as i8) * i32::from(q))
                                .sum::<i32>();
                        }
                        product = product / FINER + acc as f32;
                    }
                    sum += product * (scale * float(0));
                    if form.scales.halves() {
                        sum += min * float(SUMS + 1 + half);
                    }
                }
                if !form.scales.halves() {
                    sum += scales[0].1 * float(SUMS);
                }
            }
            // SAFETY: column `row` belongs to this task alone.
            unsafe {
                let y = job.y.slice(i * n + row, 1);
                y[0] = sum + b;
                if let Some(gelu) = job.then {
                    gelu.apply(job.isa, y);
                }
            }
        }
    }
}

/// # Safety
/// The processor has the instructions of `L`, and no other task has the tiles `[from, to)`.
#[inline(always)]
unsafe fn tiles<L: Lanes, const BITS: usize, const SCALES: u8, const T: usize>(job: &Job<'_>, from: usize, to: usize) {
    let rows = job.x.rows;
    for first in (0..rows).step_by(ROWS) {
        let last = (first + ROWS).min(rows);
        for tile in from..to {
            let mut row = first;
            // SAFETY: the rows are among those of `x`, groups begin at multiples of eight, and the tile is this task's.
            unsafe {
                while row + GROUP <= last {
                    tile_by_rows::<L, BITS, SCALES, T, GROUP>(job, tile, row);
                    row += GROUP;
                }
                if row + 4 <= last {
                    tile_by_rows::<L, BITS, SCALES, T, 4>(job, tile, row);
                    row += 4;
                }
                if row + 2 <= last {
                    tile_by_rows::<L, BITS, SCALES, T, 2>(job, tile, row);
                    row += 2;
                }
                if row < last {
                    tile_by_rows::<L, BITS, SCALES, T, 1>(job, tile, row);
                }
            }
        }
    }
}

/// Multiplies `M` rows of activations with a tile.
///
/// # Safety
/// As for [`tiles`]; rows `[row, row + M)` exist and are in one group.
#[inline(always)]
unsafe fn tile_by_rows<L: Lanes, const BITS: usize, const SCALES: u8, const T: usize, const M: usize>(
    job: &Job<'_>,
    tile: usize,
    row: usize,
) {
    let scales_kind = const { scales_of(SCALES) };
    let (steps, width) = (job.x.steps, const { words_of(T) });
    let unit_steps = const { scales_of(SCALES).steps() };
    let unit_bytes = scales_kind.bytes() + unit_steps * BITS * 64;
    let bytes = job.weight.tile(tile);
    let first = row / GROUP * GROUP;
    let group = GROUP.min(job.x.rows - first);
    assert!(bytes.len() == steps / unit_steps * unit_bytes && row + M <= first + group);
    assert_eq!(job.x.words.len(), job.x.rows * steps * width);
    // SAFETY: the lengths were checked above, and every unit and every step is inside them.
    unsafe {
        let mut unit = bytes.as_ptr();
        let mut x = job.x.words.as_ptr().add((first * steps + row - first) * width);
        let mut sums = [L::splat(0.0); M];
        let finer = L::splat(1.0 / FINER);
        for _ in 0..steps / unit_steps {
            // Weights are read from memory once, so they are prefetched.
            for line in (0..unit_bytes).step_by(64) {
                L::expect(unit.wrapping_add(AHEAD + line));
            }
            for step in 0..unit_steps {
                let w = groups::<L, BITS>(unit.add(scales_kind.bytes() + step * BITS * 64));
                let [low, high] = scales::<L, SCALES>(unit, step);
                // Loops rather than closures: closures would not be compiled with the instruction set of the caller.
                for (m, sum) in sums.iter_mut().enumerate() {
                    let x = x.add(m * width);
                    let scale = L::splat(f32::from_bits(*x as u32));
                    if scales_kind.halves() {
                        for (half, (weight_scale, min)) in [low, high].into_iter().enumerate() {
                            let mut product = L::splat(0.0);
                            for term in (0..T).rev() {
                                let x = x.add(TERMS + TERM * term);
                                let mut acc = L::int(*x.add(1 + half));
                                for (g, w) in w.iter().enumerate().skip(4 * half).take(4) {
                                    acc = L::dot4::<false>(acc, *w, *x.add(3 + g));
                                }
                                product = L::madd(product, finer, L::float(acc));
                            }
                            *sum = L::madd(product, L::mul(weight_scale, scale), *sum);
                            if scales_kind.min() {
                                *sum = L::madd(min, L::splat(f32::from_bits(*x.add(SUMS + 1 + half) as u32)), *sum);
                            }
                        }
                        continue;
                    }
                    let mut product = L::splat(0.0);
                    for term in (0..T).rev() {
                        let x = x.add(TERMS + TERM * term);
                        let (mut a, mut b) = (L::int(*x), L::int(0));
                        for g in 0..4 {
                            if BITS == 8 {
                                a = L::dot4::<true>(a, w[g], *x.add(3 + g));
                                b = L::dot4::<true>(b, w[g + 4], *x.add(7 + g));
                            } else {
                                a = L::dot4::<false>(a, w[g], *x.add(3 + g));
                                b = L::dot4::<false>(b, w[g + 4], *x.add(7 + g));
                            }
                        }
                        let term = L::float(L::plus(a, b));
                        product = if T == 1 { term } else { L::madd(product, finer, term) };
                    }
                    *sum = L::madd(product, L::mul(low.0, scale), *sum);
                    if scales_kind.min() {
                        *sum = L::madd(low.1, L::splat(f32::from_bits(*x.add(SUMS) as u32)), *sum);
                    }
                }
                x = x.wrapping_add(group * width);
            }
            unit = unit.add(unit_bytes);
        }
        let (n, column) = (job.weight.shape().0, tile * LANES);
        let count = LANES.min(n - column);
        for (m, sum) in sums.into_iter().enumerate() {
            let mut lanes = [0f32; LANES];
            L::store(lanes.as_mut_ptr(), sum);
            let y = job.y.slice((row + m) * n + column, count);
            match job.bias {
                Some(bias) => y.iter_mut().zip(lanes).zip(&bias[column..]).for_each(|((y, sum), b)| *y = sum + b),
                None => y.copy_from_slice(&lanes[..count]),
            }
            if let Some(gelu) = job.then {
                gelu.apply(job.isa, y);
            }
        }
    }
}

/// Returns the [`Scales`] with this discriminant.
pub(crate) const fn scales_of(number: u8) -> Scales {
    const ALL: [Scales; 7] =
        [Scales::Half, Scales::HalfMin, Scales::Single, Scales::SingleMin, Scales::Wide, Scales::Fine, Scales::FineMin];
    ALL[number as usize]
}

/// Returns the integers of 32 columns, four columns in each vector.
///
/// # Safety
/// The planes of 32 columns can be read, and the processor has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn groups<L: Lanes, const BITS: usize>(body: *const u8) -> [L::Bytes; 8] {
    // SAFETY: the planes of 32 columns follow each other, with as many bits as the type has, and all can be read.
    unsafe {
        let mut w = [L::bytes(body); 8];
        // Loops rather than closures: closures would not be compiled with the instruction set of the caller.
        match BITS {
            8 => {
                for (g, w) in w.iter_mut().enumerate() {
                    *w = L::bytes(body.add(64 * g));
                }
            }
            2 | 3 => w = pairs_of_bits::<L>(body),
            _ => {
                for i in 0..4 {
                    let both = L::bytes(body.add(64 * i));
                    w[i] = L::bits::<0>(both, 15);
                    w[i + 4] = L::bits::<4>(both, 15);
                }
            }
        }
        if BITS == 3 || BITS == 5 {
            let (masks, bit) = (body.add((BITS - 1) * 64), 1 << (BITS - 1));
            for (g, w) in w.iter_mut().enumerate() {
                *w = L::with_bit(*w, u64::from_le_bytes(masks.add(8 * g).cast::<[u8; 8]>().read()), bit);
            }
        }
        if BITS == 6 {
            let high = pairs_of_bits::<L>(body.add(256));
            for (w, high) in w.iter_mut().zip(high) {
                *w = L::with_high::<4>(*w, high);
            }
        }
        w
    }
}

/// Returns the integers of a plane of two bits.
///
/// # Safety
/// As for [`groups`].
#[inline(always)]
unsafe fn pairs_of_bits<L: Lanes>(plane: *const u8) -> [L::Bytes; 8] {
    // SAFETY: a plane of two bits has two vectors of 64 bytes.
    unsafe {
        let (a, b) = (L::bytes(plane), L::bytes(plane.add(64)));
        [
            L::bits::<0>(a, 3),
            L::bits::<0>(b, 3),
            L::bits::<2>(a, 3),
            L::bits::<2>(b, 3),
            L::bits::<4>(a, 3),
            L::bits::<4>(b, 3),
            L::bits::<6>(a, 3),
            L::bits::<6>(b, 3),
        ]
    }
}

/// Returns scale and minimum of both halves of a step. The halves are equal if they share a scale.
///
/// # Safety
/// The head of a unit can be read, and the processor has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn scales<L: Lanes, const SCALES: u8>(head: *const u8, step: usize) -> [(L::Float, L::Float); 2] {
    // SAFETY: the head of a unit has these scales and minima, sixteen of each. In types of 256 columns it has those of
    // `step`.
    unsafe {
        let none = L::splat(0.0);
        match const { scales_of(SCALES) } {
            Scales::Half => [(L::halves(head.cast()), none); 2],
            Scales::HalfMin => [(L::halves(head.cast()), L::halves(head.add(2 * LANES).cast())); 2],
            Scales::Single => [(L::floats(head.cast()), none); 2],
            Scales::SingleMin => [(L::floats(head.cast()), L::floats(head.add(4 * LANES).cast())); 2],
            Scales::Wide => {
                let (scale, min) =
                    (L::unsigned(head.add((4 + step) * LANES)), L::unsigned(head.add((12 + step) * LANES)));
                let min = L::mul(L::mul(L::halves(head.add(2 * LANES).cast()), min), L::splat(-1.0));
                [(L::mul(L::halves(head.cast()), scale), min); 2]
            }
            Scales::Fine => {
                let (d, bytes) = (L::halves(head.cast()), head.add((2 + 2 * step) * LANES));
                [(L::mul(d, L::signed(bytes)), none), (L::mul(d, L::signed(bytes.add(LANES))), none)]
            }
            Scales::FineMin => {
                let (d, min) = (L::halves(head.cast()), L::mul(L::halves(head.add(2 * LANES).cast()), L::splat(-1.0)));
                let (low, high) = (head.add((4 + 2 * step) * LANES), head.add((5 + 2 * step) * LANES));
                [
                    (L::mul(d, L::nibbles::<0>(low)), L::mul(min, L::nibbles::<4>(low))),
                    (L::mul(d, L::nibbles::<0>(high)), L::mul(min, L::nibbles::<4>(high))),
                ]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Blocks, dequantize};

    fn random(seed: u32, len: usize) -> Vec<f32> {
        let mut state = u64::from(seed) * 2 + 1;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
        #[test]
        fn every_type_on_every_path_is_its_values_times_f32(rows in 1usize..20, n in 1usize..50, k in 1usize..4, seed: u32) {
            for kind in BlockType::QUANTIZABLE {
                let k = k * 256;
                let bytes = crate::quantize(kind, &random(seed, n * k), k).unwrap();
                let mut w = vec![0f32; n * k];
                dequantize(kind, &bytes, &mut w);
                let packed = Packed::new(Blocks::new(kind, n, k, bytes)).unwrap();
                let x = random(seed ^ 0x4d, rows * k);
                let bias = random(seed ^ 0x3, n);
                for isa in Isa::available() {
                    let mut y = vec![0f32; rows * n];
                    multiply(&QuantizedActivations::new(&x, k, kind, packed.form(), false, isa), &packed, Some(&bias), None, &mut y, isa);
                    let mut rough = vec![0f32; rows * n];
                    multiply(&QuantizedActivations::new(&x, k, kind, packed.form(), true, isa), &packed, Some(&bias), None, &mut rough, isa);
                    for (i, (y, rough)) in y.iter().zip(&rough).enumerate() {
                        let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
                        let products = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                        let exact = products().sum::<f64>() + f64::from(bias[i % n]);
                        // The rounding error grows with the sum of magnitudes; the bound is two units in its last
                        // place.
                        let bound = products().map(f64::abs).sum::<f64>() * f64::from(f32::EPSILON) * 2.0;
                        proptest::prop_assert!((exact - f64::from(*y)).abs() < bound, "{kind} {isa:?} {exact} {y} {bound}");
                        proptest::prop_assert!((exact - f64::from(*rough)).abs() < 0.3, "{kind} {isa:?} {exact} {rough}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_reaches_every_output() {
        let kind = BlockType::Q4_0;
        let packed =
            Packed::new(Blocks::new(kind, 3, 64, crate::quantize(kind, &random(1, 192), 64).unwrap())).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = random(2, 64);
            x[40] = bad;
            for (isa, as_ggml) in Isa::available().flat_map(|isa| [(isa, true), (isa, false)]) {
                let mut y = vec![0f32; 3];
                multiply(
                    &QuantizedActivations::new(&x, 64, kind, packed.form(), as_ggml, isa),
                    &packed,
                    None,
                    None,
                    &mut y,
                    isa,
                );
                assert!(y.iter().all(|y| y.is_nan()), "{isa:?}");
            }
        }
    }
}
