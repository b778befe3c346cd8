//! Sixteen lanes of arithmetic in every instruction set: kernels are written once over this trait, and become vector code
//! in the functions that have the instructions.

#![allow(clippy::inline_always, reason = "they must become part of the functions that have the instructions")]

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// One instruction set.
///
/// # Safety
/// Every function may only be called where the processor has the instructions, with pointers to as much as it reads or
/// writes: 64 bytes, 16 halves, 16 bytes or 16 floats, at any alignment.
pub(crate) trait Lanes: Copy {
    /// Four bytes a lane.
    type Bytes: Copy;
    /// A 32-bit integer a lane.
    type Int: Copy;
    /// A 32-bit float a lane.
    type Float: Copy;

    unsafe fn bytes(p: *const u8) -> Self::Bytes;
    /// `(x >> SHIFT) & mask`, byte by byte; the mask leaves no bit of the neighbour.
    unsafe fn bits<const SHIFT: u32>(x: Self::Bytes, mask: u8) -> Self::Bytes;
    /// `a | b << SHIFT`; no bit of `b` leaves its byte.
    unsafe fn with_high<const SHIFT: u32>(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// `bit` is set in the bytes that `which` has a bit for.
    unsafe fn with_bit(x: Self::Bytes, which: u64, bit: u8) -> Self::Bytes;
    unsafe fn int(x: i32) -> Self::Int;
    unsafe fn add(a: Self::Int, b: Self::Int) -> Self::Int;
    /// `sum` plus, in each lane, the inner product of four unsigned bytes of `w` with the four signed ones of `x`. Bytes of
    /// `w` are below 64 unless `FULL`.
    unsafe fn dot4<const FULL: bool>(sum: Self::Int, w: Self::Bytes, x: i32) -> Self::Int;
    unsafe fn float(x: Self::Int) -> Self::Float;
    unsafe fn splat(x: f32) -> Self::Float;
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a b + c`.
    unsafe fn madd(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    unsafe fn halves(p: *const u8) -> Self::Float;
    unsafe fn floats(p: *const u8) -> Self::Float;
    unsafe fn unsigned(p: *const u8) -> Self::Float;
    unsafe fn signed(p: *const u8) -> Self::Float;
    /// Four bits of each of 16 bytes, from `SHIFT` on: 0 or 4.
    unsafe fn nibbles<const SHIFT: u32>(p: *const u8) -> Self::Float;
    unsafe fn to_array(x: Self::Float) -> [f32; LANES];
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    #![allow(clippy::undocumented_unsafe_blocks, reason = "each is one instruction, and the trait says what it asks for")]

    use std::arch::x86_64::*;

    use super::{LANES, Lanes};

    /// AVX2, FMA and F16C: a vector is two registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    impl Lanes for Avx2 {
        type Bytes = [__m256i; 2];
        type Int = [__m256i; 2];
        type Float = [__m256; 2];

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
                [
                    _mm256_or_si256(a[0], _mm256_sll_epi16(b[0], shift)),
                    _mm256_or_si256(a[1], _mm256_sll_epi16(b[1], shift)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn with_bit(x: Self::Bytes, which: u64, bit: u8) -> Self::Bytes {
            unsafe {
                let mut x = x;
                // Byte j of four words of eight bytes each takes bit j of the four bytes of its word.
                let spread =
                    _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
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
        unsafe fn add(a: Self::Int, b: Self::Int) -> Self::Int {
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
                    // Pairs of full bytes do not fit in sixteen bits: the highest bit apart.
                    let low = _mm256_maddubs_epi16(_mm256_and_si256(w[i], _mm256_set1_epi8(0x7f)), x);
                    let high = _mm256_and_si256(_mm256_srli_epi16(w[i], 7), _mm256_set1_epi8(1));
                    let high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(128));
                    sum[i] = _mm256_add_epi32(_mm256_add_epi32(sum[i], high), _mm256_madd_epi16(low, one));
                }
                sum
            }
        }
        #[inline(always)]
        unsafe fn float(x: Self::Int) -> Self::Float {
            unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
        }
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
        unsafe fn halves(p: *const u8) -> Self::Float {
            unsafe {
                [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast()))]
            }
        }
        #[inline(always)]
        unsafe fn floats(p: *const u8) -> Self::Float {
            unsafe { [_mm256_loadu_ps(p.cast()), _mm256_loadu_ps(p.add(32).cast())] }
        }
        #[inline(always)]
        unsafe fn unsigned(p: *const u8) -> Self::Float {
            unsafe {
                [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast())))]
            }
        }
        #[inline(always)]
        unsafe fn signed(p: *const u8) -> Self::Float {
            unsafe {
                [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast())))]
            }
        }
        #[inline(always)]
        unsafe fn nibbles<const SHIFT: u32>(p: *const u8) -> Self::Float {
            unsafe {
                let shift = _mm_cvtsi32_si128(SHIFT as i32);
                let low = _mm256_srl_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), shift);
                let high = _mm256_srl_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast())), shift);
                let mask = _mm256_set1_epi32(15);
                [
                    _mm256_cvtepi32_ps(_mm256_and_si256(low, mask)),
                    _mm256_cvtepi32_ps(_mm256_and_si256(high, mask)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn to_array(x: Self::Float) -> [f32; LANES] {
            unsafe { std::mem::transmute(x) }
        }
    }

    /// AVX-512 with VNNI.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    impl Lanes for Avx512 {
        type Bytes = __m512i;
        type Int = __m512i;
        type Float = __m512;

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
            // The bit is not set yet: adding is setting.
            unsafe { _mm512_mask_add_epi8(x, which, x, _mm512_set1_epi8(bit as i8)) }
        }
        #[inline(always)]
        unsafe fn int(x: i32) -> __m512i {
            unsafe { _mm512_set1_epi32(x) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_add_epi32(a, b) }
        }
        #[inline(always)]
        unsafe fn dot4<const FULL: bool>(sum: __m512i, w: __m512i, x: i32) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x)) }
        }
        #[inline(always)]
        unsafe fn float(x: __m512i) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(x) }
        }
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
        unsafe fn halves(p: *const u8) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn floats(p: *const u8) -> __m512 {
            unsafe { _mm512_loadu_ps(p.cast()) }
        }
        #[inline(always)]
        unsafe fn unsigned(p: *const u8) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
        }
        #[inline(always)]
        unsafe fn signed(p: *const u8) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
        }
        #[inline(always)]
        unsafe fn nibbles<const SHIFT: u32>(p: *const u8) -> __m512 {
            unsafe {
                let wide = _mm512_srli_epi32::<SHIFT>(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())));
                _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)))
            }
        }
        #[inline(always)]
        unsafe fn to_array(x: __m512) -> [f32; LANES] {
            unsafe { std::mem::transmute(x) }
        }
    }
}
