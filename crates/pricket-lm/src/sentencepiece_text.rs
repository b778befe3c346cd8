//! Encoding of texts with a sentencepiece model: special tokens and the space in front of a text, with the rules of the
//! slow `LlamaTokenizer` in transformers 4.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use crate::sentencepiece::{Kind, MARK, Model, NormalizerSpec, Piece, SentencePiece};
use crate::tokenizer_file::Siblings;
use crate::vocabulary::Vocabulary;

/// Maximum number of tokens in the files beside a model.
const MAX_ADDED: usize = 1 << 14;

/// A sentencepiece vocabulary, as the lists of a GGUF file.
#[derive(Clone, Debug, Default)]
pub struct Pieces {
    /// Text of each piece, by id, with U+2581 for a space.
    pub words: Vec<Vec<u8>>,
    /// Score of each piece.
    pub scores: Vec<f32>,
    /// Kind of each piece: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub kinds: Vec<i64>,
    /// Id of the token that precedes a text, if any.
    pub begin: Option<u32>,
    /// Id of the token that ends a text, if any.
    pub end: Option<u32>,
    /// Id of the unknown token. Used only if no piece has kind 2.
    pub unknown: Option<u32>,
    /// Whether a space is put before a text.
    pub add_space_prefix: bool,
    /// Whether runs of spaces become one space.
    pub remove_extra_whitespaces: bool,
    /// Character replacements in the format of sentencepiece's `precompiled_charsmap`; empty for none.
    pub charsmap: Vec<u8>,
}

impl Pieces {
    pub(crate) fn to_model(&self) -> Result<Model, String> {
        let count = self.words.len();
        if self.scores.len() != count || self.kinds.len() != count || count > 1 << 20 {
            return Err(format!(
                "{count} pieces with {} scores and {} kinds; the numbers must be equal and at most {}",
                self.scores.len(),
                self.kinds.len(),
                1 << 20
            ));
        }
        let mut pieces = Vec::with_capacity(count);
        for (id, ((word, &score), &kind)) in self.words.iter().zip(&self.scores).zip(&self.kinds).enumerate() {
            let kind = u64::try_from(kind).ok().and_then(Kind::of);
            let kind = kind.ok_or_else(|| format!("piece {id} has the unknown kind {}", self.kinds[id]))?;
            if score.is_nan() {
                return Err(format!("the score of piece {id} is NaN"));
            }
            let mut text = String::from_utf8(word.clone()).map_err(|_| format!("piece {id} is not UTF-8"))?;
            if kind == Kind::UserDefined {
                // llama.cpp's converter writes user-defined pieces with plain spaces.
                text = text.replace(' ', MARK);
            }
            pieces.push(Piece { text, score, kind });
        }
        if let Some(id) = self.begin.filter(|&id| id as usize >= count) {
            return Err(format!("the first token of a text has id {id}; there are only {count} pieces"));
        }
        if let Some(id) = self.unknown.filter(|_| !pieces.iter().any(|piece| piece.kind == Kind::Unknown))
            && let Some(piece) = pieces.get_mut(id as usize)
        {
            piece.kind = Kind::Unknown;
        }
        let id_of = |kind: Kind| pieces.iter().position(|piece| piece.kind == kind).map_or(-1, |id| id as i64);
        let (unknown, has_bytes) = (id_of(Kind::Unknown), id_of(Kind::Byte) >= 0);
        Ok(Model {
            pieces,
            is_unigram: false,
            byte_fallback: has_bytes,
            unknown_surface: " \u{2047} ".into(),
            unknown,
            begin: self.begin.map_or(1, i64::from),
            end: self.end.map_or(2, i64::from),
            normalizer: NormalizerSpec {
                charsmap: self.charsmap.clone(),
                add_dummy_prefix: self.add_space_prefix,
                remove_extra_whitespaces: self.remove_extra_whitespaces,
                escape_whitespaces: true,
                whitespace_is_suffix: false,
            },
        })
    }
}

