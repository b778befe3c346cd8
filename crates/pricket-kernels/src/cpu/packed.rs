//! Quantized rows in the order in which the kernels read them: sixteen rows side by side. A vector holds the same four
//! columns of each row, so sums across lanes are never needed.
//!
//! A tile of sixteen rows is a sequence of units. A unit holds one block of each row: first the scales of the sixteen
//! blocks, then for every 32 columns the integers in planes of 8, 4, 2 or 1 bits. Packing is exact. Types with
//! 32-element blocks take as many bytes as in the file. Types with 256-element blocks take up to 4 % more, because
//! their scales become whole bytes.

use std::sync::Arc;

use half::f16;

use crate::block_type::BlockType;
use crate::blocks::Blocks;
use crate::cpu::lanes::LANES;
use crate::cpu::pool::{parallel, parallel_chunks};
use crate::cpu::shared::Shared;

/// Columns of a step of the kernels.
pub(crate) const STEP: usize = 32;

/// Bytes of one bit of 32 columns of a tile.
const PLANE: usize = STEP * LANES / 8;

/// Layout of the scales at the head of a unit, where the sixteen scales of a kind are together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// A scale in f16.
    Half,
    /// Scale and minimum in f16.
    HalfMin,
    /// A scale in f32.
    Single,
    /// Scale and minimum in f32.
    SingleMin,
    /// Scale and minimum in f16, and for every 32 columns a byte that multiplies the scale and one that multiplies the
    /// minimum.
    Wide,
    /// A scale in f16, and for every 16 columns a signed byte that multiplies it.
    Fine,
    /// Scale and minimum in f16, and for every 16 columns a byte: its low half multiplies the scale, its high half the
    /// minimum.
    FineMin,
}

impl Scales {
    /// Returns the bytes of the head of a unit.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Scales::Half => 2 * LANES,
            Scales::HalfMin | Scales::Single => 4 * LANES,
            Scales::SingleMin => 8 * LANES,
            Scales::Wide | Scales::FineMin => (4 + 16) * LANES,
            Scales::Fine => (2 + 16) * LANES,
        }
    }

    /// Returns the number of steps of a unit.
    pub(crate) const fn steps(self) -> usize {
        if matches!(self, Scales::Wide | Scales::Fine | Scales::FineMin) { 8 } else { 1 }
    }

    /// Returns whether the two halves of a step have different scales.
    pub(crate) const fn halves(self) -> bool {
        matches!(self, Scales::Fine | Scales::FineMin)
    }

    /// Returns whether there are minima beside the scales.
    pub(crate) const fn min(self) -> bool {
        matches!(self, Scales::HalfMin | Scales::SingleMin | Scales::Wide | Scales::FineMin)
    }
}

/// The packed form of a block type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    /// Bits of an integer.
    pub(crate) bits: usize,
    pub(crate) scales: Scales,
    /// Number subtracted from an integer before it is multiplied by the scale.
    pub(crate) zero: i32,
}

impl Form {
    /// Returns the form of `kind`, or `None` if the type is not packed.
    pub(crate) const fn of(kind: BlockType) -> Option<Self> {
        let (bits, scales, zero) = match kind {
            BlockType::Q4_0 => (4, Scales::Half, 8),
            BlockType::Q4_1 => (4, Scales::HalfMin, 0),
            BlockType::Q5_0 => (5, Scales::Half, 16),
            BlockType::Q5_1 => (5, Scales::HalfMin, 0),
            BlockType::Q8_0 => (8, Scales::Half, 128),
            BlockType::Q4_0V1 => (4, Scales::Single, 8),
            BlockType::Q4_1V1 => (4, Scales::SingleMin, 0),
            BlockType::Q8_0V1 => (8, Scales::Single, 128),
            BlockType::Q2K => (2, Scales::FineMin, 0),
            BlockType::Q3K => (3, Scales::Fine, 4),
            BlockType::Q4K => (4, Scales::Wide, 0),
            BlockType::Q5K => (5, Scales::Wide, 0),
            BlockType::Q6K => (6, Scales::Fine, 32),
            BlockType::Q8_1 | BlockType::Q8K | BlockType::Q4_2 | BlockType::Q4_3 => return None,
        };
        Some(Self { bits, scales, zero })
    }

    /// Returns the bytes of a unit.
    pub(crate) const fn unit(&self) -> usize {
        self.scales.bytes() + self.scales.steps() * self.bits * PLANE
    }

