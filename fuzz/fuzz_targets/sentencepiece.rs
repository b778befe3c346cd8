//! Fuzzes the reader of sentencepiece models, and encoding and decoding with them.

#![no_main]

use pricket::lm::Tokenizer;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_files(&[("tokenizer.model", data)], "fuzzed") else { return };
    let Ok(ids) = tokenizer.encode_from_start("Anna  had a\n red b\u{e4}ll. </s> \u{1f917}") else { return };
    let _ = tokenizer.decode(&ids);
    let mut decoder = tokenizer.decoder();
    ids.iter().for_each(|&id| drop(decoder.push(id)));
});
