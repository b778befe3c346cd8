//! Products with a matrix as it is stored: few rows, many rows, many rows in bfloat16, and back.

use half::{bf16, f16};

use crate::blocks::{Blocks, dequantise};
#[cfg(target_arch = "x86_64")]
use crate::brain;
use crate::cpu::Path;
use crate::detect::path;
use crate::gelu::GeluOp;
use crate::lanes::LANES;
use crate::packed::Packed;
use crate::pool::{parallel, parallel_chunks, scratch, threads};
use crate::product::{PANEL, Product, Start};
use crate::rows::{self, Kind, Rows};
use crate::shared::Shared;
#[cfg(target_arch = "x86_64")]
use crate::tiles;
#[cfg(target_arch = "x86_64")]
use crate::unpack::unpack;

/// Up to here inner products of whole rows, each weight read once; beyond, panels and a blocked matrix product.
const FEW_ROWS: usize = 16;

/// Columns of a product that are summed before the next: a block of rows stays in the first-level cache, the panels in the
/// second.
const DEPTH: usize = 512;

/// Rows of activations that are multiplied at once.
const BLOCK: usize = 12;

/// Panels that a task packs before it multiplies, so that activations are read once for all of them.
const PANELS: usize = 4;

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
    /// Quantised.
    Blocks(&'a Blocks),
    /// Quantised, in the kernels' own order.
    Packed(&'a Packed),
}

impl Stored<'_> {
    fn len(&self) -> usize {
        match self {
            Stored::F32(w) => w.len(),
            Stored::F16(w) => w.len(),
            Stored::BF16(w) => w.len(),
            Stored::Blocks(w) => w.shape().0 * w.shape().1,
            Stored::Packed(w) => w.shape().0 * w.shape().1,
        }
    }

    /// Rows `[from, to)` of `k`, as numbers that the products read: in place, or widened into `buffer`.
    fn rows(&self, from: usize, to: usize, k: usize, buffer: &mut Vec<f32>) -> Rows {
        let whole = |at: *const u8, kind: Kind| {
            let rows = Rows { at, kind, stride: k };
            // SAFETY: the row is inside of the slice, whose length was compared with the shape.
            unsafe { rows.skip(from, 0) }
        };
        match self {
            Stored::F32(w) => whole(w.as_ptr().cast(), Kind::F32),
            Stored::F16(w) => whole(w.as_ptr().cast(), Kind::F16),
            Stored::BF16(w) => whole(w.as_ptr().cast(), Kind::BF16),
            Stored::Blocks(w) => {
                buffer.resize((to - from) * k, 0.0);
                let (kind, bytes) = (w.kind(), w.bytes());
                dequantise(kind, &bytes[kind.bytes(from * k)..kind.bytes(to * k)], buffer);
                Rows { at: buffer.as_ptr().cast(), kind: Kind::F32, stride: k }
            }
            Stored::Packed(w) => {
                buffer.resize((to - from) * k, 0.0);
                w.widen(from, to, buffer);
                Rows { at: buffer.as_ptr().cast(), kind: Kind::F32, stride: k }
            }
        }
    }
}

/// `y = x Wᵀ + b` for `x` of `[rows, in_features]` and `weight` of `[out_features, in_features]`, in f32.
///
/// Runs on the installed [`Pool`](crate::Pool).
///
/// # Panics
/// If a slice does not have the size that the others imply.
pub fn linear(
    x: &[f32],
    weight: Stored<'_>,
    bias: Option<&[f32]>,
    in_features: usize,
    out_features: usize,
    y: &mut [f32],
) {
    linear_then(x, weight, bias, None, in_features, out_features, y);
}

