//! Memory estimates, and the check before loading.

use std::sync::Arc;

use pricket_nn::{ModelInfo, Weights};
use pricket_weights::{Dtype, ShapesOnly};
use serde_json::Value;

use crate::loading::family::checked_family;
use crate::{Error, Result};

/// Memory requirements of a model, in bytes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Estimate {
    /// Weights.
    pub weights: u64,
    /// State of one row: keys and values of the requested context, or the recurrent state.
    pub cache: u64,
    /// Temporary memory of a pass over a prompt (approximate).
    pub workspace: u64,
    /// Description of the model.
    pub info: ModelInfo,
}

impl Estimate {
    /// Returns the sum of weights, state and temporary memory.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.workspace)
    }

    /// Estimates the memory of a model for `context` positions of one row.
    pub fn new(info: ModelInfo, context: usize) -> Self {
        Self {
            weights: info.weight_bytes,
            cache: info.cache_bytes_per_token().saturating_mul(context as u64).saturating_add(info.state_bytes),
            workspace: info.workspace_bytes(context.min(512)),
            info,
        }
    }
}

/// Estimates the memory of a model without loading or downloading it. `config` is its config.json, `dtype` the type of
/// its weights, and `context` the number of positions of one row.
///
/// The weights are counted by the loading code of the family, over a store that has shapes but no bytes.
///
/// # Errors
/// Returns [`Error::Refused`] if the configuration is not supported.
pub fn estimate(config: &Value, dtype: Dtype, context: usize) -> Result<Estimate> {
    let family = checked_family(config)?;
    let store = Arc::new(ShapesOnly::new(dtype));
    let weights = Weights::as_stored(store, family.names());
    let model = family.load(config, &weights)?;
    Ok(Estimate::new(model.info().clone(), context))
}

/// Returns the bytes of memory available without swapping, in the machine or in the container, whichever is less.
/// `None` if the platform does not report it.
pub fn available_memory() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let machine = system.available_memory();
    // A container counts its page cache as used, but the cache is reclaimable. Only resident memory counts here.
    let container = system.cgroup_limits().map_or(machine, |limits| limits.total_memory.saturating_sub(limits.rss));
    Some(machine.min(container)).filter(|&bytes| bytes > 0)
}

/// Returns the bytes of memory that this process occupies. `None` if the platform does not report it.
pub fn used_memory() -> Option<u64> {
    let pid = sysinfo::get_current_pid().ok()?;
    let mut system = sysinfo::System::new();
    let what = sysinfo::ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(sysinfo::ProcessesToUpdate::Some(&[pid]), false, what);
    Some(system.process(pid)?.memory()).filter(|&bytes| bytes > 0)
}

/// Returns an error if the estimate exceeds the available memory, before the system would kill the process.
pub(crate) fn check(what: &str, estimate: &Estimate) -> Result<()> {
    let needed = estimate.total();
    match available_memory() {
        Some(available) if needed > available => Err(Error::OutOfMemory { what: what.into(), needed, available }),
        _ => Ok(()),
    }
}
