//! Vectors of AArch64: NEON with dot products of bytes.

#![allow(clippy::undocumented_unsafe_blocks, reason = "the trait documents the conditions of these instructions")]
#![allow(clippy::wildcard_imports, reason = "a list of the instructions would be long and not informative")]

use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;

use super::{Floats, LANES, Lanes, bf16, f16};

/// NEON with the dot products of Armv8.2. A vector is four registers.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// Widens eight 16-bit integers to 32 bits.
#[inline(always)]
unsafe fn widened(x: int16x8_t) -> [int32x4_t; 2] {
    unsafe { [vmovl_s16(vget_low_s16(x)), vmovl_high_s16(x)] }
}

/// Converts sixteen unsigned bytes to floats.
#[inline(always)]
unsafe fn of_unsigned(x: uint8x16_t) -> [float32x4_t; 4] {
    unsafe {
        let [a, b] = widened(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))));
        let [c, d] = widened(vreinterpretq_s16_u16(vmovl_high_u8(x)));
        [a, b, c, d].map(|x| vcvtq_f32_s32(x))
    }
}

/// Adds the inner products of four signed bytes each to `sum`.
///
/// Written in assembly because the standard library's intrinsic is not stable yet.
#[inline(always)]
unsafe fn dot(mut sum: int32x4_t, a: uint8x16_t, b: int8x16_t) -> int32x4_t {
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

impl Floats for Neon {
    type Float = [float32x4_t; 4];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Float {
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { from_fn(|i| vaddq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { from_fn(|i| vmulq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn madd(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        unsafe { from_fn(|i| vfmaq_f32(c[i], a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { from_fn(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn min(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { from_fn(|i| vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { from_fn(|i| vdivq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn through_half(x: Self::Float) -> Self::Float {
        unsafe { x.map(|x| vcvt_f32_f16(vcvt_f16_f32(x))) }
    }
    #[inline(always)]
    unsafe fn round(x: Self::Float) -> Self::Float {
        unsafe { x.map(|x| vrndnq_f32(x)) }
    }
    #[inline(always)]
    unsafe fn scale(x: Self::Float, n: Self::Float) -> Self::Float {
        unsafe {
            from_fn(|i| {
                let power = vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n[i]), vdupq_n_s32(127)));
                vmulq_f32(x[i], vreinterpretq_f32_s32(power))
            })
        }
    }
    #[inline(always)]
    unsafe fn floats(p: *const f32) -> Self::Float {
        unsafe { from_fn(|i| vld1q_f32(p.add(4 * i))) }
    }
    #[inline(always)]
    unsafe fn halves(p: *const f16) -> Self::Float {
        unsafe {
            let p = p.cast::<u16>();
            from_fn(|i| vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p.add(4 * i)))))
        }
    }
    #[inline(always)]
    unsafe fn bf16s(p: *const bf16) -> Self::Float {
        unsafe {
            let p = p.cast::<u16>();
            from_fn(|i| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(4 * i)))))
        }
    }
    #[inline(always)]
    unsafe fn half(p: *const f16) -> Self::Float {
        unsafe {
            let half = vdup_n_u16(p.cast::<u16>().read_unaligned());
            [vcvt_f32_f16(vreinterpret_f16_u16(half)); 4]
        }
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> Self::Float {
        unsafe {
            let x = vld1q_s8(p.cast());
            let [a, b] = widened(vmovl_s8(vget_low_s8(x)));
            let [c, d] = widened(vmovl_high_s8(x));
            [a, b, c, d].map(|x| vcvtq_f32_s32(x))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::Float) {
        unsafe {
            for (i, x) in x.into_iter().enumerate() {
                vst1q_f32(p.add(4 * i), x);
            }
        }
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self::Float; LANES]) {
        unsafe {
            let old = *rows;
            for (i, j) in (0..4).flat_map(|i| (0..4).map(move |j| (i, j))) {
                let [a, b, c, d] = from_fn(|row| vreinterpretq_f64_f32(old[4 * i + row][j]));
                let pairs = |a: float64x2_t, b: float64x2_t| {
                    let (a, b) = (vreinterpretq_f32_f64(a), vreinterpretq_f32_f64(b));
                    (vreinterpretq_f64_f32(vtrn1q_f32(a, b)), vreinterpretq_f64_f32(vtrn2q_f32(a, b)))
                };
                let ((ab, ab_odd), (cd, cd_odd)) = (pairs(a, b), pairs(c, d));
                let square =
                    [vtrn1q_f64(ab, cd), vtrn1q_f64(ab_odd, cd_odd), vtrn2q_f64(ab, cd), vtrn2q_f64(ab_odd, cd_odd)];
                for (row, line) in square.into_iter().enumerate() {
                    rows[4 * j + row][i] = vreinterpretq_f32_f64(line);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn sum(x: Self::Float) -> f32 {
        unsafe { vaddvq_f32(vaddq_f32(vaddq_f32(x[0], x[1]), vaddq_f32(x[2], x[3]))) }
    }
    #[inline(always)]
    unsafe fn expect(p: *const u8) {
        unsafe { asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags)) }
    }
}

impl Lanes for Neon {
    type Bytes = [uint8x16_t; 4];
    type Int = [int32x4_t; 4];

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> Self::Bytes {
        unsafe { from_fn(|i| vld1q_u8(p.add(16 * i))) }
    }
    #[inline(always)]
    unsafe fn bits<const SHIFT: u32>(x: Self::Bytes, mask: u8) -> Self::Bytes {
        // A left shift by a negative number is a right shift.
        unsafe { x.map(|x| vandq_u8(vshlq_u8(x, vdupq_n_s8(-(SHIFT as i8))), vdupq_n_u8(mask))) }
    }
    #[inline(always)]
    unsafe fn with_high<const SHIFT: u32>(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        unsafe { from_fn(|i| vorrq_u8(a[i], vshlq_u8(b[i], vdupq_n_s8(SHIFT as i8)))) }
    }
    #[inline(always)]
    unsafe fn with_bit(x: Self::Bytes, which: u64, bit: u8) -> Self::Bytes {
        unsafe {
            let ones = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
            let bit = vdupq_n_u8(bit);
            let word = |i: usize| (which >> (16 * i)) as u8;
            from_fn(|i| {
                let spread = vcombine_u8(vdup_n_u8(word(i)), vdup_n_u8((which >> (16 * i + 8)) as u8));
                vorrq_u8(x[i], vandq_u8(vtstq_u8(spread, ones), bit))
            })
        }
    }
    #[inline(always)]
    unsafe fn int(x: i32) -> Self::Int {
        unsafe { [vdupq_n_s32(x); 4] }
    }
    #[inline(always)]
    unsafe fn plus(a: Self::Int, b: Self::Int) -> Self::Int {
        unsafe { from_fn(|i| vaddq_s32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn dot4<const FULL: bool>(sum: Self::Int, w: Self::Bytes, x: i32) -> Self::Int {
        unsafe {
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
            if !FULL {
                return from_fn(|i| dot(sum[i], w[i], x));
            }
            // A byte less 128 is a signed byte. The difference to the product is the same for every lane, and is added
            // to the sum.
            let half = vdupq_n_u8(64);
            let less = dot(dot(vdupq_n_s32(0), half, x), half, x);
            from_fn(|i| dot(vaddq_s32(sum[i], less), veorq_u8(w[i], vdupq_n_u8(128)), x))
        }
    }
    #[inline(always)]
    unsafe fn byte<const N: u32>(x: Self::Bytes) -> Self::Int {
        unsafe {
            x.map(|x| {
                let shifted = vshlq_u32(vreinterpretq_u32_u8(x), vdupq_n_s32(-8 * N as i32));
                vreinterpretq_s32_u32(vandq_u32(shifted, vdupq_n_u32(0xff)))
            })
        }
    }
    #[inline(always)]
    unsafe fn float(x: Self::Int) -> Self::Float {
        unsafe { x.map(|x| vcvtq_f32_s32(x)) }
    }
    #[inline(always)]
    unsafe fn unsigned(p: *const u8) -> Self::Float {
        unsafe { of_unsigned(vld1q_u8(p)) }
    }
    #[inline(always)]
    unsafe fn nibbles<const SHIFT: u32>(p: *const u8) -> Self::Float {
        unsafe {
            let shifted = vshlq_u8(vld1q_u8(p), vdupq_n_s8(-(SHIFT as i8)));
            of_unsigned(vandq_u8(shifted, vdupq_n_u8(15)))
        }
    }
}