/// [`linear`], and a function of the result.
pub(crate) fn linear_then(
    x: &[f32],
    weight: Stored<'_>,
    bias: Option<&[f32]>,
    then: Option<GeluOp>,
    in_features: usize,
    out_features: usize,
    y: &mut [f32],
) {
    let (k, n) = (in_features, out_features);
    let rows = x.len().checked_div(k).unwrap_or(0);
    assert_eq!(x.len(), rows * k, "activations do not fill their rows");
    assert_eq!(weight.len(), n * k, "weight is not [out_features, in_features]");
    assert_eq!(y.len(), rows * n, "output is not [rows, out_features]");
    assert!(bias.is_none_or(|b| b.len() == n), "bias is not [out_features]");
    let (path, out) = (path(), Shared::new(y));
    if rows <= FEW_ROWS {
        let step = n.div_ceil(8 * threads()).clamp(8, 256);
        return parallel(n.div_ceil(step), |task| {
            scratch(|buffer| {
                let (from, to) = (task * step, ((task + 1) * step).min(n));
                let w = weight.rows(from, to, k, buffer);
                // Several rows of activations are taken a part at a time, which stays in the first-level cache.
                let part = if rows < 4 { k.max(1) } else { (8 << 10) / rows / 16 * 16 };
                for deep in (0..k).step_by(part) {
                    let start = match bias {
                        _ if deep > 0 => Start::Output,
                        Some(bias) => Start::Row(bias[from..].as_ptr()),
                        None => Start::Zero,
                    };
                    let depth = part.min(k - deep);
                    // SAFETY: sizes were compared above; columns [from, to) of `y` belong to this task alone.
                    unsafe {
                        let (w, x, y) = (w.skip(0, deep), x.as_ptr().add(deep), out.at(from));
                        rows::inner_products(path, w.kind, w, to - from, depth, x, k, rows, start, y, n);
                    }
                }
                finish(then, out, 0..rows, n, from, to);
            });
        });
    }
    let begin = bias.map_or(Begin::Zero, Begin::Bias);
    blocked(Left { at: x, row: k, column: 1 }, rows, Right::Rows(weight), (k, n), begin, then, y);
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

impl Begin<'_> {
    /// The start of the sums of a depth, for a panel that begins at `column`.
    pub(crate) fn at(self, deep: usize, column: usize) -> Start {
        match self {
            _ if deep > 0 => Start::Output,
            Begin::Zero => Start::Zero,
            Begin::Bias(bias) => Start::Row(bias[column..].as_ptr()),
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
        let collides = are_cached && self.row.is_multiple_of(2048 / 4) && rows > BLOCK / 2;
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
            assert!(line.len() >= (lines - 1) * self.column + rows && self.row == 1, "the left factor is [rows, k]");
            assert!(j + PANEL <= apart, "a row has no room for whole panels");
            let w = Rows { at: line.as_ptr().cast(), kind: Kind::F32, stride: self.column };
            // SAFETY: both were just measured.
            unsafe { rows::pack(path(), Kind::F32, w, lines, rows, copy[j..].as_mut_ptr(), apart) };
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

/// `y = left · right` for `left` of `[rows, k]` and `right` of `[k, n]`, then a function of the result.
pub(crate) fn blocked(
    left: Left<'_>,
    rows: usize,
    right: Right<'_>,
    (k, n): (usize, usize),
    begin: Begin<'_>,
    then: Option<GeluOp>,
    y: &mut [f32],
) {
    assert_eq!(y.len(), rows * n, "the output is [rows, columns]");
    #[cfg(target_arch = "x86_64")]
    if tiles::pay(path(), rows) {
        return tiles::blocked(left, rows, right, (k, n), begin, then, y);
    }
    let (path, out) = (path(), Shared::new(y));
    let panels = n.div_ceil(PANEL).div_ceil(4 * threads()).clamp(1, PANELS);
    let step = panels * PANEL;
    let across = n.div_ceil(step);
    // Where there are few columns, the rows are shared out as well.
    let down = (2 * threads()).div_ceil(across.max(1)).clamp(1, rows.div_ceil(4 * BLOCK).max(1));
    let share = rows.div_ceil(down).next_multiple_of(BLOCK).max(BLOCK);
    let product = |left: Left<'_>, task: usize| {
        let (from, to) = (task % across * step, ((task % across + 1) * step).min(n));
        let own = (task / across * share).min(rows)..((task / across + 1) * share).min(rows);
        let run = |w: Rows, packed: &mut Vec<f32>| {
            packed.resize((panels * PANEL * DEPTH).max(packed.len()), 0.0);
            for deep in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - deep);
                right.pack(path, w, (deep, depth), (from, to), depth, packed);
                // Rows that stay in the first-level cache while every panel meets them.
                for row in own.clone().step_by(BLOCK) {
                    for (i, first) in (from..to).step_by(PANEL).enumerate() {
                        // SAFETY: rows and columns are there, and panels were just measured; these rows of columns [from, to) of
                        // `y` belong to this task alone.
                        unsafe {
                            let product = Product {
                                a: left.at[row * left.row + deep..].as_ptr(),
                                a_stride: left.row,
                                rows: BLOCK.min(own.end - row),
                                b: packed[i * PANEL * depth..].as_ptr(),
                                b_stride: PANEL,
                                k: depth,
                                c: out.at(row * n + first),
                                c_stride: n,
                                columns: PANEL.min(to - first),
                                start: begin.at(deep, first),
                            };
                            product.run(path);
                        }
                    }
                }
            }
        };
        right.with_rows((from, to), k, |w| scratch(|packed| run(w, packed)));
        finish(then, out, own, n, from, to);
    };
    left.as_rows(rows, k, true, |left| parallel(across * down, |task| product(left, task)));
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
            Stored::Blocks(_) | Stored::Packed(_) => None,
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

    /// Lays columns `[from, to)` of rows `deep` and on side by side, `depth` of them, in panels of 32 columns with room for
    /// `room` rows. `w` is where they lie: of [`Right::Rows`] from the first column on.
    pub(crate) fn pack(
        self,
        path: Path,
        w: Rows,
        (deep, depth): (usize, usize),
        (from, to): (usize, usize),
        room: usize,
        packed: &mut [f32],
    ) {
        let panels = (from..to).step_by(PANEL).enumerate();
        let panels = panels.map(|(i, first)| (i * PANEL * room, first, PANEL.min(to - first)));
        assert!(packed.len() >= (to - from).next_multiple_of(PANEL) * room.max(depth), "the panels have no room");
        let packed = packed.as_mut_ptr();
        // SAFETY: rows and columns are there, and the room was just measured.
        unsafe {
            match self {
                Right::Rows(_) => panels.for_each(|(at, first, columns)| {
                    rows::pack(path, w.kind, w.skip(first - from, deep), columns, depth, packed.add(at), PANEL);
                }),
                Right::Columns(_) => {
                    for row in (0..depth).step_by(PACKED_ROWS) {
                        let count = PACKED_ROWS.min(depth - row);
                        for (at, first, columns) in panels.clone() {
                            let to = packed.add(at + row * PANEL);
                            rows::widen_to(path, w.kind, w.skip(deep + row, first), count, columns, to, PANEL);
                        }
                    }
                }
            }
        }
    }
}

