//! Products of rows with 32-column panels of matrices, in f32. The sums stay in registers.

#![allow(clippy::inline_always, reason = "loops must be compiled into the functions that enable the instructions")]

use crate::cpu::isa::{Isa, by_isa};
use crate::cpu::lanes::{Floats, LANES};
use crate::cpu::shared::{Shared, holds};

/// Columns of a panel: two vectors.
pub(crate) const PANEL: usize = 2 * LANES;

/// The initial values of the sums of a product.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Zero.
    Zero,
    /// The same row of numbers for every row of the product: a bias.
    Row(&'a [f32]),
    /// The present output.
    Output,
}

impl Start<'_> {
    /// Returns whether there is an initial value for each of `columns` columns.
    pub(crate) fn has(self, columns: usize) -> bool {
        if let Start::Row(row) = self { row.len() >= columns } else { true }
    }

    /// Writes the sum of column `column`, added to its initial value, to `out`.
    ///
    /// # Safety
    /// `out` can be read and written, and the start [has](Start::has) the column.
    #[inline(always)]
    pub(crate) unsafe fn put(self, sum: f32, column: usize, out: *mut f32) {
        // SAFETY: `out` and the column are valid, as the caller promises.
        unsafe {
            *out = match self {
                Start::Zero => sum,
                Start::Row(row) => sum + *row.get_unchecked(column),
                Start::Output => sum + *out,
            };
        }
    }
}

/// The operands of a matrix product. `rows` rows of `a`, `a_stride` elements apart, are multiplied with `k` rows of a
/// panel of 32 columns, `b_stride` apart. The first `columns` columns of the result go to rows of `c`, `c_stride`
/// apart.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a, A = f32, B = f32> {
    pub(crate) a: &'a [A],
    pub(crate) a_stride: usize,
    pub(crate) rows: usize,
    pub(crate) b: &'a [B],
    pub(crate) b_stride: usize,
    pub(crate) k: usize,
    pub(crate) c: Shared<'a, f32>,
    pub(crate) c_stride: usize,
    pub(crate) columns: usize,
    pub(crate) start: Start<'a>,
}

impl<A, B> Product<'_, A, B> {
    /// Returns whether the output has room for the result, and the start has a value for each of its columns.
    pub(crate) fn has_room(&self) -> bool {
        self.columns <= PANEL
            && self.start.has(self.columns)
            && holds(self.c.len(), self.rows, self.c_stride, self.columns)
    }
}

impl Product<'_> {
    /// Computes the product.
    ///
    /// # Panics
    /// If an operand is too short for its sizes.
    ///
    /// # Safety
    /// During the call no other thread accesses these columns of these rows of `c`.
    pub(crate) unsafe fn run(&self, isa: Isa) {
        let (a, b) =
            (holds(self.a.len(), self.rows, self.a_stride, self.k), holds(self.b.len(), self.k, self.b_stride, PANEL));
        assert!(a && b && self.has_room(), "an operand is too short for the product");
        // SAFETY: the lengths of the operands were checked above. The output is this thread's, as the caller promises.
        unsafe { run(isa, self) }
    }
}

by_isa! {
    /// # Safety
    /// The operands are as long as [`Product::run`] requires, and no other thread accesses the output.
    unsafe fn run(p: &Product) = blocks
}

/// # Safety
/// As for [`run`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn blocks<L: Floats>(p: &Product) {
    let mut row = 0;
    // SAFETY: `row` and the rows that follow it are among the rows that the caller has checked.
    unsafe {
        // The blocks are as large as the registers allow, with room for the panel's vectors and a broadcast element.
        while L::MANY && row + 12 <= p.rows {
            block::<L, 12, 2>(p, row, 0);
            row += 12;
        }
        while L::MANY && row + 4 <= p.rows {
            block::<L, 4, 2>(p, row, 0);
            row += 4;
        }
        while !L::MANY && row + 6 <= p.rows {
            block::<L, 6, 1>(p, row, 0);
            block::<L, 6, 1>(p, row, LANES);
            row += 6;
        }
        while !L::MANY && row + 2 <= p.rows {
            block::<L, 2, 2>(p, row, 0);
            row += 2;
        }
        while row < p.rows {
            block::<L, 1, 2>(p, row, 0);
            row += 1;
        }
    }
}

