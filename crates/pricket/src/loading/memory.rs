use std::sync::Arc;

use pricket_nn::{ModelInfo, Weights};
use pricket_weights::{Dtype, ShapesOnly};
use serde_json::Value;

use crate::loading::family::checked_family;
use crate::{Error, Result};

/// What a model will take in memory, in bytes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Estimate {
    /// The weights.
    pub weights: u64,
    /// The state of one row: keys and values of the context asked for, or a recurrent state.
    pub cache: u64,
    /// What a pass over a prompt takes beside them, by rule of thumb.
    pub workspace: u64,
    /// What the model is.
    pub info: ModelInfo,
}

impl Estimate {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.workspace)
    }

    /// The memory of a model, for `context` positions of one row.
    pub fn new(info: ModelInfo, context: usize) -> Self {
        Self {
            weights: info.weight_bytes,
            cache: info.cache_bytes_per_token().saturating_mul(context as u64).saturating_add(info.state_bytes),
            workspace: info.workspace_bytes(context.min(512)),
            info,
        }
    }
}

/// Memory for a model that has not been loaded, nor even downloaded: `config` is its config.json, `dtype` the type of
/// its weights, `context` the positions of one row.
///
/// The weights are counted by the code that loads them, over a store that has shapes and no bytes.
///
/// # Errors
/// [`Error::Refused`] for a configuration that cannot be loaded either.
pub fn estimate(config: &Value, dtype: Dtype, context: usize) -> Result<Estimate> {
    let family = checked_family(config)?;
    let store = Arc::new(ShapesOnly::new(dtype));
    let weights = Weights::as_stored(store, family.names());
    let model = family.load(config, &weights)?;
    Ok(Estimate::new(model.info().clone(), context))
}

/// The bytes of memory that can be had without swapping: of the machine, or of the container if that is less. `None` where
/// the platform cannot tell.
pub fn available_memory() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let machine = system.available_memory();
    // The page cache of a container counts as used and yet gives way: only what is resident is taken.
    let container = system.cgroup_limits().map_or(machine, |limits| limits.total_memory.saturating_sub(limits.rss));
    Some(machine.min(container)).filter(|&bytes| bytes > 0)
}

/// Refuses politely what the system would kill.
pub(crate) fn check(what: &str, estimate: &Estimate) -> Result<()> {
    let needed = estimate.total();
    match available_memory() {
        Some(available) if needed > available => Err(Error::OutOfMemory { what: what.into(), needed, available }),
        _ => Ok(()),
    }
}
