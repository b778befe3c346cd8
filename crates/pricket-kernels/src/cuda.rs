//! Kernels of NVIDIA GPUs. There are none yet: models on a GPU compute with candle's operations.
