//! Kernels for the CPU: for x86-64 (AVX2, AVX-512, AMX), for aarch64 (NEON) and in plain Rust.
//!
//! - Products: [`linear`] and [`lora`] hold the candle operations. [`dense`], [`quantized_gemm`], [`tiles`] and
//!   [`bf16`] compute them over [`operands`], in the loops of [`product`] and [`rows`].
//! - Other operations of a transformer block: [`attention`], [`norm`], [`gelu`], [`gate`], [`rotary`], [`wkv`],
//!   [`reduce`].
//! - Foundations: the thread pool ([`pool`]), vectors ([`lanes`]) and instruction sets ([`isa`], [`detect`]).

pub(crate) mod attention;
pub(crate) mod attention_backward;
pub(crate) mod bf16;
pub(crate) mod dense;
pub(crate) mod detect;
pub(crate) mod gate;
pub(crate) mod gelu;
pub(crate) mod isa;
pub(crate) mod lanes;
pub(crate) mod linear;
pub(crate) mod lora;
pub(crate) mod memory;
pub(crate) mod norm;
pub(crate) mod operands;
pub(crate) mod packed;
pub(crate) mod peak;
pub(crate) mod pool;
pub(crate) mod product;
pub(crate) mod quantized_activations;
pub(crate) mod quantized_gemm;
pub(crate) mod reduce;
pub(crate) mod rotary;
pub(crate) mod rows;
pub(crate) mod shared;
pub(crate) mod store;
pub(crate) mod tiles;
pub(crate) mod unpack;
pub(crate) mod wkv;