/// A sentencepiece model with the special and added tokens that are recognized in a text.
#[derive(Debug)]
pub(crate) struct SentencePieceText {
    inner: SentencePiece,
    /// Name and content of the files of the tokenizer; empty for a tokenizer from a GGUF file.
    files: Vec<(&'static str, Vec<u8>)>,
    /// Ids of pieces and added tokens by their text.
    ids: HashMap<String, u32>,
    /// Tokens that are recognized in any text, the longest first; empty for plain sentencepiece.
    spelled: Vec<(String, u32)>,
    /// Control pieces, the longest first. If `spelled` is empty, they are recognized in prompts only.
    controls: Vec<(String, u32)>,
    /// Added tokens, whose ids follow those of the model's pieces.
    added: Vec<String>,
    /// Ids of special tokens, such as control tokens.
    special: HashSet<u32>,
    /// Text of the unknown token and the number of ids it is encoded as. Non-legacy encoding puts it before a part to
    /// keep leading spaces.
    unknown: (String, usize),
    /// Whether a space is put before each part of a text between special tokens (`legacy` in tokenizer_config.json).
    legacy: bool,
    /// Whether a space is put before the text (non-legacy encoding only).
    add_prefix_space: bool,
    begin: Option<u32>,
}

/// Returns the text of a token in a configuration, given as a string or as an object with `content`.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str()).filter(|text| !text.is_empty())
}

/// A token from a configuration file.
struct Named {
    id: Option<u64>,
    text: String,
    special: bool,
}

impl Named {
    fn new(id: Option<u64>, value: &Value, special: bool) -> Result<Option<Self>, String> {
        let Some(text) = content(value) else { return Ok(None) };
        for key in ["lstrip", "rstrip", "single_word"] {
            if value[key] == true {
                let text = pricket_nn::clip(text);
                return Err(format!("token {text:?} sets {key}, which is not implemented for sentencepiece models"));
            }
        }
        Ok(Some(Self { id, text: text.to_owned(), special }))
    }
}

/// Returns the tokens in the files beside a model, and the texts of the first, end and unknown tokens.
///
/// The rules are those of transformers. If tokenizer_config.json has `added_tokens_decoder`, the other two files are
/// ignored. Otherwise special_tokens_map.json takes precedence over tokenizer_config.json, and added_tokens.json adds
/// more tokens. Tokens with a declared id come first, in the order of their ids.
fn named_tokens(siblings: &Siblings) -> Result<(Vec<Named>, [String; 3]), String> {
    let file = |file: &Option<Value>| file.clone().unwrap_or(Value::Null);
    let (config, mut map, mut declared) = (file(&siblings.config), file(&siblings.map), file(&siblings.added));
    if config["added_tokens_decoder"].is_object() {
        (map, declared) = (Value::Null, Value::Null);
    }
    let mut tokens = Vec::new();
    for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        tokens.extend(Named::new(id.parse().ok(), token, token["special"].as_bool().unwrap_or(false))?);
    }
    for (token, id) in declared.as_object().into_iter().flatten() {
        tokens.extend(Named::new(id.as_u64(), &token.as_str().into(), false)?);
    }
    tokens.sort_by_key(|token| token.id.unwrap_or(u64::MAX));
    let value = |key: &str| if content(&map[key]).is_some() { map[key].clone() } else { config[key].clone() };
    let mut own: [String; 3] = ["<s>", "</s>", "<unk>"].map(str::to_owned);
    for (own, key) in own.iter_mut().zip(["bos_token", "eos_token", "unk_token"]) {
        if let Some(named) = Named::new(None, &value(key), true)? {
            *own = named.text;
        }
        tokens.push(Named { id: None, text: own.clone(), special: true });
    }
    for key in ["pad_token", "sep_token", "cls_token", "mask_token"] {
        tokens.extend(Named::new(None, &value(key), true)?);
    }
    let key = "additional_special_tokens";
    let list = if map[key].is_array() { &map[key] } else { &config[key] };
    for token in list.as_array().into_iter().flatten() {
        tokens.extend(Named::new(None, token, true)?);
    }
    if tokens.len() > MAX_ADDED {
        return Err(format!(
            "{} tokens in the files beside the model; at most {MAX_ADDED} are supported",
            tokens.len()
        ));
    }
    Ok((tokens, own))
}

