//! Texts over a sentencepiece model: special tokens, and the space in front, as transformers' `LlamaTokenizer` (release 4) has them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::sentencepiece::{Kind, MARK, Model, NormalizerSpec, Piece, SentencePiece};
use crate::tokenizer_file::Siblings;
use crate::vocabulary::Vocabulary;

/// Ids of added tokens behind the model's own.
const MAX_ADDED: u32 = 1 << 14;

/// A sentencepiece vocabulary as GGUF files carry it.
#[derive(Clone, Debug, Default)]
pub struct Pieces {
    /// The pieces by id, with U+2581 for a space.
    pub words: Vec<Vec<u8>>,
    /// Their scores.
    pub scores: Vec<f32>,
    /// What they are: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub kinds: Vec<i64>,
    /// The token that is put before a text.
    pub begin: Option<u32>,
    /// Whether a text gets a space in front.
    pub add_space_prefix: bool,
    /// Whether runs of spaces become one.
    pub remove_extra_whitespaces: bool,
    /// Replacements of characters, as sentencepiece writes them; empty for none.
    pub charsmap: Vec<u8>,
}

impl Pieces {
    pub(crate) fn to_model(&self) -> Result<Model, String> {
        let count = self.words.len();
        if self.scores.len() != count || self.kinds.len() != count || count > 1 << 20 {
            return Err(format!(
                "{count} pieces with {} scores and {} kinds; expected as many of each, and at most {}",
                self.scores.len(),
                self.kinds.len(),
                1 << 20
            ));
        }
        let mut pieces = Vec::with_capacity(count);
        for (id, ((word, &score), &kind)) in self.words.iter().zip(&self.scores).zip(&self.kinds).enumerate() {
            let kind = u64::try_from(kind).ok().and_then(Kind::of);
            let kind = kind.ok_or_else(|| format!("piece {id} is of the unknown kind {}", self.kinds[id]))?;
            if score.is_nan() {
                return Err(format!("the score of piece {id} is no number"));
            }
            let text = String::from_utf8(word.clone()).map_err(|_| format!("piece {id} is no UTF-8"))?;
            pieces.push(Piece { text, score, kind });
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
            end: 2,
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

/// A model, and the tokens that texts may spell out.
#[derive(Debug)]
pub(crate) struct SentencePieceText {
    inner: SentencePiece,
    /// The bytes of tokenizer.model, if it was read from one.
    file: Option<Vec<u8>>,
    /// Tokens that are looked for in a text, the longest first, and their ids; none for plain sentencepiece.
    spelled: Vec<(String, u32)>,
    /// Tokens behind the model's own, and whether they are special.
    added: BTreeMap<u32, (String, bool)>,
    /// The text of the unknown token, by which the later way keeps spaces at the beginning.
    unknown: String,
    /// Whether each part of a text between special tokens gets a space in front.
    legacy: bool,
    begin: Option<u32>,
}

/// The text of a token in a configuration: a string, or an object with a `content`.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str()).filter(|text| !text.is_empty())
}

impl SentencePieceText {
    /// What sentencepiece makes of texts, and nothing else.
    pub(crate) fn plain(model: Model, file: Option<Vec<u8>>) -> Result<Self, String> {
        let inner = SentencePiece::new(model)?;
        let (spelled, added, unknown) = (Vec::new(), BTreeMap::new(), String::new());
        Ok(Self { inner, file, spelled, added, unknown, legacy: true, begin: None })
    }

    /// What `LlamaTokenizer` makes of texts with these files beside the model.
    pub(crate) fn new(model: Model, siblings: &Siblings, file: Option<Vec<u8>>) -> Result<Self, String> {
        let mut text = Self::plain(model, file)?;
        let (config, map, declared) = (
            siblings.config.as_ref().unwrap_or(&Value::Null),
            siblings.map.as_ref().unwrap_or(&Value::Null),
            siblings.added.as_ref().unwrap_or(&Value::Null),
        );
        let named = |key: &str, default: &str| -> String {
            content(&config[key]).or_else(|| content(&map[key])).unwrap_or(default).to_owned()
        };
        let (begin, end) = (named("bos_token", "<s>"), named("eos_token", "</s>"));
        text.unknown = named("unk_token", "<unk>");
        text.legacy = config["legacy"].as_bool().unwrap_or(true);
        // Declared ids first, in their order, then tokens that have none.
        let mut tokens: Vec<(Option<u64>, String, bool)> = Vec::new();
        for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
            if let Some(content) = content(token) {
                tokens.push((id.parse().ok(), content.to_owned(), token["special"].as_bool().unwrap_or(false)));
            }
        }
        for (token, id) in declared.as_object().into_iter().flatten() {
            tokens.push((id.as_u64(), token.clone(), false));
        }
        tokens.sort_by_key(|(id, ..)| id.unwrap_or(u64::MAX));
        for token in [&begin, &end, &text.unknown] {
            tokens.push((None, token.clone(), true));
        }
        for key in ["pad_token", "sep_token", "cls_token", "mask_token"] {
            tokens.extend(content(&config[key]).or(content(&map[key])).map(|token| (None, token.to_owned(), true)));
        }
        for list in [&config["additional_special_tokens"], &map["additional_special_tokens"]] {
            let list = list.as_array().into_iter().flatten().filter_map(content);
            tokens.extend(list.map(|token| (None, token.to_owned(), true)));
        }
        for (id, token, special) in tokens {
            text.add(id, token, special)?;
        }
        text.spelled.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.0.cmp(&b.0)));
        if config["add_bos_token"].as_bool().unwrap_or(true) {
            text.begin = text.token_to_id(&begin);
        }
        Ok(text)
    }

    fn own(&self) -> u32 {
        self.inner.model.pieces.len() as u32
    }

    fn add(&mut self, declared: Option<u64>, token: String, special: bool) -> Result<(), String> {
        let known = self.token_to_id(&token);
        let next = self.own() + self.added.len() as u32;
        let id = match (known, declared) {
            (Some(id), _) => id,
            (None, Some(id)) if id != u64::from(next) => {
                let token = pricket_nn::clip(&token);
                return Err(format!("the added token {token:?} is to have the id {id}; the next that is free is {next}"));
            }
            (None, _) => next,
        };
        if id >= self.own() + MAX_ADDED {
            return Err(format!("more than {MAX_ADDED} added tokens"));
        }
        if id >= self.own() {
            self.added.entry(id).or_insert_with(|| (token.clone(), special)).1 |= special;
        }
        if self.spelled.iter().all(|(known, _)| *known != token) {
            self.spelled.push((token, id));
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
        id < self.own() && self.inner.begins_with_mark(id)
    }

    /// The bytes of every id, and whether it is special.
    pub(crate) fn table(&self) -> (Vec<Vec<u8>>, Vec<bool>) {
        let own = (0..self.own()).map(|id| self.inner.piece_bytes(id));
        let bytes = own.chain(self.added.values().map(|(token, _)| token.clone().into_bytes())).collect();
        let own = self.inner.model.pieces.iter().map(|piece| piece.kind == Kind::Control);
        (bytes, own.chain(self.added.values().map(|(_, special)| *special)).collect())
    }

    pub(crate) fn token_to_id(&self, token: &str) -> Option<u32> {
        let own = self.inner.model.pieces.iter().position(|piece| piece.text == token).map(|id| id as u32);
        own.or_else(|| self.added.iter().find(|(_, (text, _))| text == token).map(|(id, _)| *id))
    }

    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        if self.spelled.is_empty() {
            return self.inner.encode(text);
        }
        if self.legacy || text.is_empty() {
            return self.parts(text, &|part| self.inner.encode(part));
        }
        let text = format!("{MARK}{}", text.replace(MARK, " "));
        // A space at the beginning of a part is kept by a token before it, which is taken off again.
        let before = self.inner.encode_with(&self.unknown, false).len();
        let mut ids = self.parts(&text, &|part| {
            if !part.starts_with([' ', '\u{2581}']) {
                return self.inner.encode_with(part, false);
            }
            let ids = self.inner.encode_with(&format!("{}{part}", self.unknown), false);
            if ids.len() >= before { ids[before..].to_vec() } else { ids }
        });
        if let [first, second, ..] = ids[..]
            && self.token_to_id(MARK) == Some(first)
            && self.spelled.iter().any(|(_, id)| *id == second)
        {
            ids.remove(0);
        }
        ids
    }

    /// The ids of the special tokens that a text spells out, and of the parts between them.
    fn parts(&self, text: &str, encode: &dyn Fn(&str) -> Vec<u32>) -> Vec<u32> {
        let (mut out, mut start, mut at) = (Vec::new(), 0, 0);
        while at < text.len() {
            let rest = &text[at..];
            let Some((token, id)) = self.spelled.iter().find(|(token, _)| rest.starts_with(token.as_str())) else {
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

    /// The files that say the same. Beside a model that came from another container stands what transformers needs to know.
    pub(crate) fn to_files(&self, begin: Option<u32>) -> Vec<(&'static str, Vec<u8>)> {
        let model = &self.inner.model;
        if let Some(file) = &self.file {
            return vec![("tokenizer.model", file.clone())];
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

    /// The lists of GGUF, padded to `count`.
    pub(crate) fn to_vocabulary(&self, count: usize) -> Result<Vocabulary, String> {
        let model = &self.inner.model;
        if model.is_unigram {
            return Err("GGUF files of decoders have no unigram model".into());
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
        for (token, special) in self.added.values() {
            out.words.push(token.clone());
            let kind = if *special { Kind::Control } else { Kind::UserDefined };
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
