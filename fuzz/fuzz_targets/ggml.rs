//! Fuzzes the reader of legacy GGML files.

#![no_main]

mod memory;

use std::sync::Arc;

use pricket::weights::GgmlFile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let layouts = pricket::loading::ggml_layouts();
    let Ok(file) = GgmlFile::open_remote(Arc::new(memory::Bytes(data.to_vec())), &layouts) else { return };
    memory::read(&file);
    let _ = (file.header(), file.describe());
    (0..file.words()).for_each(|id| assert!(file.word(id).is_some()));
});
