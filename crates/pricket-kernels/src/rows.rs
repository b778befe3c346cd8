//! Rows of floats as they are stored, widened on the way: inner products, sums, and panels for [`Product`].
//!
//! [`Product`]: crate::product::Product

#![allow(clippy::inline_always, reason = "loops must become part of the functions that have the instructions")]

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::cpu::{Path, by_path};
use crate::lanes::{Floats, LANES};
use crate::product::Start;

/// Numbers as they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    F16,
    BF16,
    /// Blocks of 32 as ggml's `q8_0`, the last one of a row filled up with zeros; an element of storage is a byte.
    Q8,
}

impl Kind {
    /// Bytes of an element of storage.
    pub(crate) const fn size(self) -> usize {
        size_of_kind(self as u8)
    }
}

/// As [`Kind::size`], of the kind of that number.
const fn size_of_kind(kind: u8) -> usize {
    match kind {
        0 => 4,
        3 => 1,
        _ => 2,
    }
}

/// Columns and bytes of a block of [`Kind::Q8`].
pub(crate) const Q8_BLOCK: (usize, usize) = (32, 34);

/// Bytes of a row of `columns` as [`Kind::Q8`].
pub(crate) const fn q8_row(columns: usize) -> usize {
    columns.div_ceil(Q8_BLOCK.0) * Q8_BLOCK.1
}

/// Rows of numbers that lie `stride` elements of storage apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    pub(crate) at: *const u8,
    pub(crate) kind: Kind,
    pub(crate) stride: usize,
    of: PhantomData<&'a [u8]>,
}

impl Rows<'_> {
    /// Rows that begin at `at`. How long they are there is for the caller to say, by the lifetime in a signature.
    pub(crate) fn new(at: *const u8, kind: Kind, stride: usize) -> Self {
        Self { at, kind, stride, of: PhantomData }
    }

    /// # Safety
    /// The row is there.
    #[inline(always)]
    unsafe fn row(self, row: usize) -> *const u8 {
        // SAFETY: promised by the caller.
        unsafe { self.at.add(row * self.stride * self.kind.size()) }
    }

    /// The same rows from another one on, and another column; of [`Kind::Q8`] one that begins a block.
    ///
    /// # Safety
    /// The row and the column are there.
    pub(crate) unsafe fn skip(self, row: usize, column: usize) -> Self {
        let column = if self.kind == Kind::Q8 { q8_row(column) } else { column };
        // SAFETY: promised by the caller.
        Self { at: unsafe { self.row(row).add(column * self.kind.size()) }, ..self }
    }

    /// Other rows, so many elements of storage further on.
    ///
    /// # Safety
    /// They are there.
    pub(crate) unsafe fn further(self, elements: usize) -> Self {
        // SAFETY: promised by the caller.
        Self { at: unsafe { self.at.add(elements * self.kind.size()) }, ..self }
    }
}

/// Sixteen numbers of a row from `column` on, a multiple of sixteen.
///
/// # Safety
/// They can be read, and the processor has the instructions of `L`.
#[inline(always)]
unsafe fn load<L: Floats, const KIND: u8>(row: *const u8, column: usize) -> L::Float {
    // SAFETY: promised by the caller.
    unsafe {
        match KIND {
            0 => L::floats(row.add(4 * column).cast()),
            1 => L::halves(row.add(2 * column).cast()),
            2 => L::brains(row.add(2 * column).cast()),
            _ => {
                let block = row.add(column / Q8_BLOCK.0 * Q8_BLOCK.1);
                L::mul(L::half(block.cast()), L::signed(block.add(2 + column % Q8_BLOCK.0)))
            }
        }
    }
}

