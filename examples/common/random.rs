//! Models with random weights, for measurements.

use std::sync::Arc;

use anyhow::Context;
use pricket::Loader;
use pricket::loading::Precision;
use pricket::weights::Dtype;
use pricket::weights::Random;

/// Returns a loader of random weights in a published shape, stored as `dtype`, or as f16 if that is auto.
#[allow(dead_code, reason = "not every example uses random weights")]
pub(crate) fn random(shape: &str, dtype: Precision) -> anyhow::Result<Loader> {
    let known = || pricket::suites::published_shapes().collect::<Vec<_>>().join(", ");
    let config = pricket::suites::published_config(shape)
        .with_context(|| format!("--shape: unknown shape {shape:?}; expected one of {}", known()))?;
    let dtype = match dtype {
        Precision::F32 => Dtype::F32,
        Precision::BF16 => Dtype::BF16,
        _ => Dtype::F16,
    };
    Ok(Loader::from_store(config, Arc::new(Random::new(dtype, 0))))
}
