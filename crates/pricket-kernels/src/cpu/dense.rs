//! Matrix products with a weight in its stored type: for few rows, for many rows, for rows in bfloat16, and with the
//! transposed weight.

#[cfg(target_arch = "x86_64")]
use half::bf16;

#[cfg(target_arch = "x86_64")]
use crate::cpu::bf16::{Bf16Products, STEP, Tiles};
use crate::cpu::detect::isa;
use crate::cpu::gelu::GeluOp;
#[cfg(target_arch = "x86_64")]
use crate::cpu::isa::InstructionSet;
#[cfg(target_arch = "x86_64")]
use crate::cpu::lanes::LANES;
use crate::cpu::operands::{Begin, Left, Right, Stored, finish};
use crate::cpu::pool::{order_is_fixed, parallel, parallel_chunks, scratch, threads};
use crate::cpu::product::{PANEL, Product, Start};
use crate::cpu::rows::{self, Rows};
use crate::cpu::shared::Shared;
#[cfg(target_arch = "x86_64")]
use crate::cpu::tiles;
#[cfg(target_arch = "x86_64")]
use crate::cpu::unpack::unpack;

/// Largest number of rows for which products are inner products of whole rows, which read each weight once. More rows
/// take panels and a blocked product.
const FEW_ROWS: usize = 16;

/// Columns that are summed before the next ones. A block of rows then stays in the first-level cache, and the panels
/// stay in the second-level cache.
const DEPTH: usize = 512;

/// Rows of activations that are multiplied together.
const BLOCK: usize = 12;

/// Panels that a task packs before it multiplies, so that activations are read once for all of them.
const PANELS: usize = 4;

/// Computes `y = x Wᵀ + b` in f32, for `x` of `[rows, in_features]`, `weight` of `[out_features, in_features]`, `bias`
/// of `[out_features]` and `y` of `[rows, out_features]`.
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
    Gemm::new(x, weight, bias, (in_features, out_features), y).run();
}

/// The product `y = f(x Wᵀ + b)`, with operands of matching sizes.
pub(crate) struct Gemm<'a> {
    /// `[rows, k]`.
    x: &'a [f32],
    /// `[n, k]`.
    weight: Stored<'a>,
    /// `[n]`.
    bias: Option<&'a [f32]>,
    then: Option<GeluOp>,
    rows: usize,
    k: usize,
    n: usize,
    /// `[rows, n]`.
    y: &'a mut [f32],
}

impl<'a> Gemm<'a> {
    /// Creates the product for `k` inputs and `n` outputs.
    ///
    /// # Panics
    /// If a slice does not have the size that the others imply.
    pub(crate) fn new(
        x: &'a [f32],
        weight: Stored<'a>,
        bias: Option<&'a [f32]>,
        (k, n): (usize, usize),
        y: &'a mut [f32],
    ) -> Self {
        let rows = x.len().checked_div(k).unwrap_or(0);
        assert_eq!(x.len(), rows * k, "x is not [rows, in_features]");
        assert_eq!(weight.len(), n * k, "weight is not [out_features, in_features]");
        assert_eq!(y.len(), rows * n, "output is not [rows, out_features]");
        assert!(bias.is_none_or(|b| b.len() == n), "bias is not [out_features]");
        Self { x, weight, bias, then: None, rows, k, n, y }
    }

    /// Applies a function to the result.
    pub(crate) fn then(self, then: Option<GeluOp>) -> Self {
        Self { then, ..self }
    }

    /// Computes the product in f32.
    pub(crate) fn run(self) {
        let Self { x, weight, bias, then, rows, k, n, y } = self;
        if rows == 0 {
            return;
        }
        if rows > FEW_ROWS || order_is_fixed() {
            let begin = bias.map_or(Begin::Zero, Begin::Bias);
            return blocked(Left { at: x, row: k, column: 1 }, rows, Right::Rows(weight), (k, n), begin, then, y);
        }
        let (isa, out) = (isa(), Shared::new(y));
        let step = n.div_ceil(8 * threads()).clamp(8, 256);
        parallel(n.div_ceil(step), |task| {
            scratch(|buffer| {
                let (from, to) = (task * step, ((task + 1) * step).min(n));
                let w = weight.rows(from, to, k, buffer);
                // Several rows of activations are multiplied a part at a time, which stays in the first-level cache.
                let part = if rows < 4 { k.max(1) } else { (8 << 10) / rows / 16 * 16 };
                for k_block in (0..k).step_by(part) {
                    let start = match bias {
                        _ if k_block > 0 => Start::Output,
                        Some(bias) => Start::Row(&bias[from..]),
                        None => Start::Zero,
                    };
                    let (depth, x) = (part.min(k - k_block), (&x[k_block..], k, rows));
                    // SAFETY: columns [from, to) of `y` belong to this task alone.
                    unsafe {
                        rows::inner_products(
                            isa,
                            w.skip(0, k_block),
                            (to - from, depth),
                            x,
                            start,
                            (out.from(from), n),
                        );
                    }
                }
                // SAFETY: these columns belong to this task alone.
                unsafe { finish(then, out, 0..rows, n, from, to) };
            });
        });
    }

