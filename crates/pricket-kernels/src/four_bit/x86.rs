//! Dequantization of 4-bit elements with vectors: the sixteen values are in registers, and the elements select among
//! them.

use std::arch::x86_64::{
    __m128i, _mm_and_si128, _mm_cvtsi64_si128, _mm_set1_epi8, _mm_srli_epi16, _mm_srli_si128, _mm_unpacklo_epi8,
    _mm256_blendv_ps, _mm256_castsi256_ps, _mm256_cvtepu8_epi32, _mm256_loadu_ps, _mm256_mul_ps,
    _mm256_permutevar8x32_ps, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm512_cvtepu8_epi32,
    _mm512_loadu_ps, _mm512_mul_ps, _mm512_permutexvar_ps, _mm512_set1_ps, _mm512_storeu_ps,
};

/// Returns the indices of sixteen elements, one per byte, from eight bytes.
#[target_feature(enable = "avx2")]
fn indices(bytes: [u8; 8]) -> __m128i {
    let pairs = _mm_cvtsi64_si128(i64::from_le_bytes(bytes));
    let low = _mm_and_si128(pairs, _mm_set1_epi8(15));
    let high = _mm_and_si128(_mm_srli_epi16::<4>(pairs), _mm_set1_epi8(15));
    _mm_unpacklo_epi8(high, low)
}

/// Writes `table[index] · scale` for whole vectors of sixteen elements.
#[target_feature(enable = "avx512f,avx512bw,avx2")]
pub(super) fn avx512(table: &[f32; 16], scale: f32, bytes: &[u8], out: &mut [f32]) {
    // SAFETY: the table has sixteen values.
    let (table, scale) = (unsafe { _mm512_loadu_ps(table.as_ptr()) }, _mm512_set1_ps(scale));
    for (bytes, out) in bytes.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<16>().0) {
        let values = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(indices(*bytes)), table);
        // SAFETY: sixteen values are written to sixteen places.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(values, scale)) };
    }
}

/// Writes `table[index] · scale` for whole vectors of sixteen elements.
#[target_feature(enable = "avx2")]
pub(super) fn avx2(table: &[f32; 16], scale: f32, bytes: &[u8], out: &mut [f32]) {
    // SAFETY: each half of the table has eight values.
    let (low, high) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))) };
    let scale = _mm256_set1_ps(scale);
    for (bytes, out) in bytes.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<16>().0) {
        let all = indices(*bytes);
        for (indices, out) in [all, _mm_srli_si128::<8>(all)].into_iter().zip(out.as_chunks_mut::<8>().0) {
            let index = _mm256_cvtepu8_epi32(indices);
            let is_high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
            let (a, b) = (_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index));
            let values = _mm256_mul_ps(_mm256_blendv_ps(a, b, is_high), scale);
            // SAFETY: eight values are written to eight places.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
        }
    }
}