/// One number of a row.
///
/// # Safety
/// It can be read.
#[inline(always)]
unsafe fn single<const KIND: u8>(row: *const u8, column: usize) -> f32 {
    // SAFETY: promised by the caller.
    unsafe {
        match KIND {
            0 => row.add(4 * column).cast::<f32>().read_unaligned(),
            1 => row.add(2 * column).cast::<f16>().read_unaligned().to_f32(),
            2 => row.add(2 * column).cast::<bf16>().read_unaligned().to_f32(),
            _ => {
                let block = row.add(column / Q8_BLOCK.0 * Q8_BLOCK.1);
                let q = block.add(2 + column % Q8_BLOCK.0).cast::<i8>().read();
                block.cast::<f16>().read_unaligned().to_f32() * f32::from(q)
            }
        }
    }
}

/// Makes a function that runs `$body::<L, ..>` with the best instructions up to `path`, for each kind of number.
macro_rules! by_path_and_kind {
    ($(#[$doc:meta])* $name:ident, $body:ident, ($($arg:ident: $type:ty),*)) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "operands and their sizes")]
        pub(crate) unsafe fn $name(path: Path, kind: Kind, $($arg: $type),*) {
            by_path! {
                #[allow(clippy::too_many_arguments, reason = "as its caller")]
                fn of_kind<const KIND: u8>($($arg: $type),*) = $body
            }
            // SAFETY: promised by the caller.
            unsafe {
                match kind {
                    Kind::F32 => of_kind::<0>(path, $($arg),*),
                    Kind::F16 => of_kind::<1>(path, $($arg),*),
                    Kind::BF16 => of_kind::<2>(path, $($arg),*),
                    Kind::Q8 => of_kind::<3>(path, $($arg),*),
                }
            }
        }
    };
}

by_path_and_kind! {
    /// Inner products of each of `rows` rows of `w` with each of `count` rows of `x`, which lie `x_stride` apart: that of row
    /// `j` with row `i` goes to `out[i * out_stride + j]`. Every row of `w` is read once.
    ///
    /// # Safety
    /// All of that can be read and written.
    inner_products, inner_products_body, (
        w: Rows, rows: usize, k: usize, x: *const f32, x_stride: usize, count: usize, start: Start, out: *mut f32,
        out_stride: usize
    )
}

/// # Safety
/// As [`inner_products`]; the processor has the instructions of `L`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "as the function it is the body of")]
unsafe fn inner_products_body<L: Floats, const KIND: u8>(
    w: Rows,
    rows: usize,
    k: usize,
    x: *const f32,
    x_stride: usize,
    count: usize,
    start: Start,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        // `W` rows of weights by `R` rows of `x` from `i` on, as long as there are so many.
        macro_rules! rows {
            ($w:literal, $r:literal, $u:literal, $row:ident, $i:ident) => {
                while count - $i >= $r {
                    let (x, out) = (x.add($i * x_stride), out.add($i * out_stride));
                    some_rows::<L, KIND, $w, $r, $u>(w, $row, k, x, x_stride, start, out, out_stride);
                    $i += $r;
                }
            };
        }
        let mut row = 0;
        // Several rows of weights at once, where registers hold their sums: activations are loaded once for all of them.
        while L::MANY && count >= 4 && row + 3 <= rows {
            let mut i = 0;
            rows!(3, 8, 1, row, i);
            rows!(3, 4, 1, row, i);
            rows!(3, 1, 2, row, i);
            row += 3;
        }
        for row in row..rows {
            let mut i = 0;
            rows!(1, 4, 1, row, i);
            rows!(1, 1, 4, row, i);
        }
    }
}

