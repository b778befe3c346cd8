//! Products with f32 accuracy on AMX tiles, which multiply bfloat16 numbers.
//!
//! A number is split into the sum of three bfloat16 terms, `x = h + m + l` with `h = bf16(x)`, `m = bf16(x - h)` and
//! `l = x - h - m`, which together have the 24 bits of f32. Two numbers have nine products of terms. The six largest
//! are summed in f32; the others are below 2^-25 of the product, less than its rounding error. Weights in f16 are the
//! sum of two terms, and weights in bf16 are one term. Source: Henry, Tang and Heinecke, "Leveraging the bfloat16
//! Artificial Intelligence Datatype For Higher-Precision Computations", arXiv:1904.06376.
//!
//! Operands are stored tile by tile in the order in which they are multiplied. For every 32 columns of the left operand
//! there are two tiles of 16 rows of each of `l`, `h` and `m`. For the same 32 rows of the right operand there are two
//! tiles of 16 columns of each term. A row of a tile has 64 bytes: 32 numbers of the left operand, or two neighbors in
//! 16 columns of the right one.

#![cfg(target_arch = "x86_64")]
#![allow(clippy::wildcard_imports, reason = "a list of the instructions would be long and not informative")]

use std::arch::asm;
use std::arch::x86_64::*;

use crate::cpu::bf16::{STEP, Tiles, put};
use crate::cpu::detect::isa;
use crate::cpu::gelu::GeluOp;
use crate::cpu::isa::{InstructionSet, Isa};
use crate::cpu::lanes::LANES;
use crate::cpu::operands::{Begin, Left, Right, finish};
use crate::cpu::pool::{parallel, scratch, threads};
use crate::cpu::product::{PANEL, Product};
use crate::cpu::rows::{Kind, Rows};
use crate::cpu::shared::{Shared, holds};

/// 32-bit words of a tile.
const TILE: usize = 256;

/// Rows of the left operand that are multiplied together: two tiles.
const BLOCK: usize = 32;

/// Words of a step of the left operand.
const LEFT: usize = 6 * TILE;

/// Columns of the left operand that are summed before the next ones: a multiple of [`CHUNK`]. What a task packs of the
/// right operand then stays in the second-level cache.
const DEPTH: usize = 512;

/// Rows of the right operand that are packed before they are split: a multiple of [`STEP`].
const CHUNK: usize = 128;

/// Panels that a task packs, so that the left operand is read once for all of them.
const PANELS: usize = 8;

/// Returns whether tiles are the faster way to multiply `[rows, k]` with `[k, n]`. Splitting a number into terms costs
/// as much as multiplying it with a few dozen others.
pub(crate) fn is_faster(isa: Isa, rows: usize, (k, n): (usize, usize)) -> bool {
    isa == InstructionSet::Amx && rows >= 48 && n >= 64 && k >= 64
}

/// Calls `f` with `len` words of this thread's memory, aligned to a cache line of 64 bytes.
fn aligned<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    scratch(|buffer| {
        buffer.resize((len + LANES).max(buffer.len()), 0.0);
        let skip = buffer.as_ptr().align_offset(4 * LANES).min(LANES);
        f(&mut buffer[skip..][..len])
    })
}

