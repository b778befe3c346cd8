//! Tensor operations that choose between fused and plain forms. No other module calls fused operations.
//!
//! There is no training mode. Each function checks whether a gradient is tracked for one of its inputs. If none is, it
//! uses the fused form. Otherwise it uses an operation with a backward pass, or plain candle operations, because
//! candle's fused softmax, norm and rotary embedding silently drop gradients. On the CPU in f32, tracked and untracked
//! passes give the same bits. The plain forms (`plain_*`) are public; tests compare them with the fused forms.

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
    ActivationPrecision, AttentionRow, BlockType, Blocks, FOUR_BIT_BLOCK, FourBit, FourBitType, Gate, Gelu, Isa,
    Matrix, Pool, RowSummary, Scales, argmax, keep_freed_memory, map as parallel_map, multiply_add_rate, q8_row_bytes,
    quantize, row_summaries, row_summary, selected_isa as cpu_isa, with_f16_scales,
};
pub use recurrence::*;
pub use softmax::*;
