//! Vectors of x86-64: AVX2 and AVX-512.

#![allow(clippy::undocumented_unsafe_blocks, reason = "the trait documents the conditions of these instructions")]
#![allow(clippy::wildcard_imports, reason = "a list of the instructions would be long and not informative")]
#![allow(clippy::needless_range_loop, reason = "one index is used for the halves of several operands")]

use std::arch::x86_64::*;

use super::{Floats, LANES, Lanes, bf16, f16};

/// AVX2 with FMA and F16C. A vector is two registers.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Floats for Avx2 {
    type Float = [__m256; 2];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Float {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn madd(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn max(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn min(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn div(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn through_half(x: Self::Float) -> Self::Float {
        unsafe {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
            [_mm256_cvtph_ps(_mm256_cvtps_ph::<NEAREST>(x[0])), _mm256_cvtph_ps(_mm256_cvtps_ph::<NEAREST>(x[1]))]
        }
    }
    #[inline(always)]
    unsafe fn round(x: Self::Float) -> Self::Float {
        unsafe {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            [_mm256_round_ps::<NEAREST>(x[0]), _mm256_round_ps::<NEAREST>(x[1])]
        }
    }
    #[inline(always)]
    unsafe fn scale(x: Self::Float, n: Self::Float) -> Self::Float {
        unsafe {
            let (mut x, bias) = (x, _mm256_set1_epi32(127));
            for i in 0..2 {
                let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n[i]), bias));
                x[i] = _mm256_mul_ps(x[i], _mm256_castsi256_ps(power));
            }
            x
        }
    }
    #[inline(always)]
    unsafe fn floats(p: *const f32) -> Self::Float {
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn halves(p: *const f16) -> Self::Float {
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))] }
    }
    #[inline(always)]
    unsafe fn bf16s(p: *const bf16) -> Self::Float {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        }
    }
    #[inline(always)]
    unsafe fn half(p: *const f16) -> Self::Float {
        unsafe {
            let half = _mm_cvtsi32_si128(i32::from(p.cast::<u16>().read_unaligned()));
            [_mm256_broadcastss_ps(_mm_cvtph_ps(half)); 2]
        }
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> Self::Float {
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::Float) {
        unsafe {
            _mm256_storeu_ps(p, x[0]);
            _mm256_storeu_ps(p.add(8), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self::Float; LANES]) {
        unsafe {
            let old = *rows;
            for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let mut square = [old[0][0]; 8];
                for (row, square) in square.iter_mut().enumerate() {
                    *square = old[8 * i + row][j];
                }
                transpose_8(&mut square);
                for (row, square) in square.into_iter().enumerate() {
                    rows[8 * j + row][i] = square;
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn expect(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn sum(x: Self::Float) -> f32 {
        unsafe {
            let x = _mm256_add_ps(x[0], x[1]);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
}

#[inline(always)]
unsafe fn transpose_8(r: &mut [__m256; 8]) {
    unsafe {
        let mut t = *r;
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..2 {
            u[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
            u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
            u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
            u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            r[i] = _mm256_permute2f128_ps::<0x20>(u[i], u[i + 4]);
            r[i + 4] = _mm256_permute2f128_ps::<0x31>(u[i], u[i + 4]);
        }
    }
}

impl Lanes for Avx2 {
    type Bytes = [__m256i; 2];
    type Int = [__m256i; 2];

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> Self::Bytes {
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn bits<const SHIFT: u32>(x: Self::Bytes, mask: u8) -> Self::Bytes {
        unsafe {
            let (shift, mask) = (_mm_cvtsi32_si128(SHIFT as i32), _mm256_set1_epi8(mask as i8));
            [
                _mm256_and_si256(_mm256_srl_epi16(x[0], shift), mask),
                _mm256_and_si256(_mm256_srl_epi16(x[1], shift), mask),
            ]
        }
    }
    #[inline(always)]
    unsafe fn with_high<const SHIFT: u32>(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        unsafe {
            let shift = _mm_cvtsi32_si128(SHIFT as i32);
            [_mm256_or_si256(a[0], _mm256_sll_epi16(b[0], shift)), _mm256_or_si256(a[1], _mm256_sll_epi16(b[1], shift))]
        }
    }
    #[inline(always)]
    unsafe fn with_bit(x: Self::Bytes, which: u64, bit: u8) -> Self::Bytes {
        unsafe {
            let mut x = x;
            // Byte `j` of 8-byte group `g` takes bit `j` of byte `g` of this half of `which`.
            let spread = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            let ones = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            for i in 0..2 {
                let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32((which >> (32 * i)) as i32), spread);
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, ones), ones);
                x[i] = _mm256_or_si256(x[i], _mm256_and_si256(set, _mm256_set1_epi8(bit as i8)));
            }
            x
        }
    }
    #[inline(always)]
    unsafe fn int(x: i32) -> Self::Int {
        unsafe { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    unsafe fn plus(a: Self::Int, b: Self::Int) -> Self::Int {
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn dot4<const FULL: bool>(sum: Self::Int, w: Self::Bytes, x: i32) -> Self::Int {
        unsafe {
            let (mut sum, x, one) = (sum, _mm256_set1_epi32(x), _mm256_set1_epi16(1));
            for i in 0..2 {
                if !FULL {
                    let pairs = _mm256_maddubs_epi16(w[i], x);
                    sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, one));
                    continue;
                }
                // Sums of two products of full bytes can overflow 16 bits, so the highest bit is multiplied separately.
                let low = _mm256_maddubs_epi16(_mm256_and_si256(w[i], _mm256_set1_epi8(0x7f)), x);
                let high = _mm256_and_si256(_mm256_srli_epi16(w[i], 7), _mm256_set1_epi8(1));
                let high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(128));
                sum[i] = _mm256_add_epi32(_mm256_add_epi32(sum[i], high), _mm256_madd_epi16(low, one));
            }
            sum
        }
    }
    #[inline(always)]
    unsafe fn byte<const N: u32>(x: Self::Bytes) -> Self::Int {
        unsafe {
            let (shift, mask) = (_mm_cvtsi32_si128(8 * N as i32), _mm256_set1_epi32(0xff));
            [
                _mm256_and_si256(_mm256_srl_epi32(x[0], shift), mask),
                _mm256_and_si256(_mm256_srl_epi32(x[1], shift), mask),
            ]
        }
    }
    #[inline(always)]
    unsafe fn float(x: Self::Int) -> Self::Float {
        unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
    }
    #[inline(always)]
    unsafe fn unsigned(p: *const u8) -> Self::Float {
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn nibbles<const SHIFT: u32>(p: *const u8) -> Self::Float {
        unsafe {
            let shift = _mm_cvtsi32_si128(SHIFT as i32);
            let low = _mm256_srl_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), shift);
            let high = _mm256_srl_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast())), shift);
            let mask = _mm256_set1_epi32(15);
            [_mm256_cvtepi32_ps(_mm256_and_si256(low, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(high, mask))]
        }
    }
}

/// AVX-512 with VNNI. A vector is one register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

impl Floats for Avx512 {
    const MANY: bool = true;
    type Float = __m512;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn madd(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn through_half(x: __m512) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(x)) }
    }
    #[inline(always)]
    unsafe fn round(x: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    unsafe fn scale(x: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(x, n) }
    }
    #[inline(always)]
    unsafe fn floats(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn halves(p: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn bf16s(p: *const bf16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn half(p: *const f16) -> Self::Float {
        unsafe {
            let half = _mm_cvtsi32_si128(i32::from(p.cast::<u16>().read_unaligned()));
            _mm512_broadcastss_ps(_mm_cvtph_ps(half))
        }
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn transpose(r: &mut [__m512; LANES]) {
        unsafe {
            let mut t = *r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let mut u = t;
            for i in 0..4 {
                u[4 * i] = _mm512_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 1] = _mm512_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 2] = _mm512_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                u[4 * i + 3] = _mm512_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
            }
            // The 4 by 4 squares inside the quarters of the registers are transposed; the quarters are exchanged next.
            for i in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x88>(u[i], u[i + 4]);
                let high = _mm512_shuffle_f32x4::<0xdd>(u[i], u[i + 4]);
                let low_2 = _mm512_shuffle_f32x4::<0x88>(u[i + 8], u[i + 12]);
                let high_2 = _mm512_shuffle_f32x4::<0xdd>(u[i + 8], u[i + 12]);
                r[i] = _mm512_shuffle_f32x4::<0x88>(low, low_2);
                r[i + 4] = _mm512_shuffle_f32x4::<0x88>(high, high_2);
                r[i + 8] = _mm512_shuffle_f32x4::<0xdd>(low, low_2);
                r[i + 12] = _mm512_shuffle_f32x4::<0xdd>(high, high_2);
            }
        }
    }
    #[inline(always)]
    unsafe fn expect(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn sum(x: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(x) }
    }
}

impl Lanes for Avx512 {
    type Bytes = __m512i;
    type Int = __m512i;

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn bits<const SHIFT: u32>(x: __m512i, mask: u8) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<SHIFT>(x), _mm512_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    unsafe fn with_high<const SHIFT: u32>(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, _mm512_slli_epi16::<SHIFT>(b)) }
    }
    #[inline(always)]
    unsafe fn with_bit(x: __m512i, which: u64, bit: u8) -> __m512i {
        // The bit is not set before, so adding sets it.
        unsafe { _mm512_mask_add_epi8(x, which, x, _mm512_set1_epi8(bit as i8)) }
    }
    #[inline(always)]
    unsafe fn int(x: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn plus(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn dot4<const FULL: bool>(sum: __m512i, w: __m512i, x: i32) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x)) }
    }
    #[inline(always)]
    unsafe fn byte<const N: u32>(x: __m512i) -> __m512i {
        unsafe {
            let shifted = _mm512_srl_epi32(x, _mm_cvtsi32_si128(8 * N as i32));
            _mm512_and_si512(shifted, _mm512_set1_epi32(0xff))
        }
    }
    #[inline(always)]
    unsafe fn float(x: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    unsafe fn unsigned(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn nibbles<const SHIFT: u32>(p: *const u8) -> __m512 {
        unsafe {
            let wide = _mm512_srli_epi32::<SHIFT>(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())));
            _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)))
        }
    }
}
