//! Causal attention over a cache as it lies, a chunk of keys at a time.

#![allow(clippy::inline_always, reason = "loops must become part of the functions that have the instructions")]

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, bail};

use crate::cpu::{Path, by_path};
use crate::detect::path;
use crate::lanes::{Floats, LANES};
use crate::pool::{parallel, scratch};
use crate::product::{PANEL, Product, Start};
use crate::rows::{self, Kind, Rows, q8_row};
use crate::shared::Shared;

/// Query rows that one task takes.
const BLOCK: usize = 60;

/// Keys that are scored, softened and mixed before the next: their scores stay in the second-level cache.
const CHUNK: usize = 1024;

/// Up to here scores are inner products against the cache as it lies; beyond, a blocked matrix product.
const FEW_ROWS: usize = 4;

/// Which keys a query sees, and how far away they look: those up to its own position, less the padding on the left of
/// its row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Causal<'a> {
    /// Keys on the left of each batch row that are padding; empty means none anywhere.
    pub padding: &'a [usize],
    /// ALiBi: a key `n` positions back loses `n` times the slope of its head; empty means no such bias.
    pub slopes: &'a [f32],
}

impl Causal<'_> {
    fn first(&self, row: usize) -> usize {
        self.padding.get(row).copied().unwrap_or(0)
    }
}

/// Sizes of one attention call.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    heads: usize,
    /// Query heads that share a key head.
    group: usize,
    queries: usize,
    keys: usize,
    dim: usize,
}

/// A strided `[batch, heads, time, dim]` view whose rows of `dim` are contiguous.
#[derive(Clone, Copy, Debug)]
struct View {
    rows: Rows,
    batch: usize,
    head: usize,
}

// SAFETY: read only, while the storage is borrowed.
unsafe impl Sync for View {}

impl View {
    fn new(name: &str, storage: &CpuStorage, layout: &Layout) -> Result<(Self, [usize; 4])> {
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
        let rows = Rows { at, kind, stride: time };
        // SAFETY: inside of the storage, as was just checked, or nothing is read.
        let rows = unsafe { rows.further(layout.start_offset()) };
        Ok((Self { rows, batch, head }, [b, h, t, d]))
    }

    fn whole(data: &[f32], heads: usize, time: usize, dim: usize) -> Self {
        let rows = Rows { at: data.as_ptr().cast(), kind: Kind::F32, stride: dim };
        Self { rows, batch: heads * time * dim, head: time * dim }
    }

    /// # Safety
    /// The place is there.
    unsafe fn from(&self, batch: usize, head: usize, time: usize) -> Rows {
        // SAFETY: promised by the caller.
        unsafe { self.rows.further(batch * self.batch + head * self.head + time * self.rows.stride) }
    }
}

/// `softmax(scale · q kᵀ) v` with a causal mask: queries are the last positions of the keys.
///
/// `q` is `[batch, heads, queries, dim]`, `k` and `v` are `[batch, kv_heads, keys, dim]`, all contiguous, `kv_heads`
/// dividing `heads`; `out` is `[batch, queries, heads, dim]`, so that merging heads costs nothing. A query in the
/// padding sees only itself. The softmax is the running one of Milakov and Gimelshein (2018, arXiv:1805.02867): memory is
/// a buffer of `60 · 1024` a thread, however many keys there are.
///
/// # Panics
/// If a slice does not have the size that the others imply.
#[allow(clippy::too_many_arguments, reason = "three operands, their shape, and what to do")]
pub fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    [batch, heads, queries, dim]: [usize; 4],
    [kv_heads, keys]: [usize; 2],
    scale: f32,
    mask: Causal<'_>,
    out: &mut [f32],
) {
    assert_eq!(q.len(), batch * heads * queries * dim, "q");
    assert_eq!((k.len(), v.len()), (batch * kv_heads * keys * dim, batch * kv_heads * keys * dim), "k and v");
    assert_eq!(heads % kv_heads, 0, "kv_heads must divide heads");
    let sizes = Sizes { batch, heads, group: heads / kv_heads, queries, keys, dim };
    let (k, v) = (View::whole(k, kv_heads, keys, dim), View::whole(v, kv_heads, keys, dim));
    run(View::whole(q, heads, queries, dim), k, v, sizes, scale, mask, path(), out);
}

#[allow(clippy::too_many_arguments, reason = "as the function it is the body of")]
fn run(q: View, k: View, v: View, s: Sizes, scale: f32, mask: Causal<'_>, path: Path, out: &mut [f32]) {
    assert!(s.queries <= s.keys, "more queries than keys");
    assert_eq!(out.len(), s.batch * s.queries * s.heads * s.dim, "out");
    let out = Shared::new(out);
    let blocks = s.queries.div_ceil(BLOCK);
    parallel(s.batch * s.heads * blocks, |task| {
        // The last blocks see most keys: they go first, so that no thread is left with one at the end.
        let block = blocks - 1 - task / (s.batch * s.heads);
        let (b, h) = (task % (s.batch * s.heads) / s.heads, task % s.heads);
        let from = block * BLOCK;
        let head = Head {
            s,
            rows: BLOCK.min(s.queries - from),
            before: s.keys - s.queries + from,
            first: mask.first(b),
            slope: mask.slopes.get(h).copied().unwrap_or(0.0),
            scale,
            path,
        };
        // SAFETY: the views were measured; rows from `from` on of head `h` of batch row `b` belong to this task alone.
        unsafe {
            let (q, k, v) = (q.from(b, h, from), k.from(b, h / s.group, 0), v.from(b, h / s.group, 0));
            scratch(|buffer| head.attend(q, k, v, out.at(((b * s.queries + from) * s.heads + h) * s.dim), buffer));
        }
    });
}

