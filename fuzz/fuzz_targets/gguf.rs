//! Fuzzes the reader of GGUF files.

#![no_main]

mod memory;

use std::sync::Arc;

use pricket::weights::GgufFile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(file) = GgufFile::open_remote(Arc::new(memory::Bytes(data.to_vec()))) else { return };
    memory::read(&file);
    let metadata = file.metadata();
    for key in metadata.as_object().expect("an object").keys() {
        let (texts, integers) = (file.texts(key), file.integers(key));
        assert!(texts.is_ok() && integers.is_ok(), "every array of a file that opens can be read");
    }
});