    /// Returns scale and minimum of half a step of `row`.
    fn scale(&self, unit: &[u8], row: usize, step: usize, half: usize) -> (f32, f32) {
        let half_at = |i: usize| f16::from_le_bytes([unit[2 * i], unit[2 * i + 1]]).to_f32();
        let single_at = |i: usize| f32::from_le_bytes(std::array::from_fn(|j| unit[4 * i + j]));
        match self.scales {
            Scales::Half => (half_at(row), 0.0),
            Scales::HalfMin => (half_at(row), half_at(LANES + row)),
            Scales::Single => (single_at(row), 0.0),
            Scales::SingleMin => (single_at(row), single_at(LANES + row)),
            Scales::Wide => {
                let (scale, min) = (unit[(4 + step) * LANES + row], unit[(12 + step) * LANES + row]);
                (half_at(row) * f32::from(scale), -(half_at(LANES + row) * f32::from(min)))
            }
            Scales::Fine => {
                let scale = unit[(2 + 2 * step + half) * LANES + row] as i8;
                (half_at(row) * f32::from(scale), 0.0)
            }
            Scales::FineMin => {
                let both = unit[(4 + 2 * step + half) * LANES + row];
                (half_at(row) * f32::from(both & 15), -(half_at(LANES + row) * f32::from(both >> 4)))
            }
        }
    }
}

/// Returns the place of an integer of a step: its group of four columns, and its byte in the group's vector of sixteen
/// rows.
#[inline]
fn place(row: usize, column: usize) -> (usize, usize) {
    (column / 4, 4 * row + column % 4)
}

/// Returns the widths of the planes of integers of `bits` bits, from the lowest bit on.
const fn planes(bits: usize) -> &'static [usize] {
    match bits {
        2 => &[2],
        3 => &[2, 1],
        4 => &[4],
        5 => &[4, 1],
        6 => &[4, 2],
        _ => &[8],
    }
}

/// Calls `f` for each plane of an integer, with the byte that holds the plane's bits, their shift in it, their number,
/// and their lowest bit in the integer. Group `g` of a plane of `w` bits is in vector `g % w`, at bit `w (g / w)`. A
/// plane of one bit has a mask of 64 bits for each group.
#[inline]
fn each_plane(bits: usize, group: usize, at: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
    let (mut start, mut low) = (0, 0);
    for &width in planes(bits) {
        if width == 1 {
            f(start + 8 * group + at / 8, at % 8, 1, low);
        } else {
            f(start + 64 * (group % width) + at, width * (group / width), width, low);
        }
        start += width * PLANE;
        low += width;
    }
}

fn integer(bits: usize, body: &[u8], row: usize, column: usize) -> u8 {
    let ((group, at), mut q) = (place(row, column), 0);
    each_plane(bits, group, at, |byte, shift, width, low| {
        q |= (u16::from(body[byte] >> shift) & ((1 << width) - 1)) << low;
    });
    q as u8
}

