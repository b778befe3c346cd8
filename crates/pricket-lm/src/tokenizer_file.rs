//! Checks a tokenizer.json before the tokenizers library sees it.
//!
//! The library (0.23) trusts its input: merges of tokens that are not there, some normalizers and numbers out of range
//! make it panic, others take gigabytes. The tokenizers of these families need little of what it can do, so everything
//! else is refused by name, and what is let through is written out anew.

use std::collections::HashMap;

use pricket_nn::clip;
use serde_json::{Value, json};

/// That of GPT-NeoX has 2.5 MB, and twice that if it is written with one merge a line.
pub(crate) const MAX_SIZE: u64 = 6 << 20;

/// Longest text of an added token, and of all of them together.
const MAX_ADDED: usize = 1 << 10;
const MAX_ADDED_TOTAL: usize = 256 << 10;

type Result<T> = std::result::Result<T, String>;

#[derive(serde::Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(serde::Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "as the file has them")]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

#[derive(serde::Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    dropout: Option<f32>,
    #[serde(default)]
    ignore_merges: bool,
}

/// `["a", "b"]`, or `"a b"` in files of before 2024.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

/// The file again, in words that the library takes without harm; or what is wrong with it.
///
/// `truncation` and `padding`, left over from fine-tuning, are dropped: a prompt is never cut or filled up.
pub(crate) fn checked(json: &[u8]) -> Result<Vec<u8>> {
    if json.len() as u64 > MAX_SIZE {
        return Err(format!("{} bytes are no tokenizer.json", json.len()));
    }
    let file: File =
        serde_json::from_slice(json).map_err(|e| format!("not a tokenizer.json: {}", clip(&e.to_string())))?;
    if kind(&file.decoder) != Some("ByteLevel") {
        return Err("its decoder is not ByteLevel, as that of every tokenizer of these families is".into());
    }
    allow("normalizer", &file.normalizer, "normalizers", &["NFC", "NFD", "NFKC", "NFKD"])?;
    allow("pre_tokenizer", &file.pre_tokenizer, "pretokenizers", &["ByteLevel", "Digits"])?;
    allow("post_processor", &file.post_processor, "processors", &["ByteLevel", "TemplateProcessing"])?;
    let total: usize = file.added_tokens.iter().map(|token| token.content.len()).sum();
    if total > MAX_ADDED_TOTAL || file.added_tokens.iter().any(|token| token.content.len() > MAX_ADDED) {
        return Err(format!("its added tokens take {total} bytes of text"));
    }
    let model = file.model;
    let merges = merges(&model)?;
    let tokens = model.vocab.len() + file.added_tokens.len();
    let ids = model.vocab.values().copied().chain(file.added_tokens.iter().map(|token| token.id));
    // Tables grow with ids, so ids may not run far ahead of tokens.
    if let Some(id) = ids.max().filter(|&id| id as usize > 4 * tokens + 1024) {
        return Err(format!("{tokens} tokens with ids up to {id}"));
    }
    let text = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": file.added_tokens.iter().map(|token| json!({
            "id": token.id, "content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
            "rstrip": token.rstrip, "normalized": token.normalized.unwrap_or(!token.special), "special": token.special,
        })).collect::<Vec<_>>(),
        "normalizer": file.normalizer,
        "pre_tokenizer": file.pre_tokenizer,
        "post_processor": file.post_processor,
        "decoder": file.decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": model.ignore_merges, "vocab": model.vocab, "merges": merges,
        },
    });
    Ok(text.to_string().into_bytes())
}

/// The `type` of a section.
fn kind(section: &Value) -> Option<&str> {
    section["type"].as_str()
}

/// Refuses a section that is none of `kinds`, nor a sequence of them under the key `parts`.
fn allow(name: &str, section: &Value, parts: &str, kinds: &[&str]) -> Result<()> {
    if section.is_null() {
        return Ok(());
    }
    match (kind(section), section[parts].as_array()) {
        (Some("Sequence"), Some(parts)) if parts.len() <= 8 => {
            match parts.iter().find(|part| kind(part).is_none_or(|kind| !kinds.contains(&kind))) {
                Some(part) => Err(unknown(name, part)),
                None => Ok(()),
            }
        }
        (Some(kind), _) if kinds.contains(&kind) => Ok(()),
        _ => Err(unknown(name, section)),
    }
}

fn unknown(name: &str, section: &Value) -> String {
    let kind = kind(section).map_or_else(|| clip(&section.to_string()), clip);
    format!("its {name} {kind:?} is none that the tokenizers of these families use")
}

/// The merges, each of tokens that are there.
fn merges(model: &Model) -> Result<Vec<(&str, &str)>> {
    if let Some(other) = model.kind.as_deref().filter(|kind| *kind != "BPE") {
        return Err(format!("its model is {:?}; the tokenizers of these families are BPE", clip(other)));
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        return Err("its model marks word parts with a prefix or suffix, which byte-level BPE does not".into());
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err("its model drops merges at random".into());
    }
    if model.merges.len() > model.vocab.len() {
        return Err(format!("{} merges make only {} tokens", model.merges.len(), model.vocab.len()));
    }
    let known = |token: &str| model.vocab.contains_key(token);
    let mut joined = String::new();
    let mut out = Vec::with_capacity(model.merges.len());
    for merge in &model.merges {
        let (left, right) = match merge {
            Merge::Pair(left, right) => (left.as_str(), right.as_str()),
            Merge::Text(text) => {
                text.split_once(' ').ok_or_else(|| format!("the merge {:?} is no pair", clip(text)))?
            }
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        if !(known(left) && known(right) && known(&joined)) {
            return Err(format!(
                "the merge of {:?} and {:?} names a token that is not in the vocabulary",
                clip(left),
                clip(right)
            ));
        }
        out.push((left, right));
    }
    Ok(out)
}