impl SentencePieceText {
    /// Creates a tokenizer that encodes text exactly as the sentencepiece library does.
    pub(crate) fn plain(model: Model, file: Option<Vec<u8>>) -> Result<Self, String> {
        let inner = SentencePiece::new(model)?;
        let (mut ids, mut controls, mut special) = (HashMap::new(), Vec::new(), HashSet::new());
        for (id, piece) in (0..).zip(&inner.model.pieces) {
            ids.entry(piece.text.clone()).or_insert(id);
            if piece.kind == Kind::Control {
                special.insert(id);
                controls.extend((!piece.text.is_empty()).then(|| (piece.text.clone(), id)));
            }
        }
        controls.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.0.cmp(&b.0)));
        Ok(Self {
            inner,
            files: file.map(|bytes| ("tokenizer.model", bytes)).into_iter().collect(),
            ids,
            spelled: Vec::new(),
            controls,
            added: Vec::new(),
            special,
            unknown: (String::new(), 0),
            legacy: true,
            add_prefix_space: true,
            begin: None,
        })
    }

    /// Creates a tokenizer that encodes text as `LlamaTokenizer` does with these files beside the model.
    pub(crate) fn new(model: Model, siblings: &Siblings, file: Vec<u8>) -> Result<Self, String> {
        let (tokens, [begin, _, unknown]) = named_tokens(siblings)?;
        let mut text = Self::plain(model, Some(file))?;
        let config = siblings.config.as_ref().unwrap_or(&Value::Null);
        text.legacy = config["legacy"].as_bool().unwrap_or(true);
        text.add_prefix_space = config["add_prefix_space"].as_bool().unwrap_or(true);
        for token in tokens {
            text.add(token)?;
        }
        text.spelled.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.0.cmp(&b.0)));
        let length = text.inner.encode_with(&unknown, false).len();
        text.unknown = (unknown, length);
        if config["add_bos_token"].as_bool().unwrap_or(true) {
            text.begin = text.token_to_id(&begin);
        }
        let beside = [
            ("tokenizer_config.json", &siblings.config),
            ("special_tokens_map.json", &siblings.map),
            ("added_tokens.json", &siblings.added),
        ];
        for (name, value) in beside {
            let bytes = value.as_ref().map(|value| serde_json::to_vec_pretty(value).unwrap_or_default());
            text.files.extend(bytes.map(|bytes| (name, bytes)));
        }
        Ok(text)
    }

    fn own(&self) -> usize {
        self.inner.model.pieces.len()
    }

    fn add(&mut self, token: Named) -> Result<(), String> {
        let next = (self.own() + self.added.len()) as u32;
        let id = match (self.token_to_id(&token.text), token.id) {
            (Some(id), _) => id,
            (None, Some(id)) if id != u64::from(next) => {
                let token = pricket_nn::clip(&token.text);
                return Err(format!("added token {token:?} declares the id {id}, but the next free id is {next}"));
            }
            (None, _) => {
                self.ids.insert(token.text.clone(), next);
                self.added.push(token.text.clone());
                next
            }
        };
        if token.special {
            self.special.insert(id);
        }
        if !self.spelled.iter().any(|(known, _)| *known == token.text) {
            self.spelled.push((token.text, id));
        }
        Ok(())
    }

    pub(crate) fn begin(&self) -> Option<u32> {
        self.begin
    }

    pub(crate) fn has_dummy_prefix(&self) -> bool {
        self.inner.model.normalizer.add_dummy_prefix
    }

    pub(crate) fn merges_spaces(&self) -> bool {
        self.inner.model.normalizer.remove_extra_whitespaces
    }

    pub(crate) fn begins_with_mark(&self, id: u32) -> bool {
        (id as usize) < self.own() && self.inner.begins_with_mark(id)
    }

    /// Returns the bytes of every id, and whether it is special.
    pub(crate) fn table(&self) -> (Vec<Vec<u8>>, Vec<bool>) {
        let own = (0..self.own() as u32).map(|id| self.inner.piece_bytes(id));
        let bytes: Vec<Vec<u8>> = own.chain(self.added.iter().map(|token| token.clone().into_bytes())).collect();
        let special = (0..bytes.len() as u32).map(|id| self.special.contains(&id)).collect();
        (bytes, special)
    }

    pub(crate) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub(crate) fn id_to_token(&self, id: u32) -> Option<String> {
        let piece = self.inner.model.pieces.get(id as usize).map(|piece| piece.text.clone());
        piece.or_else(|| self.added.get((id as usize).checked_sub(self.own())?).cloned())
    }

    /// Encodes a text as ids. Special and added tokens that are spelled out in the text become their ids.
    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        if self.spelled.is_empty() {
            return self.inner.encode(text);
        }
        if self.legacy || text.is_empty() {
            return parts(text, &self.spelled, &|part| self.inner.encode(part));
        }
        let text = format!("{}{}", if self.add_prefix_space { MARK } else { "" }, text.replace(MARK, " "));
        // The normalizer may drop a space at the beginning of a part. The unknown token is put before it to
        // keep the space, and its ids are removed afterwards.
        let (unknown, before) = (&self.unknown.0, self.unknown.1);
        let mut ids = parts(&text, &self.spelled, &|part| {
            if !part.starts_with([' ', '\u{2581}']) {
                return self.inner.encode_with(part, false);
            }
            let ids = self.inner.encode_with(&format!("{unknown}{part}"), false);
            if ids.len() >= before { ids[before..].to_vec() } else { ids }
        });
        if let [first, second, ..] = ids[..]
            && self.token_to_id(MARK) == Some(first)
            && self.special.contains(&second)
        {
            ids.remove(0);
        }
        ids
    }

    /// Encodes a formatted prompt like [`SentencePieceText::encode`], but always recognizes control pieces.
    pub(crate) fn encode_prompt(&self, text: &str) -> Vec<u32> {
        if self.spelled.is_empty() {
            return parts(text, &self.controls, &|part| self.inner.encode(part));
        }
        self.encode(text)
    }

    /// Returns the files of an equivalent tokenizer. For a model from a GGUF file, they include a tokenizer_config.json
    /// for transformers.
    pub(crate) fn to_files(&self, begin: Option<u32>) -> Vec<(&'static str, Vec<u8>)> {
        let model = &self.inner.model;
        if !self.files.is_empty() {
            return self.files.clone();
        }
        let text = |id: i64, default: &str| {
            let piece = usize::try_from(id).ok().and_then(|id| model.pieces.get(id));
            piece.map_or_else(|| default.to_owned(), |piece| piece.text.clone())
        };
        let config = json!({
            "add_bos_token": begin.is_some(), "add_eos_token": false, "bos_token": text(model.begin, "<s>"),
            "eos_token": text(model.end, "</s>"), "unk_token": text(model.unknown, "<unk>"), "legacy": true,
            "tokenizer_class": "LlamaTokenizer",
        });
        vec![
            ("tokenizer.model", model.to_bytes()),
            ("tokenizer_config.json", serde_json::to_vec_pretty(&config).unwrap_or_default()),
        ]
    }

    /// Returns the lists of a GGUF file, padded to `count` tokens.
    pub(crate) fn to_vocabulary(&self, count: usize) -> Result<Vocabulary, String> {
        let model = &self.inner.model;
        if model.is_unigram {
            return Err("a unigram model cannot be written to a GGUF file".into());
        }
        let mut out = Vocabulary {
            words: model.pieces.iter().map(|piece| piece.text.clone()).collect(),
            kinds: model.pieces.iter().map(|piece| piece.kind.number() as i32).collect(),
            scores: model.pieces.iter().map(|piece| piece.score).collect(),
            add_space_prefix: model.normalizer.add_dummy_prefix,
            remove_extra_whitespaces: model.normalizer.remove_extra_whitespaces,
            charsmap: model.normalizer.charsmap.clone(),
            ..Vocabulary::default()
        };
        if !model.normalizer.escape_whitespaces || model.normalizer.whitespace_is_suffix {
            return Err("GGUF does not support spaces after words or unescaped spaces".into());
        }
        for (id, token) in (self.own() as u32..).zip(&self.added) {
            out.words.push(token.clone());
            let kind = if self.special.contains(&id) { Kind::Control } else { Kind::UserDefined };
            out.kinds.push(kind.number() as i32);
            out.scores.push(-1000.0);
        }
        for id in out.words.len()..count {
            out.words.push(format!("[PAD{id}]"));
            out.kinds.push(Kind::Unused.number() as i32);
            out.scores.push(-10_000.0);
        }
        Ok(out)
    }
}

/// Splits a text at the tokens in `spelled`. Returns their ids and the ids of the encoded parts between them, in order.
fn parts(text: &str, spelled: &[(String, u32)], encode: &dyn Fn(&str) -> Vec<u32>) -> Vec<u32> {
    let (mut out, mut start, mut at) = (Vec::new(), 0, 0);
    while at < text.len() {
        let rest = &text[at..];
        let Some((token, id)) = spelled.iter().find(|(token, _)| rest.starts_with(token.as_str())) else {
            at += rest.chars().next().map_or(1, char::len_utf8);
            continue;
        };
        if start < at {
            out.extend(encode(&text[start..at]));
        }
        out.push(*id);
        at += token.len();
        start = at;
    }
    if start < text.len() {
        out.extend(encode(&text[start..]));
    }
    out
}
