//! The 4-bit types of bitsandbytes: NF4 (Dettmers et al. 2023, arXiv:2305.14314) and FP4.
//!
//! The elements of a matrix form one sequence, row after row, in blocks of 64 (or another size) that may cross rows. An
//! element is a 4-bit index into a table of sixteen values between -1 and 1. Its value is multiplied by the scale of
//! its block, the largest magnitude in the block. Two elements share a byte, the first in the high half. With double
//! quantization, a scale is a byte too: an index into a table of 256 values, times a scale for every 256 blocks, plus
//! an offset for the whole matrix.
//!
//! ```
//! use pricket_kernels::{FourBit, FourBitType};
//! let values = [0.0, 1.0, -2.0, 0.5];
//! let matrix = FourBit::quantize(FourBitType::Nf4, &values, (2, 2), 64, false)?;
//! let mut row = [0.0; 2];
//! matrix.row(1, &mut row);
//! assert_eq!(row[0], -2.0);
//! # Ok::<(), candle_core::Error>(())
//! ```

mod scales;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::Arc;

use candle_core::{Result, bail};

#[cfg(target_arch = "x86_64")]
use crate::cpu::detect::isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::isa::InstructionSet;
use crate::cpu::pool::parallel_chunks;

pub use scales::{NESTED_BLOCK, Scales};

/// Default block size of bitsandbytes, in elements.
pub const FOUR_BIT_BLOCK: usize = 64;

/// Number of elements that are quantized at once, a multiple of every block size.
const PIECE: usize = 1 << 20;

/// Largest block size of bitsandbytes, in elements.
const LARGEST_BLOCK: usize = 4096;

/// A 4-bit type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FourBitType {
    /// Quantiles of a normal distribution, sorted.
    Nf4,
    /// Sign, two bits of exponent and one of mantissa.
    Fp4,
}

impl FourBitType {
    /// Returns the name in bitsandbytes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// Returns the sixteen values.
    pub const fn table(self) -> [f32; 16] {
        match self {
            Self::Nf4 => [
                -1.0,
                -0.696_192_8,
                -0.525_073_05,
                -0.394_917_5,
                -0.284_441_38,
                -0.184_773_43,
                -0.091_050_036,
                0.0,
                0.079_580_3,
                0.160_930_2,
                0.246_112_3,
                0.337_915_24,
                0.440_709_83,
                0.562_617,
                0.722_956_84,
                1.0,
            ],
            Self::Fp4 => [
                0.0,
                0.0625 / 12.0,
                8.0 / 12.0,
                1.0,
                4.0 / 12.0,
                6.0 / 12.0,
                2.0 / 12.0,
                3.0 / 12.0,
                // The pattern of -0; bitsandbytes dequantizes it to 0.
                0.0,
                -0.0625 / 12.0,
                -8.0 / 12.0,
                -1.0,
                -4.0 / 12.0,
                -6.0 / 12.0,
                -2.0 / 12.0,
                -3.0 / 12.0,
            ],
        }
    }
}

/// A matrix of 4-bit elements. Cheap to clone.
#[derive(Clone, Debug)]
pub struct FourBit {
    parts: Arc<Parts>,
    rows: usize,
    columns: usize,
    /// For each row, its position in the sequence of elements; `None` if rows are in the order of the sequence.
    order: Option<Arc<[u32]>>,
}

#[derive(Debug)]
struct Parts {
    kind: FourBitType,
    table: [f32; 16],
    block: usize,
    bytes: Vec<u8>,
    scales: Scales,
}

