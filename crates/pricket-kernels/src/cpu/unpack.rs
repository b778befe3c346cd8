//! Dequantizes packed weights into panels, for products of floats.

#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "only the AMX tiles of x86-64 multiply quantized weights in bfloat16")
)]
#![allow(clippy::inline_always, reason = "loops must be compiled into the functions that enable the instructions")]

use crate::block_type::BlockType;
use crate::cpu::isa::{Isa, by_isa};
use crate::cpu::lanes::{LANES, Lanes};
use crate::cpu::packed::{Form, Packed, STEP};
use crate::cpu::quantized_gemm::{groups, scales, scales_of};

/// Dequantizes columns `[from, from + k)` of a tile, side by side: element `c` of row `j` goes to `out[32 c + j]`.
/// `from` and `k` are multiples of the columns of a unit.
pub(crate) fn unpack(weight: &Packed, tile: usize, from: usize, k: usize, out: &mut [f32], isa: Isa) {
    assert!(out.len() >= k.saturating_sub(1) * 32 + LANES, "output is too short for the panel");
    macro_rules! forms {
        ($($kind:ident),*) => {
            match weight.kind() {
                $(BlockType::$kind => {
                    const FORM: Form = Form::of(BlockType::$kind).unwrap();
                    // SAFETY: the length of `out` was checked above.
                    unsafe { units::<{ FORM.bits }, { FORM.scales as u8 }>(isa, weight, tile, from, k, out) }
                })*
                kind => unreachable!("{kind} is not packed"),
            }
        };
    }
    forms!(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_0V1, Q4_1V1, Q8_0V1, Q2K, Q3K, Q4K, Q5K, Q6K);
}

by_isa! {
    /// # Safety
    /// `out` has room for `k` columns: 32 numbers for each but the last, and 16 for the last.
    unsafe fn units<const BITS: usize, const SCALES: u8>(weight: &Packed, tile: usize, from: usize, k: usize, out: &mut [f32]) =
        unpack_units or plain_units
}

/// # Safety
/// As for [`units`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn unpack_units<L: Lanes, const BITS: usize, const SCALES: u8>(
    weight: &Packed,
    tile: usize,
    from: usize,
    k: usize,
    out: &mut [f32],
) {
    let (form, columns) = (weight.form(), weight.kind().elements());
    for (i, unit) in weight.tile(tile).chunks_exact(form.unit()).skip(from / columns).take(k / columns).enumerate() {
        // SAFETY: this is one unit, and the caller has checked that `out` has room for sixteen numbers of each of its
        // columns.
        unsafe { unpack_unit::<L, BITS, SCALES>(unit, form.zero, out.as_mut_ptr().add(32 * i * columns)) };
    }
}

/// # Safety
/// None. The function is unsafe only because it stands in for [`unpack_units`], which is unsafe.
unsafe fn plain_units(weight: &Packed, tile: usize, from: usize, k: usize, out: &mut [f32]) {
    let (n, columns) = weight.shape();
    let mut wide = vec![0f32; columns];
    for row in 0..LANES {
        let known = tile * LANES + row < n;
        if known {
            weight.row(tile * LANES + row, &mut wide);
        }
        for c in 0..k {
            out[32 * c + row] = if known { wide[from + c] } else { 0.0 };
        }
    }
}

/// # Safety
/// `unit` points to one unit; sixteen numbers can be written for each of its columns; the processor has the
/// instructions of `L`.
#[inline(always)]
unsafe fn unpack_unit<L: Lanes, const BITS: usize, const SCALES: u8>(unit: &[u8], zero: i32, out: *mut f32) {
    let kind = const { scales_of(SCALES) };
    let unit = unit.as_ptr();
    // SAFETY: the head and the planes of a unit follow each other, and `out` has a line for each of its columns.
    unsafe {
        let zero = L::splat(-zero as f32);
        for step in 0..kind.steps() {
            let w = groups::<L, BITS>(unit.add(kind.bytes() + step * BITS * 64));
            let [low, high] = scales::<L, SCALES>(unit, step);
            for (g, w) in w.into_iter().enumerate() {
                let (scale, min) = if g < 4 { low } else { high };
                let min = L::madd(zero, scale, min);
                let out = out.add(32 * (step * STEP + 4 * g));
                L::store(out, L::madd(L::float(L::byte::<0>(w)), scale, min));
                L::store(out.add(32), L::madd(L::float(L::byte::<1>(w)), scale, min));
                L::store(out.add(64), L::madd(L::float(L::byte::<2>(w)), scale, min));
                L::store(out.add(96), L::madd(L::float(L::byte::<3>(w)), scale, min));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Blocks;

    #[test]
    fn every_path_gives_the_values_that_the_rows_have() {
        for kind in BlockType::QUANTIZABLE {
            let (n, columns, from, k) = (21, 768, 256, 512);
            let values: Vec<f32> = (0..n * columns).map(|i| ((i * 7919) % 1999) as f32 / 1000.0 - 1.0).collect();
            let bytes = crate::quantize(kind, &values, columns).unwrap();
            let packed = Packed::new(Blocks::new(kind, n, columns, bytes)).unwrap();
            let mut row = vec![0f32; columns];
            for (isa, tile) in Isa::available().flat_map(|isa| [(isa, 0), (isa, 1)]) {
                let mut out = vec![0f32; 32 * k];
                unpack(&packed, tile, from, k, &mut out, isa);
                for j in (tile * LANES..n).take(LANES) {
                    packed.row(j, &mut row);
                    for c in 0..k {
                        let (found, exact) = (out[32 * c + j % LANES], row[from + c]);
                        assert!((found - exact).abs() < 1e-5, "{kind} {isa:?} row {j} column {c}: {found} {exact}");
                    }
                }
            }
        }
    }
}
