//! The types of blocks.

use candle_core::quantized::GgmlDType;

/// A block-quantized type. Names are ggml's; a suffix `_v1` marks the blocks of before 2023-05-20, whose scales are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, reason = "the field's own spelling")]
#[non_exhaustive]
pub enum BlockType {
    /// 32 elements in 18 bytes: `d (q - 8)`.
    Q4_0,
    /// 32 in 20: `d q + m`.
    Q4_1,
    /// 32 in 22: `d (q - 16)`.
    Q5_0,
    /// 32 in 24: `d q + m`.
    Q5_1,
    /// 32 in 34: `d q`.
    Q8_0,
    /// 32 in 36: as `Q8_0`, with a sum that nobody needs here.
    Q8_1,
    /// 256 in 84, with scales of 4 bits for every 16.
    Q2K,
    /// 256 in 110, with scales of 6 bits for every 16.
    Q3K,
    /// 256 in 144, with scales and minima of 6 bits for every 32.
    Q4K,
    /// 256 in 176, with scales and minima of 6 bits for every 32.
    Q5K,
    /// 256 in 210, with scales of 8 bits for every 16.
    Q6K,
    /// 256 in 292: `d q`, with sums that nobody needs here.
    Q8K,
    /// 32 in 20: as `Q4_0`, its scale in f32.
    Q4_0V1,
    /// 32 in 24: as `Q4_1`, both in f32.
    Q4_1V1,
    /// 32 in 36: as `Q8_0`, its scale in f32.
    Q8_0V1,
    /// 16 in 10: `d (q - 8)`, neighbors in a byte. April and May 2023 only.
    Q4_2,
    /// 16 in 12: `d q + m`, neighbors in a byte. April 2023 only.
    Q4_3,
}

impl BlockType {
    /// All of them.
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

    /// Elements and bytes of a block.
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

    /// Elements of a block.
    pub const fn elements(self) -> usize {
        self.layout().0
    }

    /// Bytes that `elements` take, a whole number of blocks.
    pub const fn bytes(self, elements: usize) -> usize {
        elements / self.layout().0 * self.layout().1
    }

    /// The name, as files and flags spell it.
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
    /// Those that [`quantize`](crate::quantize) makes, by the names that flags give them.
    pub const MADE: [Self; 10] = [
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

    /// Whether it is one of those that GGUF files hold.
    pub const fn is_current(self) -> bool {
        !matches!(self, Self::Q4_0V1 | Self::Q4_1V1 | Self::Q8_0V1 | Self::Q4_2 | Self::Q4_3)
    }

    /// The type of the same blocks with scales in f16, for those that have them in f32.
    pub const fn with_f16_scales(self) -> Option<Self> {
        match self {
            Self::Q4_0V1 => Some(Self::Q4_0),
            Self::Q4_1V1 => Some(Self::Q4_1),
            Self::Q8_0V1 => Some(Self::Q8_0),
            _ => None,
        }
    }

    /// This type for rows of `columns`; where they are no whole blocks of it, the next larger one of small blocks, as
    /// llama.cpp chooses. `None` if no type fits.
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
        let names = || Self::MADE.map(Self::name).join(", ");
        Self::MADE.iter().find(same).copied().ok_or_else(|| format!("{name:?} is no quantized type; use {}", names()))
    }
}

impl std::fmt::Display for BlockType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
