//! Block-quantized types: names and layouts.

use candle_core::quantized::GgmlDType;

/// A block-quantized type, with ggml's name. A suffix `_v1` marks the layouts from before 2023-05-20, which have f32
/// scales.
///
/// `d` is a block's scale, `m` its minimum and `q` an integer; the formula gives an element's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, reason = "ggml's spelling")]
#[non_exhaustive]
pub enum BlockType {
    /// 32 elements in 18 bytes: `d (q - 8)`.
    Q4_0,
    /// 32 elements in 20 bytes: `d q + m`.
    Q4_1,
    /// 32 elements in 22 bytes: `d (q - 16)`.
    Q5_0,
    /// 32 elements in 24 bytes: `d q + m`.
    Q5_1,
    /// 32 elements in 34 bytes: `d q`.
    Q8_0,
    /// 32 elements in 36 bytes: as `Q8_0`, with a sum, which is not used here.
    Q8_1,
    /// 256 elements in 84 bytes, with 4-bit scales and minima for every 16 elements.
    Q2K,
    /// 256 elements in 110 bytes, with 6-bit scales for every 16 elements.
    Q3K,
    /// 256 elements in 144 bytes, with 6-bit scales and minima for every 32 elements.
    Q4K,
    /// 256 elements in 176 bytes, with 6-bit scales and minima for every 32 elements.
    Q5K,
    /// 256 elements in 210 bytes, with 8-bit scales for every 16 elements.
    Q6K,
    /// 256 elements in 292 bytes: `d q`, with sums, which are not used here.
    Q8K,
    /// 32 elements in 20 bytes: as `Q4_0`, with an f32 scale.
    Q4_0V1,
    /// 32 elements in 24 bytes: as `Q4_1`, with scale and minimum in f32.
    Q4_1V1,
    /// 32 elements in 36 bytes: as `Q8_0`, with an f32 scale.
    Q8_0V1,
    /// 16 elements in 10 bytes: `d (q - 8)`, neighbors in a byte. Used in April and May 2023 only.
    Q4_2,
    /// 16 elements in 12 bytes: `d q + m`, neighbors in a byte. Used in April 2023 only.
    Q4_3,
}

impl BlockType {
    /// All block types.
    pub const ALL: [Self; 17] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q8_1,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Q8K,
        Self::Q4_0V1,
        Self::Q4_1V1,
        Self::Q8_0V1,
        Self::Q4_2,
        Self::Q4_3,
    ];

    /// Returns the number of elements and the number of bytes of a block.
    pub const fn layout(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (32, 18),
            Self::Q4_1 | Self::Q4_0V1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 | Self::Q4_1V1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q8_1 | Self::Q8_0V1 => (32, 36),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
            Self::Q8K => (256, 292),
            Self::Q4_2 => (16, 10),
            Self::Q4_3 => (16, 12),
        }
    }

    /// Returns the number of elements of a block.
    pub const fn elements(self) -> usize {
        self.layout().0
    }

    /// Returns the number of bytes of `elements` elements, which are a whole number of blocks.
    pub const fn bytes(self, elements: usize) -> usize {
        elements / self.layout().0 * self.layout().1
    }

    /// Returns the name, as files and flags spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q8_1 => "q8_1",
            Self::Q2K => "q2k",
            Self::Q3K => "q3k",
            Self::Q4K => "q4k",
            Self::Q5K => "q5k",
            Self::Q6K => "q6k",
            Self::Q8K => "q8k",
            Self::Q4_0V1 => "q4_0_v1",
            Self::Q4_1V1 => "q4_1_v1",
            Self::Q8_0V1 => "q8_0_v1",
            Self::Q4_2 => "q4_2",
            Self::Q4_3 => "q4_3",
        }
    }
}

impl BlockType {
    /// The types that [`quantize`](crate::quantize) can write.
    pub const QUANTIZABLE: [Self; 10] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    pub(crate) fn to_candle(self) -> Option<GgmlDType> {
        Some(match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q2K => GgmlDType::Q2K,
            Self::Q3K => GgmlDType::Q3K,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
            _ => return None,
        })
    }

    /// Returns whether GGUF files can hold the type.
    pub const fn is_current(self) -> bool {
        !matches!(self, Self::Q4_0V1 | Self::Q4_1V1 | Self::Q8_0V1 | Self::Q4_2 | Self::Q4_3)
    }

    /// Returns the type with the same integers and f16 scales, or `None` if this type does not have f32 scales.
    pub const fn with_f16_scales(self) -> Option<Self> {
        match self {
            Self::Q4_0V1 => Some(Self::Q4_0),
            Self::Q4_1V1 => Some(Self::Q4_1),
            Self::Q8_0V1 => Some(Self::Q8_0),
            _ => None,
        }
    }

    /// Returns the type to use for rows of `columns` elements. This is the type itself if the row is a whole number of
    /// its blocks, and otherwise the next larger type with 32-element blocks, as in llama.cpp. Returns `None` if
    /// neither fits.
    pub fn fitting(self, columns: usize) -> Option<Self> {
        let small = match self {
            Self::Q2K | Self::Q3K => Self::Q4_0,
            Self::Q4K => Self::Q5_0,
            Self::Q5K => Self::Q5_1,
            Self::Q6K => Self::Q8_0,
            other => other,
        };
        [self, small].into_iter().find(|kind| columns > 0 && columns.is_multiple_of(kind.elements()))
    }
}

impl std::str::FromStr for BlockType {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let same = |kind: &&Self| kind.name() == name.to_lowercase().replace("_k", "k");
        let names = || Self::QUANTIZABLE.map(Self::name).join(", ");
        Self::QUANTIZABLE
            .iter()
            .find(same)
            .copied()
            .ok_or_else(|| format!("unknown quantized type {name:?}; expected one of {}", names()))
    }
}

impl std::fmt::Display for BlockType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
