//! Quantized activations: integers of one 8-bit term per element, as in ggml, or of three terms, which give the
//! precision of f32.
//!
//! An activation is `scale (a + b / 254 + c / 254²)` with 8-bit integers `a`, `b` and `c`. Relative to the largest
//! activation of its block this is f32 up to the last bit or two.

#![allow(clippy::inline_always, reason = "loops must be compiled into the functions that enable the instructions")]

use half::f16;

use crate::block_type::BlockType;
#[cfg(target_arch = "x86_64")]
use crate::cpu::isa::InstructionSet;
use crate::cpu::isa::Isa;
use crate::cpu::packed::{Form, STEP, Scales};
use crate::cpu::pool::{parallel_chunks, threads};

/// Ratio of the unit of one term to the unit of the next.
pub(crate) const FINER: f32 = 254.0;

/// 1.5 · 2²³: adding it to a small float rounds that to an integer.
const INTEGER: f32 = 12_582_912.0;

/// Layout of the words of 32 activations.
///
/// Word 0 is the scale. From `SUMS` on are sums of the values: of all, of the first half and of the second half. From
/// `TERMS` on are the terms, `TERM` words each. A term has the initial sums of its products (for all, for the first
/// half, for the second half) and then eight words of four integers.
pub(crate) const SUMS: usize = 1;
pub(crate) const TERMS: usize = 4;
pub(crate) const TERM: usize = 11;

/// Rows that are multiplied together and stored together: step by step, with the rows of a step one after the other.
pub(crate) const GROUP: usize = 8;

/// Rows of quantized activations, for weights of one form. They are stored in groups of [`GROUP`] rows, and a group is
/// stored step by step, with the words of the step's rows one after the other.
pub(crate) struct QuantizedActivations {
    pub(crate) words: Vec<i32>,
    pub(crate) rows: usize,
    pub(crate) terms: usize,
    pub(crate) steps: usize,
}

/// Returns the number of words of 32 activations with `terms` terms, padding included.
pub(crate) const fn words_of(terms: usize) -> usize {
    if terms == 1 { 16 } else { 40 }
}

impl QuantizedActivations {
    /// Quantizes `x`, rows of `columns` numbers, where `columns` is a multiple of 32. With `as_ggml` there is one term,
    /// rounded as ggml does beside weights of `kind`; otherwise there are three.
    pub(crate) fn new(x: &[f32], columns: usize, kind: BlockType, form: Form, as_ggml: bool, isa: Isa) -> Self {
        let terms = if as_ggml { 1 } else { 3 };
        let (steps, width) = (columns / STEP, words_of(terms));
        let rows = x.len() / columns;
        let mut words = vec![0; rows * steps * width];
        // Each task takes a group. If there is only one group, each takes some of its steps, in whole blocks of 256
        // columns.
        let alone = rows <= GROUP && x.len() >= 8 << 10;
        let part = if alone { steps.div_ceil(2 * threads()).next_multiple_of(8) } else { steps };
        let group = rows.min(GROUP);
        parallel_chunks(&mut words, group * part * width, |i, words| {
            let (row, step) = if alone { (0, i * part) } else { (i * GROUP, 0) };
            let rows = if alone { rows } else { words.len() / (steps * width) };
            let len = words.len() / (rows * width) * STEP;
            for (j, x) in x[row * columns..].chunks_exact(columns).take(rows).enumerate() {
                round(&x[step * STEP..][..len], &mut words[j * width..], rows * width, kind, form, terms, isa);
            }
        });
        Self { words, rows, terms, steps }
    }
}

