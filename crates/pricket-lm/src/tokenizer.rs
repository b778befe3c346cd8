//! Tokenizers of the Hub: tokenizer.json files (through the `tokenizers` crate) and sentencepiece models, for encoding
//! and for decoding at once or token by token.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use pricket_nn::{clip, parse_json, stand_in};
use serde_json::Value;

use crate::sentencepiece::Model;
use crate::sentencepiece_text::{Pieces, SentencePieceText};
use crate::tokenizer_file::Siblings;
use crate::vocabulary::{self, Vocabulary, byte_alphabet};
use crate::{Error, Result, tokenizer_file};

/// The tokenizer of a model: a tokenizer.json or a sentencepiece tokenizer.model, with the tokens that the files beside
/// it add. Cheap to clone.
///
/// Decoding concatenates the bytes of all tokens and reads them as UTF-8; invalid bytes become U+FFFD. Decoding at once
/// and decoding token by token therefore give the same text for any ids.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Inner,
    origin: String,
    /// Bytes of each id; empty for control tokens and for ids that the tokenizer does not have.
    bytes: Vec<Vec<u8>>,
    special: Vec<bool>,
    /// Id of the token that precedes a text.
    begin: Option<u32>,
}

#[derive(Debug)]
enum Inner {
    Library(Box<tokenizers::Tokenizer>),
    SentencePiece(Box<SentencePieceText>),
}

