//! Kernels for NVIDIA GPUs. There are none yet; on a GPU, models compute with candle's operations.