/// Multiplies `M` rows from `row` on with `N` vectors of columns from `column` on. The sums stay in registers.
///
/// # Safety
/// As for [`blocks`].
#[inline(always)]
unsafe fn block<L: Floats, const M: usize, const N: usize>(p: &Product, row: usize, column: usize) {
    let columns = p.columns.saturating_sub(column).min(N * LANES);
    if columns == 0 {
        return;
    }
    // SAFETY: the caller has checked that `M` rows from `row` on, and the columns up to `columns`, are inside `a`, `c`
    // and the start, and that `k` whole lines of the panel are inside `b`. An incomplete vector of columns goes through
    // `edge`.
    unsafe {
        let (a, c) = (p.a.as_ptr().add(row * p.a_stride), p.c.as_mut_ptr().add(row * p.c_stride + column));
        let whole = columns == N * LANES;
        let mut sums = [[L::splat(0.0); N]; M];
        let mut edge = [0f32; PANEL];
        for (m, sums) in sums.iter_mut().enumerate() {
            let from = match p.start {
                Start::Zero => continue,
                Start::Row(row) => row.as_ptr().add(column),
                Start::Output => c.add(m * p.c_stride).cast_const(),
            };
            let from = if whole {
                from
            } else {
                std::ptr::copy_nonoverlapping(from, edge.as_mut_ptr(), columns);
                edge.as_ptr()
            };
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = L::floats(from.add(n * LANES));
            }
        }
        let mut b = p.b.as_ptr().add(column);
        for k in 0..p.k {
            let mut line = [L::splat(0.0); N];
            for (n, line) in line.iter_mut().enumerate() {
                *line = L::floats(b.add(n * LANES));
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let a = L::splat(*a.add(m * p.a_stride + k));
                for (sum, line) in sums.iter_mut().zip(line) {
                    *sum = L::madd(a, line, *sum);
                }
            }
            // Beyond the last line the pointer is not dereferenced.
            b = b.wrapping_add(p.b_stride);
        }
        for (m, sums) in sums.into_iter().enumerate() {
            let to = c.add(m * p.c_stride);
            let whole_to = if whole { to } else { edge.as_mut_ptr() };
            for (n, sum) in sums.into_iter().enumerate() {
                L::store(whole_to.add(n * LANES), sum);
            }
            if !whole {
                std::ptr::copy_nonoverlapping(edge.as_ptr(), to, columns);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use half::{bf16, f16};

    use super::*;
    use crate::cpu::rows::{Kind, Rows, inner_products, pack, q8_row};
    use crate::cpu::store::{q8_values, to_q8};

    fn random(len: usize) -> Vec<f32> {
        Tensor::randn(0f32, 1.0, len, &Device::Cpu).unwrap().to_vec1().unwrap()
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]
        #[test]
        fn every_path_and_kind_is_the_sum_in_f64(rows in 1usize..30, n in 1usize..40, k in 1usize..150) {
            let (x, w, bias) = (random(rows * k), random(n * k), random(n));
            let half: Vec<f16> = w.iter().map(|&x| f16::from_f32(x)).collect();
            let in_bf16: Vec<bf16> = w.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut blocks = vec![0; n * q8_row(k)];
            for (to, from) in blocks.chunks_exact_mut(q8_row(k)).zip(w.chunks_exact(k)) {
                to_q8(to, from);
            }
            let mut rounded = vec![0f32; n * k];
            q8_values(&blocks, k, &mut rounded);
            for isa in Isa::available() {
                for kind in [Kind::F32, Kind::F16, Kind::BF16, Kind::Q8] {
                    let (w, wide): (Rows<'_>, Vec<f32>) = match kind {
                        Kind::F32 => (Rows::new(&w, k), w.clone()),
                        Kind::F16 => (Rows::new(&half, k), half.iter().map(|x| x.to_f32()).collect()),
                        Kind::BF16 => (Rows::new(&in_bf16, k), in_bf16.iter().map(|x| x.to_f32()).collect()),
                        Kind::Q8 => (Rows::new(&blocks, q8_row(k)), rounded.clone()),
                    };
                    let exact = |i: usize, j: usize| {
                        let products = (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(wide[j * k + c]));
                        products.sum::<f64>() + f64::from(bias[j])
                    };
                    let check = |y: &[f32], what: &str| {
                        for (i, y) in y.iter().enumerate() {
                            let exact = exact(i / n, i % n);
                            assert!((exact - f64::from(*y)).abs() < 5e-5, "{what} {isa:?} {kind:?}: {exact} {y}");
                        }
                    };
                    let mut y = vec![f32::NAN; rows * n];
                    // SAFETY: nothing else accesses `y`.
                    unsafe {
                        inner_products(isa, w, (n, k), (&x, k, rows), Start::Row(&bias), (Shared::new(&mut y), n));
                    }
                    check(&y, "inner products");
                    y.fill(f32::NAN);
                    let mut panel = vec![f32::NAN; k * PANEL];
                    for from in (0..n).step_by(PANEL) {
                        let columns = PANEL.min(n - from);
                        pack(isa, w.skip(from, 0), (columns, k), &mut panel, PANEL);
                        let product = Product {
                            a: &x,
                            a_stride: k,
                            rows,
                            b: &panel,
                            b_stride: PANEL,
                            k: k / 2,
                            c: Shared::new(&mut y).from(from),
                            c_stride: n,
                            columns,
                            start: Start::Row(&bias[from..]),
                        };
                        let rest = Product {
                            a: &x[k / 2..],
                            b: &panel[k / 2 * PANEL..],
                            k: k - k / 2,
                            start: Start::Output,
                            ..product
                        };
                        // SAFETY: nothing else accesses `y`. The first half is summed, and the rest is added to it.
                        unsafe {
                            product.run(isa);
                            rest.run(isa);
                        }
                    }
                    check(&y, "product");
                }
            }
        }
    }
}
