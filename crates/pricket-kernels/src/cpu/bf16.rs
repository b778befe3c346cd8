//! Products of bfloat16 numbers with f32 sums, on processors that have instructions for them: AVX-512 BF16 and AMX
//! tiles.
//!
//! Both read the same operands. Activations are stored row after row. Weights are in panels of 32 weight rows, in which
//! a word holds two neighboring columns of a row.

#![cfg(target_arch = "x86_64")]
#![allow(clippy::wildcard_imports, reason = "a list of the instructions would be long and not informative")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::sync::OnceLock;

use half::bf16;

use crate::cpu::isa::{InstructionSet, Isa};
use crate::cpu::lanes::LANES;
use crate::cpu::product::{PANEL, Product, Start};
use crate::cpu::shared::{Shared, holds};

/// Columns that a tile holds. Operands are padded with zeros to a multiple of them.
pub(crate) const STEP: usize = 32;

/// Proof that this processor has vector products of bfloat16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16Products(Isa);

#[allow(clippy::unused_self, reason = "a value is a proof; the methods need no more of it")]
impl Bf16Products {
    /// Returns the proof if `isa` includes such products and the processor has them.
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        (isa >= InstructionSet::Avx512 && is_x86_feature_detected!("avx512bf16")).then_some(Self(isa))
    }

    /// Returns the instruction set that the products use.
    pub(crate) fn isa(self) -> Isa {
        self.0
    }

    /// Returns the number of rows of activations that are multiplied together.
    pub(crate) fn block(self) -> usize {
        if self.0 == InstructionSet::Amx { 32 } else { 12 }
    }

    /// Rounds the numbers of `x` to bfloat16, into the beginning of `out`.
    ///
    /// # Panics
    /// If `out` is shorter than `x`.
    pub(crate) fn to_rows(self, x: &[f32], out: &mut [u16]) {
        assert!(out.len() >= x.len(), "output is shorter than the row");
        // SAFETY: `out` is at least as long as `x`, and the token proves that the processor has the instructions.
        unsafe { to_rows(x.as_ptr(), x.len(), out.as_mut_ptr()) };
    }

    /// Rounds a panel of 32 columns and an even number of rows to words of two numbers each: elements `c` and `c + 1`
    /// of column `j` go to word `16 c + j`, for even `c`.
    ///
    /// # Panics
    /// If the panel has an odd number of rows, or if `out` has fewer words than there are pairs.
    pub(crate) fn to_pairs(self, panel: &[f32], out: &mut [u32]) {
        let k = panel.len() / PANEL;
        assert!(
            k.is_multiple_of(2) && panel.len() == PANEL * k && out.len() >= PANEL * k / 2,
            "panel and output do not fit"
        );
        // SAFETY: the lengths of both were checked above, and the token proves that the processor has the instructions.
        unsafe { to_pairs(panel.as_ptr(), k, out.as_mut_ptr()) };
    }

    /// Computes the inner products of `rows` rows of `w` with `count` rows of `x`. Rows of `w` have `k` columns and are
    /// contiguous. Rows of `x` are `x_stride` apart and padded with zeros to a multiple of [`STEP`]. The product of row
    /// `j` of `w` with row `i` of `x` goes to `out[i * out_stride + j]`.
    ///
    /// # Panics
    /// If an operand is too short for its sizes.
    ///
    /// # Safety
    /// During the call no other thread accesses these places of `out`.
    pub(crate) unsafe fn inner_products(
        self,
        w: &[bf16],
        (rows, k): (usize, usize),
        (x, x_stride, count): (&[u16], usize, usize),
        start: Start<'_>,
        (out, out_stride): (Shared<'_, f32>, usize),
    ) {
        let has_x = holds(x.len(), count, x_stride, k.next_multiple_of(STEP));
        let has_room = start.has(rows) && holds(out.len(), count, out_stride, rows);
        assert!(w.len() >= rows * k && has_x && has_room, "an operand is too short for the inner products");
        let (w, x, out) = (w.as_ptr().cast(), x.as_ptr(), out.as_mut_ptr());
        // SAFETY: the lengths of all operands were checked above, the token proves that the processor has the
        // instructions, and the output is this thread's.
        unsafe { inner_products(w, rows, k, x, x_stride, count, start, out, out_stride) };
    }
}

