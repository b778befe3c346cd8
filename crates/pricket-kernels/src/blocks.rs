//! Quantized blocks in ggml's layout: their bytes and their values.
//!
//! A row is a sequence of small blocks. A block holds one or two scales and then packed integers. The value of an
//! element is a scale times an integer, in some types plus a minimum. Each operation rounds to f32 as ggml's C code
//! does, so dequantized tensors equal ggml's bit for bit.

#![allow(clippy::inline_always, reason = "the loops must be compiled into the functions that enable the instructions")]

use std::sync::{Arc, OnceLock};

use candle_core::quantized::QTensor;
use candle_core::{Device, Result, Tensor, bail};
use half::f16;

use crate::block_type::BlockType;
#[cfg(target_arch = "x86_64")]
use crate::cpu::detect::isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::isa::InstructionSet;
use crate::cpu::pool::{parallel, parallel_chunks};

/// A matrix of quantized rows in the order of the file. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Blocks {
    kind: BlockType,
    rows: usize,
    columns: usize,
    bytes: Arc<Vec<u8>>,
}

impl Blocks {
    /// Creates a matrix of `rows` by `columns` elements from its bytes. Every row is a whole number of blocks.
    ///
    /// # Panics
    /// If `columns` is not a multiple of the block size, or if the number of bytes does not match.
    pub fn new(kind: BlockType, rows: usize, columns: usize, bytes: Vec<u8>) -> Self {
        assert!(
            columns.is_multiple_of(kind.elements()),
            "rows of {columns} columns are not a multiple of the block size of {kind}"
        );
        assert_eq!(
            bytes.len(),
            rows * kind.bytes(columns),
            "wrong number of bytes for {rows} rows of {columns} columns in {kind}"
        );
        Self { kind, rows, columns, bytes: Arc::new(bytes) }
    }

    /// Returns the block type.
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// Returns the numbers of rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Returns the bytes, row after row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the bytes, copied if another matrix shares them.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        Arc::unwrap_or_clone(self.bytes)
    }

    /// Returns the bytes of a row.
    pub fn row(&self, row: usize) -> &[u8] {
        let width = self.kind.bytes(self.columns);
        &self.bytes[row * width..(row + 1) * width]
    }

    /// Returns the rows in another order: row `i` of the result is row `order(i)` of this matrix.
    #[must_use]
    pub fn reordered(&self, order: impl Fn(usize) -> usize) -> Self {
        let mut bytes = Vec::with_capacity(self.bytes.len());
        (0..self.rows).for_each(|row| bytes.extend_from_slice(self.row(order(row))));
        Self { bytes: Arc::new(bytes), ..self.clone() }
    }

    /// Dequantizes the matrix, row after row.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.columns];
        let width = self.columns.max(1);
        parallel_chunks(&mut out, width, |row, out| dequantize(self.kind, self.row(row), out));
        out
    }
}

/// Dequantizes whole blocks of `kind` from `bytes` into `out`.
///
/// # Panics
/// If `out` is not a whole number of blocks, or if `bytes` does not have the bytes of these blocks.
pub fn dequantize(kind: BlockType, bytes: &[u8], out: &mut [f32]) {
    assert!(
        out.len().is_multiple_of(kind.elements()) && bytes.len() == kind.bytes(out.len()),
        "bytes and values are not the same whole number of {kind} blocks"
    );
    #[cfg(target_arch = "x86_64")]
    {
        if isa() >= InstructionSet::Avx512 {
            // SAFETY: an `Isa` proves that the processor has its instructions, which include the ones enabled here.
            return unsafe { x86::avx512(kind, bytes, out) };
        }
        if isa() >= InstructionSet::Avx2 {
            // SAFETY: an `Isa` proves that the processor has its instructions, which include the ones enabled here.
            return unsafe { x86::avx2(kind, bytes, out) };
        }
    }
    plain(kind, bytes, out);
}

/// The same loops, compiled with vector instructions. They do not use fused multiply-adds, so the values stay equal to
/// ggml's.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{BlockType, plain};

    #[target_feature(enable = "avx512f,avx512vl,avx512bw,f16c")]
    pub(super) fn avx512(kind: BlockType, bytes: &[u8], out: &mut [f32]) {
        plain(kind, bytes, out);
    }

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn avx2(kind: BlockType, bytes: &[u8], out: &mut [f32]) {
        plain(kind, bytes, out);
    }
}