/// Computes what [`blocked`](crate::cpu::dense::blocked) computes, on tiles. Used if [`pay`] returns true.
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
    let (steps, blocks) = (k.div_ceil(STEP), rows.div_ceil(BLOCK));
    let terms = right.kind().map_or(3, |kind| match kind {
        Kind::BF16 => 1,
        Kind::F16 => 2,
        Kind::F32 | Kind::Q8 => 3,
    });
    let panels = n.div_ceil(PANEL).div_ceil(2 * threads()).clamp(1, PANELS);
    let across = n.div_ceil(panels * PANEL);
    // With few columns, the rows are divided among the tasks as well.
    let share = blocks.div_ceil((2 * threads()).div_ceil(across.max(1)).clamp(1, blocks.max(1))).max(1);
    let out = Shared::new(y);
    left.as_rows(rows, k, false, |left| {
        aligned(blocks * steps * LEFT, |split| {
            let all = Shared::new(split);
            parallel(blocks, |block| {
                let (from, count) = (block * BLOCK, BLOCK.min(rows - block * BLOCK));
                let x = &left.at[from * left.row..];
                assert!(holds(x.len(), count, left.row, k), "the left factor is shorter than [rows, k]");
                // SAFETY: each block belongs to one task.
                let block = unsafe { all.slice(block * steps * LEFT, steps * LEFT) };
                // SAFETY: the length of `x` was checked above, and the block has room for the same number of steps.
                // Processors with tiles have products of bfloat16.
                unsafe { split_rows(x.as_ptr(), left.row, count, k, block.as_mut_ptr().cast()) };
            });
            let split = &*split;
            parallel(across * blocks.div_ceil(share), |task| {
                let (from, own) = (task % across * panels * PANEL, task / across * share);
                let to = (from + panels * PANEL).min(n);
                let own = own..(own + share).min(blocks);
                let depth = DEPTH.min(k.next_multiple_of(STEP));
                let (part, whole) = (panels * PANEL * CHUNK.min(depth), 2 * terms * TILE * (depth / STEP));
                let run = |w: Rows<'_>, packed: &mut [f32]| {
                    aligned(panels * whole, |pairs| {
                        let Some(tiles) = Tiles::new(isa()) else {
                            unreachable!("products on tiles require an AMX processor")
                        };
                        for k_block in (0..k).step_by(DEPTH) {
                            let depth = DEPTH.min(k - k_block);
                            right.split(w, terms, (k_block, depth), (from, to), whole, packed, pairs);
                            for block in own.clone() {
                                let row = block * BLOCK;
                                for (i, first) in (from..to).step_by(PANEL).enumerate() {
                                    let product = Product {
                                        a: bytemuck::cast_slice(&split[(block * steps + k_block / STEP) * LEFT..]),
                                        a_stride: 0,
                                        rows: BLOCK.min(rows - row),
                                        b: bytemuck::cast_slice(&pairs[i * whole..]),
                                        b_stride: 0,
                                        k: depth.next_multiple_of(STEP),
                                        c: out.from(row * n + first),
                                        c_stride: n,
                                        columns: PANEL.min(to - first),
                                        start: begin.at(k_block, first),
                                    };
                                    // SAFETY: columns [from, to) of the task's own rows of `y` belong to this task
                                    // alone.
                                    unsafe { multiply(&product, terms, &tiles) };
                                }
                            }
                        }
                    });
                };
                right.with_rows((from, to), k, |w| aligned(part, |packed| run(w, packed)));
                let own = (own.start * BLOCK)..(own.end * BLOCK).min(rows);
                // SAFETY: these rows and columns belong to this task alone.
                unsafe { finish(then, out, own, n, from, to) };
            });
        });
    });
}

impl Right<'_> {
    /// Splits `depth` rows from `k_block` on of columns `[from, to)` into terms, and writes them to `pairs`, with the
    /// panels `whole` words apart. `packed` is memory for [`CHUNK`] rows before they are split.
    #[allow(clippy::too_many_arguments, reason = "operands and their sizes")]
    fn split(
        self,
        w: Rows<'_>,
        terms: usize,
        (k_block, depth): (usize, usize),
        (from, to): (usize, usize),
        whole: usize,
        packed: &mut [f32],
        pairs: &mut [f32],
    ) {
        for at in (0..depth).step_by(CHUNK) {
            let count = CHUNK.min(depth - at);
            let filled = count.next_multiple_of(STEP);
            self.pack(isa(), w, (k_block + at, count), (from, to), filled, packed);
            for i in 0..(to - from).div_ceil(PANEL) {
                let panel = &mut packed[i * PANEL * filled..][..PANEL * filled];
                panel[PANEL * count..].fill(0.0);
                let pairs = &mut pairs[i * whole + at / STEP * 2 * terms * TILE..][..filled / STEP * 2 * terms * TILE];
                // SAFETY: both are slices of these lengths. Processors with tiles have products of bfloat16.
                unsafe { split_panel(panel.as_ptr(), filled, terms, pairs.as_mut_ptr().cast()) };
            }
        }
    }
}

