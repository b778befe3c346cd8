//! Fuzzes the reader of PyTorch files. Like `safetensors`, with a corpus of its own.

#![no_main]

mod memory;

libfuzzer_sys::fuzz_target!(|data: &[u8]| memory::open(data));
