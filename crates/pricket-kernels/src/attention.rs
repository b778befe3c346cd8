//! Causal attention over keys and values as they are stored, a chunk of keys at a time.

#![allow(clippy::inline_always, reason = "loops must become part of the functions that have the instructions")]

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};

use crate::cpu::{Path, by_path};
use crate::detect::path;
use crate::lanes::{Floats, LANES};
use crate::pool::{parallel, scratch, zeros};
use crate::product::{PANEL, Product, Start};
use crate::rows::{self, Kind, Rows, q8_row};
use crate::shared::Shared;

/// Query rows that one task takes.
pub(crate) const BLOCK: usize = 60;

/// Keys that are scored, softened and mixed before the next: their scores stay in the second-level cache.
const CHUNK: usize = 1024;

/// Up to here scores are inner products against the cache as it lies; beyond, a blocked matrix product.
const FEW_ROWS: usize = 4;

/// Sizes that all rows of one attention call share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Positions of each element of the batch.
    pub(crate) time: usize,
    pub(crate) heads: usize,
    /// Query heads that share a key head.
    pub(crate) group: usize,
    pub(crate) dim: usize,
}

/// A strided `[batch, heads, time, dim]` view whose rows of `dim` are contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    pub(crate) rows: Rows<'a>,
    pub(crate) batch: usize,
    pub(crate) head: usize,
}

// SAFETY: read only, while the storage is borrowed.
unsafe impl Sync for View<'_> {}

impl<'a> View<'a> {
    pub(crate) fn new(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<(Self, [usize; 4])> {
        let (at, kind, len): (*const u8, _, _) = match storage {
            CpuStorage::F32(data) => (data.as_ptr().cast(), Kind::F32, data.len()),
            CpuStorage::F16(data) => (data.as_ptr().cast(), Kind::F16, data.len()),
            CpuStorage::BF16(data) => (data.as_ptr().cast(), Kind::BF16, data.len()),
            CpuStorage::U8(data) => (data.as_ptr(), Kind::Q8, data.len()),
            _ => bail!("attention: expected {name} in f32, f16, bf16 or q8_0"),
        };
        let (&[b, h, t, d], &[batch, head, time, inner]) = (layout.dims(), layout.stride()) else {
            bail!("attention: expected {name} of [batch, heads, time, head_dim], got {:?}", layout.dims())
        };
        if inner != 1 && d > 1 {
            bail!("attention: the rows of {name} are not contiguous");
        }
        if b * h * t * d > 0 {
            let last = layout.start_offset() + (b - 1) * batch + (h - 1) * head + (t - 1) * time + d;
            assert!(last <= len, "a layout beyond its storage");
        }
        let rows = Rows::new(at, kind, time);
        // SAFETY: inside of the storage, as was just checked, or nothing is read.
        let rows = unsafe { rows.further(layout.start_offset()) };
        Ok((Self { rows, batch, head }, [b, h, t, d]))
    }

    /// # Safety
    /// The place is there.
    pub(crate) unsafe fn from(&self, batch: usize, head: usize, time: usize) -> Rows<'a> {
        // SAFETY: promised by the caller.
        unsafe { self.rows.further(batch * self.batch + head * self.head + time * self.rows.stride) }
    }
}

/// A row of the batch: where its queries, keys and values are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    /// Of the first query, in the batch and in time.
    pub(crate) at: (usize, usize),
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) k: View<'a>,
    pub(crate) v: View<'a>,
    /// Of the row, along the first dimension of keys and of values.
    pub(crate) batch: (usize, usize),
    /// The first key, in time.
    pub(crate) first: usize,
}