/// Returns whether this process may use AMX tiles and they compute correctly. The system is asked once.
pub(crate) fn has_tiles() -> bool {
    static TILES: OnceLock<bool> = OnceLock::new();
    *TILES.get_or_init(|| is_x86_feature_detected!("avx512bf16") && tiles_are_there() && permitted() && tiles_add_up())
}

fn tiles_are_there() -> bool {
    #[target_feature(enable = "xsave")]
    fn kept() -> u64 {
        // SAFETY: extended control register 0 always exists.
        unsafe { _xgetbv(0) }
    }
    // CPUID leaf 7 has bits for tiles and for bfloat16 tiles. Register XCR0 has bits for the two parts of the tile
    // state that the system saves.
    let features = __cpuid_count(7, 0).edx;
    let (bf16, tile, state) = (1 << 22, 1 << 24, 0b11 << 17);
    if features & bf16 == 0 || features & tile == 0 || !is_x86_feature_detected!("xsave") {
        return false;
    }
    // SAFETY: `xsave` was detected, and the instruction is part of it.
    let kept = unsafe { kept() };
    kept & state == state
}

/// Asks Linux for permission to use the large state of tiles.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: the system call takes two numbers and does not access memory.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack)
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Checks a small product on tiles against scalar arithmetic.
fn tiles_add_up() -> bool {
    let value = |i: usize| ((i * 37) % 17) as f32 - 8.0;
    let (a, panel): (Vec<f32>, Vec<f32>) =
        ((0..32 * 64).map(value).collect(), (0..64 * PANEL).map(|i| value(i + 5)).collect());
    let (mut rows, mut pairs, mut c) = (vec![0u16; 32 * 64], vec![0u32; 32 * PANEL], vec![0f32; 32 * PANEL]);
    // SAFETY: the rows are contiguous, and the buffers have room for 64 columns each. The caller has detected the
    // instructions and has the system's permission. `c` is local to this function.
    unsafe {
        to_rows(a.as_ptr(), a.len(), rows.as_mut_ptr());
        to_pairs(panel.as_ptr(), 64, pairs.as_mut_ptr());
        let product = Rounded {
            a: &rows,
            a_stride: 64,
            rows: 32,
            b: &pairs,
            b_stride: PANEL,
            k: 64,
            c: Shared::new(&mut c),
            c_stride: PANEL,
            columns: PANEL,
            start: Start::Zero,
        };
        let tiles = Tiles::configured();
        by_tiles(&product, &tiles);
    }
    let exact = |i: usize| (0..64).map(|k| a[i / PANEL * 64 + k] * panel[k * PANEL + i % PANEL]).sum::<f32>();
    c.iter().enumerate().all(|(i, &c)| c == exact(i))
}

/// Implements [`Bf16Products::to_rows`].
///
/// # Safety
/// `len` numbers can be read and written.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn to_rows(x: *const f32, len: usize, out: *mut u16) {
    // SAFETY: the masks leave out everything beyond the `len` numbers.
    unsafe {
        let mut at = 0;
        while at < len {
            let mask = if len - at >= LANES { 0xffff } else { (1u16 << (len - at)) - 1 };
            let bf16s: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x.add(at))));
            _mm256_mask_storeu_epi16(out.add(at).cast(), mask, bf16s);
            at += LANES;
        }
    }
}

/// Implements [`Bf16Products::to_pairs`]; `k` is the height of the panel.
///
/// # Safety
/// The panel can be read, and `16 k` words can be written.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn to_pairs(panel: *const f32, k: usize, out: *mut u32) {
    // SAFETY: each pair reads two lines of the panel and writes one line of words; the caller has checked both lengths.
    unsafe {
        let index: [u16; 32] = std::array::from_fn(|i| (i / 2 + 16 * (i % 2)) as u16);
        let index = _mm512_loadu_si512(index.as_ptr().cast());
        for pair in 0..k / 2 {
            for half in 0..2 {
                let at = panel.add(2 * pair * PANEL + half * LANES);
                let both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(at.add(PANEL)), _mm512_loadu_ps(at));
                let woven = _mm512_permutexvar_epi16(index, std::mem::transmute::<__m512bh, __m512i>(both));
                _mm512_storeu_si512(out.add(pair * PANEL + half * LANES).cast(), woven);
            }
        }
    }
}

/// A product of operands rounded to bfloat16: `a` is rows of numbers, `b` a panel of words. `k` counts numbers and is a
/// multiple of [`STEP`].
pub(crate) type Rounded<'a> = Product<'a, u16, u32>;

