//! Sixteen-lane vectors for every instruction set. Kernels are written once over these traits, and become vector code
//! in the functions that enable the instructions.

#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code, unused_variables, unused_unsafe, reason = "other architectures use the scalar kernels only")
)]
#![allow(clippy::inline_always, reason = "they must be compiled into the functions that enable the instructions")]

use half::{bf16, f16};

/// Number of lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Arithmetic on vectors of sixteen f32 lanes, for one instruction set.
///
/// # Safety
/// The processor must have the instructions. Pointers must be valid for what the function reads or writes: sixteen
/// elements, at any alignment, unless documented otherwise.
pub(crate) trait Floats: Copy {
    /// Whether there are enough registers for two dozen sums.
    const MANY: bool = false;
    /// A vector of 32-bit floats.
    type Float: Copy;

    unsafe fn splat(x: f32) -> Self::Float;
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float;
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// Returns `a b + c`.
    unsafe fn madd(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// Returns the larger number in each lane, or `b` if either is NaN.
    unsafe fn max(a: Self::Float, b: Self::Float) -> Self::Float;
    /// Returns the smaller number in each lane, or `b` if either is NaN.
    unsafe fn min(a: Self::Float, b: Self::Float) -> Self::Float;
    unsafe fn div(a: Self::Float, b: Self::Float) -> Self::Float;
    /// Rounds to f16 and converts back.
    unsafe fn through_half(x: Self::Float) -> Self::Float;
    unsafe fn round(x: Self::Float) -> Self::Float;
    /// Returns `x 2^n`, for integers `n` from -127 to 127.
    unsafe fn scale(x: Self::Float, n: Self::Float) -> Self::Float;
    unsafe fn floats(p: *const f32) -> Self::Float;
    unsafe fn halves(p: *const f16) -> Self::Float;
    unsafe fn bf16s(p: *const bf16) -> Self::Float;
    /// Broadcasts one f16 number.
    unsafe fn half(p: *const f16) -> Self::Float;
    /// Loads signed bytes.
    unsafe fn signed(p: *const u8) -> Self::Float;
    unsafe fn store(p: *mut f32, x: Self::Float);
    /// Transposes: exchanges lane `i` of vector `j` with lane `j` of vector `i`.
    unsafe fn transpose(rows: &mut [Self::Float; LANES]);
    /// Returns the sum of all lanes.
    unsafe fn sum(x: Self::Float) -> f32;
    /// Prefetches the cache line at `p`, which need not be valid.
    unsafe fn expect(p: *const u8);

    /// Returns `eˣ`, within 2 units in the last place for `x` up to 88. Below -87.33 the result is that of -87.33,
    /// which is practically zero.
    #[inline(always)]
    unsafe fn exp(x: Self::Float) -> Self::Float {
        // SAFETY: this is arithmetic; the caller has the instructions.
        unsafe {
            // This operand order propagates NaN.
            let x = Self::max(Self::splat(-87.33), x);
            let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
            // ln 2 in two parts. The first has zeros in its last bits, so that the difference is exact.
            let r = Self::madd(n, Self::splat(-0.693_359_4), x);
            let r = Self::madd(n, Self::splat(2.121_944_4e-4), r);
            let mut sum = Self::splat(1.987_569_1e-4);
            for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                sum = Self::madd(sum, r, Self::splat(c));
            }
            let sum = Self::madd(sum, Self::mul(r, r), Self::add(r, Self::splat(1.0)));
            Self::scale(sum, n)
        }
    }
}

/// [`Floats`] with vectors of bytes and integers.
///
/// # Safety
/// As for [`Floats`].
pub(crate) trait Lanes: Floats {
    /// A vector of four bytes in each lane.
    type Bytes: Copy;
    /// A vector of 32-bit integers.
    type Int: Copy;

    unsafe fn bytes(p: *const u8) -> Self::Bytes;
    /// Returns `(x >> SHIFT) & mask` of each byte. `mask` clears the bits that come from the neighboring byte.
    unsafe fn bits<const SHIFT: u32>(x: Self::Bytes, mask: u8) -> Self::Bytes;
    /// Returns `a | b << SHIFT` of each byte. No bit of `b` may leave its byte.
    unsafe fn with_high<const SHIFT: u32>(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Sets `bit` in the bytes whose bit in `which` is set. The bit must not be set before.
    unsafe fn with_bit(x: Self::Bytes, which: u64, bit: u8) -> Self::Bytes;
    unsafe fn int(x: i32) -> Self::Int;
    unsafe fn plus(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Adds to each lane of `sum` the inner product of the four unsigned bytes of `w` with the four signed bytes of
    /// `x`. Bytes of `w` must be below 64 unless `FULL` is set.
    unsafe fn dot4<const FULL: bool>(sum: Self::Int, w: Self::Bytes, x: i32) -> Self::Int;
    /// Returns byte `N` of each lane.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only x86-64 dequantizes weights in vectors"))]
    unsafe fn byte<const N: u32>(x: Self::Bytes) -> Self::Int;
    unsafe fn float(x: Self::Int) -> Self::Float;
    unsafe fn unsigned(p: *const u8) -> Self::Float;
    /// Loads four bits of each of 16 bytes. `SHIFT`, the lowest of the four, is 0 or 4.
    unsafe fn nibbles<const SHIFT: u32>(p: *const u8) -> Self::Float;
}

/// Plain Rust, for every processor.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Floats for Scalar {
    type Float = [f32; LANES];

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; LANES] {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn add(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn madd(a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn div(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn through_half(x: [f32; LANES]) -> [f32; LANES] {
        x.map(|x| f16::from_f32(x).to_f32())
    }
    #[inline(always)]
    unsafe fn round(x: [f32; LANES]) -> [f32; LANES] {
        x.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn scale(x: [f32; LANES], n: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| x[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn floats(p: *const f32) -> [f32; LANES] {
        // SAFETY: sixteen elements can be read, at any alignment.
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn halves(p: *const f16) -> [f32; LANES] {
        // SAFETY: sixteen elements can be read, at any alignment.
        unsafe { p.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn bf16s(p: *const bf16) -> [f32; LANES] {
        // SAFETY: sixteen elements can be read, at any alignment.
        unsafe { p.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn half(p: *const f16) -> [f32; LANES] {
        // SAFETY: one number can be read, at any alignment.
        [unsafe { p.read_unaligned() }.to_f32(); LANES]
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> [f32; LANES] {
        // SAFETY: sixteen elements can be read, at any alignment.
        unsafe { p.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: [f32; LANES]) {
        // SAFETY: sixteen elements can be written, at any alignment.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [[f32; LANES]; LANES]) {
        let old = *rows;
        *rows = std::array::from_fn(|i| std::array::from_fn(|j| old[j][i]));
    }
    #[inline(always)]
    unsafe fn sum(x: [f32; LANES]) -> f32 {
        x.iter().sum()
    }
    #[inline(always)]
    unsafe fn expect(_: *const u8) {}
}

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::Neon;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86;