/// A block of queries of one head.
struct Head {
    s: Sizes,
    rows: usize,
    /// Keys before the first query's own.
    before: usize,
    /// The first key that is not padding.
    first: usize,
    slope: f32,
    scale: f32,
    path: Path,
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
        // What is padding for every row is not looked at.
        let mut start = self.first.min(self.before);
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
                    let first = self.first.min(last);
                    // Of this chunk.
                    let (from, to) =
                        (first.saturating_sub(start).min(keys), (last + 1).saturating_sub(start).min(keys));
                    let back = (last + 1).saturating_sub(start) as f32 - 1.0;
                    let bias = Bias { scale: self.scale, slope: self.slope, back };
                    let shrink = soften(self.path, scores.add(row * stride), (from, to, keys), bias, running);
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
    unsafe fn score(&self, q: Rows, k: Rows, keys: usize, packed: *mut f32, scores: *mut f32, stride: usize) {
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
                rows::pack(path, k.kind, k.skip(from, 0), columns, dim, packed);
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
struct Bias {
    scale: f32,
    slope: f32,
    back: f32,
}

by_path! {
    /// Turns the scores of keys `[from, to)` of a row into weights over the running maximum, with zeros elsewhere. Gives what
    /// was summed before is to be multiplied with.
    ///
    /// # Safety
    /// `keys` scores can be read and written.
    fn soften(row: *mut f32, span: (usize, usize, usize), bias: Bias, running: &mut (f32, f32)) -> f32 = soften_body
}

const COUNT: [f32; LANES] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// # Safety
/// As [`soften`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn soften_body<L: Floats>(
    row: *mut f32,
    (from, to, keys): (usize, usize, usize),
    bias: Bias,
    (max, sum): &mut (f32, f32),
) -> f32 {
    // SAFETY: promised by the caller.
    unsafe {
        let scores = std::slice::from_raw_parts_mut(row, keys);
        scores[..from].fill(0.0);
        scores[to.max(from)..].fill(0.0);
        if to <= from {
            return 1.0;
        }
        let biased = |at: usize, x: f32| x * bias.scale - bias.slope * (bias.back - at as f32);
        let whole = from + (to - from) / LANES * LANES;
        // The larger of both, or what is no number: it must not be lost.
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        let mut highest = L::splat(*max);
        let mut at = from;
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
        let (mut total, mut at) = (L::splat(0.0), from);
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

/// [`attention`] as a candle op of `q` in f32, contiguous, and `k` and `v` in f32, f16, bf16 or bytes of `q8_0` blocks as
/// [`StoreOp`](crate::StoreOp) writes them, which may be strided views of a cache.
/// Output: `[batch, queries, heads * dim]`. It has no backward pass: training takes the plain twin.
#[derive(Clone, Debug)]
pub struct AttentionOp {
    /// Multiplies the scores, mostly `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// As [`Causal::padding`].
    pub padding: Vec<usize>,
    /// As [`Causal::slopes`].
    pub slopes: Vec<f32>,
}

impl CustomOp3 for AttentionOp {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, [batch, heads, queries, dim]) = View::new("q", q, q_layout)?;
        let (k, [k_batch, kv_heads, keys, k_dim]) = View::new("k", k, k_layout)?;
        let (v, v_dims) = View::new("v", v, v_layout)?;
        let width = |view: &View| if view.rows.kind == Kind::Q8 { q8_row(dim) } else { dim };
        let fits = k_batch == batch && k_dim == width(&k) && kv_heads > 0 && heads % kv_heads == 0 && queries <= keys;
        if !fits || v_dims != [batch, kv_heads, keys, width(&v)] {
            bail!("attention: q {:?}, k {:?} and v {v_dims:?} do not fit", q_layout, k_layout.dims());
        }
        if q.rows.kind != Kind::F32 || !q_layout.is_contiguous() {
            bail!("attention: expected q in f32 and contiguous");
        }
        if !self.padding.is_empty() && self.padding.len() != batch {
            bail!("attention: {} padding lengths for {batch} rows", self.padding.len());
        }
        if !self.slopes.is_empty() && self.slopes.len() != heads {
            bail!("attention: {} slopes for {heads} heads", self.slopes.len());
        }
        let sizes = Sizes { batch, heads, group: heads / kv_heads, queries, keys, dim };
        let mut out = vec![0f32; batch * queries * heads * dim];
        if !out.is_empty() {
            let mask = Causal { padding: &self.padding, slopes: &self.slopes };
            run(q, k, v, sizes, self.scale, mask, path(), &mut out);
        }
        Ok((CpuStorage::F32(out), (batch, queries, heads * dim).into()))
    }
}