/// Attends row by row, a task for each head and block of queries. `out` is `[batch, time, heads, dim]`, of which each
/// row fills its own positions.
pub(crate) fn run(q: View, rows: &[Row], s: Sizes, scale: f32, slopes: &[f32], path: Path, out: &mut [f32]) {
    let blocks = |row: usize| (0..rows[row].queries).step_by(BLOCK).map(move |from| (row, from));
    let mut blocks: Vec<(usize, usize)> = (0..rows.len()).flat_map(blocks).collect();
    // Blocks with most keys go first, so that no thread is left with one at the end.
    let visible = |&(row, from): &(usize, usize)| {
        let Row { keys, queries, .. } = rows[row];
        keys - queries + (from + BLOCK).min(queries)
    };
    blocks.sort_by_key(|block| std::cmp::Reverse(visible(block)));
    let out = Shared::new(out);
    parallel(blocks.len() * s.heads, |task| {
        let ((row, from), h) = (blocks[task / s.heads], task % s.heads);
        let row = rows[row];
        let head = Head {
            s,
            rows: BLOCK.min(row.queries - from),
            before: row.keys - row.queries + from,
            slope: slopes.get(h).copied().unwrap_or(0.0),
            scale,
            path,
        };
        let (batch, at) = (row.at.0, row.at.1 + from);
        // SAFETY: `Row`s are measured when they are made; positions from `at` on of head `h` belong to this task alone.
        unsafe {
            let (k, v) =
                (row.k.from(row.batch.0, h / s.group, row.first), row.v.from(row.batch.1, h / s.group, row.first));
            let out = out.at(((batch * s.time + at) * s.heads + h) * s.dim);
            scratch(|buffer| head.attend(q.from(batch, h, at), k, v, out, buffer));
        }
    });
}

/// A block of queries of one head.
pub(crate) struct Head {
    pub(crate) s: Sizes,
    pub(crate) rows: usize,
    /// Keys before the first query's own.
    pub(crate) before: usize,
    pub(crate) slope: f32,
    pub(crate) scale: f32,
    pub(crate) path: Path,
}

impl Head {
    /// # Safety
    /// Queries, keys and values are there; `out` can be written at `dim` places every `heads · dim`, `rows` times.
    unsafe fn attend(&self, q: Rows, k: Rows, v: Rows, out: *mut f32, buffer: &mut Vec<f32>) {
        let (dim, rows, out_stride) = (self.s.dim, self.rows, self.s.heads * self.s.dim);
        let visible = self.before + rows;
        // A panel of keys or of the last columns of values; then scores.
        let chunk = CHUNK.min(visible.next_multiple_of(PANEL));
        let panel = PANEL * dim.max(chunk);
        // Rows at a distance that is no power of two: they would share a few places of the first-level cache.
        let stride = chunk + LANES;
        buffer.resize(panel + rows * stride, 0.0);
        let (packed, scores) = buffer.split_at_mut(panel);
        let (packed, scores) = (packed.as_mut_ptr(), scores.as_mut_ptr());
        let mut running = [(f32::NEG_INFINITY, 0f32); BLOCK];
        let mut start = 0;
        // SAFETY: promised by the caller; the buffer was just made.
        unsafe {
            for row in 0..rows {
                std::slice::from_raw_parts_mut(out.add(row * out_stride), dim).fill(0.0);
            }
            while start < visible {
                let keys = chunk.min(visible - start);
                self.score(q, k.skip(start, 0), keys, packed, scores, stride);
                for (row, running) in running[..rows].iter_mut().enumerate() {
                    let last = self.before + row;
                    // Of this chunk.
                    let to = (last + 1).saturating_sub(start).min(keys);
                    let back = (last + 1).saturating_sub(start) as f32 - 1.0;
                    let bias = Bias { scale: self.scale, slope: self.slope, back };
                    let shrink = soften(self.path, scores.add(row * stride), (to, keys), bias, running);
                    if shrink != 1.0 {
                        for x in std::slice::from_raw_parts_mut(out.add(row * out_stride), dim) {
                            *x *= shrink;
                        }
                    }
                }
                self.mix(scores, stride, v.skip(start, 0), keys, packed, out);
                start += keys;
            }
            for (row, (_, sum)) in running[..rows].iter().enumerate() {
                let norm = 1.0 / sum;
                for x in std::slice::from_raw_parts_mut(out.add(row * out_stride), dim) {
                    *x *= norm;
                }
            }
        }
    }

