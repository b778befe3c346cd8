//! Causal attention, `softmax(scale · q kᵀ - slope · distance) v`, over keys and values in their stored type, one chunk
//! of keys at a time.

#![allow(clippy::inline_always, reason = "loops must be compiled into the functions that enable the instructions")]

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};

use crate::cpu::detect::isa;
use crate::cpu::isa::{Isa, by_isa};
use crate::cpu::lanes::{Floats, LANES};
use crate::cpu::pool::{order_is_fixed, parallel, scratch, zeros};
use crate::cpu::product::{PANEL, Product, Start};
use crate::cpu::rows::{self, Kind, Rows, q8_row};
use crate::cpu::shared::Shared;

/// Query rows of a task.
pub(crate) const BLOCK: usize = 60;

/// Keys of a chunk. The scores of a chunk stay in the second-level cache.
const CHUNK: usize = 1024;

/// Largest number of queries for which scores are inner products with the keys in place. More queries take panels and a
/// blocked product.
pub(crate) const FEW_ROWS: usize = 4;

/// Sizes that all rows of an attention call share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Positions of each batch element.
    pub(crate) time: usize,
    pub(crate) heads: usize,
    /// Query heads that share a key head.
    pub(crate) group: usize,
    pub(crate) dim: usize,
}

/// A strided `[batch, heads, time, dim]` view whose rows of `dim` numbers are contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    pub(crate) rows: Rows<'a>,
    pub(crate) batch: usize,
    pub(crate) head: usize,
}

impl<'a> View<'a> {
    pub(crate) fn new(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<(Self, [usize; 4])> {
        let (&[b, h, t, d], &[batch, head, time, inner]) = (layout.dims(), layout.stride()) else {
            bail!("attention: expected {name} of [batch, heads, time, head_dim], got {:?}", layout.dims())
        };
        if inner != 1 && d > 1 {
            bail!("attention: expected {name} with a last stride of 1");
        }
        let rows = match storage {
            CpuStorage::F32(data) => Rows::new(data, time),
            CpuStorage::F16(data) => Rows::new(data, time),
            CpuStorage::BF16(data) => Rows::new(data, time),
            CpuStorage::U8(data) => Rows::new(data, time),
            _ => bail!("attention: expected {name} in f32, f16, bf16 or q8_0"),
        };
        Ok((Self { rows: rows.further(layout.start_offset()), batch, head }, [b, h, t, d]))
    }

    /// Returns the rows of a head from position `time` on.
    ///
    /// # Panics
    /// If they begin beyond the end of the storage.
    pub(crate) fn from(&self, batch: usize, head: usize, time: usize) -> Rows<'a> {
        self.rows.further(batch * self.batch + head * self.head + time * self.rows.stride())
    }
}

/// A row of the batch: the places of its queries, keys and values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    /// Batch and time index of the first query.
    pub(crate) at: (usize, usize),
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) k: View<'a>,
    pub(crate) v: View<'a>,
    /// Index of the row along the first dimension of keys, and of values.
    pub(crate) batch: (usize, usize),
    /// Time index of the first key.
    pub(crate) first: usize,
}

/// Computes attention row by row, with a task for each head and block of queries. `out` is `[batch, time, heads, dim]`;
/// each row writes to its own positions.
pub(crate) fn run(q: View<'_>, rows: &[Row<'_>], s: Sizes, scale: f32, slopes: &[f32], isa: Isa, out: &mut [f32]) {
    let blocks = |row: usize| (0..rows[row].queries).step_by(BLOCK).map(move |from| (row, from));
    let mut blocks: Vec<(usize, usize)> = (0..rows.len()).flat_map(blocks).collect();
    // Blocks with the most keys go first, so that no thread starts a long one at the end.
    let visible = |&(row, from): &(usize, usize)| {
        let Row { keys, queries, .. } = rows[row];
        keys - queries + (from + BLOCK).min(queries)
    };
    blocks.sort_by_key(|block| std::cmp::Reverse(visible(block)));
    let out = Shared::new(out);
    let few = if order_is_fixed() { 0 } else { FEW_ROWS };
    parallel(blocks.len() * s.heads, |task| {
        let ((row, from), h) = (blocks[task / s.heads], task % s.heads);
        let row = rows[row];
        let head = Head {
            s,
            rows: BLOCK.min(row.queries - from),
            before: row.keys - row.queries + from,
            slope: slopes.get(h).copied().unwrap_or(0.0),
            scale,
            few,
            isa,
        };
        let (batch, at) = (row.at.0, row.at.1 + from);
        let (k, v) = (row.k.from(row.batch.0, h / s.group, row.first), row.v.from(row.batch.1, h / s.group, row.first));
        let out = out.from(((batch * s.time + at) * s.heads + h) * s.dim);
        // SAFETY: positions from `at` on of head `h` belong to this task alone.
        scratch(|buffer| unsafe { head.attend(q.from(batch, h, at), k, v, out, buffer) });
    });
}

