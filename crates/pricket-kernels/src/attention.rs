use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, bail};

use crate::dot;
use crate::pool::{parallel, scratch};
use crate::shared::Shared;

/// Query rows that one task takes: the buffer of scores is this times the number of keys.
const BLOCK: usize = 64;

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
struct Rows<'a> {
    data: &'a [f32],
    batch: usize,
    head: usize,
    time: usize,
}

impl<'a> Rows<'a> {
    fn new(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<(Self, [usize; 4])> {
        let CpuStorage::F32(data) = storage else { bail!("attention: expected {name} in f32") };
        let (&[b, h, t, d], &[batch, head, time, inner]) = (layout.dims(), layout.stride()) else {
            bail!("attention: expected {name} of [batch, heads, time, head_dim], got {:?}", layout.dims())
        };
        if inner != 1 && d > 1 {
            bail!("attention: the rows of {name} are not contiguous");
        }
        Ok((Self { data: &data[layout.start_offset()..], batch, head, time }, [b, h, t, d]))
    }

    fn from(&self, batch: usize, head: usize, time: usize) -> &'a [f32] {
        &self.data[batch * self.batch + head * self.head + time * self.time..]
    }
}

/// `softmax(scale · q kᵀ) v` with a causal mask: queries are the last positions of the keys.
///
/// `q` is `[batch, heads, queries, dim]`, `k` and `v` are `[batch, kv_heads, keys, dim]`, all contiguous, `kv_heads`
/// dividing `heads`; `out` is `[batch, queries, heads, dim]`, so that merging heads costs nothing. A query in the
/// padding sees only itself. Memory is one buffer of `64 · keys` a thread.
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
    let whole = |data, heads: usize, time: usize| Rows { data, batch: heads * time * dim, head: time * dim, time: dim };
    assert_eq!(q.len(), batch * heads * queries * dim, "q");
    assert_eq!((k.len(), v.len()), (batch * kv_heads * keys * dim, batch * kv_heads * keys * dim), "k and v");
    assert_eq!(heads % kv_heads, 0, "kv_heads must divide heads");
    let sizes = Sizes { batch, heads, group: heads / kv_heads, queries, keys, dim };
    run(whole(q, heads, queries), whole(k, kv_heads, keys), whole(v, kv_heads, keys), sizes, scale, mask, out);
}

fn run(q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, s: Sizes, scale: f32, mask: Causal<'_>, out: &mut [f32]) {
    assert!(s.queries <= s.keys, "more queries than keys");
    assert_eq!(out.len(), s.batch * s.queries * s.heads * s.dim, "out");
    let out = Shared::new(out);
    let blocks = s.queries.div_ceil(BLOCK);
    parallel(s.batch * s.heads * blocks, |task| scratch(|scores| {
        // The last blocks see most keys: they go first, so that no thread is left with one at the end.
        let block = blocks - 1 - task / (s.batch * s.heads);
        let (b, h) = (task % (s.batch * s.heads) / s.heads, task % s.heads);
        let (from, to) = (block * BLOCK, ((block + 1) * BLOCK).min(s.queries));
        let visible = s.keys - s.queries + to;
        let rows = to - from;
        scores.resize(rows * visible, 0.0);
        let (q, k, v) =
            ((q.from(b, h, from), q.time), (k.from(b, h / s.group, 0), k.time), (v.from(b, h / s.group, 0), v.time));
        score(q, k, rows, visible, s.dim, scores);
        for (i, row) in scores.chunks_exact_mut(visible).enumerate() {
            let last = s.keys - s.queries + from + i;
            softmax(row, mask.first(b).min(last), last, scale, mask.slopes.get(h).copied().unwrap_or(0.0));
        }
        // SAFETY: rows [from, to) of head `h` of batch row `b` belong to this task alone.
        unsafe {
            mix(
                scores,
                v,
                rows,
                visible,
                s.dim,
                out.at(((b * s.queries + from) * s.heads + h) * s.dim),
                s.heads * s.dim,
            );
        }
    }));
}

