//! The operands of products of many rows: how they are stored, and how they are brought together.

use half::{bf16, f16};

use crate::blocks::{Blocks, dequantize};
use crate::cpu::detect::isa;
use crate::cpu::gelu::GeluOp;
use crate::cpu::isa::Isa;
use crate::cpu::lanes::LANES;
use crate::cpu::packed::Packed;
use crate::cpu::pool::{parallel_chunks, scratch};
use crate::cpu::product::{PANEL, Start};
#[cfg(target_arch = "x86_64")]
use crate::cpu::rows::Kind;
use crate::cpu::rows::{self, Rows};
use crate::cpu::shared::Shared;
use crate::four_bit::FourBit;

/// Rows of a panel that are packed before those of the next one: rows of weights lie pages apart, and the next panel's part
/// of a row follows that of this one.
const PACKED_ROWS: usize = 8;

/// A row-major matrix of weights as they are stored.
#[derive(Clone, Copy, Debug)]
pub enum Stored<'a> {
    /// 32-bit float.
    F32(&'a [f32]),
    /// IEEE half.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
    /// Quantized.
    Blocks(&'a Blocks),
    /// Quantized, in the kernels' own order.
    Packed(&'a Packed),
    /// Elements of 4 bits.
    FourBit(&'a FourBit),
}

impl<'s> Stored<'s> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Stored::F32(w) => w.len(),
            Stored::F16(w) => w.len(),
            Stored::BF16(w) => w.len(),
            Stored::Blocks(w) => w.shape().0 * w.shape().1,
            Stored::Packed(w) => w.shape().0 * w.shape().1,
            Stored::FourBit(w) => w.shape().0 * w.shape().1,
        }
    }

    /// Rows `[from, to)` of `k`, as numbers that the products read: in place, or widened into `buffer`.
    pub(crate) fn rows<'a>(self, from: usize, to: usize, k: usize, buffer: &'a mut Vec<f32>) -> Rows<'a>
    where
        's: 'a,
    {
        assert!(from <= to && to * k <= self.len(), "rows that are not there");
        match self {
            Stored::F32(w) => Rows::new(&w[from * k..to * k], k),
            Stored::F16(w) => Rows::new(&w[from * k..to * k], k),
            Stored::BF16(w) => Rows::new(&w[from * k..to * k], k),
            Stored::Blocks(w) => {
                buffer.resize((to - from) * k, 0.0);
                let (kind, bytes) = (w.kind(), w.bytes());
                dequantize(kind, &bytes[kind.bytes(from * k)..kind.bytes(to * k)], buffer);
                Rows::new(buffer, k)
            }
            Stored::FourBit(w) => {
                buffer.resize((to - from) * k, 0.0);
                w.widen(from, to, buffer);
                Rows::new(buffer, k)
            }
            Stored::Packed(w) => {
                buffer.resize((to - from) * k, 0.0);
                w.widen(from, to, buffer);
                Rows::new(buffer, k)
            }
        }
    }
}

/// The initial value of the sums of a blocked product.
#[derive(Clone, Copy)]
pub(crate) enum Begin<'a> {
    /// Zero.
    Zero,
    /// A bias: one number for each column.
    Bias(&'a [f32]),
    /// The present output.
    Output,
}

impl<'a> Begin<'a> {
    /// The start of the sums of a depth, for a panel that begins at `column`.
    pub(crate) fn at(self, k_block: usize, column: usize) -> Start<'a> {
        match self {
            _ if k_block > 0 => Start::Output,
            Begin::Zero => Start::Zero,
            Begin::Bias(bias) => Start::Row(&bias[column..]),
            Begin::Output => Start::Output,
        }
    }
}

/// The left factor of a blocked product: element `[i, j]` is at `row · i + column · j`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) at: &'a [f32],
    pub(crate) row: usize,
    pub(crate) column: usize,
}

