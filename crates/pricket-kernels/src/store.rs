use candle_core::{CpuStorage, InplaceOp2, Layout, Result, bail};
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::pool::parallel;
use crate::rows::{Q8_BLOCK, q8_row};
use crate::shared::Shared;

/// Writes a tensor of f32 over another of the same shape in f32, f16 or bf16: both `[batch, heads, time, dim]` with any
/// strides whose last is 1, so that new keys and values go to their places in a cache without a copy of their own. Over bytes,
/// `[batch, heads, time, q8_row_bytes(dim)]`, it writes ggml's `q8_0` blocks.
#[derive(Clone, Copy, Debug)]
pub struct StoreOp;

impl InplaceOp2 for StoreOp {
    fn name(&self) -> &'static str {
        "store"
    }

    fn cpu_fwd(&self, to: &mut CpuStorage, to_at: &Layout, from: &CpuStorage, from_at: &Layout) -> Result<()> {
        let CpuStorage::F32(from) = from else { bail!("store: expected f32 activations") };
        let (&[b, h, t, d], &[sb, sh, st, sd], &[ob, oh, ot, od]) = (from_at.dims(), from_at.stride(), to_at.stride())
        else {
            bail!("store: expected [batch, heads, time, head_dim], got {:?}", from_at.dims())
        };
        let width = if matches!(to, CpuStorage::U8(_)) { q8_row(d) } else { d };
        if to_at.dims() != [b, h, t, width] || (d > 1 && (sd != 1 || od != 1)) {
            bail!("store: {from_at:?} does not fit {to_at:?}");
        }
        // Layouts of tensors lie inside of their storage: slicing checks it again.
        let source = |row: usize| {
            let (i, j, k) = (row / t / h, row / t % h, row % t);
            (
                &from[from_at.start_offset() + i * sb + j * sh + k * st..][..d],
                to_at.start_offset() + i * ob + j * oh + k * ot,
            )
        };
        macro_rules! write {
            ($to:ident, $copy:expr) => {{
                let out = Shared::new($to);
                let rows = b * h * t;
                let share = rows.div_ceil(16).max(64);
                parallel(rows.div_ceil(share), |task| {
                    for row in task * share..rows.min((task + 1) * share) {
                        let (from, at) = source(row);
                        // SAFETY: rows do not overlap, and `slice` checks that this one is inside.
                        $copy(unsafe { out.slice(at, width) }, from);
                    }
                });
            }};
        }
        match to {
            CpuStorage::F32(to) => write!(to, |to: &mut [f32], from: &[f32]| to.copy_from_slice(from)),
            CpuStorage::F16(to) => write!(to, |to: &mut [half::f16], from: &[f32]| to.convert_from_f32_slice(from)),
            CpuStorage::BF16(to) => write!(to, |to: &mut [half::bf16], from: &[f32]| to.convert_from_f32_slice(from)),
            CpuStorage::U8(to) => write!(to, to_q8),
            _ => bail!("store: a cache is f32, f16, bf16 or q8_0"),
        }
        Ok(())
    }
}

/// Bytes of a row of `columns` in ggml's `q8_0`, the last block filled up with zeros.
pub const fn q8_row_bytes(columns: usize) -> usize {
    q8_row(columns)
}

/// A row as blocks: a scale in f16, and 32 integers that it multiplies. What is no number makes its block none.
pub(crate) fn to_q8(to: &mut [u8], from: &[f32]) {
    for (to, from) in to.chunks_exact_mut(Q8_BLOCK.1).zip(from.chunks(Q8_BLOCK.0)) {
        let most = from.iter().fold(0f32, |most, x| if x.abs() > most { x.abs() } else { most });
        let broken: f32 = from.iter().map(|x| x * 0.0).sum();
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        let (scale, integers) = to.split_at_mut(2);
        scale.copy_from_slice(&f16::from_f32(most / 127.0 + broken).to_le_bytes());
        integers.fill(0);
        for (to, x) in integers.iter_mut().zip(from) {
            *to = (x * inverse).round_ties_even() as i8 as u8;
        }
    }
}

/// The values of rows of `columns` in `q8_0`.
///
/// # Panics
/// If `bytes` are not whole rows, or `out` has another number of them.
pub fn q8_values(bytes: &[u8], columns: usize, out: &mut [f32]) {
    assert_eq!(bytes.len() * columns, out.len() * q8_row(columns), "rows of {columns}");
    for (row, out) in bytes.chunks_exact(q8_row(columns).max(1)).zip(out.chunks_exact_mut(columns.max(1))) {
        for (block, out) in row.chunks_exact(Q8_BLOCK.1).zip(out.chunks_mut(Q8_BLOCK.0)) {
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
            for (out, q) in out.iter_mut().zip(&block[2..]) {
                *out = scale * f32::from(*q as i8);
            }
        }
    }
}
