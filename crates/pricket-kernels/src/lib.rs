//! CPU kernels for decoder models: plain functions over slices, and the same kernels as candle custom ops.
//!
//! This crate works on tensors and slices only; layers, states and models are in other crates. Every operation has a
//! reference implementation in plain candle operations in `pricket-nn`, and tests compare the two over shapes and
//! types. Activations are f32. Weights keep the type of the file (f32, f16, bf16, or quantized [`Packed`] rows).
//! Kernels widen a panel of a weight at a time, and only if they need to: memory stays near the size of the file, and
//! sums are in f32.
//!
//! The instruction set is detected at run time. [`Isa::available`] lists the sets of this processor, and the
//! environment variable `PRICKET_CPU` forces one of them. Work is split over the threads of the [`Pool`] that the
//! caller installs.
//!
//! ```
//! use pricket_kernels::{Stored, linear};
//! let weight = [half::f16::ONE, half::f16::from_f32(2.0), half::f16::ZERO, half::f16::ONE]; // [2, 2]
//! let mut y = [0.0; 2];
//! linear(&[3.0, 4.0], Stored::F16(&weight), Some(&[0.5, 0.0]), 2, 2, &mut y); // y = x Wᵀ + b
//! assert_eq!(y, [11.5, 4.0]);
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]
#![allow(unsafe_code, reason = "the workspace denies unsafe code; kernels need it")]

mod block_type;
mod blocks;
mod cpu;
mod cuda;
mod four_bit;
mod in_place;
mod matrix;

pub use block_type::BlockType;
pub use blocks::{Blocks, dequantize, halves_from_pairs, quantize, with_f16_scales};
pub use cpu::attention::{AttentionOp, AttentionRow};
pub use cpu::attention_backward::SelfAttentionOp;
pub use cpu::dense::{linear, linear_transposed};
pub use cpu::detect::selected_isa;
pub use cpu::gate::{Gate, GatedOp, MixOp};
pub use cpu::gelu::{Gelu, GeluOp};
pub use cpu::isa::{InstructionSet, Isa};
pub use cpu::linear::{ActivationPrecision, LinearOp, TrainedLinearOp};
pub use cpu::lora::{BackwardOnlyOp, LoraOp};
pub use cpu::memory::keep_freed_memory;
pub use cpu::norm::{LayerNormOp, RmsNormOp};
pub use cpu::operands::Stored;
pub use cpu::packed::Packed;
pub use cpu::peak::multiply_add_rate;
pub use cpu::pool::{Pool, collect, map, parallel, threads};
pub use cpu::reduce::{RowSummary, SoftmaxOp, SumOp, argmax, row_summaries, row_summary};
pub use cpu::rotary::RotaryOp;
pub use cpu::store::{StoreOp, q8_row_bytes, q8_values};
pub use cpu::wkv::WkvOp;
pub use four_bit::{FOUR_BIT_BLOCK, FourBit, FourBitType, NESTED_BLOCK, Scales};
pub use in_place::{InPlace, MappedBytes};
pub use matrix::Matrix;
