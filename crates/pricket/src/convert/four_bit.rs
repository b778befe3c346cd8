//! Conversion to the 4-bit types of bitsandbytes, which store a matrix in several tensors.

use candle_core::{DType, Device};
use pricket_nn::FourBitQuantization;
use pricket_nn::ops::{FOUR_BIT_BLOCK, FourBit, Scales};
use pricket_weights::{Dtype, Store, four_bit_parts};
use serde_json::Value;

use super::{Change, Item, Merge, Target};
use crate::{Error, Result};

/// Returns the `quantization_config` of a checkpoint. `others` is the type of the other tensors, in which transformers
/// then computes.
pub(super) fn quantization_config(wanted: FourBitQuantization, others: Option<Dtype>) -> Value {
    let compute = match others {
        Some(Dtype::F16) => "float16",
        Some(Dtype::BF16) => "bfloat16",
        _ => "float32",
    };
    serde_json::json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "_load_in_4bit": true, "load_in_8bit": false,
        "bnb_4bit_quant_type": wanted.kind.name(), "bnb_4bit_use_double_quant": wanted.is_double,
        "bnb_4bit_compute_dtype": compute, "bnb_4bit_quant_storage": "uint8",
    })
}

impl Item {
    /// Writes the tensor. If it is a part of a 4-bit matrix, the first part computes all parts, which `parts` keeps for
    /// the following items.
    pub(super) fn write_as(
        &self,
        target: Target,
        store: &dyn Store,
        merge: Option<Merge<'_>>,
        parts: &mut Vec<Vec<u8>>,
        out: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (Some(part), Target::FourBit(wanted)) = (self.part, target) else { return self.write(store, merge, out) };
        if part == 0 {
            let (matrix, original) = match self.kept(store, merge.is_some(), wanted)? {
                Some(kept) => kept,
                None => self.quantized(store, merge, wanted)?,
            };
            let named = four_bit_parts(&self.outline.name, &matrix, original);
            *parts = named.into_iter().map(|(_, bytes)| bytes).collect();
        }
        out(&parts[part])
    }

    /// Returns the stored matrix and its type before quantization, if it can be written as it is.
    fn kept(
        &self,
        store: &dyn Store,
        is_merged: bool,
        wanted: FourBitQuantization,
    ) -> Result<Option<(FourBit, Dtype)>> {
        let stored = store.entry(&self.from).map(|entry| entry.dtype);
        if is_merged || self.rows != Change::None || stored != Some(Dtype::FourBit(wanted.kind)) {
            return Ok(None);
        }
        let (matrix, original) = store.four_bit(&self.from)?;
        let is_double = matches!(matrix.scales(), Scales::Double { .. });
        Ok((is_double == wanted.is_double && matrix.block() == FOUR_BIT_BLOCK).then_some((matrix, original)))
    }

    /// Quantizes the matrix, merged with the adapters. Returns it with its type before quantization.
    fn quantized(
        &self,
        store: &dyn Store,
        merge: Option<Merge<'_>>,
        wanted: FourBitQuantization,
    ) -> Result<(FourBit, Dtype)> {
        let tensor = pricket_weights::read_tensor(store, &self.from, &Device::Cpu)?;
        let original = Dtype::from_candle(tensor.dtype());
        let tensor = self.reordered(&merge.map_or(Ok(tensor.clone()), |merge| merge(tensor))?)?;
        let (shape, flat) = (tensor.dims2()?, tensor.flatten_all()?);
        let read = |from: usize, to: usize| flat.narrow(0, from, to - from)?.to_dtype(DType::F32)?.to_vec1::<f32>();
        let matrix = FourBit::quantize_parts(wanted.kind, shape, FOUR_BIT_BLOCK, wanted.is_double, read);
        let wrong =
            |e| Error::Malformed { origin: store.origin(&self.from), what: format!("tensor {}: {e}", self.from) };
        Ok((matrix.map_err(wrong)?, original))
    }
}