impl FourBit {
    /// Makes a matrix of the shape `(rows, columns)` from its parts.
    ///
    /// # Errors
    /// Returns an error if the sizes of the parts do not fit the shape and the block size, or if the block size is odd
    /// or 0.
    pub fn new(
        kind: FourBitType,
        table: [f32; 16],
        (rows, columns): (usize, usize),
        block: usize,
        bytes: Vec<u8>,
        scales: Scales,
    ) -> Result<Self> {
        let Some(elements) = rows.checked_mul(columns).filter(|_| u32::try_from(rows).is_ok()) else {
            bail!("a 4-bit matrix of [{rows}, {columns}] is too large")
        };
        if block == 0 || !block.is_multiple_of(2) {
            bail!("4-bit blocks of {block} elements; expected an even number")
        }
        if bytes.len() != elements.div_ceil(2) {
            bail!("a 4-bit matrix of [{rows}, {columns}] takes {} bytes, found {}", elements.div_ceil(2), bytes.len())
        }
        if scales.len() != elements.div_ceil(block) {
            bail!("{} blocks of {block} elements have {} scales", elements.div_ceil(block), scales.len())
        }
        if let Scales::Double { codes, table, nested, nested_block, .. } = &scales
            && (*nested_block == 0 || table.len() != 256 || nested.len() != codes.len().div_ceil(*nested_block))
        {
            bail!(
                "{} doubly quantized scales have a table of {} and {} scales for every {nested_block}",
                codes.len(),
                table.len(),
                nested.len()
            )
        }
        Ok(Self { parts: Arc::new(Parts { kind, table, block, bytes, scales }), rows, columns, order: None })
    }

    /// Quantizes `values`, row after row, to the bytes of bitsandbytes on a CPU.
    ///
    /// # Errors
    /// Returns an error if the number of values does not fit the shape, or if a value is not finite.
    pub fn quantize(
        kind: FourBitType,
        values: &[f32],
        shape: (usize, usize),
        block: usize,
        is_double: bool,
    ) -> Result<Self> {
        if values.len() != shape.0 * shape.1 {
            bail!("{} values for a matrix of [{}, {}]", values.len(), shape.0, shape.1)
        }
        Self::quantize_parts(kind, shape, block, is_double, |from, to| Ok(values[from..to].to_vec()))
    }

    /// Quantizes a matrix in pieces: `read(from, to)` returns the elements `[from, to)`. A large matrix is never in
    /// memory in f32 as a whole.
    ///
    /// # Errors
    /// Returns the errors of [`FourBit::quantize`] and of `read`.
    pub fn quantize_parts(
        kind: FourBitType,
        (rows, columns): (usize, usize),
        block: usize,
        is_double: bool,
        mut read: impl FnMut(usize, usize) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        if !block.is_power_of_two() || !(2..=LARGEST_BLOCK).contains(&block) {
            bail!("4-bit blocks of {block} elements; expected a power of two from 2 to {LARGEST_BLOCK}")
        }
        let elements = rows * columns;
        let mut bytes = vec![0u8; elements.div_ceil(2)];
        let mut scales = vec![0f32; elements.div_ceil(block)];
        let index = Indices::new(kind);
        for from in (0..elements).step_by(PIECE) {
            let to = (from + PIECE).min(elements);
            let values = read(from, to)?;
            if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                bail!("{} in row {} cannot be quantized", values[at], (from + at) / columns.max(1));
            }
            let scales = &mut scales[from / block..to.div_ceil(block)];
            for (scale, values) in scales.iter_mut().zip(values.chunks(block)) {
                *scale = values.iter().fold(0f32, |max, x| max.max(x.abs()));
            }
            let scales = &*scales;
            parallel_chunks(&mut bytes[from / 2..to.div_ceil(2)], PIECE / 64, |i, bytes| {
                let first = i * (PIECE / 64) * 2;
                for (j, byte) in bytes.iter_mut().enumerate() {
                    let at = first + 2 * j;
                    let inverse = 1.0 / scales[at / block];
                    // The last byte of an odd number of elements ends with 0.
                    let of = |at: usize| index.of(values.get(at).map_or(0.0, |x| x * inverse));
                    *byte = of(at) << 4 | of(at + 1);
                }
            });
        }
        let scales = if is_double { Scales::double(&scales) } else { Scales::Plain(scales) };
        Self::new(kind, kind.table(), (rows, columns), block, bytes, scales)
    }

    /// Returns the type.
    pub fn kind(&self) -> FourBitType {
        self.parts.kind
    }

    /// Returns the numbers of rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Returns the number of elements that share a scale.
    pub fn block(&self) -> usize {
        self.parts.block
    }

    /// Returns the sixteen values.
    pub fn table(&self) -> &[f32; 16] {
        &self.parts.table
    }

    /// Returns the elements as bitsandbytes stores them, in the order in which they were quantized.
    pub fn bytes(&self) -> &[u8] {
        &self.parts.bytes
    }

    /// Returns the scales, in the same order.
    pub fn scales(&self) -> &Scales {
        &self.parts.scales
    }

    /// Returns the size in memory, in bytes.
    pub fn size(&self) -> usize {
        self.parts.bytes.len() + self.parts.scales.bytes()
    }

    /// Returns the matrix with its rows in another order: row `i` of the result is row `order(i)`. Elements are not
    /// copied.
    #[must_use]
    pub fn reordered(&self, order: impl Fn(usize) -> usize) -> Self {
        Self { order: Some((0..self.rows).map(|row| self.place(order(row)) as u32).collect()), ..self.clone() }
    }

    fn place(&self, row: usize) -> usize {
        self.order.as_ref().map_or(row, |order| order[row] as usize)
    }

    /// Writes the values of a row.
    ///
    /// # Panics
    /// Panics if `out` is not as long as a row, or if the row does not exist.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.columns,
            "row {row} of {} rows of {}, into {} numbers",
            self.rows,
            self.columns,
            out.len()
        );
        self.parts.widen(self.place(row) * self.columns, out);
    }

    /// Writes the values of rows `[from, to)`.
    pub(crate) fn widen(&self, from: usize, to: usize, out: &mut [f32]) {
        if self.order.is_none() {
            return self.parts.widen(from * self.columns, &mut out[..(to - from) * self.columns]);
        }
        for (row, out) in (from..to).zip(out.chunks_exact_mut(self.columns.max(1))) {
            self.row(row, out);
        }
    }

    /// Returns all values, row after row.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.columns];
        parallel_chunks(&mut out, self.columns.max(1), |row, out| self.row(row, out));
        out
    }
}