impl Rounded<'_> {
    /// Computes the product, on tiles if `tiles` is given and there are more than 12 rows. Tiles read
    /// [`Bf16Products::block`] rows of `a`, of which only `rows` rows are used.
    ///
    /// # Panics
    /// If an operand is too short for its sizes.
    ///
    /// # Safety
    /// During the call no other thread accesses these columns of these rows of `c`.
    pub(crate) unsafe fn run(&self, _: Bf16Products, tiles: Option<&Tiles>) {
        let tiles = tiles.filter(|_| self.rows > 12);
        let rows = if tiles.is_some() { 2 * TILE_ROWS } else { self.rows };
        let has_a = holds(self.a.len(), rows, self.a_stride, self.k);
        let has_b = self.b_stride == PANEL && self.b.len() >= self.k / 2 * PANEL;
        let fits = self.rows <= rows && self.k > 0 && self.k.is_multiple_of(STEP) && has_a && has_b;
        assert!(fits && self.has_room(), "an operand is too short for the product");
        // SAFETY: the lengths of the operands were checked above. The tokens prove that the processor has the
        // instructions. The output is this thread's, as the caller promises.
        unsafe {
            if let Some(tiles) = tiles {
                return by_tiles(self, tiles);
            }
            let mut row = 0;
            while row + 12 <= self.rows {
                by_vectors::<12>(self, row);
                row += 12;
            }
            while row + 4 <= self.rows {
                by_vectors::<4>(self, row);
                row += 4;
            }
            while row < self.rows {
                by_vectors::<1>(self, row);
                row += 1;
            }
        }
    }
}

/// Writes a row of sums, added to its initial values, to the output.
///
/// # Safety
/// The product [has room](Product::has_room) and includes the row, which no other thread accesses.
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
pub(crate) unsafe fn put(p: &Rounded<'_>, row: usize, sums: &[f32; PANEL]) {
    // SAFETY: the masks leave out columns beyond the result; the others are in the output and in the start.
    unsafe {
        let c = p.c.as_mut_ptr().add(row * p.c_stride);
        for half in 0..2 {
            let at = half * LANES;
            let left = p.columns.saturating_sub(at).min(LANES);
            let mask = if left == LANES { 0xffff } else { (1u16 << left) - 1 };
            let sum = _mm512_loadu_ps(sums.as_ptr().add(at));
            let start = match p.start {
                Start::Zero => _mm512_setzero_ps(),
                Start::Row(row) => _mm512_maskz_loadu_ps(mask, row.as_ptr().wrapping_add(at)),
                Start::Output => _mm512_maskz_loadu_ps(mask, c.wrapping_add(at)),
            };
            _mm512_mask_storeu_ps(c.wrapping_add(at), mask, _mm512_add_ps(start, sum));
        }
    }
}

/// Multiplies `M` rows from `row` on with vector instructions.
///
/// # Safety
/// [`Rounded::run`] has checked the operands, and these rows are among the product's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn by_vectors<const M: usize>(p: &Rounded<'_>, row: usize) {
    // SAFETY: the lengths were checked: each row of `a` has `k` numbers, and `b` has half as many lines.
    unsafe {
        let a = p.a.as_ptr().add(row * p.a_stride);
        let mut sums = [[_mm512_setzero_ps(); 2]; M];
        for pair in 0..p.k / 2 {
            let b = p.b.as_ptr().add(pair * p.b_stride);
            let low: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.cast()));
            let high: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.add(LANES).cast()));
            for (m, sums) in sums.iter_mut().enumerate() {
                let both = a.add(m * p.a_stride + 2 * pair).cast::<i32>().read_unaligned();
                let both: __m512bh = std::mem::transmute(_mm512_set1_epi32(both));
                sums[0] = _mm512_dpbf16_ps(sums[0], both, low);
                sums[1] = _mm512_dpbf16_ps(sums[1], both, high);
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            put(p, row + m, &std::mem::transmute::<[__m512; 2], [f32; PANEL]>(*sums));
        }
    }
}