/// Whether products of bfloat16 are faster: they are for many rows of floats, and of blocks where there are tiles.
#[cfg(target_arch = "x86_64")]
pub(crate) fn many_bf16_pay(weight: Stored<'_>, rows: usize) -> bool {
    let path = path();
    let fits = match weight {
        Stored::Packed(w) => path == Path::Amx && w.shape().1.is_multiple_of(DEEP),
        Stored::Blocks(_) => false,
        Stored::F32(_) | Stored::F16(_) | Stored::BF16(_) => true,
    };
    rows > FEW_ROWS && fits && brain::has_products(path)
}

/// As [`DEPTH`], for products of bfloat16, whose sums are slower to come by: a multiple of every block's columns.
#[cfg(target_arch = "x86_64")]
const DEEP: usize = 256;

/// As [`PANELS`]: products are so fast that rows must not be fetched again for every few columns.
#[cfg(target_arch = "x86_64")]
const DEEP_PANELS: usize = 8;

/// [`linear`] of many rows, both factors rounded to bfloat16.
#[cfg(target_arch = "x86_64")]
pub(crate) fn many_rows_bf16(
    x: &[f32],
    weight: Stored<'_>,
    bias: Option<&[f32]>,
    then: Option<GeluOp>,
    (k, n): (usize, usize),
    y: &mut [f32],
    path: Path,
) {
    let rows = x.len() / k;
    let block = brain::block(path);
    let out = Shared::new(y);
    let depth = (8 * DEEP).min(k.next_multiple_of(brain::STEP));
    // Rounded once for every task; rows fill up whole blocks, and columns whole steps, with zeros.
    let stride = k.next_multiple_of(brain::STEP) + brain::STEP;
    let mut short = vec![0u16; rows.next_multiple_of(block) * stride];
    parallel_chunks(&mut short, stride * 8, |i, short| {
        for (x, short) in x[(i * 8 * k).min(x.len())..].chunks_exact(k).zip(short.chunks_exact_mut(stride)) {
            // SAFETY: the processor has the instructions; a row has room for its columns.
            unsafe { brain::to_rows(x.as_ptr(), k, short.as_mut_ptr()) };
        }
    });
    let panels = n.div_ceil(PANEL).div_ceil(2 * threads()).clamp(1, DEEP_PANELS);
    let step = panels * PANEL;
    parallel(n.div_ceil(step), |task| {
        let (from, to) = (task * step, ((task + 1) * step).min(n));
        let mut pairs = vec![0u32; panels * PANEL * depth / 2];
        if path == Path::Amx {
            // SAFETY: the path is taken where the system has permitted tiles.
            unsafe { brain::configure() };
        }
        for deep in (0..k).step_by(depth) {
            let whole = depth.min(k - deep);
            let filled = whole.next_multiple_of(brain::STEP);
            scratch(|panel| {
                panel.resize(PANEL * depth, 0.0);
                for (i, first) in (from..to).step_by(PANEL).enumerate() {
                    let pairs = &mut pairs[i * PANEL * depth / 2..][..PANEL * filled / 2];
                    if let Stored::BF16(w) = weight
                        && k % 2 == 0
                    {
                        pairs[PANEL * whole / 2..].fill(0);
                        let w = Rows { at: w.as_ptr().cast(), kind: Kind::F32, stride: k / 2 };
                        // SAFETY: two columns are a word, as which they are moved; rows and columns are there.
                        unsafe {
                            let w = w.skip(first, deep / 2);
                            rows::pack(
                                path,
                                w.kind,
                                w,
                                PANEL.min(to - first),
                                whole / 2,
                                pairs.as_mut_ptr().cast(),
                                PANEL,
                            );
                        }
                        continue;
                    }
                    panel[PANEL * whole..PANEL * filled].fill(0.0);
                    match weight {
                        Stored::Packed(w) => {
                            for half in 0..PANEL.min(to - first).div_ceil(LANES) {
                                let tile = first / LANES + half;
                                unpack(w, tile, deep, whole, &mut panel[half * LANES..], path);
                            }
                        }
                        weight => {
                            let w = weight.rows(first, (first + PANEL).min(to), k, &mut Vec::new());
                            // SAFETY: rows and columns are there, and the panel was just measured.
                            unsafe {
                                let w = w.skip(0, deep);
                                rows::pack(path, w.kind, w, PANEL.min(to - first), whole, panel.as_mut_ptr(), PANEL);
                            }
                        }
                    }
                    // SAFETY: the processor has the instructions, and both were just measured.
                    unsafe {
                        brain::to_pairs(panel.as_ptr(), filled, pairs.as_mut_ptr());
                    }
                }
            });
            for row in (0..rows).step_by(block) {
                for (i, first) in (from..to).step_by(PANEL).enumerate() {
                    // SAFETY: whole blocks of rows were made; columns [from, to) of `y` belong to this task alone.
                    unsafe {
                        let product = Product {
                            a: short.as_ptr().add(row * stride + deep),
                            a_stride: stride,
                            rows: block.min(rows - row),
                            b: pairs[i * PANEL * depth / 2..].as_ptr(),
                            b_stride: PANEL,
                            k: filled,
                            c: out.at(row * n + first),
                            c_stride: n,
                            columns: PANEL.min(to - first),
                            start: match bias {
                                _ if deep > 0 => Start::Output,
                                Some(bias) => Start::Row(bias.as_ptr().add(first)),
                                None => Start::Zero,
                            },
                        };
                        product.run(path);
                    }
                }
            }
        }
        if path == Path::Amx {
            // SAFETY: configured above.
            unsafe { brain::release() };
        }
        finish(then, out, 0..rows, n, from, to);
    });
}

