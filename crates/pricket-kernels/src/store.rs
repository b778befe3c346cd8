use candle_core::{CpuStorage, InplaceOp2, Layout, Result, bail};
use half::slice::HalfFloatSliceExt;

use crate::pool::parallel;
use crate::shared::Shared;

/// Writes a tensor of f32 over another of the same shape in f32, f16 or bf16: both `[batch, heads, time, dim]` with any
/// strides whose last is 1, so that new keys and values go to their places in a cache without a copy of their own.
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
        if from_at.dims() != to_at.dims() || (d > 1 && (sd != 1 || od != 1)) {
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
                        $copy(unsafe { out.slice(at, d) }, from);
                    }
                });
            }};
        }
        match to {
            CpuStorage::F32(to) => write!(to, |to: &mut [f32], from: &[f32]| to.copy_from_slice(from)),
            CpuStorage::F16(to) => write!(to, |to: &mut [half::f16], from: &[f32]| to.convert_from_f32_slice(from)),
            CpuStorage::BF16(to) => write!(to, |to: &mut [half::bf16], from: &[f32]| to.convert_from_f32_slice(from)),
            _ => bail!("store: a cache is f32, f16 or bf16"),
        }
        Ok(())
    }
}
