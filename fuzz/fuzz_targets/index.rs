//! Fuzzes the reader of the index of a sharded checkpoint.

#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(map) = pricket::weights::shard_map(data, Path::new("model.safetensors.index.json")) else { return };
    for file in map.values() {
        assert!(!file.contains(['/', '\\']) && file != "..", "{file:?} leaves the directory");
    }
});
