//! Rows of numbers in their stored type, widened to f32 as they are read: inner products, weighted sums, and panels for
//! [`Product`].
//!
//! [`Product`]: crate::cpu::product::Product

#![allow(clippy::inline_always, reason = "loops must be compiled into the functions that enable the instructions")]

use bytemuck::Pod;
use half::{bf16, f16};

use crate::cpu::isa::{Isa, by_isa};
use crate::cpu::lanes::{Floats, LANES};
use crate::cpu::product::Start;
use crate::cpu::shared::{Shared, holds};

/// The type of stored numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    F16,
    BF16,
    /// ggml's `q8_0` blocks of 32 numbers; the last block of a row is padded with zeros. An element of storage is a
    /// byte.
    Q8,
}

impl Kind {
    /// Returns the bytes of an element of storage.
    pub(crate) const fn size(self) -> usize {
        size_of_kind(self as u8)
    }
}

/// Returns [`Kind::size`] of the kind with this number.
const fn size_of_kind(kind: u8) -> usize {
    match kind {
        0 => 4,
        3 => 1,
        _ => 2,
    }
}

/// Columns and bytes of a block of [`Kind::Q8`].
pub(crate) const Q8_BLOCK: (usize, usize) = (32, 34);

/// Returns the bytes of a row of `columns` numbers as [`Kind::Q8`].
pub(crate) const fn q8_row(columns: usize) -> usize {
    columns.div_ceil(Q8_BLOCK.0) * Q8_BLOCK.1
}

/// An element of storage.
pub(crate) trait Element: Pod {
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::F32;
}

impl Element for f16 {
    const KIND: Kind = Kind::F16;
}

impl Element for bf16 {
    const KIND: Kind = Kind::BF16;
}

impl Element for u8 {
    const KIND: Kind = Kind::Q8;
}

/// Rows of numbers that begin `stride` elements of storage apart. They include all of the storage that follows them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    storage: &'a [u8],
    kind: Kind,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// Creates rows that begin at the start of `storage`.
    pub(crate) fn new<T: Element>(storage: &'a [T], stride: usize) -> Self {
        Self { storage: bytemuck::cast_slice(storage), kind: T::KIND, stride }
    }

    /// Creates rows of words of two columns each, from rows of an even number of columns. Words can be moved, but not
    /// computed with.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn in_words(storage: &'a [bf16], columns: usize) -> Self {
        Self { storage: bytemuck::cast_slice(storage), kind: Kind::F32, stride: columns / 2 }
    }

    /// Returns the type of the stored numbers.
    pub(crate) fn kind(self) -> Kind {
        self.kind
    }

    /// Returns the number of elements of storage from one row to the next.
    pub(crate) fn stride(self) -> usize {
        self.stride
    }

    /// Returns the numbers of [`Kind::F32`] rows, from the first on.
    pub(crate) fn floats(self) -> &'a [f32] {
        assert_eq!(self.kind, Kind::F32, "rows that are not f32");
        bytemuck::cast_slice(self.storage)
    }

    /// Returns whether there are `rows` rows of `columns` numbers.
    pub(crate) fn has(self, rows: usize, columns: usize) -> bool {
        let columns = if self.kind == Kind::Q8 { q8_row(columns) } else { columns };
        holds(self.storage.len() / self.kind.size(), rows, self.stride, columns)
    }

    /// Returns a pointer to the beginning of a row.
    ///
    /// # Safety
    /// The rows [have](Rows::has) it.
    #[inline(always)]
    unsafe fn row(self, row: usize) -> *const u8 {
        // SAFETY: the row is inside the storage, as the caller promises.
        unsafe { self.storage.as_ptr().add(row * self.stride * self.kind.size()) }
    }

    /// Returns the rows from row `row` and column `column` on. For [`Kind::Q8`] the column must begin a block.
    ///
    /// # Panics
    /// If they begin beyond the end of the storage.
    pub(crate) fn skip(self, row: usize, column: usize) -> Self {
        let column = if self.kind == Kind::Q8 { q8_row(column) } else { column };
        self.further(row * self.stride + column)
    }

    /// Returns the rows that begin `elements` elements of storage further on.
    ///
    /// # Panics
    /// If they begin beyond the end of the storage.
    pub(crate) fn further(self, elements: usize) -> Self {
        Self { storage: &self.storage[elements * self.kind.size()..], ..self }
    }
}

/// Loads sixteen numbers of a row from `column` on, which is a multiple of sixteen.
///
/// # Safety
/// The numbers are in storage of that kind, and the processor has the instructions of `L`.
#[inline(always)]
unsafe fn load<L: Floats, const KIND: u8>(row: *const u8, column: usize) -> L::Float {
    // SAFETY: the storage has these sixteen numbers. In a `q8_0` block they are one half of the block, behind its
    // scale.
    unsafe {
        match KIND {
            0 => L::floats(row.add(4 * column).cast()),
            1 => L::halves(row.add(2 * column).cast()),
            2 => L::bf16s(row.add(2 * column).cast()),
            _ => {
                let block = row.add(column / Q8_BLOCK.0 * Q8_BLOCK.1);
                L::mul(L::half(block.cast()), L::signed(block.add(2 + column % Q8_BLOCK.0)))
            }
        }
    }
}

