//! Checks a tokenizer.json before the tokenizers library sees it.
//!
//! The library (0.23) trusts its input: merges of tokens that are not there, some normalizers and numbers out of range
//! make it panic, others take gigabytes. The tokenizers of these families need little of what it can do, so everything
//! else is refused by name, and what is let through is written out anew.

use std::collections::{BTreeMap, HashMap, HashSet};

use pricket_nn::clip;
use serde::Deserialize;
use serde_json::{Value, json};

/// That of GPT-NeoX has 2.5 MB, and twice that if it is written with one merge a line.
pub(crate) const MAX_SIZE: u64 = 6 << 20;

/// Longest text of an added token, and of all of them together.
const MAX_ADDED: usize = 1 << 10;
const MAX_ADDED_TOTAL: usize = 256 << 10;
/// Tokens that the files beside a tokenizer.json name, together.
const MAX_ADDED_COUNT: usize = 1 << 14;

type Result<T> = std::result::Result<T, String>;

#[derive(Deserialize)]
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

/// A token that is looked for in the text before anything else.
#[derive(Clone, Debug, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "as the file has them")]
pub(crate) struct AddedToken {
    #[serde(default)]
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

#[derive(Deserialize)]
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
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

impl AddedToken {
    /// A special token, as its bare name stands for.
    fn special(content: &str) -> Self {
        let (normalized, content) = (Some(false), content.to_owned());
        Self { id: 0, content, single_word: false, lstrip: false, rstrip: false, normalized, special: true }
    }

    pub(crate) fn is_special(&self) -> bool {
        self.special
    }

    pub(crate) fn content(&self) -> &str {
        &self.content
    }

    /// The same in the library's words.
    pub(crate) fn to_library(&self) -> tokenizers::AddedToken {
        tokenizers::AddedToken::from(self.content.clone(), self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

/// The files beside a tokenizer.json that name more tokens.
#[derive(Debug, Default)]
pub(crate) struct Siblings {
    /// tokenizer_config.json.
    pub(crate) config: Option<Value>,
    /// special_tokens_map.json.
    pub(crate) map: Option<Value>,
    /// added_tokens.json.
    pub(crate) added: Option<Value>,
}

/// Attributes that name a special token, in the order of transformers.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Attributes that name several.
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

impl Siblings {
    /// The tokens to add after those of the tokenizer.json, which are `own`, in their order.
    ///
    /// As transformers 5 (`TokenizersBackend`) adds them: the ids that files declare only say in which order. Where
    /// tokenizer_config.json has `added_tokens_decoder` it is the whole truth, and the other two files are not read.
    pub(crate) fn tokens(&self, own: &[AddedToken]) -> Result<Vec<AddedToken>> {
        if self.config.is_none() && self.map.is_none() && self.added.is_none() {
            return Ok(Vec::new());
        }
        let null = Value::Null;
        let (config, map) = (self.config.as_ref().unwrap_or(&null), self.map.as_ref().unwrap_or(&null));
        let decoder = config.get("added_tokens_decoder");
        // The map comes before the configuration.
        let attribute =
            |key: &str| map.get(key).filter(|_| decoder.is_none()).or_else(|| config.get(key)).unwrap_or(&null);
        let mut named = Vec::new();
        for key in NAMED {
            named.extend(token_of(key, attribute(key))?);
        }
        let is_named = |content: &str| named.iter().any(|token| token.content == content);
        let mut count = 0;
        let mut counted = |more: usize| {
            count += more;
            if count > MAX_ADDED_COUNT {
                return Err(format!("its added tokens are more than {MAX_ADDED_COUNT}"));
            }
            Ok(())
        };
        let mut listed = Vec::new();
        for (key, value) in LISTS.iter().map(|key| (key, attribute(key))) {
            let items: Vec<&Value> = match value {
                Value::Array(items) => items.iter().collect(),
                Value::Object(items) => items.values().collect(),
                _ => Vec::new(),
            };
            counted(items.len())?;
            for item in items {
                listed.extend(token_of(key, item)?);
            }
        }
        let mut by_id = BTreeMap::new();
        if let Some(decoder) = decoder {
            counted(decoder.as_object().map_or(0, serde_json::Map::len))?;
            for (id, value) in decoder.as_object().into_iter().flatten() {
                let wrong = |what: &str| format!("tokenizer_config.json: added_tokens_decoder: {}: {what}", clip(id));
                let id: u32 = id.parse().map_err(|_| wrong("not an id"))?;
                let token = AddedToken::deserialize(value).map_err(|e| wrong(&e.to_string()))?;
                by_id.insert(id, token);
            }
        } else {
            let added = self.added.as_ref().and_then(Value::as_object);
            counted(added.map_or(0, serde_json::Map::len))?;
            let listed: HashSet<&str> = listed.iter().map(|token| token.content.as_str()).collect();
            for (content, id) in added.into_iter().flatten() {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                let id =
                    id.ok_or_else(|| format!("added_tokens.json: the id of {:?} is not a number", clip(content)))?;
                let special = is_named(content) || listed.contains(content.as_str());
                by_id.insert(id, AddedToken { special, normalized: Some(!special), ..AddedToken::special(content) });
            }
            by_id.extend(own.iter().map(|token| (token.id, token.clone())));
        }
        let mut out: Vec<AddedToken> = by_id.into_values().collect();
        let mut known: HashSet<String> = own.iter().chain(&out).map(|token| token.content.clone()).collect();
        for token in named.iter().chain(&listed) {
            if known.insert(token.content.clone()) {
                out.push(token.clone());
            }
        }
        for token in &mut out {
            token.special |= is_named(&token.content);
        }
        out.retain(|token| !token.content.is_empty());
        check_added(own.iter().chain(&out))?;
        Ok(out)
    }
}

/// A token that is named by its text, or described; none for `null` and what is neither.
fn token_of(key: &str, value: &Value) -> Result<Option<AddedToken>> {
    match value {
        Value::String(content) => Ok(Some(AddedToken::special(content))),
        Value::Object(_) => {
            let token = AddedToken::deserialize(value).map_err(|e| format!("{key}: {}", clip(&e.to_string())))?;
            let normalized = token.normalized.or(Some(false));
            Ok(Some(AddedToken { special: true, normalized, ..token }))
        }
        _ => Ok(None),
    }
}

/// Refuses added tokens that take much memory.
fn check_added<'a>(tokens: impl Iterator<Item = &'a AddedToken>) -> Result<()> {
    let lengths: Vec<usize> = tokens.map(|token| token.content.len()).collect();
    let total: usize = lengths.iter().sum();
    if total > MAX_ADDED_TOTAL || lengths.iter().any(|&length| length > MAX_ADDED) {
        return Err(format!("its added tokens take {total} bytes of text"));
    }
    Ok(())
}

/// The file again, in words that the library takes without harm, and its added tokens; or what is wrong with it.
///
/// `truncation` and `padding`, left over from fine-tuning, are dropped: a prompt is never cut or filled up.
pub(crate) fn checked(json: &[u8]) -> Result<(Vec<u8>, Vec<AddedToken>)> {
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
    check_added(file.added_tokens.iter())?;
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
    Ok((text.to_string().into_bytes(), file.added_tokens))
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
