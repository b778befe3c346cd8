//! Writes keys and values into a KV cache in f32, f16, bf16 or ggml's `q8_0`.

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, bail};
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::cpu::pool::parallel;
use crate::cpu::rows::{Q8_BLOCK, q8_row};
use crate::cpu::shared::Shared;

/// Writes new keys and values of one row into its state, in place.
///
/// The state is `[2, kv_heads, capacity, head_dim]` in f32, f16 or bf16, contiguous, with the keys first. If it holds
/// bytes, `[2, kv_heads, capacity, q8_row_bytes(head_dim)]`, ggml's `q8_0` blocks are written.
///
/// The new keys and values are `[batch, kv_heads, time, head_dim]` in f32; their last stride is 1.
#[derive(Clone, Copy, Debug)]
pub struct StoreOp {
    /// Index of the row in the batch.
    pub row: usize,
    /// The first new position of the row, along time.
    pub from: usize,
    /// Number of new positions.
    pub len: usize,
    /// Index along the capacity at which the first of them is written.
    pub at: usize,
}

/// New keys or values: the elements, the index of the first, and the strides of heads and time.
struct New<'a> {
    data: &'a [f32],
    start: usize,
    strides: (usize, usize),
}

impl StoreOp {
    fn new_rows<'a>(&self, from: &'a CpuStorage, layout: &Layout, dims: [usize; 2]) -> Result<New<'a>> {
        let CpuStorage::F32(data) = from else { bail!("store: expected keys and values in f32") };
        let (&[b, h, t, d], &[batch, head, time, inner]) = (layout.dims(), layout.stride()) else {
            bail!("store: expected [batch, heads, time, head_dim], got {:?}", layout.dims())
        };
        if [h, d] != dims || self.row >= b || self.from + self.len > t || (d > 1 && inner != 1) {
            bail!("store: {self:?} of {layout:?} does not fit the state's [heads, head_dim] of {dims:?}");
        }
        let start = layout.start_offset() + self.row * batch + self.from * time;
        Ok(New { data, start, strides: (head, time) })
    }
}

impl InplaceOp3 for StoreOp {
    fn name(&self) -> &'static str {
        "store"
    }

    fn cpu_fwd(
        &self,
        to: &mut CpuStorage,
        to_at: &Layout,
        keys: &CpuStorage,
        keys_at: &Layout,
        values: &CpuStorage,
        values_at: &Layout,
    ) -> Result<()> {
        let (&[two, h, capacity, width], Some((offset, _))) = (to_at.dims(), to_at.contiguous_offsets()) else {
            bail!("store: expected a contiguous [2, heads, capacity, width], got {to_at:?}")
        };
        let d = keys_at.dims().last().copied().unwrap_or(0);
        let expected = if matches!(to, CpuStorage::U8(_)) { q8_row(d) } else { d };
        if two != 2 || width != expected || self.at + self.len > capacity {
            bail!("store: {self:?} with a head_dim of {d} does not fit the state {to_at:?}");
        }
        let new = [self.new_rows(keys, keys_at, [h, d])?, self.new_rows(values, values_at, [h, d])?];
        // Slicing the sources checks that the layouts lie inside their storage.
        let place = |row: usize| {
            let (part, head, time) = (row / self.len / h, row / self.len % h, row % self.len);
            let New { data, start, strides } = &new[part];
            let from = &data[start + head * strides.0 + time * strides.1..][..d];
            (from, offset + ((part * h + head) * capacity + self.at + time) * width)
        };
        macro_rules! write {
            ($to:ident, $copy:expr) => {{
                let out = Shared::new($to);
                let rows = 2 * h * self.len;
                let share = rows.div_ceil(16).max(64);
                parallel(rows.div_ceil(share), |task| {
                    for row in task * share..rows.min((task + 1) * share) {
                        let (from, at) = place(row);
                        // SAFETY: rows do not overlap, and `slice` checks that this one is inside the buffer.
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
            _ => bail!("store: expected a state in f32, f16, bf16 or q8_0"),
        }
        Ok(())
    }
}

/// Returns the bytes of a row of `columns` elements in ggml's `q8_0`, whose last block is padded with zeros.
pub const fn q8_row_bytes(columns: usize) -> usize {
    q8_row(columns)
}

/// Quantizes a row to blocks: a scale in f16 and 32 integers. A block with a NaN or an infinity gets a NaN scale.
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

/// Dequantizes rows of `columns` elements from `q8_0`.
///
/// # Panics
/// If `bytes` and `out` do not hold the same number of whole rows.
pub fn q8_values(bytes: &[u8], columns: usize, out: &mut [f32]) {
    assert_eq!(
        bytes.len() * columns,
        out.len() * q8_row(columns),
        "bytes and values differ in rows of {columns} columns"
    );
    for (row, out) in bytes.chunks_exact(q8_row(columns).max(1)).zip(out.chunks_exact_mut(columns.max(1))) {
        for (block, out) in row.chunks_exact(Q8_BLOCK.1).zip(out.chunks_mut(Q8_BLOCK.0)) {
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
            for (out, q) in out.iter_mut().zip(&block[2..]) {
                *out = scale * f32::from(*q as i8);
            }
        }
    }
}
