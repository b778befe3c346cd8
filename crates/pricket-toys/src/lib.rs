//! Two small model families for tests. They show the code that a family needs, and test that the rest of pricket works
//! with families that it does not know. No published model belongs to them.
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::{Device, Tensor};
//! use pricket_nn::{Context, Weights};
//! use pricket_weights::{Dtype, Random};
//!
//! let config = serde_json::json!({"model_type": "toy_gated", "vocab": 61, "width": 24, "layers": 2, "heads": 4, "kv_heads": 2});
//! let weights = Weights::as_stored(Arc::new(Random::new(Dtype::F32, 0)), pricket_toys::GATED.names());
//! let model = pricket_toys::GATED.load(&config, &weights)?;
//! let hidden = model.hidden(&Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?, &mut Context::new())?;
//! assert_eq!(model.head(&hidden)?.dims(), [1, 3, 61]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod gated;
mod recurrent;

pub use gated::GATED;
pub use recurrent::RECURRENT;
