//! Element types of stored tensors.

use candle_core::DType;
use pricket_kernels::{BlockType, FOUR_BIT_BLOCK, FourBitType};

/// The element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// 16-bit float (IEEE half precision).
    F16,
    /// 16-bit bfloat16.
    BF16,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// Boolean, one byte with the value 0 or 1.
    Bool,
    /// Quantized blocks.
    Block(BlockType),
    /// 4-bit type of bitsandbytes.
    FourBit(FourBitType),
    /// An unsupported type, by its name.
    Other(&'static str),
}

impl Dtype {
    /// Returns the bytes that `elements` take, or 0 if the size of the type is unknown. For blocks, `elements` must be
    /// a multiple of the block size.
    pub const fn bytes(self, elements: usize) -> usize {
        elements.saturating_mul(match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
            Dtype::Block(kind) => return kind.bytes(elements),
            // With double quantization a scale is a byte.
            Dtype::FourBit(_) => return elements.div_ceil(2) + elements.div_ceil(FOUR_BIT_BLOCK),
            Dtype::Other(_) => 0,
        })
    }

    /// Returns whether weights can have this type: a floating-point or quantized type.
    pub const fn is_float(self) -> bool {
        matches!(self, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::Block(_) | Dtype::FourBit(_))
    }

    /// Returns the candle type with the same bytes, or `None` if candle has none.
    pub const fn to_candle(self) -> Option<DType> {
        Some(match self {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::I64 => DType::I64,
            Dtype::I32 => DType::I32,
            Dtype::I16 => DType::I16,
            Dtype::U8 | Dtype::Bool => DType::U8,
            Dtype::I8 | Dtype::Block(_) | Dtype::FourBit(_) | Dtype::Other(_) => return None,
        })
    }

    /// Returns the stored type of a candle tensor. Types other than floats become [`Dtype::Other`].
    pub fn from_candle(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Dtype::F64,
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            _ => Dtype::Other(dtype.as_str()),
        }
    }

    /// Returns the name of the type, spelled as in safetensors (`F32`), or as in ggml for blocks (`q4_0`).
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::I64 => "I64",
            Dtype::I32 => "I32",
            Dtype::I16 => "I16",
            Dtype::I8 => "I8",
            Dtype::U8 => "U8",
            Dtype::Bool => "BOOL",
            Dtype::Block(kind) => kind.name(),
            Dtype::FourBit(kind) => kind.name(),
            Dtype::Other(name) => name,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