/// Quantizes a row, whose steps are `stride` words apart.
fn round(x: &[f32], words: &mut [i32], stride: usize, kind: BlockType, form: Form, terms: usize, isa: Isa) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,f16c")]
        fn avx512(x: &[f32], words: &mut [i32], stride: usize, kind: BlockType, form: Form, terms: usize) {
            round_body(x, words, stride, kind, form, terms);
        }
        #[target_feature(enable = "avx2,f16c")]
        fn avx2(x: &[f32], words: &mut [i32], stride: usize, kind: BlockType, form: Form, terms: usize) {
            round_body(x, words, stride, kind, form, terms);
        }
        if isa >= InstructionSet::Avx512 {
            // SAFETY: an `Isa` proves that the processor has its instructions, which include the ones enabled here.
            return unsafe { avx512(x, words, stride, kind, form, terms) };
        }
        if isa >= InstructionSet::Avx2 {
            // SAFETY: an `Isa` proves that the processor has its instructions, which include the ones enabled here.
            return unsafe { avx2(x, words, stride, kind, form, terms) };
        }
    }
    let _ = isa;
    round_body(x, words, stride, kind, form, terms);
}

#[inline(always)]
fn round_body(x: &[f32], words: &mut [i32], stride: usize, kind: BlockType, form: Form, terms: usize) {
    let most = |x: &[f32]| {
        let mut lanes = [0f32; 16];
        for x in x.chunks_exact(16) {
            for (most, x) in lanes.iter_mut().zip(x) {
                *most = if x.abs() > *most { x.abs() } else { *most };
            }
        }
        lanes.iter().copied().fold(0f32, f32::max)
    };
    // ggml has an f32 scale for 256 activations beside blocks of 256, and otherwise an f16 scale for 32.
    let block = if terms == 1 { kind.elements().max(STEP) } else { STEP };
    let width = words_of(terms);
    for (x, words) in x.chunks(block).zip(words.chunks_mut(block / STEP * stride)) {
        let largest = most(x);
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let scale = match (terms, block) {
            (1, STEP) => f16::from_f32(largest / 127.0).to_f32(),
            _ => largest / 127.0,
        };
        for (x, words) in x.as_chunks::<STEP>().0.iter().zip(words.chunks_mut(stride)) {
            round_step(x, &mut words[..width], (inverse, scale), form, terms);
        }
    }
}

#[inline(always)]
fn round_step(x: &[f32; STEP], words: &mut [i32], (inverse, scale): (f32, f32), form: Form, terms: usize) {
    let mut rest = [0f32; STEP];
    let mut broken = 0f32;
    for (rest, x) in rest.iter_mut().zip(x) {
        *rest = x * inverse;
        // A NaN or an infinity makes the scale NaN, and so every product.
        broken += x * 0.0;
    }
    let (mut sums, mut unit) = ([0f32; 2], scale);
    for term in 0..terms {
        let mut q = [0i8; STEP];
        for (rest, q) in rest.iter_mut().zip(&mut q) {
            // In the sum the last bit is worth one. The addition rounds to the nearest integer, ties to even, and
            // leaves the integer in the low bits.
            let rounded = *rest + INTEGER;
            *q = rounded.to_bits() as i8;
            *rest = (*rest - (rounded - INTEGER)) * FINER;
        }
        let (mut low, mut high) = (0, 0);
        for i in 0..16 {
            low += i32::from(q[i]);
            high += i32::from(q[16 + i]);
        }
        sums[0] += unit * low as f32;
        sums[1] += unit * high as f32;
        unit /= FINER;
        let at = TERMS + TERM * term;
        words[at] = -form.zero * (low + high);
        words[at + 1] = -form.zero * low;
        words[at + 2] = -form.zero * high;
        for (word, q) in words[at + 3..at + TERM].iter_mut().zip(q.as_chunks::<4>().0) {
            *word = i32::from_le_bytes(q.map(|q| q as u8));
        }
    }
    let whole = sums[0] + sums[1];
    // ggml keeps the sum of a block in f16 if there is a minimum to multiply with it.
    let of_ggml = terms == 1 && matches!(form.scales, Scales::HalfMin | Scales::SingleMin);
    let whole = if of_ggml { f16::from_f32(whole).to_f32() } else { whole };
    words[0] = (scale + broken).to_bits() as i32;
    words[SUMS] = whole.to_bits() as i32;
    words[SUMS + 1] = sums[0].to_bits() as i32;
    words[SUMS + 2] = sums[1].to_bits() as i32;
}