/// Splits `rows` (at most 32) rows of `k` numbers, `stride` apart, into terms. Missing numbers become zeros.
///
/// # Safety
/// The rows can be read, and [`LEFT`] words can be written for each step.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn split_rows(x: *const f32, stride: usize, rows: usize, k: usize, out: *mut u16) {
    // SAFETY: the masks leave out rows and columns that do not exist; three terms of the 32 rows of a step fill its
    // words.
    unsafe {
        for step in 0..k.div_ceil(STEP) {
            for row in 0..BLOCK {
                let to = out.add(step * 2 * LEFT + row / 16 * 2 * TILE + row % 16 * STEP);
                for half in 0..2 {
                    let at = step * STEP + half * LANES;
                    let count = if row < rows { k.saturating_sub(at).min(LANES) } else { 0 };
                    let mask = ((1u32 << count) - 1) as u16;
                    let mut rest = _mm512_maskz_loadu_ps(mask, x.wrapping_add(row * stride + at));
                    // The tile of each term, in the order `h`, `m`, `l`.
                    for tile in [2, 4, 0] {
                        let term: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(rest));
                        _mm256_storeu_si256(to.add(tile * 2 * TILE + half * LANES).cast(), term);
                        let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(term));
                        rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(wide));
                    }
                }
            }
        }
    }
}

/// Splits a panel of `k` rows (whole steps) and 32 columns into its first `terms` terms.
///
/// # Safety
/// The panel can be read, and two tiles can be written for each step and term.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn split_panel(panel: *const f32, k: usize, terms: usize, out: *mut u32) {
    // SAFETY: each pair reads two lines of the panel. Each of its terms writes one line in each of two tiles.
    unsafe {
        let index: [u16; 32] = std::array::from_fn(|i| (i / 2 + 16 * (i % 2)) as u16);
        let index = _mm512_loadu_si512(index.as_ptr().cast());
        for pair in 0..k / 2 {
            let to = out.add(pair / 16 * 2 * terms * TILE + pair % 16 * LANES);
            for half in 0..2 {
                let at = panel.add(2 * pair * PANEL + half * LANES);
                let (mut even, mut odd) = (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(PANEL)));
                for term in 0..terms {
                    let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
                    let woven = _mm512_permutexvar_epi16(index, both);
                    _mm512_storeu_si512(to.add((2 * term + half) * TILE).cast(), woven);
                    even = _mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(woven)));
                    let high = _mm512_and_si512(woven, _mm512_set1_epi32(-0x1_0000));
                    odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(high));
                }
            }
        }
    }
}