/// Unpacks the integers of a 256-element block to `q`, and writes its scales to their places in the head of a unit.
fn unpack_block(kind: BlockType, block: &[u8], row: usize, head: &mut [u8], q: &mut [u8; 256]) {
    let mut put = |place: usize, bytes: &[u8]| head[place..place + bytes.len()].copy_from_slice(bytes);
    match kind {
        BlockType::Q2K => {
            put(2 * row, &block[80..82]);
            put(2 * (LANES + row), &block[82..84]);
            (0..16).for_each(|i| put((4 + i) * LANES + row, &block[i..=i]));
            (0..256).for_each(|i| q[i] = block[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3);
        }
        BlockType::Q3K => {
            put(2 * row, &block[108..110]);
            let scales = crate::blocks::q3k_scales(&block[96..108]);
            (0..16).for_each(|i| put((2 + i) * LANES + row, &[scales[i] as i8 as u8]));
            for (i, q) in q.iter_mut().enumerate() {
                let low = block[32 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
                *q = low | (block[i % 32] >> (i / 32) & 1) << 2;
            }
        }
        BlockType::Q4K | BlockType::Q5K => {
            put(2 * row, &block[..2]);
            put(2 * (LANES + row), &block[2..4]);
            for step in 0..8 {
                let (scale, min) = crate::blocks::scale_and_min(step, &block[4..16]);
                put((4 + step) * LANES + row, &[scale as u8]);
                put((12 + step) * LANES + row, &[min as u8]);
            }
            let (high, low) =
                if kind == BlockType::Q4K { (&[0; 32][..], &block[16..]) } else { block[16..].split_at(32) };
            for (i, q) in q.iter_mut().enumerate() {
                *q = low[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15 | (high[i % 32] >> (i / 32) & 1) << 4;
            }
        }
        BlockType::Q6K => {
            put(2 * row, &block[208..210]);
            (0..16).for_each(|i| put((2 + i) * LANES + row, &block[192 + i..=192 + i]));
            for (i, q) in q.iter_mut().enumerate() {
                let low = block[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
                *q = low | (block[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3) << 4;
            }
        }
        _ => unreachable!("{kind} has no packed blocks of 256"),
    }
}

/// Writes a 32-element block to its places in a unit. Its words stay as they are in the file, because ggml also keeps
/// columns `i` and `i + 16` in one byte.
fn weave_block(form: Form, block: &[u8], row: usize, unit: &mut [u8]) {
    let (head, body) = unit.split_at_mut(form.scales.bytes());
    let (wide, count) = match form.scales {
        Scales::Half => (2, 1),
        Scales::HalfMin => (2, 2),
        Scales::Single => (4, 1),
        _ => (4, 2),
    };
    let (scales, integers) = block.split_at(wide * count);
    for (i, scale) in scales.chunks_exact(wide).enumerate() {
        head[wide * (i * LANES + row)..][..wide].copy_from_slice(scale);
    }
    let integers = if form.bits == 5 {
        let (high, low) = integers.split_at(4);
        let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
        for group in 0..8 {
            let (at, bits) = (4 * PLANE + 8 * group + row / 2, (high >> (4 * group) & 15) as u8);
            body[at] = if row.is_multiple_of(2) { bits } else { body[at] | bits << 4 };
        }
        low
    } else {
        integers
    };
    let sign = if form.bits == 8 { 0x80 } else { 0 };
    for (word, to) in integers.as_chunks::<4>().0.iter().zip(body.chunks_exact_mut(64)) {
        to[4 * row..4 * row + 4].copy_from_slice(&word.map(|byte| byte ^ sign));
    }
}

/// A matrix of quantized rows in tiles of sixteen rows. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Packed {
    kind: BlockType,
    form: Form,
    rows: usize,
    columns: usize,
    bytes: Arc<Vec<u8>>,
}

impl Packed {
    /// Packs `blocks`. Uses the same memory if nothing else shares it and the packed form has the same size.
    ///
    /// # Errors
    /// Returns the blocks unchanged if their type is not packed.
    pub fn new(blocks: Blocks) -> Result<Self, Blocks> {
        let Some(form) = Form::of(blocks.kind()) else { return Err(blocks) };
        let (kind, (rows, columns)) = (blocks.kind(), blocks.shape());
        let (file_row, unit) = (kind.bytes(columns), form.unit());
        let units = columns / kind.elements();
        let tiles = rows.div_ceil(LANES);
        let (from, to) = (LANES * file_row, units * unit);
        let mut bytes = blocks.into_bytes();
        // The last tile is padded with zero rows, whose scales are zero.
        bytes.resize(tiles * from, 0);
        let pack = |source: &[u8], tile: &mut [u8]| {
            let mut q = [[0u8; 256]; LANES];
            let size = kind.layout().1;
            for (u, unit) in tile.chunks_exact_mut(unit).enumerate() {
                let block = |row: usize| &source[row * file_row + u * size..][..size];
                if kind.elements() == STEP {
                    (0..LANES).for_each(|row| weave_block(form, block(row), row, unit));
                    continue;
                }
                let (head, body) = unit.split_at_mut(form.scales.bytes());
                for (row, q) in q.iter_mut().enumerate() {
                    unpack_block(kind, block(row), row, head, q);
                }
                for (step, body) in body.chunks_exact_mut(form.bits * PLANE).enumerate() {
                    pack_step(form.bits, &q, step * STEP, body);
                }
            }
        };
        let bytes = if from == to {
            parallel_chunks(&mut bytes, to.max(1), |_, tile| {
                let source = tile.to_vec();
                pack(&source, tile);
            });
            bytes
        } else {
            let mut out = vec![0; tiles * to];
            parallel_chunks(&mut out, to.max(1), |i, tile| pack(&bytes[i * from..(i + 1) * from], tile));
            out
        };
        Ok(Self { kind, form, rows, columns, bytes: Arc::new(bytes) })
    }

    /// Returns the block type.
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// Returns the numbers of rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// Returns the bytes of a tile.
    pub(crate) fn tile(&self, tile: usize) -> &[u8] {
        let width = self.columns / self.kind.elements() * self.form.unit();
        &self.bytes[tile * width..(tile + 1) * width]
    }

    /// Returns the integers of a step of a row, and scale and minimum of each half.
    pub(crate) fn step(&self, row: usize, step: usize) -> ([u8; STEP], [(f32, f32); 2]) {
        let (tile, row, steps) = (self.tile(row / LANES), row % LANES, self.form.scales.steps());
        let unit = &tile[step / steps * self.form.unit()..][..self.form.unit()];
        let (head, body) = unit.split_at(self.form.scales.bytes());
        let body = &body[step % steps * self.form.bits * PLANE..];
        let q = std::array::from_fn(|column| integer(self.form.bits, body, row, column));
        (q, [0, 1].map(|half| self.form.scale(head, row, step % steps, half)))
    }

    /// Dequantizes a row into `out`.
    ///
    /// # Panics
    /// If the row does not exist, or if `out` does not have the length of a row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.columns,
            "row {row} or the output does not fit a matrix of {} rows by {} columns",
            self.rows,
            self.columns
        );
        for (step, out) in out.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
            let (q, scales) = self.step(row, step);
            for (half, out) in out.chunks_exact_mut(16).enumerate() {
                let (scale, min) = scales[half];
                for (out, q) in out.iter_mut().zip(&q[16 * half..]) {
                    *out = scale * (i32::from(*q) - self.form.zero) as f32 + min;
                }
            }
        }
    }

    /// Dequantizes rows `[from, to)` into `out`.
    pub(crate) fn widen(&self, from: usize, to: usize, out: &mut [f32]) {
        for (row, out) in (from..to).zip(out.chunks_exact_mut(self.columns)) {
            self.row(row, out);
        }
    }

    /// Dequantizes the matrix, row after row.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.columns];
        let all = Shared::new(&mut out);
        parallel(self.rows, |row| {
            // SAFETY: rows do not overlap.
            self.row(row, unsafe { all.slice(row * self.columns, self.columns) });
        });
        out
    }
}

