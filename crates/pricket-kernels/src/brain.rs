//! Products of bfloat16 with bfloat16, summed in f32, where the processor has them: AVX-512 BF16, and AMX tiles.
//!
//! Both read the same operands: activations row after row, and panels of 32 weight rows in which a word holds two
//! neighbouring columns of one.

#![cfg(target_arch = "x86_64")]
#![allow(clippy::wildcard_imports, reason = "the list of instructions would say nothing")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use crate::cpu::Path;
use crate::lanes::LANES;
use crate::product::{PANEL, Product, Start};

/// Columns that a tile takes at once: operands are filled up to them with zeros.
pub(crate) const STEP: usize = 32;

/// Rows of activations that are multiplied together.
pub(crate) const fn block(path: Path) -> usize {
    if matches!(path, Path::Amx) { 32 } else { 12 }
}

/// Whether `path` has such products.
pub(crate) fn has_products(path: Path) -> bool {
    path >= Path::Avx512 && is_x86_feature_detected!("avx512bf16")
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
    // SAFETY: the processor has the instruction.
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
    // SAFETY: the buffers have the sizes that are given; the instructions were asked for.
    unsafe {
        to_rows(a.as_ptr(), 64, rows.as_mut_ptr());
        for row in 1..32 {
            to_rows(a.as_ptr().add(row * 64), 64, rows.as_mut_ptr().add(row * 64));
        }
        to_pairs(panel.as_ptr(), 64, pairs.as_mut_ptr());
        let product = Rounded {
            a: rows.as_ptr(),
            a_stride: 64,
            rows: 32,
            b: pairs.as_ptr(),
            b_stride: PANEL,
            k: 64,
            c: c.as_mut_ptr(),
            c_stride: PANEL,
            columns: PANEL,
            start: Start::Zero,
        };
        configure();
        by_tiles(&product);
        release();
    }
    let exact = |i: usize| (0..64).map(|k| a[i / PANEL * 64 + k] * panel[k * PANEL + i % PANEL]).sum::<f32>();
    c.iter().enumerate().all(|(i, &c)| c == exact(i))
}

/// Rounds `len` numbers, a multiple of [`STEP`] away from the end of what `out` holds.
///
/// # Safety
/// `len` numbers can be read and written.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn to_rows(x: *const f32, len: usize, out: *mut u16) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut at = 0;
        while at < len {
            let mask = if len - at >= LANES { 0xffff } else { (1u16 << (len - at)) - 1 };
            let brains: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x.add(at))));
            _mm256_mask_storeu_epi16(out.add(at).cast(), mask, brains);
            at += LANES;
        }
    }
}

/// A panel of `k` (even) times 32 numbers, rounded, two columns in a word: those of column `c` and `c + 1` of row `j` are in word
/// `16 c + j`.
///
/// # Safety
/// The panel can be read, and `16 k` words can be written.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn to_pairs(panel: *const f32, k: usize, out: *mut u32) {
    // SAFETY: promised by the caller.
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
pub(crate) type Rounded = Product<u16, u32>;