/// [`linear`] of a few rows, both factors rounded to bfloat16: every weight is read once.
#[cfg(target_arch = "x86_64")]
pub(crate) fn few_rows_bf16(
    x: &[f32],
    weight: &[bf16],
    bias: Option<&[f32]>,
    then: Option<GeluOp>,
    (k, n): (usize, usize),
    y: &mut [f32],
) {
    let (rows, stride) = (x.len() / k, k.next_multiple_of(brain::STEP));
    assert_eq!(
        (weight.len(), y.len()),
        (n * k, rows * n),
        "weight is [out_features, in_features], output [rows, out_features]"
    );
    assert!(bias.is_none_or(|b| b.len() == n), "bias is not [out_features]");
    let out = Shared::new(y);
    let mut short = vec![0u16; rows * stride];
    for (x, short) in x.chunks_exact(k).zip(short.chunks_exact_mut(stride)) {
        // SAFETY: the path was taken because the processor has the instructions; a row has room for its columns.
        unsafe { brain::to_rows(x.as_ptr(), k, short.as_mut_ptr()) };
    }
    let step = n.div_ceil(8 * threads()).clamp(8, 256);
    parallel(n.div_ceil(step), |task| {
        let (from, to) = (task * step, ((task + 1) * step).min(n));
        let start = bias.map_or(Start::Zero, |bias| Start::Row(bias[from..].as_ptr()));
        let w: *const u16 = weight[from * k..].as_ptr().cast();
        // SAFETY: as above; rows of the weight are there, and columns [from, to) of `y` belong to this task alone.
        unsafe { brain::inner_products(w, to - from, k, short.as_ptr(), stride, rows, start, out.at(from), n) };
        finish(then, out, 0..rows, n, from, to);
    });
}