    /// `scores = q kᵀ`, rows `stride` apart.
    ///
    /// # Safety
    /// As [`Head::attend`].
    pub(crate) unsafe fn score(
        &self,
        q: Rows,
        k: Rows,
        keys: usize,
        packed: *mut f32,
        scores: *mut f32,
        stride: usize,
    ) {
        let (dim, path) = (self.s.dim, self.path);
        // SAFETY: promised by the caller.
        unsafe {
            if self.rows <= FEW_ROWS {
                return rows::inner_products(
                    path,
                    k.kind,
                    k,
                    keys,
                    dim,
                    q.at.cast(),
                    q.stride,
                    self.rows,
                    Start::Zero,
                    scores,
                    stride,
                );
            }
            for from in (0..keys).step_by(PANEL) {
                let columns = PANEL.min(keys - from);
                rows::pack(path, k.kind, k.skip(from, 0), columns, dim, packed, PANEL);
                let product = Product {
                    a: q.at.cast(),
                    a_stride: q.stride,
                    rows: self.rows,
                    b: packed,
                    b_stride: PANEL,
                    k: dim,
                    c: scores.add(from),
                    c_stride: stride,
                    columns,
                    start: Start::Zero,
                };
                product.run(path);
            }
        }
    }

    /// `out += weights v`.
    ///
    /// # Safety
    /// As [`Head::attend`].
    unsafe fn mix(&self, weights: *const f32, stride: usize, v: Rows, keys: usize, packed: *mut f32, out: *mut f32) {
        let (dim, path, out_stride) = (self.s.dim, self.path, self.s.heads * self.s.dim);
        // SAFETY: promised by the caller.
        unsafe {
            if self.rows <= FEW_ROWS {
                for row in 0..self.rows {
                    rows::weighted_sum(
                        path,
                        v.kind,
                        v,
                        keys,
                        dim,
                        weights.add(row * stride),
                        out.add(row * out_stride),
                    );
                }
                return;
            }
            for from in (0..dim).step_by(PANEL) {
                let columns = PANEL.min(dim - from);
                let in_place = v.kind == Kind::F32 && columns == PANEL;
                if !in_place {
                    rows::widen_to(path, v.kind, v.skip(0, from), keys, columns, packed, PANEL);
                }
                let product = Product {
                    a: weights,
                    a_stride: stride,
                    rows: self.rows,
                    b: if in_place { v.skip(0, from).at.cast() } else { packed.cast_const() },
                    b_stride: if in_place { v.stride } else { PANEL },
                    k: keys,
                    c: out.add(from),
                    c_stride: out_stride,
                    columns,
                    start: Start::Output,
                };
                product.run(path);
            }
        }
    }
}

/// What is done to a score: multiplied by `scale`, less `slope` for each position that it is away from the query, key 0
/// being `back` away.
#[derive(Clone, Copy)]
pub(crate) struct Bias {
    pub(crate) scale: f32,
    pub(crate) slope: f32,
    pub(crate) back: f32,
}

by_path! {
    /// Turns the scores of the first `to` of `keys` keys into weights over the running maximum, with zeros behind. Returns the
    /// factor for what was summed before.
    ///
    /// # Safety
    /// `keys` scores can be read and written.
    pub(crate) fn soften(row: *mut f32, span: (usize, usize), bias: Bias, running: &mut (f32, f32)) -> f32 = soften_body
}