/// Quantizes rows of `columns` values with ggml's reference algorithm, and returns their bytes.
///
/// # Errors
/// Returns an error if a value is not finite, if a row is not a whole number of blocks, or if `kind` is not in
/// [`BlockType::QUANTIZABLE`].
pub fn quantize(kind: BlockType, values: &[f32], columns: usize) -> Result<Vec<u8>> {
    let Some(theirs) = kind.to_candle() else { bail!("quantizing to {kind} is not supported; it can only be read") };
    if columns == 0 || !columns.is_multiple_of(kind.elements()) || !values.len().is_multiple_of(columns) {
        bail!("rows of {columns} columns are not a multiple of the {kind} block size, {}", kind.elements());
    }
    if let Some(at) = values.iter().position(|x| !x.is_finite()) {
        bail!("the value {} in row {} cannot be quantized", values[at], at / columns);
    }
    let parts: Vec<_> = values.chunks(columns * 16).collect();
    let done: Vec<OnceLock<Result<Vec<u8>>>> = parts.iter().map(|_| OnceLock::new()).collect();
    parallel(parts.len(), |i| {
        done[i].get_or_init(|| {
            let tensor = Tensor::from_slice(parts[i], (parts[i].len() / columns, columns), &Device::Cpu)?;
            Ok(QTensor::quantize(&tensor, theirs)?.data()?.into_owned())
        });
    });
    let done = done.into_iter().filter_map(OnceLock::into_inner).collect::<Result<Vec<_>>>()?;
    Ok(done.concat())
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn single(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Calls `value` for each block of `N` elements in `B` bytes.
#[inline(always)]
fn blocks<const N: usize, const B: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn(&[u8; B], &mut [f32; N])) {
    for (block, out) in bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        value(block, out);
    }
}

/// Unpacks 4-bit integers: the low halves of all bytes, then the high halves.
#[inline(always)]
fn nibbles(qs: &[u8], out: &mut [f32], value: impl Fn(i32) -> f32) {
    let (low, high) = out.split_at_mut(qs.len());
    for ((q, low), high) in qs.iter().zip(low).zip(high) {
        *low = value(i32::from(q & 15));
        *high = value(i32::from(q >> 4));
    }
}

/// Unpacks 5-bit integers: four bits as in [`nibbles`], and the fifth bit of each from `qh`.
#[inline(always)]
fn five_bits(qh: &[u8], qs: &[u8], out: &mut [f32], value: impl Fn(i32) -> f32) {
    let qh = u32::from_le_bytes([qh[0], qh[1], qh[2], qh[3]]);
    let (low, high) = out.split_at_mut(16);
    for (i, ((q, low), high)) in qs.iter().zip(low).zip(high).enumerate() {
        *low = value((u32::from(q & 15) | ((qh >> i) & 1) << 4) as i32);
        *high = value((u32::from(q >> 4) | ((qh >> (i + 16)) & 1) << 4) as i32);
    }
}