impl Rounded {
    /// Computes it. On [`Path::Amx`] this thread has been [configured](configure).
    ///
    /// # Safety
    /// All of that can be read and written: of `a` [`block`] rows by tiles, of which `rows` count.
    pub(crate) unsafe fn run(&self, path: Path) {
        // SAFETY: the processor has the instructions of the path; the rest is the caller's.
        unsafe {
            if path == Path::Amx && self.rows > 12 {
                return by_tiles(self);
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

/// Adds sums to what they start from; `sums` are `PANEL` apart.
///
/// # Safety
/// Row `row` of the output can be read and written, and `PANEL` sums be read.
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
pub(crate) unsafe fn put(p: &Rounded, row: usize, sums: *const f32) {
    // SAFETY: promised by the caller.
    unsafe {
        let c = p.c.add(row * p.c_stride);
        for half in 0..2 {
            let at = half * LANES;
            let left = p.columns.saturating_sub(at).min(LANES);
            let mask = if left == LANES { 0xffff } else { (1u16 << left) - 1 };
            let sum = _mm512_loadu_ps(sums.add(at));
            let start = match p.start {
                Start::Zero => _mm512_setzero_ps(),
                Start::Row(row) => _mm512_maskz_loadu_ps(mask, row.add(at)),
                Start::Output => _mm512_maskz_loadu_ps(mask, c.add(at)),
            };
            _mm512_mask_storeu_ps(c.add(at), mask, _mm512_add_ps(start, sum));
        }
    }
}

/// `M` rows from `row` on.
///
/// # Safety
/// As [`Rounded::run`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn by_vectors<const M: usize>(p: &Rounded, row: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        let a = p.a.add(row * p.a_stride);
        let mut sums = [[_mm512_setzero_ps(); 2]; M];
        for pair in 0..p.k / 2 {
            let b = p.b.add(pair * p.b_stride);
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
            put(p, row + m, sums.as_ptr().cast());
        }
    }
}

/// Inner products of each of `rows` rows of `w`, `k` apart, with each of `count` rows of `x`, which lie `x_stride` apart and are
/// filled up with zeros to a multiple of [`STEP`]: that of row `j` with row `i` goes to `out[i * out_stride + j]`.
///
/// # Safety
/// All of that can be read and written.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[allow(clippy::too_many_arguments, reason = "operands and their sizes")]
pub(crate) unsafe fn inner_products(
    w: *const u16,
    rows: usize,
    k: usize,
    x: *const u16,
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
    start: Start,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: promised by the caller; beyond the last column nothing is read of `w`, and zeros of `x`.
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

/// Eight tiles of sixteen rows of 64 bytes, for this thread, until [`release`].
///
/// # Safety
/// The system has permitted tiles.
pub(crate) unsafe fn configure() {
    #[repr(align(64))]
    struct Config([u8; 64]);
    let mut config = Config([0; 64]);
    config.0[0] = 1;
    for tile in 0..8 {
        config.0[16 + 2 * tile] = 64;
        config.0[48 + tile] = 16;
    }
    // SAFETY: the configuration is valid, and the system has permitted it.
    unsafe { asm!("ldtilecfg [{}]", in(reg) config.0.as_ptr(), options(nostack)) };
}

/// Leaves the tiles, so that their state is not carried along.
///
/// # Safety
/// As [`configure`].
pub(crate) unsafe fn release() {
    // SAFETY: promised by the caller.
    unsafe { asm!("tilerelease", options(nostack)) };
}

/// 32 rows by 32 columns: four tiles of sums, two of each operand.
///
/// # Safety
/// As [`Rounded::run`]; the thread is configured.
unsafe fn by_tiles(p: &Rounded) {
    let mut sums = [0f32; 32 * PANEL];
    // SAFETY: promised by the caller: 32 rows of `a` and `k / 2` of `b` are there. Nobody else uses tiles.
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
            a = inout(reg) p.a => _,
            a_low = inout(reg) p.a.add(16 * p.a_stride) => _,
            b = inout(reg) p.b => _,
            steps = inout(reg) p.k / STEP => _,
            a_stride = in(reg) 2 * p.a_stride,
            b_stride = in(reg) 4 * PANEL,
            c = in(reg) sums.as_mut_ptr(),
            c_low = in(reg) sums.as_mut_ptr().add(16 * PANEL),
            options(nostack)
        );
        for row in 0..p.rows {
            put(p, row, sums.as_ptr().add(row * PANEL));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_rounded_numbers_are_those_of_f64() {
        if !has_products(Path::best()) {
            return;
        }
        let value = |i: usize| ((i * 7919) % 257) as f32 / 64.0 - 2.0;
        let (rows, k, columns) = (45, 96, 27);
        let a: Vec<f32> = (0..rows * k).map(value).collect();
        let panel: Vec<f32> = (0..k * PANEL).map(|i| value(i + 11)).collect();
        let bias: Vec<f32> = (0..columns).map(value).collect();
        let (mut short, mut pairs) = (vec![0u16; 64 * k], vec![0u32; k / 2 * PANEL]);
        for path in Path::available().filter(|&path| path >= Path::Avx512) {
            let mut c = vec![0f32; rows * columns];
            // SAFETY: the buffers have the sizes that are given, with rows to spare for whole tiles.
            unsafe {
                for row in 0..rows {
                    to_rows(a.as_ptr().add(row * k), k, short.as_mut_ptr().add(row * k));
                }
                to_pairs(panel.as_ptr(), k, pairs.as_mut_ptr());
                if path == Path::Amx {
                    configure();
                }
                for from in (0..rows).step_by(block(path)) {
                    let product = Rounded {
                        a: short.as_ptr().add(from * k),
                        a_stride: k,
                        rows: block(path).min(rows - from),
                        b: pairs.as_ptr(),
                        b_stride: PANEL,
                        k,
                        c: c.as_mut_ptr().add(from * columns),
                        c_stride: columns,
                        columns,
                        start: Start::Row(bias.as_ptr()),
                    };
                    product.run(path);
                }
                if path == Path::Amx {
                    release();
                }
            }
            let rounded = |x: f32| f64::from(half::bf16::from_f32(x).to_f32());
            // The same columns as rows of weights, of fewer columns than a whole step.
            let (k, weights) = (k - 5, (0..columns * (k - 5)).map(|i| panel[i % (k - 5) * PANEL + i / (k - 5)]));
            let weights: Vec<u16> = weights.map(|x| half::bf16::from_f32(x).to_bits()).collect();
            for count in [1, 2, 7, 13] {
                let mut y = vec![0f32; count * columns];
                // SAFETY: rows of `short` have zeros where `a` has no column any more, as is made sure of here.
                unsafe {
                    let mut cut = short.clone();
                    cut.chunks_exact_mut(k + 5).for_each(|row| row[k..].fill(0));
                    let start = Start::Row(bias.as_ptr());
                    inner_products(
                        weights.as_ptr(),
                        columns,
                        k,
                        cut.as_ptr(),
                        k + 5,
                        count,
                        start,
                        y.as_mut_ptr(),
                        columns,
                    );
                }
                for (i, y) in y.iter().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let product = |j: usize| rounded(a[row * (k + 5) + j]) * rounded(panel[j * PANEL + column]);
                    let exact = (0..k).map(product).sum::<f64>() + f64::from(bias[column]);
                    assert!((exact - f64::from(*y)).abs() < 1e-4, "{path:?} {exact} {y}");
                }
            }
            let k = k + 5;
            for (i, c) in c.iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let sum: f64 = (0..k).map(|j| rounded(a[row * k + j]) * rounded(panel[j * PANEL + column])).sum();
                let exact = sum + f64::from(bias[column]);
                assert!((exact - f64::from(*c)).abs() < 1e-4, "{path:?} {exact} {c}");
            }
        }
    }
}
