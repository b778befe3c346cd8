#![no_main]

mod memory;

libfuzzer_sys::fuzz_target!(|data: &[u8]| memory::open(data));