/// Loads one number of a row.
///
/// # Safety
/// The number is in storage of that kind.
#[inline(always)]
unsafe fn single<const KIND: u8>(row: *const u8, column: usize) -> f32 {
    // SAFETY: the storage has the number and the scale of its block.
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

/// Defines a function that calls `$body::<L, ..>` with the best instructions up to `isa`, for each type of stored
/// numbers.
macro_rules! by_isa_and_kind {
    ($(#[$doc:meta])* $name:ident, $body:ident, ($($arg:ident: $type:ty),*)) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "operands and their sizes")]
        unsafe fn $name(isa: Isa, kind: Kind, $($arg: $type),*) {
            by_isa! {
                /// # Safety
                /// As for the caller.
                #[allow(clippy::too_many_arguments, reason = "the same arguments as its caller")]
                unsafe fn of_kind<const KIND: u8>($($arg: $type),*) = $body
            }
            // SAFETY: each kind calls the function with its number; the caller promises the other conditions.
            unsafe {
                match kind {
                    Kind::F32 => of_kind::<0>(isa, $($arg),*),
                    Kind::F16 => of_kind::<1>(isa, $($arg),*),
                    Kind::BF16 => of_kind::<2>(isa, $($arg),*),
                    Kind::Q8 => of_kind::<3>(isa, $($arg),*),
                }
            }
        }
    };
}

/// Computes the inner products of `rows` rows of `w` with `count` rows of `x`, all of `k` numbers. Rows of `x` are
/// `x_stride` apart. The product of row `j` of `w` with row `i` of `x` goes to `out[i * out_stride + j]`. Every row of
/// `w` is read once.
///
/// # Panics
/// If an operand is too short for its sizes.
///
/// # Safety
/// During the call no other thread accesses these places of `out`.
pub(crate) unsafe fn inner_products(
    isa: Isa,
    w: Rows<'_>,
    (rows, k): (usize, usize),
    (x, x_stride, count): (&[f32], usize, usize),
    start: Start<'_>,
    (out, out_stride): (Shared<'_, f32>, usize),
) {
    let has_room = start.has(rows) && holds(out.len(), count, out_stride, rows);
    assert!(
        w.has(rows, k) && holds(x.len(), count, x_stride, k) && has_room,
        "an operand is too short for the inner products"
    );
    let (kind, x, out) = (w.kind, x.as_ptr(), out.as_mut_ptr());
    // SAFETY: the lengths of all operands were checked above. The output is this thread's, as the caller promises.
    unsafe { inner_products_of_kind(isa, kind, w, rows, k, x, x_stride, count, start, out, out_stride) };
}

by_isa_and_kind! {
    /// # Safety
    /// The operands are as long as [`inner_products`] requires, and no other thread accesses the output.
    inner_products_of_kind, inner_products_body, (
        w: Rows<'_>, rows: usize, k: usize, x: *const f32, x_stride: usize, count: usize, start: Start<'_>, out: *mut f32,
        out_stride: usize
    )
}

/// # Safety
/// As for [`inner_products_of_kind`]; the processor has the instructions of `L`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the same arguments as its caller")]
unsafe fn inner_products_body<L: Floats, const KIND: u8>(
    w: Rows<'_>,
    rows: usize,
    k: usize,
    x: *const f32,
    x_stride: usize,
    count: usize,
    start: Start<'_>,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: the rows of weights and of `x` that are taken at once are among those that the caller has checked.
    unsafe {
        // Multiplies `W` rows of weights with `R` rows of `x` from `i` on, while there are as many.
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
        // Several rows of weights at once, if there are registers for their sums: activations are loaded once for all
        // of them.
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

/// Multiplies `W` rows of weights from `row` on with `R` rows of `x`, in `U` sums each.
///
/// # Safety
/// As for [`inner_products_body`]; there are `W` rows of weights from `row` on, and `R` rows of `x`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the same arguments as its caller")]
#[allow(clippy::needless_range_loop, reason = "the indices are shared by both kinds of rows and the sums")]
unsafe fn some_rows<L: Floats, const KIND: u8, const W: usize, const R: usize, const U: usize>(
    w: Rows<'_>,
    row: usize,
    k: usize,
    x: *const f32,
    x_stride: usize,
    start: Start<'_>,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: only columns below `k` of these rows are read, the last few one by one; prefetching does not access
    // memory.
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

/// Packs `rows` (at most 32) rows of `k` numbers side by side: element `c` of row `j` goes to `out[stride · c + j]`.
/// Missing rows become zeros.
///
/// # Panics
/// If the rows or the output are too short for the sizes.
pub(crate) fn pack(isa: Isa, w: Rows<'_>, (rows, k): (usize, usize), out: &mut [f32], stride: usize) {
    let has_room = holds(out.len(), k, stride, 2 * LANES);
    assert!(rows <= 2 * LANES && w.has(rows, k) && has_room, "an operand is too short for the panel");
    // SAFETY: the lengths of the rows and the output were checked above, and the output is borrowed.
    unsafe { pack_of_kind(isa, w.kind, w, rows, k, out.as_mut_ptr(), stride) };
}

by_isa_and_kind! {
    /// # Safety
    /// The rows exist, and 32 numbers can be written for each column.
    pack_of_kind, pack_body, (w: Rows<'_>, rows: usize, k: usize, out: *mut f32, stride: usize)
}

/// # Safety
/// As for [`pack_of_kind`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn pack_body<L: Floats, const KIND: u8>(w: Rows<'_>, rows: usize, k: usize, out: *mut f32, stride: usize) {
    // SAFETY: the `count` rows of a half are among `rows`, and each column has room for 32 numbers; the caller has
    // checked both.
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

/// Writes `rows` rows of `k` numbers, widened to f32, `stride` numbers apart. The places between the rows are not
/// changed.
///
/// # Panics
/// If the rows or the output are too short for the sizes.
pub(crate) fn widen_to(isa: Isa, w: Rows<'_>, (rows, k): (usize, usize), out: &mut [f32], stride: usize) {
    assert!(w.has(rows, k) && holds(out.len(), rows, stride, k), "an operand is too short for the rows");
    // SAFETY: the lengths of the rows and the output were checked above, and the output is borrowed.
    unsafe { widen_of_kind(isa, w.kind, w, rows, k, out.as_mut_ptr(), stride) };
}

by_isa_and_kind! {
    /// # Safety
    /// The rows exist, and `k` numbers can be written for each.
    widen_of_kind, widen_body, (w: Rows<'_>, rows: usize, k: usize, out: *mut f32, stride: usize)
}

/// # Safety
/// As for [`widen_of_kind`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn widen_body<L: Floats, const KIND: u8>(w: Rows<'_>, rows: usize, k: usize, out: *mut f32, stride: usize) {
    for row in 0..rows {
        // SAFETY: the caller has checked that `k` numbers of the row can be read and written.
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

/// Adds the rows of `v`, each times its weight, to `out`.
///
/// # Panics
/// If there are fewer rows than weights, or if the rows are shorter than `out`.
pub(crate) fn weighted_sum(isa: Isa, v: Rows<'_>, weights: &[f32], out: &mut [f32]) {
    let (rows, k) = (weights.len(), out.len());
    assert!(v.has(rows, k), "rows are too short for the weighted sum");
    // SAFETY: the lengths of the rows were checked above, and the output is borrowed.
    unsafe { weighted_sum_of_kind(isa, v.kind, v, rows, k, weights.as_ptr(), out.as_mut_ptr()) };
}

by_isa_and_kind! {
    /// # Safety
    /// `rows` rows and weights can be read, and `k` numbers read and written.
    weighted_sum_of_kind, weighted_sum_body, (v: Rows<'_>, rows: usize, k: usize, weights: *const f32, out: *mut f32)
}

/// # Safety
/// As for [`weighted_sum_of_kind`]; the processor has the instructions of `L`.
#[inline(always)]
unsafe fn weighted_sum_body<L: Floats, const KIND: u8>(
    v: Rows<'_>,
    rows: usize,
    k: usize,
    weights: *const f32,
    out: *mut f32,
) {
    // SAFETY: only columns below `k` of the rows and of the output are accessed, and `rows` weights; the caller has
    // checked them.
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

/// Adds `C` vectors of columns from `at` on, with even and odd rows in separate sums.
///
/// # Safety
/// As for [`weighted_sum_body`]; the columns exist, and `out` begins at column `at`.
#[inline(always)]
unsafe fn some_columns<L: Floats, const KIND: u8, const C: usize>(
    v: Rows<'_>,
    at: usize,
    rows: usize,
    weights: *const f32,
    out: *mut f32,
) {
    // SAFETY: the caller has checked that there are `rows` rows with these columns, and their weights.
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
        for isa in Isa::available() {
            // SAFETY: both slices are whole vectors.
            unsafe { exp(isa, Kind::F32, padded.as_ptr(), y.as_mut_ptr(), y.len()) };
            for (x, y) in x.iter().zip(&y) {
                let exact = f64::from(*x).exp();
                let error = (f64::from(*y) - exact).abs();
                assert!(error <= exact * 2.4e-7 || (*x < -87.0 && error < 2e-38), "{isa:?} {x}: {y} for {exact}");
            }
        }
    }

    by_isa_and_kind! {
        /// # Safety
        /// `len` numbers can be read and written, and are whole vectors.
        exp, exp_body, (x: *const f32, y: *mut f32, len: usize)
    }

    #[inline(always)]
    unsafe fn exp_body<L: Floats, const KIND: u8>(x: *const f32, y: *mut f32, len: usize) {
        for at in (0..len).step_by(LANES) {
            // SAFETY: `len` is a multiple of a vector, so each access is a whole vector.
            unsafe { L::store(y.add(at), L::exp(L::floats(x.add(at)))) };
        }
    }
}
