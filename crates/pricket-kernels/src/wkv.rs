//! The recurrence of RWKV-4.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, bail};

use crate::pool::parallel;
use crate::shared::{Shared, f32_slice};

/// Channels of a task.
const CHANNELS: usize = 64;

/// The `wkv` of RWKV-4 (Peng et al. 2023, arXiv:2305.13048, equation 16) over keys and values of `[positions, channels]`, f32
/// and contiguous: for each channel
///
/// `out_t = (num + e^(first + k_t) v_t) / (den + e^(first + k_t))`, then `num = e^decay num + e^(k_t) v_t` and
/// `den = e^decay den + e^(k_t)`,
///
/// with numerator and denominator divided by `e^max`, so that nothing overflows. The rows of the batch follow each other; each
/// has a state of its own, `[num, den, max]`.
///
/// Output: `[positions + 3 · rows, channels]`: what each position gives, then the states after the last of each row. It has no
/// backward pass: training takes the plain twin.
#[derive(Clone, Debug)]
pub struct WkvOp {
    /// `-e^time_decay`, for each channel.
    pub decay: Vec<f32>,
    /// `time_first`, for each channel.
    pub first: Vec<f32>,
    /// Positions of each row.
    pub lens: Vec<usize>,
    /// The states before, `[rows, 3, channels]`.
    pub states: Vec<f32>,
}

impl CustomOp2 for WkvOp {
    fn name(&self) -> &'static str {
        "wkv"
    }

    fn cpu_fwd(
        &self,
        keys: &CpuStorage,
        keys_at: &Layout,
        values: &CpuStorage,
        values_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (k, v) = (f32_slice("wkv keys", keys, keys_at)?, f32_slice("wkv values", values, values_at)?);
        let &[n, d] = keys_at.dims() else { bail!("wkv: expected [positions, channels], got {:?}", keys_at.dims()) };
        let rows = self.lens.len();
        if values_at.dims() != [n, d]
            || self.lens.iter().sum::<usize>() != n
            || (self.decay.len(), self.first.len(), self.states.len()) != (d, d, rows * 3 * d)
        {
            bail!("wkv: keys {:?}, values {:?} and {rows} rows do not fit", keys_at.dims(), values_at.dims());
        }
        let starts: Vec<usize> = self
            .lens
            .iter()
            .scan(0, |at, len| {
                *at += len;
                Some(*at - len)
            })
            .collect();
        let mut out = vec![0f32; (n + 3 * rows) * d];
        let shared = Shared::new(&mut out);
        let parts = d.div_ceil(CHANNELS);
        parallel(rows * parts, |task| {
            let (row, from) = (task / parts, task % parts * CHANNELS);
            let to = d.min(from + CHANNELS);
            let at = |part: usize, c: usize| (row * 3 + part) * d + c;
            for c in from..to {
                let (decay, first) = (self.decay[c], self.first[c]);
                let (mut num, mut den, mut max) = (self.states[at(0, c)], self.states[at(1, c)], self.states[at(2, c)]);
                for t in starts[row]..starts[row] + self.lens[row] {
                    let (k, v) = (k[t * d + c], v[t * d + c]);
                    let top = max.max(first + k);
                    let (old, new) = ((max - top).exp(), (first + k - top).exp());
                    // SAFETY: inside the buffer, and this channel of this row belongs to this task alone.
                    unsafe { *shared.at(t * d + c) = (old * num + new * v) / (old * den + new) };
                    let top = (max + decay).max(k);
                    let (old, new) = ((max + decay - top).exp(), (k - top).exp());
                    (num, den, max) = (old * num + new * v, old * den + new, top);
                }
                for (part, x) in [num, den, max].into_iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { *shared.at(n * d + at(part, c)) = x };
                }
            }
        });
        Ok((CpuStorage::F32(out), (n + 3 * rows, d).into()))
    }
}