/// Returns scale and minimum `j` of the twelve bytes in which `Q4K` and `Q5K` pack eight of each.
#[inline(always)]
pub(crate) fn scale_and_min(j: usize, q: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (q[j] & 63, q[j + 4] & 63)
    } else {
        (q[j + 4] & 15 | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// Returns the sixteen scales that `Q3K` packs in twelve bytes.
#[inline(always)]
pub(crate) fn q3k_scales(q: &[u8]) -> [f32; 16] {
    std::array::from_fn(|i| {
        let low = if i < 8 { q[i] & 15 } else { q[i - 8] >> 4 };
        let high = q[8 + i % 4] >> (2 * (i / 4)) & 3;
        f32::from((low | high << 4) as i8 - 32)
    })
}

#[inline(always)]
fn plain(kind: BlockType, bytes: &[u8], out: &mut [f32]) {
    match kind {
        BlockType::Q4_0 => blocks::<32, 18>(bytes, out, |b, out| {
            let d = half(b);
            nibbles(&b[2..], out, |q| (q - 8) as f32 * d);
        }),
        BlockType::Q4_0V1 => blocks::<32, 20>(bytes, out, |b, out| {
            let d = single(b);
            nibbles(&b[4..], out, |q| (q - 8) as f32 * d);
        }),
        BlockType::Q4_1 => blocks::<32, 20>(bytes, out, |b, out| {
            let (d, m) = (half(b), half(&b[2..]));
            nibbles(&b[4..], out, |q| q as f32 * d + m);
        }),
        BlockType::Q4_1V1 => blocks::<32, 24>(bytes, out, |b, out| {
            let (d, m) = (single(b), single(&b[4..]));
            nibbles(&b[8..], out, |q| q as f32 * d + m);
        }),
        BlockType::Q5_0 => blocks::<32, 22>(bytes, out, |b, out| {
            let d = half(b);
            five_bits(&b[2..6], &b[6..], out, |q| (q - 16) as f32 * d);
        }),
        BlockType::Q5_1 => blocks::<32, 24>(bytes, out, |b, out| {
            let (d, m) = (half(b), half(&b[2..]));
            five_bits(&b[4..8], &b[8..], out, |q| q as f32 * d + m);
        }),
        BlockType::Q8_0 => blocks::<32, 34>(bytes, out, |b, out| bytewise(half(b), &b[2..], out)),
        BlockType::Q8_0V1 => blocks::<32, 36>(bytes, out, |b, out| bytewise(single(b), &b[4..], out)),
        BlockType::Q8_1 => blocks::<32, 36>(bytes, out, |b, out| bytewise(half(b), &b[4..], out)),
        BlockType::Q8K => blocks::<256, 292>(bytes, out, |b, out| bytewise(single(b), &b[4..260], out)),
        BlockType::Q4_2 => blocks::<16, 10>(bytes, out, |b, out| {
            let d = half(b);
            pairs(&b[2..], out, |q| (q - 8) as f32 * d);
        }),
        BlockType::Q4_3 => blocks::<16, 12>(bytes, out, |b, out| {
            let (d, m) = (half(b), half(&b[2..]));
            pairs(&b[4..], out, |q| q as f32 * d + m);
        }),
        BlockType::Q2K => blocks::<256, 84>(bytes, out, q2k),
        BlockType::Q3K => blocks::<256, 110>(bytes, out, q3k),
        BlockType::Q4K => blocks::<256, 144>(bytes, out, |b, out| {
            let (d, min) = (half(b), half(&b[2..]));
            for (j, (qs, out)) in b[16..].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
                let ((s1, m1), (s2, m2)) = (scale_and_min(2 * j, &b[4..16]), scale_and_min(2 * j + 1, &b[4..16]));
                let (d1, m1, d2, m2) = (d * s1, min * m1, d * s2, min * m2);
                let (low, high) = out.split_at_mut(32);
                for ((q, low), high) in qs.iter().zip(low).zip(high) {
                    *low = d1 * f32::from(q & 15) - m1;
                    *high = d2 * f32::from(q >> 4) - m2;
                }
            }
        }),
        BlockType::Q5K => blocks::<256, 176>(bytes, out, |b, out| {
            let (d, min) = (half(b), half(&b[2..]));
            for (j, (qs, out)) in b[48..].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
                let ((s1, m1), (s2, m2)) = (scale_and_min(2 * j, &b[4..16]), scale_and_min(2 * j + 1, &b[4..16]));
                let (d1, m1, d2, m2) = (d * s1, min * m1, d * s2, min * m2);
                let (low, high) = out.split_at_mut(32);
                for (((q, h), low), high) in qs.iter().zip(&b[16..48]).zip(low).zip(high) {
                    *low = d1 * f32::from(q & 15 | (h >> (2 * j) & 1) << 4) - m1;
                    *high = d2 * f32::from(q >> 4 | (h >> (2 * j + 1) & 1) << 4) - m2;
                }
            }
        }),
        BlockType::Q6K => blocks::<256, 210>(bytes, out, q6k),
    }
}