/// A block of queries of one head.
pub(crate) struct Head {
    pub(crate) s: Sizes,
    pub(crate) rows: usize,
    /// Number of keys before the first query's own.
    pub(crate) before: usize,
    pub(crate) slope: f32,
    pub(crate) scale: f32,
    /// Largest number of queries that take inner products; see [`FEW_ROWS`].
    pub(crate) few: usize,
    pub(crate) isa: Isa,
}

impl Head {
    /// Writes the attention outputs to rows of `dim` numbers, `heads · dim` apart.
    ///
    /// # Safety
    /// During the call nothing else accesses these places of `out`.
    unsafe fn attend(&self, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, out: Shared<'_, f32>, buffer: &mut Vec<f32>) {
        let (dim, rows, out_stride) = (self.s.dim, self.rows, self.s.heads * self.s.dim);
        let visible = self.before + rows;
        // Memory for a panel of keys or of the last columns of values, then for scores.
        let chunk = CHUNK.min(visible.next_multiple_of(PANEL));
        let panel = PANEL * dim.max(chunk);
        // The padding avoids a distance that is a power of two, at which rows would share a few sets of the first-level
        // cache.
        let stride = chunk + LANES;
        buffer.resize(panel + rows * stride, 0.0);
        let (packed, scores) = buffer.split_at_mut(panel);
        // SAFETY: these rows are this thread's, as the caller promises, and only one of them is borrowed at a time.
        let own = |row: usize| unsafe { out.slice(row * out_stride, dim) };
        let mut running = [(f32::NEG_INFINITY, 0f32); BLOCK];
        let mut start = 0;
        for row in 0..rows {
            own(row).fill(0.0);
        }
        while start < visible {
            let keys = chunk.min(visible - start);
            self.score(q, k.skip(start, 0), keys, packed, scores, stride);
            for (row, running) in running[..rows].iter_mut().enumerate() {
                let last = self.before + row;
                // Visible keys of this chunk.
                let to = (last + 1).saturating_sub(start).min(keys);
                let back = (last + 1).saturating_sub(start) as f32 - 1.0;
                let bias = Bias { scale: self.scale, slope: self.slope, back };
                let shrink = online_softmax(self.isa, &mut scores[row * stride..][..keys], to, bias, running);
                if shrink != 1.0 {
                    for x in own(row) {
                        *x *= shrink;
                    }
                }
            }
            // SAFETY: these rows are this thread's, as above.
            unsafe { self.mix(scores, stride, v.skip(start, 0), keys, packed, out) };
            start += keys;
        }
        for (row, (_, sum)) in running[..rows].iter().enumerate() {
            let norm = 1.0 / sum;
            for x in own(row) {
                *x *= norm;
            }
        }
    }

    /// Computes `scores = q kᵀ`, in rows `stride` apart. `packed` is memory for a panel of keys.
    pub(crate) fn score(
        &self,
        q: Rows<'_>,
        k: Rows<'_>,
        keys: usize,
        packed: &mut [f32],
        scores: &mut [f32],
        stride: usize,
    ) {
        let (dim, isa, scores) = (self.s.dim, self.isa, Shared::new(scores));
        if self.rows <= self.few {
            let (q, out) = ((q.floats(), q.stride(), self.rows), (scores, stride));
            // SAFETY: this function has the only reference to the scores.
            return unsafe { rows::inner_products(isa, k, (keys, dim), q, Start::Zero, out) };
        }
        for from in (0..keys).step_by(PANEL) {
            let columns = PANEL.min(keys - from);
            rows::pack(isa, k.skip(from, 0), (columns, dim), packed, PANEL);
            let product = Product {
                a: q.floats(),
                a_stride: q.stride(),
                rows: self.rows,
                b: packed,
                b_stride: PANEL,
                k: dim,
                c: scores.from(from),
                c_stride: stride,
                columns,
                start: Start::Zero,
            };
            // SAFETY: this function has the only reference to the scores.
            unsafe { product.run(isa) };
        }
    }