/// `W` rows of weights from `row` on times `R` rows, in `U` sums each.
///
/// # Safety
/// As [`inner_products_body`].
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "as the function it is the body of")]
#[allow(clippy::needless_range_loop, reason = "rows, rows and sums go together")]
unsafe fn some_rows<L: Floats, const KIND: u8, const W: usize, const R: usize, const U: usize>(
    w: Rows,
    row: usize,
    k: usize,
    x: *const f32,
    x_stride: usize,
    start: Start,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let size = const { size_of_kind(KIND) };
        let out = out.add(row);
        let (apart, w) = (w.stride * size, w.row(row));
        let mut sums = [[[L::splat(0.0); U]; R]; W];
        let mut at = 0;
        while at + LANES * U <= k {
            for u in 0..U {
                let mut wide = [L::splat(0.0); W];
                for (j, wide) in wide.iter_mut().enumerate() {
                    let (w, at) = (w.add(j * apart), at + LANES * u);
                    L::expect(w.wrapping_add(at * size + (2 << 10)));
                    *wide = load::<L, KIND>(w, at);
                }
                for r in 0..R {
                    let x = L::floats(x.add(r * x_stride + at + LANES * u));
                    for j in 0..W {
                        sums[j][r][u] = L::madd(x, wide[j], sums[j][r][u]);
                    }
                }
            }
            at += LANES * U;
        }
        while at + LANES <= k {
            for j in 0..W {
                let wide = load::<L, KIND>(w.add(j * apart), at);
                for r in 0..R {
                    sums[j][r][0] = L::madd(L::floats(x.add(r * x_stride + at)), wide, sums[j][r][0]);
                }
            }
            at += LANES;
        }
        for (j, sums) in sums.iter().enumerate() {
            for (r, sums) in sums.iter().enumerate() {
                let mut sum = sums[0];
                for more in &sums[1..] {
                    sum = L::add(sum, *more);
                }
                let mut sum = L::sum(sum);
                for at in at..k {
                    sum += *x.add(r * x_stride + at) * single::<KIND>(w.add(j * apart), at);
                }
                start.put(sum, row + j, out.add(r * out_stride + j));
            }
        }
    }
}

by_path_and_kind! {
    /// Lays `rows` (at most 32) rows of `k` numbers side by side: element `c` of row `j` goes to `out[stride · c + j]`, and zeros
    /// where there is no row.
    ///
    /// # Safety
    /// All of that can be read, and 32 numbers be written for each column.
    pack, pack_body, (w: Rows, rows: usize, k: usize, out: *mut f32, stride: usize)
}

/// # Safety
/// As [`pack`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn pack_body<L: Floats, const KIND: u8>(w: Rows, rows: usize, k: usize, out: *mut f32, stride: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        for half in 0..2 {
            let (first, count) = (half * LANES, rows.saturating_sub(half * LANES).min(LANES));
            let mut at = 0;
            while at + LANES <= k {
                let mut square = [L::splat(0.0); LANES];
                for (row, line) in square.iter_mut().enumerate().take(count) {
                    *line = load::<L, KIND>(w.row(first + row), at);
                }
                L::transpose(&mut square);
                for (c, line) in square.into_iter().enumerate() {
                    L::store(out.add((at + c) * stride + first), line);
                }
                at += LANES;
            }
            for at in at..k {
                for row in 0..LANES {
                    let value = if row < count { single::<KIND>(w.row(first + row), at) } else { 0.0 };
                    *out.add(at * stride + first + row) = value;
                }
            }
        }
    }
}

by_path_and_kind! {
    /// The numbers of `rows` rows of `k`, widened, `stride` apart; what is between the rows is left as it is.
    ///
    /// # Safety
    /// All of that can be read and written.
    widen_to, widen_body, (w: Rows, rows: usize, k: usize, out: *mut f32, stride: usize)
}

/// # Safety
/// As [`widen_to`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn widen_body<L: Floats, const KIND: u8>(w: Rows, rows: usize, k: usize, out: *mut f32, stride: usize) {
    for row in 0..rows {
        // SAFETY: promised by the caller.
        unsafe {
            let (w, out) = (w.row(row), out.add(row * stride));
            let mut at = 0;
            while at + LANES <= k {
                L::store(out.add(at), load::<L, KIND>(w, at));
                at += LANES;
            }
            for at in at..k {
                *out.add(at) = single::<KIND>(w, at);
            }
        }
    }
}

