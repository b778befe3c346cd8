//! Options for loading weights.

use std::sync::Arc;

use candle_core::{DType, Device};

use crate::ops::{ActivationPrecision, BlockType, FourBitType};
use crate::{CacheType, NoProgress, Progress};

/// Quantization of the matrices of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Type of the matrices in the blocks of the model. A matrix whose rows do not fit this type gets a related type or
    /// stays as stored.
    pub weights: BlockType,
    /// Type of the embedding and the head; `None` leaves them as stored.
    pub embeddings_and_head: Option<BlockType>,
}

impl Quantization {
    /// Returns the quantized type of a matrix with `columns` columns, or `None` if it stays as stored.
    /// `is_embedding_or_head` is true for an embedding or a head.
    pub fn of(self, is_embedding_or_head: bool, columns: usize) -> Option<BlockType> {
        let kind = if is_embedding_or_head { self.embeddings_and_head } else { Some(self.weights) };
        kind?.fitting(columns)
    }
}

/// 4-bit quantization of the matrices of the blocks. The embedding and the head stay as stored, as in transformers.
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

/// Storage type of matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Storage {
    /// The type in the file; f64 becomes f32.
    #[default]
    AsStored,
    /// The given type.
    Cast(DType),
    /// Quantized blocks.
    Quantize(Quantization),
    /// 4-bit types of bitsandbytes.
    FourBit(FourBitQuantization),
}

/// Weights to train. They become f32 variables with gradients; see [`Weights::parameters`](crate::Weights::parameters).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Trainable {
    /// No weights; the model is frozen.
    #[default]
    None,
    /// All weights.
    All,
    /// The weights whose canonical name is one of these, or ends with a dot and one of these, such as
    /// `attention.dense.weight`.
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

/// Options for loading weights. Vectors always get the type of the activations.
///
/// ```
/// use pricket_nn::{LoadOptions, Trainable};
/// let options = LoadOptions { trainable: Trainable::Names(vec!["embed_out.weight".into()]), ..LoadOptions::default() };
/// assert!(options.device.is_cpu());
/// ```
#[derive(Clone)]
pub struct LoadOptions {
    /// Device of the weights; the CPU by default.
    pub device: Device,
    /// Storage type of matrices; as stored by default.
    pub storage: Storage,
    /// Weights to train; none by default. Trained weights are f32 and cannot be quantized.
    pub trainable: Trainable,
    /// Precision of activations in matrix products on the CPU; f32 by default.
    pub precision: ActivationPrecision,
    /// Storage type of keys and values. `None`, the default, chooses a type as precise as the activations.
    pub cache: Option<CacheType>,
    /// Whether the rows of fused matrices in the file are in the model's order, as some converters write them. Then no
    /// [`RowOrder`](crate::RowOrder) is applied. False by default.
    pub in_model_order: bool,
    /// Whether weights in the file that the model does not use are ignored. False by default, which makes them an
    /// error.
    pub allow_unused: bool,
    /// Whether f32, f16 and bf16 matrices are used directly in the memory-mapped file, on the CPU. False by default,
    /// which copies them.
    ///
    /// In place, only the pages that are used are read, and processes share them. Overwriting the file changes the
    /// model. Matrices with reordered rows and matrices that are not aligned in the file are copied.
    pub in_place: bool,
    /// Gets the number of bytes read, and may cancel loading.
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
