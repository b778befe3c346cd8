//! Choice between pricket's kernels and candle's operations.

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

/// Returns whether pricket's kernels are used. If the environment variable `PRICKET_KERNELS` is `off`, candle's
/// operations are used instead. The variable is read once.
///
/// # Errors
/// Returns a message if the variable is neither `on` nor `off`.
pub fn kernels_are_on() -> std::result::Result<bool, String> {
    static ON: OnceLock<std::result::Result<bool, String>> = OnceLock::new();
    let read = || match std::env::var("PRICKET_KERNELS").as_deref() {
        Err(_) | Ok("on") => Ok(true),
        Ok("off") => Ok(false),
        Ok(other) => Err(format!("PRICKET_KERNELS is {other:?}; expected on or off")),
    };
    ON.get_or_init(read).clone()
}

/// Returns whether pricket's kernels are used on `device`: on the CPU, unless they are off.
pub(crate) fn has_kernels(device: &Device) -> bool {
    device.is_cpu() && kernels_are_on().unwrap_or(true)
}

/// Returns whether pricket's kernels support `x`: f32 on the CPU, unless they are off.
pub(super) fn on_our_kernels(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && has_kernels(x.device())
}