/// Packs 32 columns of sixteen rows, from column `from` on, into planes, whole vectors at a time. [`integer`] reads
/// them.
fn pack_step(bits: usize, q: &[[u8; 256]; LANES], from: usize, body: &mut [u8]) {
    let mut groups = [[0u8; 64]; 8];
    for (row, q) in q.iter().enumerate() {
        for (group, q) in groups.iter_mut().zip(q[from..from + STEP].as_chunks::<4>().0) {
            group[4 * row..4 * row + 4].copy_from_slice(q);
        }
    }
    let (mut body, mut low) = (body, 0);
    for &width in planes(bits) {
        let (plane, rest) = body.split_at_mut(width * PLANE);
        if width == 1 {
            for (mask, group) in plane.chunks_exact_mut(8).zip(&groups) {
                let set = group.iter().enumerate().fold(0u64, |set, (i, q)| set | u64::from(q >> low & 1) << i);
                mask.copy_from_slice(&set.to_le_bytes());
            }
        } else {
            let mask = (0xffu16 >> (8 - width)) as u8;
            for (i, out) in plane.chunks_exact_mut(64).enumerate() {
                out.fill(0);
                for (shift, group) in groups.iter().skip(i).step_by(width).enumerate() {
                    for (out, q) in out.iter_mut().zip(group) {
                        *out |= (q >> low & mask) << (width * shift);
                    }
                }
            }
        }
        body = rest;
        low += width;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequantize;

    #[test]
    fn packing_changes_no_value() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        for kind in BlockType::ALL {
            let (rows, columns) = (35, 512);
            let mut bytes: Vec<u8> = (0..rows * kind.bytes(columns)).map(|_| random()).collect();
            if matches!(kind, BlockType::Q4_0V1 | BlockType::Q4_1V1 | BlockType::Q8_0V1) {
                bytes.chunks_exact_mut(4).step_by(kind.layout().1 / 4).for_each(|x| x[3] = 0x3f);
            }
            let mut expected = vec![0f32; rows * columns];
            dequantize(kind, &bytes, &mut expected);
            match Packed::new(Blocks::new(kind, rows, columns, bytes)) {
                Ok(packed) => {
                    // A NaN minimum gives NaN both ways; the bits of the NaN do not matter.
                    let same =
                        |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a == b || (a.is_nan() && b.is_nan());
                    let found = packed.to_f32();
                    let worst = found.iter().zip(&expected).position(|pair| !same(pair));
                    assert_eq!(worst, None, "{kind}: {:?}", worst.map(|i| (found[i], expected[i])));
                }
                Err(blocks) => assert!(Form::of(blocks.kind()).is_none()),
            }
        }
    }
}
