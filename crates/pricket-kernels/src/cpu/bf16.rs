//! Products of bfloat16 with bfloat16, summed in f32, where the processor has them: AVX-512 BF16, and AMX tiles.
//!
//! Both read the same operands: activations row after row, and panels of 32 weight rows in which a word holds two
//! neighboring columns of one.

#![cfg(target_arch = "x86_64")]
#![allow(clippy::wildcard_imports, reason = "the list of instructions would say nothing")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::sync::OnceLock;

use half::bf16;

use crate::cpu::isa::{InstructionSet, Isa};
use crate::cpu::lanes::LANES;
use crate::cpu::product::{PANEL, Product, Start};
use crate::cpu::shared::{Shared, holds};

/// Columns that a tile takes at once: operands are filled up to them with zeros.
pub(crate) const STEP: usize = 32;

/// Proof that this processor has products of bfloat16 in vectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16Products(Isa);

#[allow(clippy::unused_self, reason = "the proof is that there is one")]
impl Bf16Products {
    /// The proof, if `isa` allows such products and the processor has them.
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        (isa >= InstructionSet::Avx512 && is_x86_feature_detected!("avx512bf16")).then_some(Self(isa))
    }

    /// The path that they are on.
    pub(crate) fn isa(self) -> Isa {
        self.0
    }

    /// Rows of activations that are multiplied together.
    pub(crate) fn block(self) -> usize {
        if self.0 == InstructionSet::Amx { 32 } else { 12 }
    }

    /// Rounds the numbers of `x` into the first places of `out`.
    ///
    /// # Panics
    /// If `out` has fewer places.
    pub(crate) fn to_rows(self, x: &[f32], out: &mut [u16]) {
        assert!(out.len() >= x.len(), "no room for a row");
        // SAFETY: there are as many places as numbers, and the token proves the instructions.
        unsafe { to_rows(x.as_ptr(), x.len(), out.as_mut_ptr()) };
    }

    /// Rounds a panel of 32 columns, its height even, into words that hold two neighbors of a column: those of column `c` and
    /// `c + 1` of row `j` are in word `16 c + j`.
    ///
    /// # Panics
    /// If there is not a word for each pair.
    pub(crate) fn to_pairs(self, panel: &[f32], out: &mut [u32]) {
        let k = panel.len() / PANEL;
        assert!(k.is_multiple_of(2) && panel.len() == PANEL * k && out.len() >= PANEL * k / 2, "no room for a panel");
        // SAFETY: both were just measured, and the token proves the instructions.
        unsafe { to_pairs(panel.as_ptr(), k, out.as_mut_ptr()) };
    }

    /// Inner products of each of `rows` rows of `w`, `k` apart, with each of `count` rows of `x`, which lie `x_stride` apart and are
    /// filled up with zeros to a multiple of [`STEP`]: that of row `j` with row `i` goes to `out[i * out_stride + j]`.
    ///
    /// # Panics
    /// If an operand is too short for its sizes.
    ///
    /// # Safety
    /// While it runs no other thread touches these places of `out`.
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
        assert!(w.len() >= rows * k && has_x && has_room, "inner products beyond their operands");
        let (w, x, out) = (w.as_ptr().cast(), x.as_ptr(), out.as_mut_ptr());
        // SAFETY: all were just measured, the token proves the instructions, and the output is this thread's.
        unsafe { inner_products(w, rows, k, x, x_stride, count, start, out, out_stride) };
    }
}

/// Whether this process may use AMX tiles and they compute what they should. Asks the system once.
pub(crate) fn has_tiles() -> bool {
    static TILES: OnceLock<bool> = OnceLock::new();
    *TILES.get_or_init(|| is_x86_feature_detected!("avx512bf16") && tiles_are_there() && permitted() && tiles_add_up())
}

fn tiles_are_there() -> bool {
    #[target_feature(enable = "xsave")]
    fn kept() -> u64 {
        // SAFETY: register 0 is always there.
        unsafe { _xgetbv(0) }
    }
    // Leaf 7: tiles, and bfloat16 in them. Register 0 of the system: it keeps both parts of their state.
    let features = __cpuid_count(7, 0).edx;
    let (bf16, tile, state) = (1 << 22, 1 << 24, 0b11 << 17);
    if features & bf16 == 0 || features & tile == 0 || !is_x86_feature_detected!("xsave") {
        return false;
    }
    // SAFETY: `xsave` was just found, and the instruction with it.
    let kept = unsafe { kept() };
    kept & state == state
}

/// Linux grants the large state of tiles to a process that asks.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call with two numbers; it touches no memory.
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