    /// Computes `out += weights v`. `packed` is memory for the last columns of values.
    ///
    /// # Safety
    /// As for [`Head::attend`].
    unsafe fn mix(
        &self,
        weights: &[f32],
        stride: usize,
        v: Rows<'_>,
        keys: usize,
        packed: &mut [f32],
        out: Shared<'_, f32>,
    ) {
        let (dim, isa, out_stride) = (self.s.dim, self.isa, self.s.heads * self.s.dim);
        if self.rows <= self.few {
            for row in 0..self.rows {
                // SAFETY: the row is this thread's, as the caller promises.
                let out = unsafe { out.slice(row * out_stride, dim) };
                rows::weighted_sum(isa, v, &weights[row * stride..][..keys], out);
            }
            return;
        }
        for from in (0..dim).step_by(PANEL) {
            let columns = PANEL.min(dim - from);
            let in_place = v.kind() == Kind::F32 && columns == PANEL;
            if !in_place {
                rows::widen_to(isa, v.skip(0, from), (keys, columns), packed, PANEL);
            }
            let product = Product {
                a: weights,
                a_stride: stride,
                rows: self.rows,
                b: if in_place { v.skip(0, from).floats() } else { packed },
                b_stride: if in_place { v.stride() } else { PANEL },
                k: keys,
                c: out.from(from),
                c_stride: out_stride,
                columns,
                start: Start::Output,
            };
            // SAFETY: these rows are this thread's, as the caller promises.
            unsafe { product.run(isa) };
        }
    }
}

/// Scale and ALiBi bias of the scores of a query: `scale · score - slope · distance`. Key 0 is at distance `back`.
#[derive(Clone, Copy)]
pub(crate) struct Bias {
    pub(crate) scale: f32,
    pub(crate) slope: f32,
    pub(crate) back: f32,
}

by_isa! {
    /// Turns the first `to` scores of a row into weights relative to the running maximum, and sets the others to zero.
    /// `running` is the maximum and the sum of the weights so far. Returns the factor for the outputs summed before.
    pub(crate) fn online_softmax(scores: &mut [f32], to: usize, bias: Bias, running: &mut (f32, f32)) -> f32 = online_softmax_body
}

const COUNT: [f32; LANES] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn online_softmax_body<L: Floats>(
    scores: &mut [f32],
    to: usize,
    bias: Bias,
    (max, sum): &mut (f32, f32),
) -> f32 {
    // SAFETY: slicing checks that `to` is within the scores. Whole vectors are accessed below `whole`, and the rest one
    // by one.
    unsafe {
        scores[to..].fill(0.0);
        let row = scores.as_mut_ptr();
        if to == 0 {
            return 1.0;
        }
        let biased = |at: usize, x: f32| x * bias.scale - bias.slope * (bias.back - at as f32);
        let whole = to / LANES * LANES;
        // Returns the larger number, or `b` if either is NaN, as `L::max` does.
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        let mut highest = L::splat(*max);
        let mut at = 0;
        while at < whole {
            let back = L::madd(
                L::floats(COUNT.as_ptr()),
                L::splat(bias.slope),
                L::splat(-bias.slope * (bias.back - at as f32)),
            );
            let x = L::madd(L::floats(row.add(at)), L::splat(bias.scale), back);
            highest = L::max(highest, x);
            L::store(row.add(at), x);
            at += LANES;
        }
        let mut lanes = [0f32; LANES];
        L::store(lanes.as_mut_ptr(), highest);
        let mut highest = lanes.iter().fold(*max, |a, &b| larger(a, b));
        for at in whole..to {
            *row.add(at) = biased(at, *row.add(at));
            highest = larger(highest, *row.add(at));
        }
        let shrink = if *max == f32::NEG_INFINITY { 0.0 } else { (*max - highest).exp() };
        let (mut total, mut at) = (L::splat(0.0), 0);
        while at < whole {
            let x = L::exp(L::add(L::floats(row.add(at)), L::splat(-highest)));
            total = L::add(total, x);
            L::store(row.add(at), x);
            at += LANES;
        }
        let mut total = L::sum(total);
        // The rest goes through the same exponential, so a row's weights do not depend on the position of its chunks.
        let mut edge = [f32::NEG_INFINITY; LANES];
        let rest = to - whole;
        for (edge, at) in edge.iter_mut().zip(whole..to) {
            *edge = *row.add(at) - highest;
        }
        L::store(lanes.as_mut_ptr(), L::exp(L::floats(edge.as_ptr())));
        for (i, x) in lanes[..rest].iter().enumerate() {
            *row.add(whole + i) = *x;
            total += x;
        }
        *sum = *sum * shrink + total;
        *max = highest;
        shrink
    }
}

/// Returns the index of `tensor` in `held`. Adds the tensor if it is not among the last two.
fn place<'a>(held: &mut Vec<&'a Tensor>, tensor: &'a Tensor) -> usize {
    let recent = held.len().saturating_sub(2);
    let known = held[recent..].iter().position(|known| known.id() == tensor.id());
    known.map_or_else(
        || {
            held.push(tensor);
            held.len() - 1
        },
        |at| recent + at,
    )
}

