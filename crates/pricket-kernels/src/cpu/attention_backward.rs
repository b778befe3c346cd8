//! Causal attention with a gradient. The backward pass computes the probabilities again, one block of queries at a
//! time.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};

use crate::cpu::attention::{BLOCK, Bias, FEW_ROWS, Head, Row, Sizes, View, online_softmax, run};
use crate::cpu::detect::isa;
use crate::cpu::isa::Isa;
use crate::cpu::lanes::LANES;
use crate::cpu::pool::{parallel, scratch, zeros};
use crate::cpu::product::{PANEL, Product, Start};
use crate::cpu::rows::{self, Kind, Rows};
use crate::cpu::shared::Shared;

/// Causal self-attention of rows without a past, as a candle operation with a gradient.
///
/// Inputs: `q` of `[batch, heads, time, head_dim]`, `k` and `v` of `[batch, kv_heads, time, head_dim]`, all in f32 and
/// with a last stride of 1. The values are those of [`AttentionOp`], bit for bit.
///
/// The backward pass (Dao et al. 2022, arXiv:2205.14135, algorithm 4) keeps the probabilities of 60 queries of one head
/// in each thread, never all of them.
///
/// [`AttentionOp`]: crate::AttentionOp
#[derive(Clone, Debug)]
pub struct SelfAttentionOp {
    /// Factor of the scores.
    pub scale: f32,
    /// ALiBi slope of each head: `n · slope` is subtracted from the score of a key `n` positions back. Empty for no
    /// ALiBi.
    pub slopes: Vec<f32>,
    /// The rows: batch element, first position along time, and number of positions.
    pub spans: Vec<(usize, usize, usize)>,
}

/// The operands and their sizes.
struct Inputs<'a> {
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    sizes: Sizes,
    batch: usize,
    kv_heads: usize,
}

impl SelfAttentionOp {
    fn inputs<'a>(&self, of: [(&'a CpuStorage, &Layout); 3]) -> Result<Inputs<'a>> {
        let (q, [batch, heads, time, dim]) = View::new("q", of[0].0, of[0].1)?;
        let (k, k_dims) = View::new("keys", of[1].0, of[1].1)?;
        let (v, v_dims) = View::new("values", of[2].0, of[2].1)?;
        let kv_heads = k_dims[1];
        let fits = kv_heads > 0 && heads % kv_heads == 0 && k_dims == [batch, kv_heads, time, dim] && v_dims == k_dims;
        // Every position must be in exactly one span, so that no two tasks write to the same gradients.
        let mut sorted = self.spans.clone();
        sorted.sort_unstable();
        let end = sorted.iter().try_fold(0usize, |end, &(row, from, len)| {
            let begins =
                row.checked_mul(time)?.checked_add(from)? == end && from < time && len > 0 && len <= time - from;
            begins.then_some(end + len)
        });
        let is_f32 = [&q, &k, &v].iter().all(|view| view.rows.kind() == Kind::F32);
        if !fits || !is_f32 || end != Some(batch * time) {
            bail!(
                "attention: q {:?}, keys {k_dims:?}, values {v_dims:?} and {} spans do not fit or are not f32",
                of[0].1.dims(),
                self.spans.len()
            );
        }
        if !self.slopes.is_empty() && self.slopes.len() != heads {
            bail!("attention: expected a slope for each head, got {} for {heads} heads", self.slopes.len());
        }
        Ok(Inputs { q, k, v, sizes: Sizes { time, heads, group: heads / kv_heads, dim }, batch, kv_heads })
    }

    fn slope(&self, head: usize) -> f32 {
        self.slopes.get(head).copied().unwrap_or(0.0)
    }
}