impl Tokenizer {
    /// Reads a tokenizer.json file, or a sentencepiece model if the name ends in `.model`.
    ///
    /// If the file is named tokenizer.json or tokenizer.model, the files tokenizer_config.json, special_tokens_map.json
    /// and added_tokens.json in the same directory add tokens, as they do in transformers.
    ///
    /// A sentencepiece model encodes text like the slow `LlamaTokenizer` of transformers 4: special tokens that are
    /// spelled out in a text become their ids. The `legacy` key of tokenizer_config.json selects the legacy or the
    /// later behavior.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`], which names the file, if a file cannot be read or is invalid.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let content = read(path)?;
        let sibling = |name: &str| -> Result<Option<Value>> {
            let path = path.with_file_name(name);
            if !path.exists() {
                return Ok(None);
            }
            let what = |e: serde_json::Error| format!("not valid JSON: {}", clip(&e.to_string()));
            let wrong = |e| Error::Tokenizer { origin: path.display().to_string(), what: what(e) };
            parse_json(&read(&path)?).map(Some).map_err(wrong)
        };
        let has_siblings = ["tokenizer.json", "tokenizer.model"].iter().any(|name| path.ends_with(name));
        let siblings = if has_siblings {
            Siblings {
                config: sibling("tokenizer_config.json")?,
                map: sibling("special_tokens_map.json")?,
                added: sibling("added_tokens.json")?,
            }
        } else {
            Siblings::default()
        };
        let origin = path.display().to_string();
        if path.extension().is_some_and(|end| end == "model") {
            return Self::of_model(&content, &siblings, origin);
        }
        Self::new(&content, &siblings, origin)
    }

    /// Reads a tokenizer from files in memory, given as pairs of name and content. The first is the tokenizer.json or
    /// tokenizer.model. The others are read like the files beside it in [`Tokenizer::from_file`].
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`], which names `origin`, if `files` is empty or a file is invalid.
    pub fn from_files(files: &[(&str, &[u8])], origin: impl Into<String>) -> Result<Self> {
        let origin = origin.into();
        let wrong = |what: String| Error::Tokenizer { origin: origin.clone(), what };
        let json = |name: &str| -> Result<Option<Value>> {
            let file = files.iter().skip(1).find(|(known, _)| *known == name);
            let parsed = file.map(|(_, bytes)| parse_json(bytes)).transpose();
            parsed.map_err(|e| wrong(format!("{name}: not valid JSON: {}", clip(&e.to_string()))))
        };
        let siblings = Siblings {
            config: json("tokenizer_config.json")?,
            map: json("special_tokens_map.json")?,
            added: json("added_tokens.json")?,
        };
        match files.first() {
            Some((name, bytes)) if Path::new(name).extension().is_some_and(|end| end == "model") => {
                Self::of_model(bytes, &siblings, origin)
            }
            Some((_, bytes)) => Self::new(bytes, &siblings, origin),
            None => Err(wrong("no tokenizer file is given".into())),
        }
    }

    fn of_model(bytes: &[u8], siblings: &Siblings, origin: String) -> Result<Self> {
        let read = Model::parse(bytes).and_then(|model| SentencePieceText::new(model, siblings, bytes.to_vec()));
        match read {
            Ok(text) => Ok(Self::over(text, origin)),
            Err(what) => Err(Error::Tokenizer { origin, what }),
        }
    }

    /// Reads the bytes of a sentencepiece model; `origin` names it in messages.
    ///
    /// Text is encoded as by the sentencepiece library: control symbols that are spelled out in a text are encoded as
    /// text, and no token is added in front.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`], which names `origin`, if the model is invalid.
    pub fn from_sentencepiece(model: &[u8], origin: impl Into<String>) -> Result<Self> {
        let origin = origin.into();
        let wrong = |what| Error::Tokenizer { origin: origin.clone(), what };
        let read = Model::parse(model).and_then(|parsed| SentencePieceText::plain(parsed, Some(model.to_vec())));
        Ok(Self::over(read.map_err(wrong)?, origin))
    }

    /// Creates a sentencepiece tokenizer from the lists in a GGUF file. Text is encoded as by
    /// [`Tokenizer::from_sentencepiece`].
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`], which names `origin`, if the lists are invalid.
    pub fn from_pieces(pieces: &Pieces, origin: impl Into<String>) -> Result<Self> {
        let origin = origin.into();
        let wrong = |what| Error::Tokenizer { origin: origin.clone(), what };
        let read = pieces.to_model().and_then(|model| SentencePieceText::plain(model, None)).map_err(wrong)?;
        let mut shared = Self::over(read, origin).shared;
        if let Some(shared) = Arc::get_mut(&mut shared) {
            shared.begin = pieces.begin;
        }
        Ok(Self { shared })
    }

    fn over(text: SentencePieceText, origin: String) -> Self {
        let (bytes, special) = text.table();
        let begin = text.begin();
        Self { shared: Arc::new(Shared { inner: Inner::SentencePiece(Box::new(text)), origin, bytes, special, begin }) }
    }

    /// Reads the bytes of a tokenizer.json; `origin` names it in messages.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`], which names `origin`, if the file is invalid.
    pub fn from_bytes(json: &[u8], origin: impl Into<String>) -> Result<Self> {
        Self::new(json, &Siblings::default(), origin.into())
    }

    fn new(json: &[u8], siblings: &Siblings, origin: String) -> Result<Self> {
        let bad = |what: String| Error::Tokenizer { origin: origin.clone(), what };
        let (json, own) = tokenizer_file::checked(json).map_err(&bad)?;
        let inner = tokenizers::Tokenizer::from_bytes(json);
        let mut inner = inner.map_err(|e| bad(format!("not a tokenizer.json: {}", clip(&e.to_string()))))?;
        let added = siblings.tokens(&own).map_err(&bad)?;
        // A later description of a token replaces an earlier one.
        let library = added.iter().map(tokenizer_file::AddedToken::to_library);
        inner.add_tokens(library).map_err(|e| bad(clip(&e.to_string())))?;
        let vocab = inner.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let alphabet = byte_alphabet();
        let mut bytes = vec![Vec::new(); size];
        for (token, id) in &vocab {
            let decoded: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
            // The file has added tokens, such as runs of spaces, as plain text.
            bytes[*id as usize] = decoded.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        let mut special = vec![false; size];
        // A token stays special if any description marks it so. The library does the same when it decodes.
        let were_special: HashSet<&str> = own
            .iter()
            .chain(&added)
            .filter(|token| token.is_special())
            .map(tokenizer_file::AddedToken::content)
            .collect();
        for (id, token) in inner.get_added_tokens_decoder() {
            if let Some(slot) = bytes.get_mut(id as usize) {
                *slot = token.content.as_bytes().to_vec();
                special[id as usize] = token.special || were_special.contains(token.content.as_str());
            }
        }
        let inner = Inner::Library(Box::new(inner));
        Ok(Self { shared: Arc::new(Shared { inner, origin, bytes, special, begin: None }) })
    }

    /// Creates a byte-level BPE tokenizer from the lists in a GGUF file: tokens, their kinds and merges.
    ///
    /// The kinds are 3 for special tokens, 4 for added tokens, 5 for padding, and any other number for normal tokens.
    /// The list of kinds may be empty. Tokens of the form `<|...|>` are special whatever their kind. Text is normalized
    /// to NFC, as by the tokenizer of GPT-NeoX.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`], which names `origin`, if the lists are too long or invalid.
    pub fn from_vocabulary(
        words: &[Vec<u8>],
        kinds: &[i64],
        merges: &[Vec<u8>],
        origin: impl Into<String>,
    ) -> Result<Self> {
        let origin = origin.into();
        let bytes: usize = words.iter().chain(merges).map(Vec::len).sum();
        if words.len() > 1 << 20 || bytes > tokenizer_file::MAX_SIZE as usize {
            let what = format!("{} tokens and {} merges of {bytes} bytes exceed the limit", words.len(), merges.len());
            return Err(Error::Tokenizer { origin, what });
        }
        Self::from_bytes(vocabulary::to_json(words, kinds, merges).to_string().as_bytes(), origin)
    }

    /// Returns the files of an equivalent tokenizer as pairs of name and content: a tokenizer.json, or a
    /// tokenizer.model with the files that it needs beside it.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the `tokenizers` library cannot write the tokenizer.
    pub fn to_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        match &self.shared.inner {
            Inner::Library(_) => Ok(vec![("tokenizer.json", self.to_json()?.into_bytes())]),
            Inner::SentencePiece(text) => Ok(text.to_files(self.shared.begin)),
        }
    }

    /// Returns the tokenizer as a tokenizer.json.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the tokenizer is a sentencepiece model, or if the `tokenizers` library cannot
    /// write it.
    pub fn to_json(&self) -> Result<String> {
        let wrong = |what| Error::Tokenizer { origin: self.shared.origin.clone(), what };
        match &self.shared.inner {
            Inner::Library(inner) => inner.to_string(false).map_err(|e| wrong(e.to_string())),
            Inner::SentencePiece(_) => {
                Err(wrong("a sentencepiece model cannot be written as a tokenizer.json file".into()))
            }
        }
    }

    /// Returns the tokenizer as the lists of a GGUF file: tokens, kinds (1 normal, 3 special, 4 added, 5 padding up to
    /// `count` tokens), and merges or scores. The inverse of [`Tokenizer::from_vocabulary`] and
    /// [`Tokenizer::from_pieces`].
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the tokenizer is not a BPE tokenizer.
    pub fn to_vocabulary(&self, count: usize) -> Result<Vocabulary> {
        let wrong = |what: String| Error::Tokenizer { origin: self.shared.origin.clone(), what };
        if let Inner::SentencePiece(text) = &self.shared.inner {
            return text.to_vocabulary(count).map_err(wrong);
        }
        let json = serde_json::from_str(&self.to_json()?).map_err(|e| wrong(e.to_string()))?;
        vocabulary::from_json(&json, count).ok_or_else(|| wrong("not a BPE tokenizer".into()))
    }

    /// Returns the number of ids, which is the largest id plus one. The vocabulary of a model is often padded to a
    /// larger size.
    pub fn vocab_size(&self) -> usize {
        self.shared.bytes.len()
    }

    /// Returns the id of `token`, spelled as in the tokenizer file, or `None` if there is no such token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.shared.inner {
            Inner::Library(inner) => inner.token_to_id(token),
            Inner::SentencePiece(text) => text.token_to_id(token),
        }
    }

    /// Encodes a text as ids. Adds no special tokens.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the `tokenizers` library cannot encode the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.shared.inner {
            Inner::Library(inner) => {
                let encoding = inner.encode_fast(text, false);
                let wrong =
                    |e: tokenizers::Error| Error::Tokenizer { origin: self.shared.origin.clone(), what: e.to_string() };
                Ok(encoding.map_err(wrong)?.get_ids().to_vec())
            }
            Inner::SentencePiece(inner) => Ok(inner.encode(text)),
        }
    }

    /// Returns the spelling of a token in the tokenizer file, for messages, or `None` if the tokenizer does not have
    /// the id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.shared.inner {
            Inner::Library(inner) => inner.id_to_token(id),
            Inner::SentencePiece(inner) => inner.id_to_token(id),
        }
    }

    /// Returns the id of the token that precedes a text according to the tokenizer's configuration. Most tokenizers
    /// have none.
    pub fn begin(&self) -> Option<u32> {
        self.shared.begin
    }

    /// Encodes a text as ids, with the token [`Tokenizer::begin`] in front if there is one.
    ///
    /// # Errors
    /// Returns the errors of [`Tokenizer::encode`].
    pub fn encode_from_start(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids: Vec<u32> = self.begin().into_iter().collect();
        ids.extend(self.encode(text)?);
        Ok(ids)
    }

    /// Encodes a formatted prompt as ids, with the token [`Tokenizer::begin`] in front if there is one.
    ///
    /// In contrast to [`Tokenizer::encode_from_start`], special tokens that are spelled out in the prompt, such as
    /// `</s>`, become their ids with every sentencepiece tokenizer, including those from GGUF files.
    ///
    /// # Errors
    /// Returns the errors of [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let Inner::SentencePiece(inner) = &self.shared.inner else { return self.encode_from_start(text) };
        Ok(self.begin().into_iter().chain(inner.encode_prompt(text)).collect())
    }

    /// Returns whether the beginning of a text is encoded differently from its middle. If so, a text must not be
    /// encoded in parts.
    pub fn has_text_start(&self) -> bool {
        matches!(self.shared.inner, Inner::SentencePiece(_))
    }

    /// Decodes the ids of a text, from its beginning.
    ///
    /// Special tokens are included. The control tokens of sentencepiece have no text, and unknown ids are skipped. The
    /// space that sentencepiece puts before a text is removed; [`Tokenizer::decode_part`] keeps it.
    pub fn decode(&self, ids: &[u32]) -> String {
        decoded(ids, self.decoder())
    }

    /// Decodes ids from the middle of a text, otherwise like [`Tokenizer::decode`].
    pub fn decode_part(&self, ids: &[u32]) -> String {
        decoded(ids, self.decoder_of_part())
    }

    /// Decodes ids like [`Tokenizer::decode`], without special tokens such as `<|endoftext|>`.
    pub fn decode_text(&self, ids: &[u32]) -> String {
        let ids: Vec<u32> = ids.iter().copied().filter(|&id| !self.is_special(id)).collect();
        self.decode(&ids)
    }

    /// Decodes ids like [`Tokenizer::decode`], then removes the space before punctuation and English contractions. This
    /// is `clean_up_tokenization_spaces` of transformers.
    pub fn decode_cleaned(&self, ids: &[u32]) -> String {
        let rules = [
            (" .", "."),
            (" ?", "?"),
            (" !", "!"),
            (" ,", ","),
            (" ' ", "'"),
            (" n't", "n't"),
            (" 'm", "'m"),
            (" 's", "'s"),
            (" 've", "'ve"),
            (" 're", "'re"),
        ];
        rules.iter().fold(self.decode(ids), |text, (from, to)| text.replace(from, to))
    }

    /// Returns the bytes of a token, which may be part of a UTF-8 character. Empty for control tokens and unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.shared.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// Returns whether `id` is a special token, such as an end token, which does not stand for text.
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Returns a decoder that decodes a text from its beginning, token by token.
    pub fn decoder(&self) -> TextDecoder {
        let at_start = match &self.shared.inner {
            Inner::Library(_) => false,
            Inner::SentencePiece(text) => text.has_dummy_prefix() || text.merges_spaces(),
        };
        TextDecoder { at_start, ..self.decoder_of_part() }
    }

    /// Returns a decoder that decodes a text from its middle, token by token.
    pub fn decoder_of_part(&self) -> TextDecoder {
        TextDecoder { tokenizer: self.clone(), pending: Vec::new(), at_start: false }
    }

    fn merges_spaces(&self) -> bool {
        matches!(&self.shared.inner, Inner::SentencePiece(text) if text.merges_spaces())
    }

    fn begins_with_mark(&self, id: u32) -> bool {
        matches!(&self.shared.inner, Inner::SentencePiece(text) if text.begins_with_mark(id))
    }
}