    /// Computes the product with both factors rounded to bfloat16, if that is faster. Otherwise returns the product
    /// unchanged.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn run_bf16(self) -> Option<Self> {
        let isa = isa();
        let fits = match self.weight {
            _ if order_is_fixed() => false,
            Stored::Packed(w) => isa == InstructionSet::Amx && w.shape().1.is_multiple_of(K_BLOCK),
            Stored::Blocks(_) | Stored::FourBit(_) => false,
            Stored::F32(_) | Stored::F16(_) | Stored::BF16(_) => true,
        };
        let products = if fits { Bf16Products::new(isa) } else { None };
        match (self.weight, products) {
            (_, Some(products)) if self.rows > FEW_ROWS => many_rows_bf16(self, products),
            // A single row gains nothing: it waits for memory.
            (Stored::BF16(weight), Some(products)) if self.rows >= 2 => few_rows_bf16(self, weight, products),
            _ => return Some(self),
        }
        None
    }
}

/// Computes `y = then(left · right)`, for `left` of `[rows, k]` and `right` of `[k, n]`. The sums start from `begin`.
pub(crate) fn blocked(
    left: Left<'_>,
    rows: usize,
    right: Right<'_>,
    (k, n): (usize, usize),
    begin: Begin<'_>,
    then: Option<GeluOp>,
    y: &mut [f32],
) {
    assert_eq!(y.len(), rows * n, "output is not [rows, columns]");
    #[cfg(target_arch = "x86_64")]
    if tiles::is_faster(isa(), rows, (k, n)) && !order_is_fixed() {
        return tiles::blocked(left, rows, right, (k, n), begin, then, y);
    }
    let (isa, out) = (isa(), Shared::new(y));
    let panels = n.div_ceil(PANEL).div_ceil(4 * threads()).clamp(1, PANELS);
    let step = panels * PANEL;
    let across = n.div_ceil(step);
    // With few columns, the rows are divided among the tasks as well.
    let down = (2 * threads()).div_ceil(across.max(1)).clamp(1, rows.div_ceil(4 * BLOCK).max(1));
    let share = rows.div_ceil(down).next_multiple_of(BLOCK).max(BLOCK);
    let product = |left: Left<'_>, task: usize| {
        let (from, to) = (task % across * step, ((task % across + 1) * step).min(n));
        let own = (task / across * share).min(rows)..((task / across + 1) * share).min(rows);
        let run = |w: Rows<'_>, packed: &mut Vec<f32>| {
            packed.resize((panels * PANEL * DEPTH).max(packed.len()), 0.0);
            for k_block in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - k_block);
                right.pack(isa, w, (k_block, depth), (from, to), depth, packed);
                // These rows stay in the first-level cache while every panel is multiplied with them.
                for row in own.clone().step_by(BLOCK) {
                    for (i, first) in (from..to).step_by(PANEL).enumerate() {
                        let product = Product {
                            a: &left.at[row * left.row + k_block..],
                            a_stride: left.row,
                            rows: BLOCK.min(own.end - row),
                            b: &packed[i * PANEL * depth..],
                            b_stride: PANEL,
                            k: depth,
                            c: out.from(row * n + first),
                            c_stride: n,
                            columns: PANEL.min(to - first),
                            start: begin.at(k_block, first),
                        };
                        // SAFETY: columns [from, to) of the task's own rows of `y` belong to this task alone.
                        unsafe { product.run(isa) };
                    }
                }
            }
        };
        right.with_rows((from, to), k, |w| scratch(|packed| run(w, packed)));
        // SAFETY: these rows and columns belong to this task alone.
        unsafe { finish(then, out, own, n, from, to) };
    };
    left.as_rows(rows, k, true, |left| parallel(across * down, |task| product(left, task)));
}

