//! A tokenizer.json made from lists of words and merges.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value, json};

use crate::tokenizer::byte_alphabet;

const SPECIAL: i64 = 3;
const ADDED: i64 = 4;
const UNUSED: i64 = 5;

/// The file that [`crate::Tokenizer::from_vocabulary`] reads.
pub(crate) fn to_json(words: &[Vec<u8>], kinds: &[i64], merges: &[Vec<u8>]) -> Value {
    let alphabet = byte_alphabet();
    let letters: BTreeMap<u8, char> = alphabet.iter().map(|(letter, byte)| (*byte, *letter)).collect();
    let merges: Vec<String> = merges.iter().map(|merge| String::from_utf8_lossy(merge).into_owned()).collect();
    // A word is spelled in letters that stand for bytes. One program of 2023 wrote the bytes themselves; its merges tell.
    let known: HashSet<&[u8]> = words.iter().map(Vec::as_slice).collect();
    let made: Vec<String> = merges.iter().map(|merge| merge.replacen(' ', "", 1)).collect();
    let raw = !made.iter().all(|word| known.contains(word.as_bytes()));
    let spelled = |word: &[u8]| -> String {
        if raw {
            word.iter().filter_map(|byte| letters.get(byte)).collect()
        } else {
            String::from_utf8_lossy(word).into_owned()
        }
    };
    let looks_special = |word: &[u8]| word.starts_with(b"<|") && word.ends_with(b"|>");
    let is_padding = |id: usize, word: &[u8]| word == format!("[PAD{id}]").as_bytes();
    let (mut vocab, mut added) = (serde_json::Map::new(), Vec::new());
    for (id, word) in words.iter().enumerate() {
        let kind = kinds.get(id).copied();
        if kind == Some(UNUSED) || is_padding(id, word) || word.is_empty() {
            continue;
        }
        let plain = String::from_utf8_lossy(word).into_owned();
        let special = kind == Some(SPECIAL) || looks_special(word);
        // Runs of spaces are added tokens whatever kind they are said to have: no letter stands for a space.
        let spaces = word.len() > 1 && word.iter().all(|byte| *byte == b' ');
        if special || kind == Some(ADDED) || spaces {
            added.push(json!({
                "id": id, "content": plain, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": !special, "special": special,
            }));
            if !special {
                continue;
            }
        }
        // Where a word is there twice, its first id is the one that merges lead to.
        let spelling = if special { plain } else { spelled(word) };
        vocab.entry(spelling).or_insert(id.into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges,
        },
    })
}