impl Left<'_> {
    /// Calls `f` with these rows as products read them, element `[i, j]` at `row · i + j`. They are copied for that, `depth` columns
    /// of `rows` rows, where they lie across, and where rows `are_cached` at a distance at which the first-level cache would
    /// hold no more than a few of them.
    pub(crate) fn as_rows<R>(self, rows: usize, depth: usize, are_cached: bool, f: impl FnOnce(Left<'_>) -> R) -> R {
        // A cache of 64 sets of lines of 64 bytes: rows at this distance have two sets in common.
        let collides = are_cached && self.row.is_multiple_of(2048 / 4) && rows > LANES / 2;
        if self.column == 1 && !collides {
            return f(self);
        }
        let row = depth.next_multiple_of(LANES) + LANES;
        scratch(|copy| {
            copy.resize((rows * row).max(copy.len()), 0.0);
            let copy = &mut copy[..rows * row];
            parallel_chunks(copy, LANES * row, |i, copy| self.copy(i * LANES, depth, copy, row));
            f(Left { at: copy, row, column: 1 })
        })
    }

    /// Copies `depth` columns of the rows from `from` on, `apart` words apart in `copy`.
    fn copy(self, from: usize, depth: usize, copy: &mut [f32], apart: usize) {
        if self.column == 1 {
            for (i, copy) in copy.chunks_mut(apart).enumerate() {
                copy[..depth].copy_from_slice(&self.at[(from + i) * self.row..][..depth]);
            }
            return;
        }
        // Neighbors in memory are rows.
        let rows = copy.len() / apart;
        for j in (0..depth).step_by(PANEL) {
            let lines = PANEL.min(depth - j);
            let line = &self.at[j * self.column + from * self.row..];
            assert!(self.row == 1, "neighbors are neither rows nor columns");
            rows::pack(isa(), Rows::new(line, self.column), (lines, rows), &mut copy[j..], apart);
        }
    }
}

/// The right factor of a blocked product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    /// Its columns are the rows of what is stored.
    Rows(Stored<'a>),
    /// Its columns are the columns of what is stored: f32, f16 or bf16.
    Columns(Stored<'a>),
}

impl Right<'_> {
    /// How its numbers are stored, where they are read in place.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn kind(self) -> Option<Kind> {
        let (Right::Rows(stored) | Right::Columns(stored)) = self;
        match stored {
            Stored::F32(_) => Some(Kind::F32),
            Stored::F16(_) => Some(Kind::F16),
            Stored::BF16(_) => Some(Kind::BF16),
            Stored::Blocks(_) | Stored::Packed(_) | Stored::FourBit(_) => None,
        }
    }

    /// Calls `f` with the numbers of columns `[from, to)`, of which each has `k`, as [`pack`](Self::pack) reads them.
    pub(crate) fn with_rows(self, (from, to): (usize, usize), k: usize, f: impl FnOnce(Rows)) {
        let mut buffer = Vec::new();
        f(match self {
            Right::Rows(weight) => weight.rows(from, to, k, &mut buffer),
            Right::Columns(weight) => weight.rows(0, k, weight.len() / k.max(1), &mut buffer),
        });
    }

    /// Lays columns `[from, to)` of rows `k_block` and on side by side, `depth` of them, in panels of 32 columns with room for
    /// `room` rows. `w` is where they lie: of [`Right::Rows`] from the first column on.
    pub(crate) fn pack(
        self,
        isa: Isa,
        w: Rows<'_>,
        (k_block, depth): (usize, usize),
        (from, to): (usize, usize),
        room: usize,
        packed: &mut [f32],
    ) {
        let panels = (from..to).step_by(PANEL).enumerate();
        let panels = panels.map(|(i, first)| (i * PANEL * room, first, PANEL.min(to - first)));
        match self {
            Right::Rows(_) => panels.for_each(|(at, first, columns)| {
                rows::pack(isa, w.skip(first - from, k_block), (columns, depth), &mut packed[at..], PANEL);
            }),
            Right::Columns(_) => {
                for row in (0..depth).step_by(PACKED_ROWS) {
                    let count = PACKED_ROWS.min(depth - row);
                    for (at, first, columns) in panels.clone() {
                        let to = &mut packed[at + row * PANEL..];
                        rows::widen_to(isa, w.skip(k_block + row, first), (count, columns), to, PANEL);
                    }
                }
            }
        }
    }
}

/// Applies a function to columns `[from, to)` of some rows.
///
/// # Safety
/// No other thread touches them meanwhile.
pub(crate) unsafe fn finish(
    then: Option<GeluOp>,
    out: Shared<'_, f32>,
    rows: std::ops::Range<usize>,
    n: usize,
    from: usize,
    to: usize,
) {
    let Some(gelu) = then else { return };
    for row in rows {
        // SAFETY: nobody else touches this part of the row, as the caller promises.
        gelu.apply(isa(), unsafe { out.slice(row * n + from, to - from) });
    }
}
