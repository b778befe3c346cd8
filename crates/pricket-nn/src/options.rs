//! How weights are loaded.

use std::sync::Arc;

use candle_core::{DType, Device};

use crate::ops::{ActivationPrecision, BlockType, FourBitType};
use crate::{CacheType, NoProgress, Progress};

/// Which matrices become which blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// The type of the blocks' matrices, where their rows are whole blocks of it.
    pub weights: BlockType,
    /// That of the embedding and the head; `None` leaves them as stored.
    pub embeddings_and_head: Option<BlockType>,
}

impl Quantization {
    /// The type of a matrix with rows of `columns`, whether it is an embedding or a head or not; `None` if it stays as it is.
    pub fn of(self, is_table: bool, columns: usize) -> Option<BlockType> {
        let kind = if is_table { self.embeddings_and_head } else { Some(self.weights) };
        kind?.fitting(columns)
    }
}

/// The 4-bit type of the matrices of the blocks. The embedding and the head stay as stored, as in transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FourBitQuantization {
    /// NF4 or FP4.
    pub kind: FourBitType,
    /// Whether the scales are quantized too.
    pub is_double: bool,
}

impl std::str::FromStr for FourBitQuantization {
    type Err = String;

    /// Parses `nf4` and `fp4`, whose scales are quantized, and `nf4_f32` and `fp4_f32`, whose scales are f32.
    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let lower = name.to_lowercase();
        let (kind, is_double) = lower.strip_suffix("_f32").map_or((&lower[..], true), |kind| (kind, false));
        let kind = [FourBitType::Nf4, FourBitType::Fp4].into_iter().find(|known| known.name() == kind);
        let kind = kind.ok_or_else(|| format!("unknown 4-bit type {name:?}; use nf4, fp4, nf4_f32 or fp4_f32"))?;
        Ok(Self { kind, is_double })
    }
}

impl std::fmt::Display for FourBitQuantization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.kind.name(), if self.is_double { "" } else { "_f32" })
    }
}

/// The type that matrices are kept in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Storage {
    /// As stored (f64 becomes f32).
    #[default]
    AsStored,
    /// This type.
    Cast(DType),
    /// Quantized blocks.
    Quantize(Quantization),
    /// Elements of 4 bits.
    FourBit(FourBitQuantization),
}

/// Which weights become f32 variables that collect gradients; see [`Weights::parameters`](crate::Weights::parameters).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Trainable {
    /// None: the model is frozen.
    #[default]
    None,
    /// All of them.
    All,
    /// Those with one of these canonical names, or whose name ends in one after a dot: `attention.dense.weight`.
    Names(Vec<String>),
}

impl Trainable {
    pub(crate) fn includes(&self, name: &str) -> bool {
        let ends =
            |end: &String| name.strip_suffix(end.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        match self {
            Trainable::None => false,
            Trainable::All => true,
            Trainable::Names(names) => names.iter().any(ends),
        }
    }
}

/// How weights are loaded. Vectors take the type of the activations under every option.
///
/// ```
/// use pricket_nn::{LoadOptions, Trainable};
/// let options = LoadOptions { trainable: Trainable::Names(vec!["embed_out.weight".into()]), ..LoadOptions::default() };
/// assert!(options.device.is_cpu());
/// ```
#[derive(Clone)]
pub struct LoadOptions {
    /// Where they go; the CPU by default.
    pub device: Device,
    /// The type of matrices; as stored by default.
    pub storage: Storage,
    /// Which of them are trained; none by default. What is trained is f32, and cannot be stored in quantized blocks.
    pub trainable: Trainable,
    /// How precise activations are when they meet a matrix, on the CPU; f32 by default.
    pub precision: ActivationPrecision,
    /// The type in which keys and values are kept; by default as precise as the activations.
    pub cache: Option<CacheType>,
    /// Whether fused matrices are in the model's order already, as some converters write them: then no [`RowOrder`](crate::RowOrder) is applied.
    pub in_model_order: bool,
    /// Whether weights that the configuration has no use for are left in the file; an error by default.
    pub allow_unused: bool,
    /// Whether matrices of f32, f16 and bf16 are used where their file is mapped rather than copied, on the CPU; false by default. Only
    /// what is used is read then, processes share it, and a file that is written over meanwhile changes the model. Matrices whose rows
    /// are reordered, and those that lie unaligned in their file, are copied.
    pub in_place: bool,
    /// Is told of bytes read, and may cancel.
    pub progress: Arc<dyn Progress>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            storage: Storage::AsStored,
            trainable: Trainable::None,
            precision: ActivationPrecision::F32,
            cache: None,
            in_model_order: false,
            allow_unused: false,
            in_place: false,
            progress: Arc::new(NoProgress),
        }
    }
}

impl std::fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadOptions")
            .field("device", &self.device)
            .field("storage", &self.storage)
            .field("trainable", &self.trainable)
            .field("precision", &self.precision)
            .field("cache", &self.cache)
            .field("in_model_order", &self.in_model_order)
            .field("allow_unused", &self.allow_unused)
            .field("in_place", &self.in_place)
            .finish_non_exhaustive()
    }
}
