//! Measurements of memory bandwidth and arithmetic speed.

use std::time::Instant;

use pricket::candle::{DType, Device, Tensor};

/// Measures a device: bytes per second of a copy within its memory, and operations per second of a large matrix product
/// in bf16.
///
/// Bytes read and bytes written are added up, as are multiplications and additions. Returns the best of four runs.
pub(crate) fn device_rates(device: &Device) -> anyhow::Result<(f64, f64)> {
    const ELEMENTS: usize = 256 << 20;
    const SIDE: usize = 8192;
    let timed = |work: &dyn Fn() -> pricket::candle::Result<Tensor>| -> anyhow::Result<f64> {
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            device.synchronize()?;
            let start = Instant::now();
            std::hint::black_box(work()?);
            device.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best)
    };
    let (long, copy) = (Tensor::zeros(ELEMENTS, DType::F32, device)?, Tensor::zeros(ELEMENTS, DType::F32, device)?);
    let square = Tensor::zeros((SIDE, SIDE), DType::BF16, device)?;
    // The copy reuses memory, since an allocation takes longer than the copy.
    let moved = timed(&|| copy.slice_set(&long, 0, 0).map(|()| copy.clone()))?;
    let multiplied = timed(&|| square.matmul(&square))?;
    Ok(((8 * ELEMENTS) as f64 / moved, 2.0 * (SIDE as f64).powi(3) / multiplied))
}

/// Measures the bytes per second that `threads` read from a buffer of this size, at most 4 GiB. Returns the best of
/// three runs.
pub(crate) fn read_rate(bytes: usize, threads: usize) -> f64 {
    let words = bytes.clamp(1 << 20, 4 << 30) / 8;
    let buffer: Vec<u64> = (0..words as u64).collect();
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        let sum: u64 = std::thread::scope(|scope| {
            let parts = buffer.chunks(words.div_ceil(threads));
            let workers: Vec<_> =
                parts.map(|part| scope.spawn(move || part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x)))).collect();
            workers.into_iter().map(|worker| worker.join().unwrap_or(0)).fold(0, u64::wrapping_add)
        });
        std::hint::black_box(sum);
        best = best.min(start.elapsed().as_secs_f64());
    }
    (words * 8) as f64 / best
}