/// Multiplies a block of the left operand with a panel of `terms` terms of the right operand.
///
/// # Panics
/// If an operand is too short for its sizes.
///
/// # Safety
/// During the call no other thread accesses these columns of these rows of `c`.
unsafe fn multiply(p: &Product<'_, u16, u32>, terms: usize, _: &Tiles) {
    let steps = p.k / STEP;
    let fits = p.a.len() >= steps * LEFT * 2 && p.b.len() >= steps * 2 * terms * TILE;
    assert!(steps > 0 && p.rows <= BLOCK && fits && p.has_room(), "an operand is too short for the product");
    let mut sums = [[0f32; PANEL]; BLOCK];
    // Each step multiplies the first term of the right operand, and then runs the instructions in `more`.
    macro_rules! tiles {
        ($step:literal $(, $more:literal)*) => {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{b} + {line}]",
                "tileloadd tmm4, [{a} + {line}]",
                "tileloadd tmm7, [{b} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a} + {line} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{a} + {line} + 2048]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm5, [{a} + {line} + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{a} + {line} + 4096]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm5, [{a} + {line} + 5120]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                $($more,)*
                "add {a}, 6144",
                concat!("add {b}, ", $step),
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c} + {row}], tmm0",
                "tilestored [{c} + {row} + 64], tmm1",
                "tilestored [{low} + {row}], tmm2",
                "tilestored [{low} + {row} + 64], tmm3",
                a = inout(reg) p.a.as_ptr() => _,
                b = inout(reg) p.b.as_ptr() => _,
                steps = inout(reg) steps => _,
                line = in(reg) 64usize,
                row = in(reg) 4 * PANEL,
                c = in(reg) sums.as_mut_ptr(),
                low = in(reg) sums.as_mut_ptr().add(16),
                options(nostack)
            )
        };
    }
    // SAFETY: the tiles of each step are inside both operands, whose lengths were checked above. `sums` has room for
    // four tiles. The token proves that this thread has tiles, and nothing else uses them. The output is this thread's,
    // as the caller promises.
    unsafe {
        match terms {
            1 => tiles!("2048"),
            // Also `m` and then `h` of the left operand with `m` of the right one.
            2 => tiles!(
                "4096",
                "tileloadd tmm6, [{b} + {line} + 2048]",
                "tileloadd tmm7, [{b} + {line} + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{a} + {line} + 2048]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm5, [{a} + {line} + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7"
            ),
            // Also `h` of the left operand with `l` of the right one.
            _ => tiles!(
                "6144",
                "tileloadd tmm6, [{b} + {line} + 2048]",
                "tileloadd tmm7, [{b} + {line} + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{a} + {line} + 2048]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm5, [{a} + {line} + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tileloadd tmm6, [{b} + {line} + 4096]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm7, [{b} + {line} + 5120]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7"
            ),
        }
        for (row, sums) in sums[..p.rows].iter().enumerate() {
            put(p, row, sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use half::{bf16, f16};

    use super::*;
    use crate::cpu::operands::Stored;

    fn random(len: usize) -> Vec<f32> {
        Tensor::randn(0f32, 1.0, len, &Device::Cpu).unwrap().to_vec1().unwrap()
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn the_six_products_are_as_exact_as_f32(
            rows in 1usize..80, k in 1usize..700, n in 1usize..300, kind in 0usize..3, columns: bool, across: bool, add: bool,
        ) {
            if !Isa::available().any(|isa| isa == InstructionSet::Amx) {
                return Ok(());
            }
            let (x, w, bias) = (random(rows * k), random(n * k), random(n));
            let half: Vec<f16> = w.iter().map(|&x| f16::from_f32(x)).collect();
            let in_bf16: Vec<bf16> = w.iter().map(|&x| bf16::from_f32(x)).collect();
            let stored = [Stored::F32(&w), Stored::F16(&half), Stored::BF16(&in_bf16)][kind];
            let wide: Vec<f32> = match kind {
                0 => w.clone(),
                1 => half.iter().map(|x| x.to_f32()).collect(),
                _ => in_bf16.iter().map(|x| x.to_f32()).collect(),
            };
            let right = if columns { Right::Columns(stored) } else { Right::Rows(stored) };
            let turned: Vec<f32> = (0..rows * k).map(|i| x[i % rows * k + i / rows]).collect();
            let left = if across { Left { at: &turned, row: 1, column: rows } } else { Left { at: &x, row: k, column: 1 } };
            let before = random(rows * n);
            let mut y = before.clone();
            let begin = if add { Begin::Output } else { Begin::Bias(&bias) };
            blocked(left, rows, right, (k, n), begin, None, &mut y);
            for (i, &y) in y.iter().enumerate() {
                let (row, column) = (i / n, i % n);
                let weight = |c: usize| if columns { wide[c * n + column] } else { wide[column * k + c] };
                let products = (0..k).map(|c| f64::from(x[row * k + c]) * f64::from(weight(c)));
                let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()));
                let from = f64::from(if add { before[i] } else { bias[column] });
                let bound = 3e-7 * (size + from.abs()) + 1e-6;
                proptest::prop_assert!((sum + from - f64::from(y)).abs() < bound, "{row} {column}: {y} for {}", sum + from);
            }
        }
    }
}
