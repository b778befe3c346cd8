//! The only module that calls fused operations, candle's or ours.
//!
//! There is no training mode to forget. Each function asks its inputs whether a gradient is tracked: if none is, it
//! takes the fused form; if any is, an operation with a backward pass or the plain twin, because candle's fused
//! softmax, norm and rotary drop gradients without a word. On the CPU, in f32, both give the same bits. The twins are public,
//! and tests compare them.

mod attention;
mod dispatch;
mod elementwise;
mod linear;
mod norm;
mod recurrence;
mod softmax;

pub use attention::*;
pub use dispatch::*;
pub use elementwise::*;
pub use linear::*;
pub use norm::*;
pub use pricket_kernels::{
    ActivationPrecision, AttentionRow, BlockType, Blocks, FourBit, FourBitType, Gate, Gelu, Isa, Matrix, Pool,
    RowSummary, Scales, argmax, chosen as cpu_isa, keep_freed_memory, multiply_add_rate, q8_row_bytes, quantize,
    row_summaries, row_summary, with_f16_scales,
};
pub use recurrence::*;
pub use softmax::*;