/// Implements [`Bf16Products::inner_products`].
///
/// # Safety
/// The operands are as long as that method requires, and no other thread accesses the output.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[allow(clippy::too_many_arguments, reason = "operands and their sizes")]
unsafe fn inner_products(
    w: *const u16,
    rows: usize,
    k: usize,
    x: *const u16,
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
            ($w:literal, $r:literal, $row:ident, $i:ident) => {
                while count - $i >= $r {
                    let (x, out) = (x.add($i * x_stride), out.add($i * out_stride));
                    some_rows::<$w, $r>(w.add($row * k), $row, k, x, x_stride, start, out, out_stride);
                    $i += $r;
                }
            };
        }
        let mut row = 0;
        while row + 2 <= rows {
            let mut i = 0;
            rows!(2, 8, row, i);
            rows!(2, 4, row, i);
            rows!(2, 1, row, i);
            row += 2;
        }
        for row in row..rows {
            let mut i = 0;
            rows!(1, 8, row, i);
            rows!(1, 1, row, i);
        }
    }
}

/// Computes `W` by `R` products of [`inner_products`], from row `row` on. `w` points to that row.
///
/// # Safety
/// As for [`inner_products`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[allow(clippy::too_many_arguments, reason = "the same arguments as its caller")]
#[allow(clippy::needless_range_loop, reason = "the indices are shared by both kinds of rows and the sums")]
unsafe fn some_rows<const W: usize, const R: usize>(
    w: *const u16,
    row: usize,
    k: usize,
    x: *const u16,
    x_stride: usize,
    start: Start<'_>,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: the mask leaves out everything beyond the last column of `w`; rows of `x` have whole steps; prefetching
    // does not access memory.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); R]; W];
        for at in (0..k).step_by(STEP) {
            let mask = if k - at >= STEP { u32::MAX } else { (1 << (k - at)) - 1 };
            let mut wide = [_mm512_setzero_si512(); W];
            for (j, wide) in wide.iter_mut().enumerate() {
                let w = w.add(j * k + at);
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(4 << 10).cast());
                *wide = _mm512_maskz_loadu_epi16(mask, w.cast());
            }
            for r in 0..R {
                let x = _mm512_loadu_si512(x.add(r * x_stride + at).cast());
                for j in 0..W {
                    sums[j][r] = _mm512_dpbf16_ps(
                        sums[j][r],
                        std::mem::transmute::<__m512i, __m512bh>(x),
                        std::mem::transmute::<__m512i, __m512bh>(wide[j]),
                    );
                }
            }
        }
        for (j, sums) in sums.iter().enumerate() {
            for (r, sum) in sums.iter().enumerate() {
                start.put(_mm512_reduce_add_ps(*sum), row + j, out.add(r * out_stride + row + j));
            }
        }
    }
}

/// Rows of a tile.
const TILE_ROWS: usize = 16;

/// Eight tiles of sixteen rows of 64 bytes, configured for this thread. Dropping the value releases the tiles, so the
/// system no longer saves their state.
#[derive(Debug)]
pub(crate) struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// Configures the tiles of this thread, if `isa` includes tiles.
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        // SAFETY: an `Isa` of AMX proves that the processor has tiles and that the system has permitted them.
        (isa == InstructionSet::Amx).then(|| unsafe { Self::configured() })
    }

    /// # Safety
    /// The processor has tiles, and the system has permitted them.
    unsafe fn configured() -> Self {
        // SAFETY: the caller promises the same conditions.
        unsafe { configure() };
        Self(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the value was created on a processor with tiles.
        unsafe { asm!("tilerelease", options(nostack)) };
    }
}

/// # Safety
/// The processor has tiles, and the system has permitted them.
unsafe fn configure() {
    #[repr(align(64))]
    struct Config([u8; 64]);
    let mut config = Config([0; 64]);
    config.0[0] = 1;
    for tile in 0..8 {
        config.0[16 + 2 * tile] = 64;
        config.0[48 + tile] = 16;
    }
    // SAFETY: the 64 bytes are a valid configuration, and the system has permitted tiles, as the caller promises.
    unsafe { asm!("ldtilecfg [{}]", in(reg) config.0.as_ptr(), options(nostack)) };
}

