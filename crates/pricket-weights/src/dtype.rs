use candle_core::DType;
use pricket_kernels::{BlockType, FOUR_BIT_BLOCK, FourBitType};

/// The element type of a stored tensor, spelled as safetensors spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed byte.
    I8,
    /// Unsigned byte.
    U8,
    /// One byte, 0 or 1.
    Bool,
    /// Quantized.
    Block(BlockType),
    /// Elements of 4 bits with a scale for every 64, as bitsandbytes stores them.
    FourBit(FourBitType),
    /// A type by name that no reader here makes anything of.
    Other(&'static str),
}

impl Dtype {
    /// Bytes that `elements` take, for blocks a whole number of them; 0 if that is not known.
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

    /// Whether a weight can be of this type.
    pub const fn is_float(self) -> bool {
        matches!(self, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::Block(_) | Dtype::FourBit(_))
    }

    /// The type of candle's tensors that holds these bytes unchanged; `None` where there is none.
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

    /// What a float tensor of candle's is stored as.
    pub fn from_candle(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Dtype::F64,
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            _ => Dtype::Other(dtype.as_str()),
        }
    }

    /// Its name, as files spell it.
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
