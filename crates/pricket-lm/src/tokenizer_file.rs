//! Validation of a tokenizer.json before the `tokenizers` library reads it, and of the tokens that other files add.
//!
//! The library (0.23) trusts its input. Merges of missing tokens, some normalizers and numbers out of range make it
//! panic; other files make it allocate gigabytes. The tokenizers of the supported families use few of its features. All
//! other features are rejected with a message, and the accepted fields are written to a new file for the library.

use std::collections::{BTreeMap, HashMap, HashSet};

use pricket_nn::clip;
use serde::Deserialize;
use serde_json::{Value, json};

/// Maximum size of a tokenizer file in bytes. The file of GPT-NeoX has 2.5 MB, or 5 MB with one merge per line.
pub(crate) const MAX_SIZE: u64 = 6 << 20;

/// Maximum length of an added token in bytes.
const MAX_ADDED: usize = 1 << 10;
/// Maximum length of all added tokens together in bytes.
const MAX_ADDED_TOTAL: usize = 256 << 10;
/// Maximum number of tokens that the files beside a tokenizer.json add together.
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

/// A token that is matched in the text before the tokenizer's model is applied.
#[derive(Clone, Debug, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "the file has these fields")]
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

/// A merge: `["a", "b"]`, or `"a b"` in files from before 2024.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

impl AddedToken {
    /// Creates a special token with the defaults for a token that is given by its text alone.
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

    /// Converts the token to the type of the `tokenizers` library.
    pub(crate) fn to_library(&self) -> tokenizers::AddedToken {
        tokenizers::AddedToken::from(self.content.clone(), self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

/// Parsed files beside a tokenizer.json that add tokens; `None` for a file that does not exist.
#[derive(Debug, Default)]
pub(crate) struct Siblings {
    /// tokenizer_config.json.
    pub(crate) config: Option<Value>,
    /// special_tokens_map.json.
    pub(crate) map: Option<Value>,
    /// added_tokens.json.
    pub(crate) added: Option<Value>,
}

/// Keys that hold one special token, in the order of transformers.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Keys that hold several special tokens.
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

impl Siblings {
    /// Returns the tokens to add, in order, after `own`, the added tokens of the tokenizer.json.
    ///
    /// The rules are those of transformers 5 (`TokenizersBackend`). The ids in the files only give the order. If
    /// tokenizer_config.json has `added_tokens_decoder`, the other two files are ignored.
    pub(crate) fn tokens(&self, own: &[AddedToken]) -> Result<Vec<AddedToken>> {
        if self.config.is_none() && self.map.is_none() && self.added.is_none() {
            return Ok(Vec::new());
        }
        let null = Value::Null;
        let (config, map) = (self.config.as_ref().unwrap_or(&null), self.map.as_ref().unwrap_or(&null));
        let decoder = config.get("added_tokens_decoder");
        // special_tokens_map.json takes precedence over tokenizer_config.json.
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
                return Err(format!("more than {MAX_ADDED_COUNT} added tokens"));
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
                let id: u32 = id.parse().map_err(|_| wrong("invalid id"))?;
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

/// Parses a special token, given as a string or an object. Returns `None` for `null` and other types.
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

/// Rejects added tokens whose text exceeds the limits.
fn check_added<'a>(tokens: impl Iterator<Item = &'a AddedToken>) -> Result<()> {
    let lengths: Vec<usize> = tokens.map(|token| token.content.len()).collect();
    let total: usize = lengths.iter().sum();
    if total > MAX_ADDED_TOTAL || lengths.iter().any(|&length| length > MAX_ADDED) {
        return Err(format!("the added tokens are too long: {total} bytes of text together"));
    }
    Ok(())
}

/// Checks a tokenizer.json. Returns a rewritten file that the library can read safely, and its added tokens.
///
/// `truncation` and `padding`, which fine-tuning may have left in the file, are dropped: a prompt is never truncated or
/// padded.
///
/// # Errors
/// Returns a description of the problem.
pub(crate) fn checked(json: &[u8]) -> Result<(Vec<u8>, Vec<AddedToken>)> {
    if json.len() as u64 > MAX_SIZE {
        return Err(format!("{} bytes exceed the limit of 6 MiB", json.len()));
    }
    let file: File =
        serde_json::from_slice(json).map_err(|e| format!("not a tokenizer.json: {}", clip(&e.to_string())))?;
    if kind(&file.decoder) != Some("ByteLevel") {
        return Err("unsupported decoder; expected ByteLevel, as in every supported model family".into());
    }
    allow("normalizer", &file.normalizer, "normalizers", &["NFC", "NFD", "NFKC", "NFKD"])?;
    allow("pre_tokenizer", &file.pre_tokenizer, "pretokenizers", &["ByteLevel", "Digits"])?;
    allow("post_processor", &file.post_processor, "processors", &["ByteLevel", "TemplateProcessing"])?;
    check_added(file.added_tokens.iter())?;
    let model = file.model;
    let merges = merges(&model)?;
    let tokens = model.vocab.len() + file.added_tokens.len();
    let ids = model.vocab.values().copied().chain(file.added_tokens.iter().map(|token| token.id));
    // The size of tables depends on the largest id, so it must not be much larger than the number of tokens.
    if let Some(id) = ids.max().filter(|&id| id as usize > 4 * tokens + 1024) {
        return Err(format!("id {id} is too large for a vocabulary of {tokens} tokens"));
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

/// Returns the `type` of a section.
fn kind(section: &Value) -> Option<&str> {
    section["type"].as_str()
}

/// Rejects a section unless its type is one of `kinds`, or it is a sequence of such sections under the key `parts`.
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
    format!("unsupported {name} {kind:?}; no supported model family uses it")
}

/// Returns the merges. Checks that both parts and the result of each are in the vocabulary.
fn merges(model: &Model) -> Result<Vec<(&str, &str)>> {
    if let Some(other) = model.kind.as_deref().filter(|kind| *kind != "BPE") {
        return Err(format!("unsupported model type {:?}; expected BPE", clip(other)));
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        return Err("unsupported prefix or suffix of word parts; byte-level BPE does not use any".into());
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err("unsupported dropout of merges".into());
    }
    if model.merges.len() > model.vocab.len() {
        return Err(format!(
            "{} merges are too many for a vocabulary of {} tokens",
            model.merges.len(),
            model.vocab.len()
        ));
    }
    let known = |token: &str| model.vocab.contains_key(token);
    let mut joined = String::new();
    let mut out = Vec::with_capacity(model.merges.len());
    for merge in &model.merges {
        let (left, right) = match merge {
            Merge::Pair(left, right) => (left.as_str(), right.as_str()),
            Merge::Text(text) => {
                text.split_once(' ').ok_or_else(|| format!("the merge {:?} is not a pair", clip(text)))?
            }
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        if !(known(left) && known(right) && known(&joined)) {
            return Err(format!(
                "merge of {:?} and {:?}: a part or the result is not in the vocabulary",
                clip(left),
                clip(right)
            ));
        }
        out.push((left, right));
    }
    Ok(out)
}