/// Unit of the depth of products in bfloat16: a multiple of every block size. The depth is eight units, more than
/// [`DEPTH`], because adding to the output takes a larger share of the time.
#[cfg(target_arch = "x86_64")]
const K_BLOCK: usize = 256;

/// Panels that a task packs, as [`PANELS`], for products in bfloat16. These are so fast that rows must be read once for
/// many columns.
#[cfg(target_arch = "x86_64")]
const BF16_PANELS: usize = 8;

/// [`Gemm::run_bf16`] for many rows.
#[cfg(target_arch = "x86_64")]
fn many_rows_bf16(product: Gemm<'_>, products: Bf16Products) {
    let Gemm { x, weight, bias, then, rows, k, n, y } = product;
    let (isa, block) = (products.isa(), products.block());
    let out = Shared::new(y);
    let depth = (8 * K_BLOCK).min(k.next_multiple_of(STEP));
    // Activations are rounded once, for all tasks. Rows are padded with zeros to whole blocks, and columns to whole
    // steps.
    let stride = k.next_multiple_of(STEP) + STEP;
    let mut packed = vec![0u16; rows.next_multiple_of(block) * stride];
    parallel_chunks(&mut packed, stride * 8, |i, packed| {
        for (x, packed) in x[(i * 8 * k).min(x.len())..].chunks_exact(k).zip(packed.chunks_exact_mut(stride)) {
            products.to_rows(x, packed);
        }
    });
    let panels = n.div_ceil(PANEL).div_ceil(2 * threads()).clamp(1, BF16_PANELS);
    let step = panels * PANEL;
    parallel(n.div_ceil(step), |task| {
        let (from, to) = (task * step, ((task + 1) * step).min(n));
        let mut pairs = vec![0u32; panels * PANEL * depth / 2];
        let tiles = Tiles::new(isa);
        for k_block in (0..k).step_by(depth) {
            let whole = depth.min(k - k_block);
            let filled = whole.next_multiple_of(STEP);
            scratch(|panel| {
                panel.resize(PANEL * depth, 0.0);
                for (i, first) in (from..to).step_by(PANEL).enumerate() {
                    let pairs = &mut pairs[i * PANEL * depth / 2..][..PANEL * filled / 2];
                    if let Stored::BF16(w) = weight
                        && k % 2 == 0
                    {
                        pairs[PANEL * whole / 2..].fill(0);
                        // Two neighboring columns are moved as one word.
                        let w = Rows::in_words(w, k).skip(first, k_block / 2);
                        let pairs = bytemuck::cast_slice_mut(pairs);
                        rows::pack(isa, w, (PANEL.min(to - first), whole / 2), pairs, PANEL);
                        continue;
                    }
                    panel[PANEL * whole..PANEL * filled].fill(0.0);
                    match weight {
                        Stored::Packed(w) => {
                            for half in 0..PANEL.min(to - first).div_ceil(LANES) {
                                let tile = first / LANES + half;
                                unpack(w, tile, k_block, whole, &mut panel[half * LANES..], isa);
                            }
                        }
                        weight => {
                            let mut buffer = Vec::new();
                            let w = weight.rows(first, (first + PANEL).min(to), k, &mut buffer);
                            rows::pack(isa, w.skip(0, k_block), (PANEL.min(to - first), whole), panel, PANEL);
                        }
                    }
                    products.to_pairs(&panel[..PANEL * filled], pairs);
                }
            });
            for row in (0..rows).step_by(block) {
                for (i, first) in (from..to).step_by(PANEL).enumerate() {
                    let product = Product {
                        a: &packed[row * stride + k_block..],
                        a_stride: stride,
                        rows: block.min(rows - row),
                        b: &pairs[i * PANEL * depth / 2..],
                        b_stride: PANEL,
                        k: filled,
                        c: out.from(row * n + first),
                        c_stride: n,
                        columns: PANEL.min(to - first),
                        start: match bias {
                            _ if k_block > 0 => Start::Output,
                            Some(bias) => Start::Row(&bias[first..]),
                            None => Start::Zero,
                        },
                    };
                    // SAFETY: columns [from, to) of `y` belong to this task alone.
                    unsafe { product.run(products, tiles.as_ref()) };
                }
            }
        }
        drop(tiles);
        // SAFETY: these columns belong to this task alone.
        unsafe { finish(then, out, 0..rows, n, from, to) };
    });
}