impl Parts {
    /// Writes the values of the elements from `from` on.
    fn widen(&self, from: usize, out: &mut [f32]) {
        let mut at = 0;
        while at < out.len() {
            let block = (from + at) / self.block;
            let end = ((block + 1) * self.block - from).min(out.len());
            let scale = self.scales.of(block);
            self.widen_block(from + at, scale, &mut out[at..end]);
            at = end;
        }
    }

    /// Writes the values of elements that share the scale `scale`.
    fn widen_block(&self, from: usize, scale: f32, out: &mut [f32]) {
        let bytes = &self.bytes[from / 2..];
        // Whole vectors begin at the high half of a byte.
        #[cfg(target_arch = "x86_64")]
        if from.is_multiple_of(2) {
            let whole = out.len() / 16 * 16;
            if isa() >= InstructionSet::Avx512 {
                // SAFETY: `isa` shows that the processor has AVX-512.
                unsafe { x86::avx512(&self.table, scale, &bytes[..whole / 2], &mut out[..whole]) };
                return self.plain(from + whole, scale, &mut out[whole..]);
            }
            if isa() >= InstructionSet::Avx2 {
                // SAFETY: `isa` shows that the processor has AVX2.
                unsafe { x86::avx2(&self.table, scale, &bytes[..whole / 2], &mut out[..whole]) };
                return self.plain(from + whole, scale, &mut out[whole..]);
            }
        }
        let _ = bytes;
        self.plain(from, scale, out);
    }

    /// [`Parts::widen_block`] without vectors.
    fn plain(&self, from: usize, scale: f32, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            let at = from + i;
            let byte = self.bytes[at / 2];
            let code = if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
            *out = self.table[code as usize] * scale;
        }
    }
}

/// Finds the index of the nearest value of a table.
struct Indices {
    /// The values in ascending order, with their indices.
    sorted: Vec<(f32, u8)>,
    /// The midpoint between each value and the next.
    middles: Vec<f32>,
    kind: FourBitType,
}

