//! Conversion between a tokenizer.json and the lists of tokens and merges in a GGUF file.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Value, json};

// Kinds of tokens in GGUF files (`tokenizer.ggml.token_type`).
const SPECIAL: i64 = 3;
const ADDED: i64 = 4;
const UNUSED: i64 = 5;

/// A tokenizer as the lists of a GGUF file. Byte-level BPE has merges; sentencepiece has scores.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocabulary {
    /// Text of each token, by id. Byte-level BPE spells it with one character per byte; special and added tokens are
    /// plain text.
    pub words: Vec<String>,
    /// Kind of each token: 1 normal, 2 unknown, 3 special, 4 added, 5 unused, 6 byte. Only sentencepiece has 2 and 6.
    pub kinds: Vec<i32>,
    /// Merges in order of priority, each as two tokens separated by a space.
    pub merges: Vec<String>,
    /// Score of each token; empty for byte-level BPE.
    pub scores: Vec<f32>,
    /// Whether a space is put before a text (sentencepiece only).
    pub add_space_prefix: bool,
    /// Whether runs of spaces become one space (sentencepiece only).
    pub remove_extra_whitespaces: bool,
    /// Precompiled character replacements, `precompiled_charsmap` (sentencepiece only).
    pub charsmap: Vec<u8>,
}

/// Returns the lists of a tokenizer.json, padded to `count` tokens, or `None` if it is not a BPE tokenizer.
pub(crate) fn from_json(json: &Value, count: usize) -> Option<Vocabulary> {
    let vocab = json["model"]["vocab"].as_object()?;
    let added = json["added_tokens"].as_array()?;
    let ids = vocab.values().chain(added.iter().map(|token| &token["id"])).filter_map(Value::as_u64);
    let count = ids.max().map_or(0, |id| id as usize + 1).max(count);
    let mut words: Vec<String> = (0..count).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED as i32; count];
    for (word, id) in vocab {
        let id = id.as_u64()? as usize;
        (words[id], kinds[id]) = (word.clone(), 1);
    }
    for token in added {
        let id = token["id"].as_u64()? as usize;
        let kind = if token["special"] == true { SPECIAL } else { ADDED };
        (words[id], kinds[id]) = (token["content"].as_str()?.into(), kind as i32);
    }
    let merge = |merge: &Value| match merge {
        Value::String(merge) => Some(merge.clone()),
        // Later versions of the library write a merge as an array of two strings.
        Value::Array(pair) => Some(format!("{} {}", pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
        _ => None,
    };
    let merges = json["model"]["merges"].as_array()?.iter().map(merge).collect::<Option<_>>()?;
    Some(Vocabulary { words, kinds, merges, ..Vocabulary::default() })
}

/// Returns the tokenizer.json for the lists given to [`crate::Tokenizer::from_vocabulary`].
pub(crate) fn to_json(words: &[Vec<u8>], kinds: &[i64], merges: &[Vec<u8>]) -> Value {
    let alphabet = byte_alphabet();
    let letters: BTreeMap<u8, char> = alphabet.iter().map(|(letter, byte)| (*byte, *letter)).collect();
    let merges: Vec<String> = merges.iter().map(|merge| String::from_utf8_lossy(merge).into_owned()).collect();
    // Tokens are normally spelled with one character per byte, like the merges. A converter of 2023 wrote the raw bytes
    // instead; the results of the merges are then missing from the list.
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
    let results: HashSet<&String> = made.iter().collect();
    let (mut vocab, mut added) = (serde_json::Map::new(), Vec::new());
    for (id, word) in words.iter().enumerate() {
        let kind = kinds.get(id).copied();
        if kind == Some(UNUSED) || is_padding(id, word) || word.is_empty() {
            continue;
        }
        let plain = String::from_utf8_lossy(word).into_owned();
        let special = kind == Some(SPECIAL) || looks_special(word);
        // Runs of spaces are added tokens, whatever their kind. The exception is the first id for the result of a
        // merge.
        let merged = || raw && results.contains(&spelled(word)) && !vocab.contains_key(&spelled(word));
        let spaces = word.len() > 1 && word.iter().all(|byte| *byte == b' ') && !merged();
        if special || kind == Some(ADDED) || spaces {
            added.push(json!({
                "id": id, "content": plain, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": !special, "special": special,
            }));
            if !special {
                continue;
            }
        }
        // If two ids have the same text, the merges give the first.
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

/// Returns GPT-2's one-to-one map of characters to bytes (`bytes_to_unicode` in openai/gpt-2).
pub(crate) fn byte_alphabet() -> HashMap<char, u8> {
    let visible = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let hidden = (0..=255u8).filter(|b| !visible(b)).zip(256u32..);
    let moved = hidden.filter_map(|(b, code)| Some((char::from_u32(code)?, b)));
    (0..=255u8).filter(visible).map(|b| (char::from(b), b)).chain(moved).collect()
}
