//! Search for the layer where a forward pass overflows.

use candle_core::{DType, Tensor};
use pricket_nn::{CausalLm, Context};

use crate::{Error, Result};

/// Runs `ids` again and checks the activations after every layer. Returns [`Error::NonFinite`] with the first layer
/// whose activations are not finite, or without a layer if all of them are finite.
pub(crate) fn diagnose(model: &dyn CausalLm, ids: &[u32]) -> Error {
    let info = model.info();
    let overflow = |what: String, layer| Error::NonFinite {
        what,
        layer,
        dtype: info.dtype.name(),
        activations: info.activations.as_str(),
        advice: "the checkpoint may be damaged; in f16, try f32 or bf16",
    };
    let search = || -> Result<Option<usize>> {
        let keep = ids.len().min(info.context.unwrap_or(usize::MAX));
        let mut ctx = Context::new();
        let mut x = model.embed(&Tensor::new(&ids[ids.len() - keep..], &info.device)?.unsqueeze(0)?, &mut ctx)?;
        for layer in 0..info.layers {
            x = model.block(layer, &x, &mut ctx)?;
            if !x.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?.is_finite() {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    };
    match search() {
        Ok(Some(layer)) => overflow(format!("the activations after layer {layer}"), Some(layer)),
        _ => overflow("the logits".into(), None),
    }
}
