//! Fuzzes the reader of safetensors files. Like `pickle`, with a corpus of its own.

#![no_main]

mod memory;

libfuzzer_sys::fuzz_target!(|data: &[u8]| memory::open(data));
