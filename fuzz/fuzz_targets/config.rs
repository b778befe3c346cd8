//! Fuzzes the reader of config.json, up to the shape of every tensor.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(config) = serde_json::from_slice(data) else { return };
    let _ = pricket::loading::estimate(&config, pricket::weights::Dtype::F16, 64);
});