by_path_and_kind! {
    /// Adds to `out` the `rows` rows of `k` numbers of `v`, each times its weight.
    ///
    /// # Safety
    /// All of that can be read and written.
    weighted_sum, weighted_sum_body, (v: Rows, rows: usize, k: usize, weights: *const f32, out: *mut f32)
}

/// # Safety
/// As [`weighted_sum`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn weighted_sum_body<L: Floats, const KIND: u8>(
    v: Rows,
    rows: usize,
    k: usize,
    weights: *const f32,
    out: *mut f32,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut at = 0;
        while at + 4 * LANES <= k {
            some_columns::<L, KIND, 4>(v, at, rows, weights, out.add(at));
            at += 4 * LANES;
        }
        while at + LANES <= k {
            some_columns::<L, KIND, 1>(v, at, rows, weights, out.add(at));
            at += LANES;
        }
        for at in at..k {
            for row in 0..rows {
                *out.add(at) += *weights.add(row) * single::<KIND>(v.row(row), at);
            }
        }
    }
}

/// `C` vectors of columns from `at` on, two rows at a time in sums of their own.
///
/// # Safety
/// As [`weighted_sum_body`].
#[inline(always)]
unsafe fn some_columns<L: Floats, const KIND: u8, const C: usize>(
    v: Rows,
    at: usize,
    rows: usize,
    weights: *const f32,
    out: *mut f32,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut even = [L::splat(0.0); C];
        let mut odd = [L::splat(0.0); C];
        for (c, even) in even.iter_mut().enumerate() {
            *even = L::floats(out.add(c * LANES));
        }
        let mut row = 0;
        while row + 2 <= rows {
            let (a, b) = (v.row(row), v.row(row + 1));
            let (weight_a, weight_b) = (L::splat(*weights.add(row)), L::splat(*weights.add(row + 1)));
            for c in 0..C {
                even[c] = L::madd(weight_a, load::<L, KIND>(a, at + c * LANES), even[c]);
                odd[c] = L::madd(weight_b, load::<L, KIND>(b, at + c * LANES), odd[c]);
            }
            row += 2;
        }
        if row < rows {
            let (a, weight) = (v.row(row), L::splat(*weights.add(row)));
            for (c, even) in even.iter_mut().enumerate() {
                *even = L::madd(weight, load::<L, KIND>(a, at + c * LANES), *even);
            }
        }
        for c in 0..C {
            L::store(out.add(c * LANES), L::add(even[c], odd[c]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_within_two_units_in_the_last_place() {
        let x: Vec<f32> =
            (0..87_000).map(|i| i as f32 * -1e-3).chain([0.0, -87.5, -100.0, f32::NEG_INFINITY]).collect();
        let mut y = vec![0f32; x.len().next_multiple_of(LANES)];
        let mut padded = x.clone();
        padded.resize(y.len(), 0.0);
        for path in Path::available() {
            // SAFETY: whole vectors of both slices.
            unsafe { exp(path, Kind::F32, padded.as_ptr(), y.as_mut_ptr(), y.len()) };
            for (x, y) in x.iter().zip(&y) {
                let exact = f64::from(*x).exp();
                let error = (f64::from(*y) - exact).abs();
                assert!(error <= exact * 2.4e-7 || (*x < -87.0 && error < 2e-38), "{path:?} {x}: {y} for {exact}");
            }
        }
    }

    by_path_and_kind! {
        /// # Safety
        /// `len` numbers, whole vectors, can be read and written.
        exp, exp_body, (x: *const f32, y: *mut f32, len: usize)
    }

    #[inline(always)]
    unsafe fn exp_body<L: Floats, const KIND: u8>(x: *const f32, y: *mut f32, len: usize) {
        for at in (0..len).step_by(LANES) {
            // SAFETY: promised by the caller.
            unsafe { L::store(y.add(at), L::exp(L::floats(x.add(at)))) };
        }
    }
}