impl CustomOp3 for SelfAttentionOp {
    fn name(&self) -> &'static str {
        "self-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_at: &Layout,
        k: &CpuStorage,
        k_at: &Layout,
        v: &CpuStorage,
        v_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Inputs { q, k, v, sizes, batch, .. } = self.inputs([(q, q_at), (k, k_at), (v, v_at)])?;
        let row = |&(row, from, len): &(usize, usize, usize)| Row {
            at: (row, from),
            queries: len,
            keys: len,
            k,
            v,
            batch: (row, row),
            first: from,
        };
        let rows: Vec<Row> = self.spans.iter().map(row).collect();
        let mut out = zeros(batch * sizes.time * sizes.heads * sizes.dim);
        if !out.is_empty() {
            run(q, &rows, sizes, self.scale, &self.slopes, isa(), &mut out);
        }
        Ok((CpuStorage::F32(out), (batch, sizes.time, sizes.heads * sizes.dim).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        let guards = [q, k, v, &grad].map(Tensor::storage_and_layout);
        let mut inputs = Vec::with_capacity(guards.len());
        for (storage, layout) in &guards {
            let Storage::Cpu(storage) = &**storage else { bail!("attention: expected tensors on the CPU") };
            inputs.push((storage, *layout));
        }
        let &[q_in, k_in, v_in, (grad_in, grad_at)] = &inputs[..] else { bail!("attention: expected four tensors") };
        let inputs = self.inputs([q_in, k_in, v_in])?;
        let Sizes { time, heads, dim, .. } = inputs.sizes;
        let grad_in = crate::cpu::shared::f32_slice("attention gradient", grad_in, grad_at)?;
        if grad_in.len() != inputs.batch * time * heads * dim {
            bail!("attention: a gradient of shape {:?} does not fit q", grad_at.dims());
        }
        let count = |heads: usize| inputs.batch * heads * time * dim;
        let (mut of_q, mut of_k, mut of_v) =
            (zeros(count(heads)), zeros(count(inputs.kv_heads)), zeros(count(inputs.kv_heads)));
        self.backward(&inputs, grad_in, [&mut of_q, &mut of_k, &mut of_v]);
        let tensor = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.dims(), q.device());
        Ok((Some(tensor(of_q, q)?), Some(tensor(of_k, k)?), Some(tensor(of_v, v)?)))
    }
}

impl SelfAttentionOp {
    /// Computes the gradients of queries, keys and values, which are contiguous. There is a task for each row and key
    /// head, which writes to its own gradients.
    fn backward(&self, inputs: &Inputs<'_>, grad: &[f32], out: [&mut [f32]; 3]) {
        let &Inputs { q, k, v, sizes, kv_heads, .. } = inputs;
        let Sizes { time, heads, group, dim } = sizes;
        let (isa, [of_q, of_k, of_v]) = (isa(), out.map(Shared::new));
        parallel(self.spans.len() * kv_heads, |task| {
            let ((row, from, len), kv) = (self.spans[task / kv_heads], task % kv_heads);
            for h in kv * group..(kv + 1) * group {
                for start in (0..len).step_by(BLOCK) {
                    let rows = BLOCK.min(len - start);
                    let head = Head {
                        s: sizes,
                        rows,
                        before: start,
                        slope: self.slope(h),
                        scale: self.scale,
                        few: FEW_ROWS,
                        isa,
                    };
                    let at = from + start;
                    let element = |heads: usize, head: usize, at: usize| ((row * heads + head) * time + at) * dim;
                    let block = Block {
                        q: q.from(row, h, at),
                        k: k.from(row, kv, from),
                        v: v.from(row, kv, from),
                        grad: Rows::new(&grad[((row * time + at) * heads + h) * dim..], heads * dim),
                        of_q: of_q.from(element(heads, h, at)),
                        of_k: of_k.from(element(kv_heads, kv, from)),
                        of_v: of_v.from(element(kv_heads, kv, from)),
                    };
                    // SAFETY: the gradients of this row and of these heads belong to this task alone.
                    scratch(|buffer| unsafe { block.backward(&head, buffer) });
                }
            }
        });
    }
}

/// A block of queries of one head, and the gradients that it writes to, in rows of `head_dim`. The gradients of keys
/// and values are added to.
struct Block<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    grad: Rows<'a>,
    of_q: Shared<'a, f32>,
    of_k: Shared<'a, f32>,
    of_v: Shared<'a, f32>,
}