const COUNT: [f32; LANES] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// # Safety
/// As [`soften`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn soften_body<L: Floats>(
    row: *mut f32,
    (to, keys): (usize, usize),
    bias: Bias,
    (max, sum): &mut (f32, f32),
) -> f32 {
    // SAFETY: promised by the caller.
    unsafe {
        let scores = std::slice::from_raw_parts_mut(row, keys);
        scores[to..].fill(0.0);
        if to == 0 {
            return 1.0;
        }
        let biased = |at: usize, x: f32| x * bias.scale - bias.slope * (bias.back - at as f32);
        let whole = to / LANES * LANES;
        // The larger of both, or what is no number: it must not be lost.
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
        // The rest by the same function: a row's weights do not depend on where its chunks begin.
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

/// The index of `tensor` in `held`, where it goes if it is not among the last two.
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

/// Where the keys and values of a row of [`AttentionOp`] are.
#[derive(Clone, Debug)]
pub struct AttentionRow {
    /// The keys: `[.., kv_heads, time, head_dim]` with any strides whose last is 1, in f32, f16, bf16 or bytes of `q8_0`
    /// blocks.
    pub keys: Tensor,
    /// The values, likewise; may be the same tensor.
    pub values: Tensor,
    /// Index of the row along the first dimension of keys, and of values.
    pub at: (usize, usize),
    /// Index of the first key along time.
    pub first: usize,
    /// Number of keys.
    pub len: usize,
    /// Number of queries: the last positions of the keys.
    pub queries: usize,
}

/// Causal attention as a candle op over queries `[batch, heads, time, head_dim]`, f32 and contiguous. It owns its rows, as
/// [`LinearOp`](crate::LinearOp) owns its weight: each of them takes the next queries and attends to its own keys and
/// values, wherever they are stored.
///
/// `softmax(scale · q kᵀ - slope · distance) v`, of `[batch, time, heads · head_dim]`. `kv_heads` divides `heads`. The softmax
/// is the running one of Milakov and Gimelshein (2018, arXiv:1805.02867): memory is a buffer of `60 · 1024` for each thread,
/// however many keys there are. It has no backward pass: rows without a past that are
/// trained take [`SelfAttentionOp`](crate::SelfAttentionOp), others the plain twin.
#[derive(Clone, Debug)]
pub struct AttentionOp {
    /// Multiplies the scores; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// ALiBi: a key `n` positions back loses `n` times the slope of its head. Empty for none.
    pub slopes: Vec<f32>,
    /// The rows, in the order of the queries. A row's queries are within one element of the batch.
    pub rows: Vec<AttentionRow>,
}

impl CustomOp1 for AttentionOp {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, q: &CpuStorage, q_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (q, [batch, heads, time, dim]) = View::new("q", q, q_layout)?;
        if q.rows.kind != Kind::F32 || !q_layout.is_contiguous() {
            bail!("attention: expected q in f32 and contiguous");
        }
        if !self.slopes.is_empty() && self.slopes.len() != heads {
            bail!("attention: {} slopes for {heads} heads", self.slopes.len());
        }
        // One guard for each tensor: rows of a batch share them.
        let mut held = Vec::with_capacity(self.rows.len());
        let mut of_rows = Vec::with_capacity(self.rows.len());
        for row in &self.rows {
            let places = (place(&mut held, &row.keys), place(&mut held, &row.values));
            of_rows.push(places);
        }
        let guards: Vec<_> = held.iter().map(|tensor| tensor.storage_and_layout()).collect();
        let view = |name: &str, at: usize| -> Result<(View, [usize; 4])> {
            let (storage, layout) = &guards[at];
            let Storage::Cpu(storage) = &**storage else { bail!("attention: {name} are not on the CPU") };
            View::new(name, storage, layout)
        };
        let (mut rows, mut done, mut group) = (Vec::with_capacity(self.rows.len()), 0, 1);
        for (row, &(keys, values)) in self.rows.iter().zip(&of_rows) {
            let (k, k_dims) = view("keys", keys)?;
            let (v, v_dims) = view("values", values)?;
            let width = |view: &View| if view.rows.kind == Kind::Q8 { q8_row(dim) } else { dim };
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
                bail!("attention: rows with {kv_heads} and {} key heads", heads / group);
            }
            group = heads / kv_heads;
            rows.push(Row { at, queries: row.queries, keys: row.len, k, v, batch: row.at, first: row.first });
            done += row.queries;
        }
        if done != batch * time {
            bail!("attention: rows of {done} queries for {batch} times {time}");
        }
        let mut out = zeros(batch * time * heads * dim);
        if !out.is_empty() {
            run(q, &rows, Sizes { time, heads, group, dim }, self.scale, &self.slopes, path(), &mut out);
        }
        Ok((CpuStorage::F32(out), (batch, time, heads * dim).into()))
    }
}
