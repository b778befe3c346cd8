//! Selection of the compute device by name.

use candle_core::Device;

use crate::{Error, Result};

/// Returns the device named `cpu`, `cuda`, `cuda:N` or `metal`.
///
/// # Errors
/// Returns [`Error::Device`] if the name is unknown, the backend is not compiled in, or the device does not exist.
pub fn device(name: &str) -> Result<Device> {
    let (kind, ordinal) = name.split_once(':').unwrap_or((name, "0"));
    let unknown = || Error::Device(format!("unknown device {name:?}; expected cpu, cuda, cuda:N or metal"));
    let ordinal: usize = ordinal.parse().map_err(|_| unknown())?;
    let missing = |feature: &str| {
        Error::Device(format!("this build has no {feature} backend; build with `--features {feature}`"))
    };
    let absent = |e: candle_core::Error| Error::Device(format!("no device {name}: {}", pricket_nn::Error::from(e)));
    match kind {
        "cpu" => Ok(Device::Cpu),
        "cuda" if candle_core::utils::cuda_is_available() => cuda(ordinal).map_err(absent),
        "cuda" => Err(missing("cuda")),
        "metal" if candle_core::utils::metal_is_available() => Device::new_metal(ordinal).map_err(absent),
        "metal" => Err(missing("metal")),
        _ => Err(unknown()),
    }
}

/// Returns the CUDA device of an ordinal. All threads share one device object with its own stream: candle's default
/// stream differs by thread, so threads that share tensors would race.
fn cuda(ordinal: usize) -> candle_core::Result<Device> {
    use std::collections::HashMap;
    use std::sync::{Mutex, OnceLock, PoisonError};
    static DEVICES: OnceLock<Mutex<HashMap<usize, Device>>> = OnceLock::new();
    let mut devices = DEVICES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = devices.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = Device::new_cuda_with_stream(ordinal)?;
    devices.insert(ordinal, device.clone());
    Ok(device)
}
