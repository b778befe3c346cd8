//! The operands of products of many rows: the types in which they are stored, and their packing into panels.

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

/// Rows of a panel that are packed before those of the next panel. Rows of weights are pages apart in memory, and the
/// next panel reads the part of a row that follows.
const PACKED_ROWS: usize = 8;

/// A row-major matrix of weights in its stored type.
#[derive(Clone, Copy, Debug)]
pub enum Stored<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE half-precision floats.
    F16(&'a [f16]),
    /// bfloat16 numbers.
    BF16(&'a [bf16]),
    /// Quantized blocks in the order of the file.
    Blocks(&'a Blocks),
    /// Quantized blocks in the order in which the kernels read them.
    Packed(&'a Packed),
    /// 4-bit types of bitsandbytes.
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

    /// Returns rows `[from, to)`, of `k` columns each, as numbers that the products read: in place, or dequantized into
    /// `buffer`.
    pub(crate) fn rows<'a>(self, from: usize, to: usize, k: usize, buffer: &'a mut Vec<f32>) -> Rows<'a>
    where
        's: 'a,
    {
        assert!(from <= to && to * k <= self.len(), "rows beyond the end of the weight");
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
    /// All sums start at zero.
    Zero,
    /// Sums start from a bias, one number for each column.
    Bias(&'a [f32]),
    /// Sums are added to the present output.
    Output,
}

impl<'a> Begin<'a> {
    /// Returns the start of the sums over the depth that begins at `k_block`, for a panel that begins at `column`.
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
    /// Calls `f` with the rows as the products read them, element `[i, j]` at `row · i + j`.
    ///
    /// The first `depth` columns of `rows` rows are copied if the columns are not contiguous. They are also copied if
    /// `are_cached` is set and the distance between rows lets the first-level cache hold only a few of them.
    pub(crate) fn as_rows<R>(self, rows: usize, depth: usize, are_cached: bool, f: impl FnOnce(Left<'_>) -> R) -> R {
        // In a cache of 64 sets of 64-byte lines, rows at this distance share two sets.
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

    /// Copies `depth` columns of the rows from `from` on into `copy`, where the rows begin `apart` numbers apart.
    fn copy(self, from: usize, depth: usize, copy: &mut [f32], apart: usize) {
        if self.column == 1 {
            for (i, copy) in copy.chunks_mut(apart).enumerate() {
                copy[..depth].copy_from_slice(&self.at[(from + i) * self.row..][..depth]);
            }
            return;
        }
        // The rows are contiguous in memory: transpose.
        let rows = copy.len() / apart;
        for j in (0..depth).step_by(PANEL) {
            let lines = PANEL.min(depth - j);
            let line = &self.at[j * self.column + from * self.row..];
            assert!(self.row == 1, "neither the rows nor the columns are contiguous");
            rows::pack(isa(), Rows::new(line, self.column), (lines, rows), &mut copy[j..], apart);
        }
    }
}

/// The right factor of a blocked product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    /// The columns of the factor are the rows of the stored matrix.
    Rows(Stored<'a>),
    /// The columns of the factor are the columns of the stored matrix, which is f32, f16 or bf16.
    Columns(Stored<'a>),
}

impl Right<'_> {
    /// Returns the type of the stored numbers if they are read in place, and `None` for quantized weights.
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

    /// Calls `f` with the numbers of columns `[from, to)`, each of `k` elements, in the layout that
    /// [`pack`](Self::pack) reads.
    pub(crate) fn with_rows(self, (from, to): (usize, usize), k: usize, f: impl FnOnce(Rows)) {
        let mut buffer = Vec::new();
        f(match self {
            Right::Rows(weight) => weight.rows(from, to, k, &mut buffer),
            Right::Columns(weight) => weight.rows(0, k, weight.len() / k.max(1), &mut buffer),
        });
    }

    /// Packs columns `[from, to)` side by side, `depth` rows of the factor from row `k_block` on, in panels of 32
    /// columns with room for `room` rows each. `w` is the source from [`with_rows`](Self::with_rows); for
    /// [`Right::Rows`] it begins at the first column.
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

/// Applies the function `then`, if any, to columns `[from, to)` of the given rows.
///
/// # Safety
/// No other thread accesses them during the call.
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
        // SAFETY: nothing else accesses this part of the row, as the caller promises.
        gelu.apply(isa(), unsafe { out.slice(row * n + from, to - from) });
    }
}