impl Block<'_> {
    /// Adds the block's gradients.
    ///
    /// # Safety
    /// During the call nothing else accesses them.
    unsafe fn backward(&self, head: &Head, buffer: &mut Vec<f32>) {
        let (dim, rows, isa) = (head.s.dim, head.rows, head.isa);
        let visible = head.before + rows;
        let stride = visible.next_multiple_of(PANEL) + LANES;
        let panel = PANEL * dim.max(visible).max(BLOCK);
        buffer.resize(panel + 2 * rows * stride + visible * rows, 0.0);
        let (packed, rest) = buffer.split_at_mut(panel);
        let (weights, rest) = rest.split_at_mut(rows * stride);
        let (changes, turned) = rest.split_at_mut(rows * stride);
        // Computes the probabilities as in the forward pass.
        head.score(self.q, self.k, visible, packed, weights, stride);
        for (row, weights) in weights.chunks_exact_mut(stride).enumerate() {
            let (seen, mut running) = (head.before + row + 1, (f32::NEG_INFINITY, 0f32));
            let bias = Bias { scale: head.scale, slope: head.slope, back: seen as f32 - 1.0 };
            online_softmax(isa, &mut weights[..visible], seen, bias, &mut running);
            let norm = 1.0 / running.1;
            weights[..seen].iter_mut().for_each(|x| *x *= norm);
        }
        // Gradient of the values: the transposed probabilities times the gradient.
        turn(weights, stride, rows, visible, turned);
        // SAFETY: all three gradients are this thread's, as the caller promises.
        unsafe { multiply(isa, (turned, rows, visible), (self.grad, rows), dim, packed, self.of_v) };
        // Gradient of the scores: p (dp - Σ p dp), times the scale.
        head.score(self.grad, self.v, visible, packed, changes, stride);
        for (weights, changes) in weights.chunks_exact(stride).zip(changes.chunks_exact_mut(stride)) {
            let (weights, changes) = (&weights[..visible], &mut changes[..visible]);
            let mean: f32 = weights.iter().zip(&*changes).map(|(p, dp)| p * dp).sum();
            for (p, dp) in weights.iter().zip(changes) {
                *dp = p * (*dp - mean) * head.scale;
            }
        }
        // SAFETY: these gradients are this thread's, as the caller promises.
        unsafe { multiply(isa, (changes, stride, rows), (self.k, visible), dim, packed, self.of_q) };
        turn(changes, stride, rows, visible, turned);
        // SAFETY: these gradients are this thread's, as the caller promises.
        unsafe { multiply(isa, (turned, rows, visible), (self.q, rows), dim, packed, self.of_k) };
    }
}

/// Transposes rows of `columns` numbers, `stride` apart, from `from` to `to`.
fn turn(from: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [f32]) {
    for (row, from) in from.chunks_exact(stride).take(rows).enumerate() {
        for (column, x) in from[..columns].iter().enumerate() {
            to[column * rows + row] = *x;
        }
    }
}

/// Adds `a b` to `out`, which is contiguous. `a` is `rows` rows of `k` numbers, `a_stride` apart, and `b` is `k` rows
/// of `dim` numbers. `packed` is memory for the last columns of `b`.
///
/// # Safety
/// During the call nothing else accesses these places of `out`.
unsafe fn multiply(
    isa: Isa,
    (a, a_stride, rows): (&[f32], usize, usize),
    (b, k): (Rows<'_>, usize),
    dim: usize,
    packed: &mut [f32],
    out: Shared<'_, f32>,
) {
    for from in (0..dim).step_by(PANEL) {
        let columns = PANEL.min(dim - from);
        let in_place = columns == PANEL;
        if !in_place {
            rows::widen_to(isa, b.skip(0, from), (k, columns), packed, PANEL);
        }
        let product = Product {
            a,
            a_stride,
            rows,
            b: if in_place { b.skip(0, from).floats() } else { packed },
            b_stride: if in_place { b.stride() } else { PANEL },
            k,
            c: out.from(from),
            c_stride: dim,
            columns,
            start: Start::Output,
        };
        // SAFETY: these places are this thread's, as the caller promises.
        unsafe { product.run(isa) };
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    /// Overlapping spans would be written by two tasks at once.
    #[test]
    fn spans_that_overlap_or_leave_gaps_are_refused() {
        let x = Tensor::zeros((1, 2, 4, 8), DType::F32, &Device::Cpu).unwrap();
        let attend = |spans: &[(usize, usize, usize)]| {
            let op = SelfAttentionOp { scale: 1.0, slopes: Vec::new(), spans: spans.to_vec() };
            x.apply_op3_no_bwd(&x, &x, &op)
        };
        assert!(attend(&[(0, 2, 2), (0, 0, 2)]).is_ok());
        let far = usize::MAX;
        for bad in [
            &[(0, 0, 2), (0, 0, 2)][..],
            &[(0, 0, 3)],
            &[(0, 0, 2), (0, 3, 1)],
            &[(1, 0, 4)],
            &[(0, far, 4)],
            &[(far, 2, 4)],
        ] {
            assert!(attend(bad).is_err(), "{bad:?}");
        }
    }
}