fn decoded(ids: &[u32], mut decoder: TextDecoder) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| decoder.take(id).to_vec()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads a tokenizer file.
fn read(path: &Path) -> Result<Vec<u8>> {
    let bad = |what: String| Error::Tokenizer { origin: path.display().to_string(), what };
    // Checks the type before reading, because reading a pipe might never end.
    let meta = std::fs::metadata(path).map_err(|e| bad(e.to_string()))?;
    if !meta.is_file() || meta.len() > tokenizer_file::MAX_SIZE {
        return Err(bad(format!(
            "not a regular file or too large: {} bytes; the limit is {}",
            meta.len(),
            tokenizer_file::MAX_SIZE
        )));
    }
    let bytes = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
    match stand_in(&bytes) {
        Some(what) => Err(bad(what.into())),
        None => Ok(bytes),
    }
}

/// Incremental decoder of ids, which holds back the bytes of an incomplete character.
#[derive(Clone, Debug)]
pub struct TextDecoder {
    tokenizer: Tokenizer,
    pending: Vec<u8>,
    /// Whether the space that precedes the text is still to be removed.
    at_start: bool,
}

impl TextDecoder {
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.tokenizer.is_special(id)
    }

    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        self.tokenizer.token_bytes(id)
    }

    /// Returns the bytes of the next token, without the space that precedes the text.
    fn take(&mut self, id: u32) -> &[u8] {
        let bytes = self.tokenizer.token_bytes(id);
        if bytes.is_empty() || !std::mem::take(&mut self.at_start) || !self.tokenizer.begins_with_mark(id) {
            return bytes;
        }
        let rest = &bytes[1..];
        // If the model merges runs of spaces, the text begins with the first piece that is not a space.
        self.at_start = rest.is_empty() && self.tokenizer.merges_spaces();
        rest
    }

    /// Adds a token and returns the text that it completes, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        let bytes = self.take(id).to_vec();
        self.pending.extend(bytes);
        let mut out = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(text) => {
                    out.push_str(text);
                    self.pending.clear();
                    return out;
                }
                Err(e) => {
                    let valid = e.valid_up_to();
                    out.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    if let Some(wrong) = e.error_len() {
                        out.push(char::REPLACEMENT_CHARACTER);
                        self.pending.drain(..valid + wrong);
                    } else {
                        self.pending.drain(..valid);
                        return out;
                    }
                }
            }
        }
    }

    /// Returns the rest of the text. An incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}
