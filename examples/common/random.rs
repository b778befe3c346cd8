use std::sync::Arc;

use anyhow::Context;
use pricket::Loader;
use pricket::loading::Precision;
use pricket::weights::Dtype;
use pricket::weights::Random;

/// Random weights of a published shape, stored as `dtype`, f16 if that is auto.
#[allow(dead_code, reason = "not every example makes weights up")]
pub(crate) fn random(shape: &str, dtype: Precision) -> anyhow::Result<Loader> {
    let known = || pricket::suites::published_shapes().collect::<Vec<_>>().join(", ");
    let config = pricket::suites::published_config(shape)
        .with_context(|| format!("no shape {shape:?}; there are {}", known()))?;
    let dtype = match dtype {
        Precision::F32 => Dtype::F32,
        Precision::BF16 => Dtype::BF16,
        _ => Dtype::F16,
    };
    Ok(Loader::from_store(config, Arc::new(Random::new(dtype, 0))))
}