/// `scores = q kᵀ`.
fn score(
    (q, q_stride): (&[f32], usize),
    (k, k_stride): (&[f32], usize),
    rows: usize,
    visible: usize,
    dim: usize,
    scores: &mut [f32],
) {
    if rows <= FEW_ROWS {
        for (i, row) in scores.chunks_exact_mut(visible).enumerate() {
            let q = &q[i * q_stride..][..dim];
            for (j, score) in row.iter_mut().enumerate() {
                *score = dot(q, &k[j * k_stride..][..dim]);
            }
        }
        return;
    }
    assert!(q.len() >= (rows - 1) * q_stride + dim && k.len() >= (visible - 1) * k_stride + dim);
    // SAFETY: the operands were just checked, and `scores` is [rows, visible].
    unsafe {
        gemm::gemm(
            rows,
            visible,
            dim,
            scores.as_mut_ptr(),
            1,
            visible as isize,
            false,
            q.as_ptr(),
            1,
            q_stride as isize,
            k.as_ptr(),
            k_stride as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Softmax of `scale * row`, less `slope` for each position before the last, over `[first, last]`; zero elsewhere.
fn softmax(row: &mut [f32], first: usize, last: usize, mut scale: f32, slope: f32) {
    row[..first].fill(0.0);
    row[last + 1..].fill(0.0);
    let row = &mut row[first..=last];
    if slope != 0.0 {
        for (back, x) in row.iter_mut().rev().enumerate() {
            *x = *x * scale - slope * back as f32;
        }
        scale = 1.0;
    }
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in row.iter_mut() {
        *x = ((*x - max) * scale).exp();
        sum += *x;
    }
    // A row of NaN stays NaN: the caller looks for it in the logits.
    let norm = 1.0 / sum;
    for x in row {
        *x *= norm;
    }
}

/// `out = weights v`, rows of `out` being `out_stride` apart.
///
/// # Safety
/// `out` can be written at `dim` places every `out_stride`, `rows` times.
unsafe fn mix(
    weights: &[f32],
    (v, v_stride): (&[f32], usize),
    rows: usize,
    visible: usize,
    dim: usize,
    out: *mut f32,
    out_stride: usize,
) {
    if rows <= FEW_ROWS {
        for (i, row) in weights.chunks_exact(visible).enumerate() {
            // SAFETY: promised by the caller.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add(i * out_stride), dim) };
            out.fill(0.0);
            for (j, &weight) in row.iter().enumerate() {
                if weight != 0.0 {
                    for (o, x) in out.iter_mut().zip(&v[j * v_stride..][..dim]) {
                        *o += weight * x;
                    }
                }
            }
        }
        return;
    }
    assert!(v.len() >= (visible - 1) * v_stride + dim);
    // SAFETY: `weights` is [rows, visible], `v` was just checked, `out` is promised by the caller.
    unsafe {
        gemm::gemm(
            rows,
            dim,
            visible,
            out,
            1,
            out_stride as isize,
            false,
            weights.as_ptr(),
            1,
            visible as isize,
            v.as_ptr(),
            1,
            v_stride as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// [`attention`] as a candle op of `q`, `k` and `v` in f32, which may be strided views of a cache.
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
        let (q, [batch, heads, queries, dim]) = Rows::new("q", q, q_layout)?;
        let (k, [k_batch, kv_heads, keys, k_dim]) = Rows::new("k", k, k_layout)?;
        let (v, v_dims) = Rows::new("v", v, v_layout)?;
        let fits = k_batch == batch && k_dim == dim && kv_heads > 0 && heads % kv_heads == 0 && queries <= keys;
        if !fits || v_dims != [batch, kv_heads, keys, dim] {
            bail!("attention: q {:?}, k {:?} and v {v_dims:?} do not fit", q_layout, k_layout.dims());
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
            run(q, k, v, sizes, self.scale, Causal { padding: &self.padding, slopes: &self.slopes }, &mut out);
        }
        Ok((CpuStorage::F32(out), (batch, queries, heads * dim).into()))
    }
}
