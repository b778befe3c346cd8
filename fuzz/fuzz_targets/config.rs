#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(config) = serde_json::from_slice(data) else { return };
    let _ = pricket::estimate(&config, pricket::Dtype::F16, 64);
});
