//! How fast this machine reads its memory and computes.

use std::time::Instant;

use pricket::candle::{DType, Device, Tensor};

/// Bytes a second that a device moves within its memory, reading and writing, and operations a second of a large product in
/// bf16, multiplications and additions counted apart: the best of four.
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
    // Into memory that is there: asking for some takes longer than filling it.
    let moved = timed(&|| copy.slice_set(&long, 0, 0).map(|()| copy.clone()))?;
    let multiplied = timed(&|| square.matmul(&square))?;
    Ok(((8 * ELEMENTS) as f64 / moved, 2.0 * (SIDE as f64).powi(3) / multiplied))
}

/// Bytes a second that `threads` read from a buffer of the model's own size, at most 4 GiB; the best of three.
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