/// Keys and values of a row of [`AttentionOp`].
#[derive(Clone, Debug)]
pub struct AttentionRow {
    /// The keys: `[.., kv_heads, time, head_dim]` in f32, f16, bf16 or bytes of `q8_0` blocks. The last stride is 1.
    pub keys: Tensor,
    /// The values, with the same layout; may be the same tensor.
    pub values: Tensor,
    /// Index of the row along the first dimension of keys, and of values.
    pub at: (usize, usize),
    /// Index of the first key along time.
    pub first: usize,
    /// Number of keys.
    pub len: usize,
    /// Number of queries. They are at the positions of the last keys.
    pub queries: usize,
}

/// Causal attention as a candle operation over queries `[batch, heads, time, head_dim]`, in f32 and contiguous:
/// `softmax(scale · q kᵀ - slope · distance) v`, as `[batch, time, heads · head_dim]`. `kv_heads` divides `heads`.
///
/// The operation owns its rows, as [`LinearOp`](crate::LinearOp) owns its weight. Each row takes the next queries and
/// attends to its own keys and values, wherever they are stored.
///
/// The softmax is the online softmax of Milakov and Gimelshein (2018, arXiv:1805.02867). Memory is a buffer of
/// `60 · 1024` numbers for each thread, regardless of the number of keys.
///
/// There is no backward pass. For gradients, rows without a past use [`SelfAttentionOp`](crate::SelfAttentionOp), and
/// others use plain candle operations.
#[derive(Clone, Debug)]
pub struct AttentionOp {
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// ALiBi slope of each head (Press et al. 2021, arXiv:2108.12409): `n · slope` is subtracted from the score of a
    /// key `n` positions back. Empty for no ALiBi.
    pub slopes: Vec<f32>,
    /// The rows, in the order of their queries. The queries of a row are within one batch element.
    pub rows: Vec<AttentionRow>,
}

impl CustomOp1 for AttentionOp {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, q: &CpuStorage, q_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (q, [batch, heads, time, dim]) = View::new("q", q, q_layout)?;
        if q.rows.kind() != Kind::F32 || !q_layout.is_contiguous() {
            bail!("attention: expected a contiguous q in f32");
        }
        if !self.slopes.is_empty() && self.slopes.len() != heads {
            bail!("attention: expected a slope for each head, got {} for {heads} heads", self.slopes.len());
        }
        // One guard for each tensor, because the rows of a batch share tensors.
        let mut held = Vec::with_capacity(self.rows.len());
        let mut of_rows = Vec::with_capacity(self.rows.len());
        for row in &self.rows {
            let places = (place(&mut held, &row.keys), place(&mut held, &row.values));
            of_rows.push(places);
        }
        let guards: Vec<_> = held.iter().map(|tensor| tensor.storage_and_layout()).collect();
        let view = |name: &str, at: usize| -> Result<(View, [usize; 4])> {
            let (storage, layout) = &guards[at];
            let Storage::Cpu(storage) = &**storage else { bail!("attention: expected {name} on the CPU") };
            View::new(name, storage, layout)
        };
        let (mut rows, mut done, mut group) = (Vec::with_capacity(self.rows.len()), 0, 1);
        for (row, &(keys, values)) in self.rows.iter().zip(&of_rows) {
            let (k, k_dims) = view("keys", keys)?;
            let (v, v_dims) = view("values", values)?;
            let width = |view: &View| if view.rows.kind() == Kind::Q8 { q8_row(dim) } else { dim };
            let kv_heads = k_dims[1];
            let has = |[b, h, t, d]: [usize; 4], at: usize, view: &View| {
                let end = row.first.checked_add(row.len);
                at < b && h == kv_heads && end.is_some_and(|end| end <= t) && d == width(view)
            };
            let at = (done / time.max(1), done % time.max(1));
            let fits = kv_heads > 0 && heads % kv_heads == 0 && (1..=row.len).contains(&row.queries);
            if !fits || !has(k_dims, row.at.0, &k) || !has(v_dims, row.at.1, &v) || at.1 + row.queries > time {
                bail!("attention: q {:?}, keys {k_dims:?} and values {v_dims:?} do not fit {row:?}", q_layout.dims());
            }
            if !rows.is_empty() && group != heads / kv_heads {
                bail!("attention: expected rows with as many key heads each, got {kv_heads} and {}", heads / group);
            }
            group = heads / kv_heads;
            rows.push(Row { at, queries: row.queries, keys: row.len, k, v, batch: row.at, first: row.first });
            done += row.queries;
        }
        if done != batch * time {
            bail!("attention: the rows have {done} queries; expected {batch} times {time}");
        }
        let mut out = zeros(batch * time * heads * dim);
        if !out.is_empty() {
            run(q, &rows, Sizes { time, heads, group, dim }, self.scale, &self.slopes, isa(), &mut out);
        }
        Ok((CpuStorage::F32(out), (batch, time, heads * dim).into()))
    }
}