#[inline(always)]
fn bytewise(d: f32, qs: &[u8], out: &mut [f32]) {
    for (q, out) in qs.iter().zip(out) {
        *out = f32::from(*q as i8) * d;
    }
}

/// Unpacks 4-bit integers, two neighbors from each byte.
#[inline(always)]
fn pairs(qs: &[u8], out: &mut [f32], value: impl Fn(i32) -> f32) {
    for (q, out) in qs.iter().zip(out.as_chunks_mut::<2>().0) {
        *out = [value(i32::from(q & 15)), value(i32::from(q >> 4))];
    }
}

#[inline(always)]
fn q2k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, qs, d, min) = (&b[..16], &b[16..80], half(&b[80..]), half(&b[82..]));
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        let (d, min) = (d * f32::from(scales[i] & 15), min * f32::from(scales[i] >> 4));
        let (from, shift) = (i / 8 * 32 + i % 2 * 16, i % 8 / 2 * 2);
        for (q, out) in qs[from..from + 16].iter().zip(out) {
            *out = d * f32::from(q >> shift & 3) - min;
        }
    }
}

#[inline(always)]
fn q3k(b: &[u8; 110], out: &mut [f32; 256]) {
    let (high, qs, scales, d) = (&b[..32], &b[32..96], q3k_scales(&b[96..108]), half(&b[108..]));
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        let d = d * scales[i];
        let (from, shift, bit) = (i / 8 * 32 + i % 2 * 16, i % 8 / 2 * 2, i / 2);
        let high = &high[i % 2 * 16..][..16];
        for ((q, h), out) in qs[from..from + 16].iter().zip(high).zip(out) {
            *out = d * f32::from((q >> shift & 3) as i8 - if h >> bit & 1 == 1 { 0 } else { 4 });
        }
    }
}

#[inline(always)]
fn q6k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = half(&b[208..]);
    for (n, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high, scales) = (&b[64 * n..][..64], &b[128 + 32 * n..][..32], &b[192 + 8 * n..][..8]);
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let (low, shift) = (&low[i % 2 * 32..][..32], i / 2 * 4);
            for (l, out) in out.iter_mut().enumerate() {
                let q = (low[l] >> shift & 15 | (high[l] >> (2 * i) & 3) << 4) as i8 - 32;
                *out = d * f32::from(scales[l / 16 + 2 * i] as i8) * f32::from(q);
            }
        }
    }
}

/// Converts blocks with f32 scales to the same type with f16 scales ([`BlockType::with_f16_scales`]). Returns `None` if
/// `kind` has no such type, or if a scale cannot be converted exactly.
pub fn with_f16_scales(kind: BlockType, bytes: &[u8]) -> Option<Vec<u8>> {
    let narrow = kind.with_f16_scales()?;
    let scales = if kind == BlockType::Q4_1V1 { 2 } else { 1 };
    let mut out = Vec::with_capacity(bytes.len() / kind.layout().1 * narrow.layout().1);
    for block in bytes.chunks_exact(kind.layout().1) {
        for scale in block[..4 * scales].chunks_exact(4) {
            let (wide, small) = (single(scale), f16::from_f32(single(scale)));
            if small.to_f32().to_bits() != wide.to_bits() {
                return None;
            }
            out.extend(small.to_le_bytes());
        }
        out.extend(&block[4 * scales..]);
    }
    Some(out)
}