/// [`Gemm::run_bf16`] for a few rows. `weight` is the product's weight; each of its numbers is read once.
#[cfg(target_arch = "x86_64")]
fn few_rows_bf16(product: Gemm<'_>, weight: &[bf16], products: Bf16Products) {
    let Gemm { x, bias, then, rows, k, n, y, .. } = product;
    let stride = k.next_multiple_of(STEP);
    let out = Shared::new(y);
    let mut packed = vec![0u16; rows * stride];
    for (x, packed) in x.chunks_exact(k).zip(packed.chunks_exact_mut(stride)) {
        products.to_rows(x, packed);
    }
    let step = n.div_ceil(8 * threads()).clamp(8, 256);
    parallel(n.div_ceil(step), |task| {
        let (from, to) = (task * step, ((task + 1) * step).min(n));
        let start = bias.map_or(Start::Zero, |bias| Start::Row(&bias[from..]));
        let (w, x) = (&weight[from * k..to * k], (&packed[..], stride, rows));
        // SAFETY: columns [from, to) of `y` belong to this task alone.
        unsafe { products.inner_products(w, (to - from, k), x, start, (out.from(from), n)) };
        // SAFETY: these columns belong to this task alone.
        unsafe { finish(then, out, 0..rows, n, from, to) };
    });
}

/// Computes `x = y W` for `y` of `[rows, out_features]` and `x` of `[rows, in_features]`: the gradient of [`linear`]
/// with respect to its activations.
///
/// # Panics
/// If a slice does not have the size that the others imply.
pub fn linear_transposed(y: &[f32], weight: Stored<'_>, in_features: usize, out_features: usize, x: &mut [f32]) {
    let (k, n) = (in_features, out_features);
    let rows = y.len().checked_div(n).unwrap_or(0);
    assert_eq!(y.len(), rows * n, "y is not [rows, out_features]");
    assert_eq!(weight.len(), n * k, "weight is not [out_features, in_features]");
    assert_eq!(x.len(), rows * k, "output is not [rows, in_features]");
    if !matches!(weight, Stored::Blocks(_) | Stored::Packed(_) | Stored::FourBit(_)) {
        return blocked(Left { at: y, row: n, column: 1 }, rows, Right::Columns(weight), (n, k), Begin::Zero, None, x);
    }
    // Quantized weights are dequantized by whole rows.
    let isa = isa();
    // The dequantized weights of a step stay in the second-level cache.
    let step = ((512 << 10) / 4 / k.max(1)).clamp(8, 256);
    // Each task has its own rows of `x` and reads the whole weight, so no two tasks write to the same element.
    let share = rows.div_ceil(threads()).max(1);
    parallel_chunks(x, share * k, |i, x| {
        let rows = x.len() / k;
        let y = &y[i * share * n..][..rows * n];
        let (mut buffer, mut wide) = (Vec::new(), Vec::new());
        for from in (0..n).step_by(step) {
            let to = (from + step).min(n);
            let w = weight.rows(from, to, k, &mut buffer);
            // Rows are padded to whole panels.
            let width = k.next_multiple_of(PANEL);
            wide.resize((to - from) * width, 0f32);
            rows::widen_to(isa, w, (to - from, k), &mut wide, width);
            for column in (0..k).step_by(PANEL) {
                let product = Product {
                    a: &y[from..],
                    a_stride: n,
                    rows,
                    b: &wide[column..],
                    b_stride: width,
                    k: to - from,
                    c: Shared::new(x).from(column),
                    c_stride: k,
                    columns: PANEL.min(k - column),
                    start: if from == 0 { Start::Zero } else { Start::Output },
                };
                // SAFETY: this part of `x` belongs to this task alone.
                unsafe { product.run(isa) };
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_rows_have_no_result() {
        let weight = vec![1f32; 40 * 24];
        linear(&[], Stored::F32(&weight), None, 24, 40, &mut []);
        linear_transposed(&[], Stored::F32(&weight), 24, 40, &mut []);
    }
}