/// Multiplies 32 rows with 32 columns: four tiles of sums, and two tiles of each operand.
///
/// # Safety
/// There are 32 rows of `a`, `k / 2` contiguous lines of `b`, and at least one step. The product
/// [has room](Product::has_room), and no other thread accesses the output.
unsafe fn by_tiles(p: &Rounded<'_>, _: &Tiles) {
    let mut sums = [[0f32; PANEL]; 32];
    // SAFETY: each step reads 16 rows of a tile, `a_stride` apart, from `a` and from 16 rows below, and lines of `b`
    // likewise. `sums` has room for four tiles. The token proves that this thread has tiles, and nothing else uses
    // them.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {a_stride}]",
            "tileloadd tmm6, [{b} + {b_stride}]",
            "tileloadd tmm7, [{b} + {b_stride} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a_low} + {a_stride}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 64",
            "add {a_low}, 64",
            "add {b}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {b_stride}], tmm0",
            "tilestored [{c} + {b_stride} + 64], tmm1",
            "tilestored [{c_low} + {b_stride}], tmm2",
            "tilestored [{c_low} + {b_stride} + 64], tmm3",
            a = inout(reg) p.a.as_ptr() => _,
            a_low = inout(reg) p.a.as_ptr().add(16 * p.a_stride) => _,
            b = inout(reg) p.b.as_ptr() => _,
            steps = inout(reg) p.k / STEP => _,
            a_stride = in(reg) 2 * p.a_stride,
            b_stride = in(reg) 4 * PANEL,
            c = in(reg) sums.as_mut_ptr(),
            c_low = in(reg) sums.as_mut_ptr().add(16),
            options(nostack)
        );
        for (row, sums) in sums[..p.rows].iter().enumerate() {
            put(p, row, sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_rounded_numbers_are_those_of_f64() {
        let value = |i: usize| ((i * 7919) % 257) as f32 / 64.0 - 2.0;
        let (rows, k, columns) = (45, 96, 27);
        let a: Vec<f32> = (0..rows * k).map(value).collect();
        let panel: Vec<f32> = (0..k * PANEL).map(|i| value(i + 11)).collect();
        let bias: Vec<f32> = (0..columns).map(value).collect();
        let (mut packed, mut pairs) = (vec![0u16; 64 * k], vec![0u32; k / 2 * PANEL]);
        for products in Isa::available().filter_map(Bf16Products::new) {
            let (isa, mut c) = (products.isa(), vec![0f32; rows * columns]);
            // `packed` has extra rows, so that tiles are complete.
            products.to_rows(&a, &mut packed);
            products.to_pairs(&panel, &mut pairs);
            let tiles = Tiles::new(isa);
            for from in (0..rows).step_by(products.block()) {
                let product = Rounded {
                    a: &packed[from * k..],
                    a_stride: k,
                    rows: products.block().min(rows - from),
                    b: &pairs,
                    b_stride: PANEL,
                    k,
                    c: Shared::new(&mut c).from(from * columns),
                    c_stride: columns,
                    columns,
                    start: Start::Row(&bias),
                };
                // SAFETY: nothing else accesses `c`.
                unsafe { product.run(products, tiles.as_ref()) };
            }
            drop(tiles);
            let rounded = |x: f32| f64::from(half::bf16::from_f32(x).to_f32());
            // The same columns as rows of weights, with a number of columns that is not a multiple of the step.
            let (k, weights) = (k - 5, (0..columns * (k - 5)).map(|i| panel[i % (k - 5) * PANEL + i / (k - 5)]));
            let weights: Vec<bf16> = weights.map(bf16::from_f32).collect();
            for count in [1, 2, 7, 13] {
                let mut y = vec![0f32; count * columns];
                let mut cut = packed.clone();
                cut.chunks_exact_mut(k + 5).for_each(|row| row[k..].fill(0));
                let (x, out) = ((&cut[..], k + 5, count), (Shared::new(&mut y), columns));
                // SAFETY: nothing else accesses `y`.
                unsafe { products.inner_products(&weights, (columns, k), x, Start::Row(&bias), out) };
                for (i, y) in y.iter().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let product = |j: usize| rounded(a[row * (k + 5) + j]) * rounded(panel[j * PANEL + column]);
                    let exact = (0..k).map(product).sum::<f64>() + f64::from(bias[column]);
                    assert!((exact - f64::from(*y)).abs() < 1e-4, "{isa:?} {exact} {y}");
                }
            }
            let k = k + 5;
            for (i, c) in c.iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let sum: f64 = (0..k).map(|j| rounded(a[row * k + j]) * rounded(panel[j * PANEL + column])).sum();
                let exact = sum + f64::from(bias[column]);
                assert!((exact - f64::from(*c)).abs() < 1e-4, "{isa:?} {exact} {c}");
            }
        }
    }
}