/// A small product by tiles and by hand.
fn tiles_add_up() -> bool {
    let value = |i: usize| ((i * 37) % 17) as f32 - 8.0;
    let (a, panel): (Vec<f32>, Vec<f32>) =
        ((0..32 * 64).map(value).collect(), (0..64 * PANEL).map(|i| value(i + 5)).collect());
    let (mut rows, mut pairs, mut c) = (vec![0u16; 32 * 64], vec![0u32; 32 * PANEL], vec![0f32; 32 * PANEL]);
    // SAFETY: the rows are contiguous, and the buffers have room for 64 numbers of each; the caller has found the instructions and has the
    // system's permission. `c` is this function's own.
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

/// See [`Bf16Products::to_rows`].
///
/// # Safety
/// `len` numbers can be read and written.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn to_rows(x: *const f32, len: usize, out: *mut u16) {
    // SAFETY: the masks leave out what is not among the `len` numbers.
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

/// See [`Bf16Products::to_pairs`]; `k` is the height.
///
/// # Safety
/// The panel can be read, and `16 k` words can be written.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn to_pairs(panel: *const f32, k: usize, out: *mut u32) {
    // SAFETY: two lines of the panel and one of words for each pair, all of which the caller has measured.
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

/// A product of rounded operands: of rows, and of the words of a panel. `k`, in numbers, is a multiple of [`STEP`].
pub(crate) type Rounded<'a> = Product<'a, u16, u32>;

impl Rounded<'_> {
    /// Computes it: by tiles, if there are any, for more than 12 rows. Those read [`Bf16Products::block`] rows of `a`, of which `rows`
    /// count.
    ///
    /// # Panics
    /// If an operand is too short for its sizes.
    ///
    /// # Safety
    /// While it runs no other thread touches the columns wanted of these rows of `c`.
    pub(crate) unsafe fn run(&self, _: Bf16Products, tiles: Option<&Tiles>) {
        let tiles = tiles.filter(|_| self.rows > 12);
        let rows = if tiles.is_some() { 2 * TILE_ROWS } else { self.rows };
        let has_a = holds(self.a.len(), rows, self.a_stride, self.k);
        let has_b = self.b_stride == PANEL && self.b.len() >= self.k / 2 * PANEL;
        let fits = self.rows <= rows && self.k > 0 && self.k.is_multiple_of(STEP) && has_a && has_b;
        assert!(fits && self.has_room(), "a product beyond its operands");
        // SAFETY: the operands were just measured; tokens prove vectors and tiles; the output is this thread's, as the caller promises.
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

/// Adds a row of sums to what it starts from.
///
/// # Safety
/// The product [has room](Product::has_room) and the row, which no other thread touches.
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
pub(crate) unsafe fn put(p: &Rounded<'_>, row: usize, sums: &[f32; PANEL]) {
    // SAFETY: the masks leave out the columns that are not wanted; the others are in the output and in the start.
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

/// `M` rows from `row` on.
///
/// # Safety
/// [`Rounded::run`] has measured the operands, and these rows are among theirs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn by_vectors<const M: usize>(p: &Rounded<'_>, row: usize) {
    // SAFETY: `k` numbers of each row of `a` and half as many lines of `b`, which were measured.
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

/// See [`Bf16Products::inner_products`].
///
/// # Safety
/// The operands hold what that asks of them, and no other thread touches the output.
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
    // SAFETY: as many rows of weights and of `x` as are taken at once are left of those that the caller has measured.
    unsafe {
        // `W` rows of weights by `R` rows of `x` from `i` on, as long as there are so many.
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

/// Rows `row` and on of [`inner_products`]; `w` is the first of them.
///
/// # Safety
/// As [`inner_products`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[allow(clippy::too_many_arguments, reason = "as its caller")]
#[allow(clippy::needless_range_loop, reason = "rows, rows and sums go together")]
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
    // SAFETY: the mask leaves out what lies behind the last column of `w`; rows of `x` have whole steps. Prefetching reads nothing.
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

/// Eight tiles of sixteen rows of 64 bytes that this thread may use. Dropping it leaves them, so that their state is not carried along.
#[derive(Debug)]
pub(crate) struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// Configures the tiles of this thread, where there are any on `isa`.
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        // SAFETY: the path proves that the processor has tiles, and that the system has permitted them.
        (isa == InstructionSet::Amx).then(|| unsafe { Self::configured() })
    }

    /// # Safety
    /// The processor has tiles, and the system has permitted them.
    unsafe fn configured() -> Self {
        // SAFETY: promised in these words.
        unsafe { configure() };
        Self(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever made this has found tiles.
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
    // SAFETY: the 64 bytes are a valid configuration, and the caller has the system's permission.
    unsafe { asm!("ldtilecfg [{}]", in(reg) config.0.as_ptr(), options(nostack)) };
}

/// 32 rows by 32 columns: four tiles of sums, two of each operand.
///
/// # Safety
/// There are 32 rows of `a`, `k / 2` contiguous lines of `b` and at least one step; the product [has room](Product::has_room), and no
/// other thread touches the output.
unsafe fn by_tiles(p: &Rounded<'_>, _: &Tiles) {
    let mut sums = [[0f32; PANEL]; 32];
    // SAFETY: 16 rows of a tile are read `a_stride` apart from `a` and from 16 rows below, step by step, and lines of `b` likewise; `sums` has
    // room for four tiles. Nothing else uses tiles, and the token proves that this thread has them.
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
            // Rows to spare for whole tiles.
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
                // SAFETY: nobody else has `c`.
                unsafe { product.run(products, tiles.as_ref()) };
            }
            drop(tiles);
            let rounded = |x: f32| f64::from(half::bf16::from_f32(x).to_f32());
            // The same columns as rows of weights, of fewer columns than a whole step.
            let (k, weights) = (k - 5, (0..columns * (k - 5)).map(|i| panel[i % (k - 5) * PANEL + i / (k - 5)]));
            let weights: Vec<bf16> = weights.map(bf16::from_f32).collect();
            for count in [1, 2, 7, 13] {
                let mut y = vec![0f32; count * columns];
                let mut cut = packed.clone();
                cut.chunks_exact_mut(k + 5).for_each(|row| row[k..].fill(0));
                let (x, out) = ((&cut[..], k + 5, count), (Shared::new(&mut y), columns));
                // SAFETY: nobody else has `y`.
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