/// Reorders the 4-bit integers of 32-element blocks from the layout used before 2023-05-14 to the current one. The old
/// layout has neighbors in a byte; the current one has the first sixteen integers in the low halves. `kind` determines
/// where the integers are in a block; other types are left as they are. The conversion is exact.
pub fn halves_from_pairs(kind: BlockType, bytes: &mut [u8]) {
    let (elements, width) = kind.layout();
    let from = match kind {
        BlockType::Q4_0
        | BlockType::Q4_0V1
        | BlockType::Q4_1
        | BlockType::Q4_1V1
        | BlockType::Q5_0
        | BlockType::Q5_1 => width - elements / 2,
        _ => return,
    };
    for block in bytes.chunks_exact_mut(width) {
        let qs = &mut block[from..];
        let element = |qs: &[u8; 16], i: usize| qs[i / 2] >> (4 * (i % 2)) & 15;
        let old: [u8; 16] = std::array::from_fn(|i| qs[i]);
        for (i, q) in qs.iter_mut().enumerate() {
            *q = element(&old, i) | element(&old, i + 16) << 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares with candle on blocks that candle made.
    #[test]
    fn values_are_those_of_another_reader() {
        let source = Tensor::randn(0f32, 1.0, (6, 512), &Device::Cpu).unwrap();
        for kind in BlockType::QUANTIZABLE {
            let quantized = QTensor::quantize(&source, kind.to_candle().unwrap()).unwrap();
            let bytes = quantized.data().unwrap().into_owned();
            let expected: Vec<f32> =
                quantized.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let values: Vec<f32> = source.flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(quantize(kind, &values, 512).unwrap(), bytes, "{kind}");
            let blocks = Blocks::new(kind, 6, 512, bytes);
            assert_eq!(blocks.to_f32(), expected, "{kind}");
            // The plain loop gives the same bits on every processor.
            let mut slow = vec![0.0; 512];
            plain(kind, blocks.row(3), &mut slow);
            assert_eq!(slow, expected[3 * 512..4 * 512], "{kind}");
        }
    }

    #[test]
    fn what_cannot_be_quantized_is_refused() {
        assert!(
            quantize(BlockType::Q4_0, &[1.0; 33], 33)
                .unwrap_err()
                .to_string()
                .contains("not a multiple of the q4_0 block size")
        );
        let mut values = [1.0; 64];
        values[40] = f32::NAN;
        assert!(quantize(BlockType::Q8_0, &values, 32).unwrap_err().to_string().contains("NaN in row 1"));
        assert!(quantize(BlockType::Q4_2, &values[..32], 32).is_err());
        assert_eq!(
            (BlockType::Q4K.fitting(512), BlockType::Q4K.fitting(96)),
            (Some(BlockType::Q4K), Some(BlockType::Q5_0))
        );
        assert_eq!((BlockType::Q6K.fitting(48), "Q4_K".parse()), (None, Ok(BlockType::Q4K)));
    }

    #[test]
    fn old_blocks_are_read_by_hand() {
        let mut pairs: Vec<u8> = 2.5f32.to_le_bytes().to_vec();
        pairs.extend((0..16).map(|k: u8| (2 * k % 16) | ((2 * k + 1) % 16) << 4));
        let value = |i: usize| (i % 16) as f32 * 2.5 - 20.0;
        halves_from_pairs(BlockType::Q4_0V1, &mut pairs);
        let mut out = [0.0; 32];
        dequantize(BlockType::Q4_0V1, &pairs, &mut out);
        assert!(out.iter().enumerate().all(|(i, &x)| x == value(i)), "{out:?}");
        let mut small = half::f16::from_f32(0.5).to_le_bytes().to_vec();
        small.extend([0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe]);
        let mut out = [0.0; 16];
        dequantize(BlockType::Q4_2, &small, &mut out);
        assert!(out.iter().enumerate().all(|(i, &x)| x == (i as f32 - 8.0) * 0.5), "{out:?}");
    }

    #[test]
    fn scales_that_are_f16_lose_nothing() {
        let block = |scale: f32| [&scale.to_le_bytes()[..], &[0x5a; 16]].concat();
        let whole = [block(0.5), block(-3.0)].concat();
        let small = with_f16_scales(BlockType::Q4_0V1, &whole).unwrap();
        let (mut a, mut b) = ([0.0; 64], [0.0; 64]);
        dequantize(BlockType::Q4_0V1, &whole, &mut a);
        dequantize(BlockType::Q4_0, &small, &mut b);
        assert_eq!((a, small.len()), (b, 36));
        assert!(with_f16_scales(BlockType::Q4_0V1, &[block(0.5), block(0.1)].concat()).is_none());
    }

    #[test]
    fn every_type_fills_its_layout() {
        for kind in BlockType::ALL {
            let (elements, bytes) = kind.layout();
            let mut out = vec![f32::NAN; elements * 3];
            dequantize(kind, &vec![0; bytes * 3], &mut out);
            assert!(out.iter().all(|x| *x == 0.0), "{kind}");
        }
    }
}