/// Whether [`few_rows_bf16`] is what a product should take: for a single row the memory is what counts.
#[cfg(target_arch = "x86_64")]
pub(crate) fn few_bf16_pay(weight: Stored<'_>, rows: usize) -> Option<&[bf16]> {
    match weight {
        Stored::BF16(w) if (2..=FEW_ROWS).contains(&rows) && brain::has_products(path()) => Some(w),
        _ => None,
    }
}

/// Applies a function to columns `[from, to)` of some rows, which belong to the calling task alone.
pub(crate) fn finish(
    then: Option<GeluOp>,
    out: Shared<f32>,
    rows: std::ops::Range<usize>,
    n: usize,
    from: usize,
    to: usize,
) {
    let Some(gelu) = then else { return };
    for row in rows {
        // SAFETY: inside of the output, and nobody else's.
        gelu.apply(path(), unsafe { std::slice::from_raw_parts_mut(out.at(row * n + from), to - from) });
    }
}

/// `x = y W` for `y` of `[rows, out_features]`: the gradient of [`linear`] with respect to its activations.
///
/// # Panics
/// As [`linear`].
pub fn linear_transposed(y: &[f32], weight: Stored<'_>, in_features: usize, out_features: usize, x: &mut [f32]) {
    let (k, n) = (in_features, out_features);
    let rows = y.len().checked_div(n).unwrap_or(0);
    assert_eq!(y.len(), rows * n, "gradients do not fill their rows");
    assert_eq!(weight.len(), n * k, "weight is not [out_features, in_features]");
    assert_eq!(x.len(), rows * k, "output is not [rows, in_features]");
    if !matches!(weight, Stored::Blocks(_) | Stored::Packed(_)) {
        return blocked(Left { at: y, row: n, column: 1 }, rows, Right::Columns(weight), (n, k), Begin::Zero, None, x);
    }
    // Blocks are widened by whole rows.
    let path = path();
    // Weights of a step, widened, stay in the second-level cache.
    let step = ((512 << 10) / 4 / k.max(1)).clamp(8, 256);
    // Each task owns some rows of `x` and walks the weight: no two tasks add to one element.
    let share = rows.div_ceil(threads()).max(1);
    parallel_chunks(x, share * k, |i, x| {
        let rows = x.len() / k;
        let y = &y[i * share * n..][..rows * n];
        let (mut buffer, mut wide) = (Vec::new(), Vec::new());
        for from in (0..n).step_by(step) {
            let to = (from + step).min(n);
            let w = weight.rows(from, to, k, &mut buffer);
            // Rows end in a whole panel, whatever `k` is.
            let width = k.next_multiple_of(PANEL);
            wide.resize((to - from) * width, 0f32);
            // SAFETY: rows of `w` are there, those of `wide` were just made, and `x` and `y` were measured.
            unsafe {
                rows::widen_to(path, w.kind, w, to - from, k, wide.as_mut_ptr(), width);
                for column in (0..k).step_by(PANEL) {
                    let product = Product {
                        a: y.as_ptr().add(from),
                        a_stride: n,
                        rows,
                        b: wide.as_ptr().add(column),
                        b_stride: width,
                        k: to - from,
                        c: x.as_mut_ptr().add(column),
                        c_stride: k,
                        columns: PANEL.min(k - column),
                        start: if from == 0 { Start::Zero } else { Start::Output },
                    };
                    product.run(path);
                }
            }
        }
    });
}