impl Indices {
    fn new(kind: FourBitType) -> Self {
        let mut sorted: Vec<(f32, u8)> = kind.table().into_iter().zip(0..).collect();
        // Of two zeros one is kept: `of` chooses between them.
        sorted.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap_or(std::cmp::Ordering::Equal).then(a.1.cmp(&b.1)));
        sorted.dedup_by(|b, a| a.0 == b.0);
        let middles = sorted.windows(2).map(|pair| f32::midpoint(pair[0].0, pair[1].0)).collect();
        Self { sorted, middles, kind }
    }

    /// Returns the index of the value nearest to `x`, the first in the table if two are equally near.
    fn of(&self, x: f32) -> u8 {
        if x.is_nan() {
            // In a block of zeros the scale is 0, and 0 times its inverse is NaN. The result is the index of 0.
            return if self.kind == FourBitType::Nf4 { 7 } else { 0 };
        }
        let guess = self.middles.partition_point(|&middle| middle < x);
        // Near a midpoint, the rounding of the distances decides.
        let near = guess.saturating_sub(1)..=(guess + 1).min(self.sorted.len() - 1);
        let distance = |i: usize| (x - self.sorted[i].0).abs();
        let best =
            near.min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then(self.sorted[a].1.cmp(&self.sorted[b].1)));
        match self.sorted[best.unwrap_or(guess)].1 {
            // bitsandbytes searches its sorted table, in which the second 0 follows the first, so that small positive
            // numbers get its index.
            0 if self.kind == FourBitType::Fp4 && x > 0.0 => 8,
            index => index,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next() * next()).collect()
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        /// Any path writes the values of the plain one, whatever the rows' ends and order.
        #[test]
        fn rows_are_those_of_the_plain_path(rows in 1usize..9, columns in 1usize..200, block in 1u32..9, is_double: bool, fp4: bool) {
            let kind = if fp4 { FourBitType::Fp4 } else { FourBitType::Nf4 };
            let values = values(rows * columns, block + columns as u32);
            let matrix = FourBit::quantize(kind, &values, (rows, columns), 1 << block, is_double).unwrap();
            let mut plain = vec![0.0; rows * columns];
            for (i, out) in plain.iter_mut().enumerate() {
                matrix.parts.plain(i, matrix.scales().of(i / matrix.block()), std::slice::from_mut(out));
            }
            proptest::prop_assert_eq!(&matrix.to_f32(), &plain);
            let turned = matrix.reordered(|row| rows - 1 - row);
            let expected: Vec<f32> = plain.chunks(columns).rev().flatten().copied().collect();
            proptest::prop_assert_eq!(&turned.to_f32(), &expected);
            let mut some = vec![0.0; (rows - 1) * columns];
            turned.widen(1, rows, &mut some);
            proptest::prop_assert_eq!(&some, &expected[columns..]);
            // The nearest value is at most half the widest gap of the table away.
            for (i, (x, y)) in values.iter().zip(&plain).enumerate() {
                let scale = matrix.scales().of(i / matrix.block());
                let bound = scale.abs() * 0.17 + if is_double { x.abs() * 0.3 + 0.05 } else { 1e-6 };
                proptest::prop_assert!((x - y).abs() <= bound, "{} {} {}", x, y, scale);
            }
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let table = FourBitType::Nf4.table();
        let new = |shape, block, bytes: usize, scales: usize| {
            FourBit::new(FourBitType::Nf4, table, shape, block, vec![0; bytes], Scales::Plain(vec![0.0; scales]))
        };
        assert!(new((3, 5), 64, 8, 1).is_ok());
        for (shape, block, bytes, scales) in
            [((3, 5), 64, 7, 1), ((3, 5), 64, 8, 2), ((3, 5), 0, 8, 1), ((3, 5), 3, 8, 5), ((usize::MAX, 2), 64, 8, 1)]
        {
            assert!(new(shape, block, bytes, scales).is_err(), "{shape:?} {block} {bytes} {scales}");
        }
        let refused = FourBit::quantize(FourBitType::Fp4, &[1.0, f32::NAN], (1, 2), 64, false);
        assert!(refused.unwrap_err().to_string().contains("NaN in row 0"));
    }
}
