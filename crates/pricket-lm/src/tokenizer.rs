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

/// A repository's tokenizer: its tokenizer.json, or a sentencepiece tokenizer.model, with the tokens that the files beside it add.
/// Cheap to clone.
///
/// Decoding is of bytes: the bytes of all tokens, put together, read as UTF-8 with U+FFFD for what is none. So
/// decoding at once and decoding token by token give the same text, whatever the ids.
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
    /// The token that is put before a text.
    begin: Option<u32>,
}

#[derive(Debug)]
enum Inner {
    Library(Box<tokenizers::Tokenizer>),
    SentencePiece(Box<SentencePieceText>),
}

impl Tokenizer {
    /// Reads a tokenizer.json, or a sentencepiece model whose name ends in `.model`. Beside files named tokenizer.json and
    /// tokenizer.model, tokenizer_config.json, special_tokens_map.json and added_tokens.json add tokens as they do in transformers.
    ///
    /// A tokenizer.model reads texts as `LlamaTokenizer` of transformers 4 does over sentencepiece itself: special tokens that are
    /// spelled out in a text become their ids, in the `legacy` way or the later one as tokenizer_config.json says.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], naming the file.
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

    /// Reads the files of a tokenizer, by their names, as [`Tokenizer::from_file`] reads the first of them beside the others.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], naming `origin`.
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
            None => Err(wrong("there is no file".into())),
        }
    }

    fn of_model(bytes: &[u8], siblings: &Siblings, origin: String) -> Result<Self> {
        let read = Model::parse(bytes).and_then(|model| SentencePieceText::new(model, siblings, bytes.to_vec()));
        match read {
            Ok(text) => Ok(Self::over(text, origin)),
            Err(what) => Err(Error::Tokenizer { origin, what }),
        }
    }

    /// Reads the bytes of a sentencepiece model; `origin` names it in messages. Texts become what sentencepiece makes of them: control
    /// symbols that are spelled out are text, and nothing is put before it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], naming `origin`.
    pub fn from_sentencepiece(model: &[u8], origin: impl Into<String>) -> Result<Self> {
        let origin = origin.into();
        let wrong = |what| Error::Tokenizer { origin: origin.clone(), what };
        let read = Model::parse(model).and_then(|parsed| SentencePieceText::plain(parsed, Some(model.to_vec())));
        Ok(Self::over(read.map_err(wrong)?, origin))
    }

    /// A sentencepiece tokenizer from the lists that GGUF files carry. Text is read as by [`Tokenizer::from_sentencepiece`].
    ///
    /// # Errors
    /// [`Error::Tokenizer`], naming `origin`.
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
    /// [`Error::Tokenizer`], naming the file.
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
            // Added tokens such as runs of spaces stand in the file as plain text.
            bytes[*id as usize] = decoded.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        let mut special = vec![false; size];
        // Once special, always special: so does the library when it decodes.
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

    /// A byte-level BPE tokenizer from the lists that GGUF files carry: words, their kinds (3 is special, 4 is added, 5 is
    /// padding; an empty list where there are none) and merges. Text is normalized as NFC, as GPT-NeoX's tokenizer does.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], naming `origin`.
    pub fn from_vocabulary(
        words: &[Vec<u8>],
        kinds: &[i64],
        merges: &[Vec<u8>],
        origin: impl Into<String>,
    ) -> Result<Self> {
        let origin = origin.into();
        let bytes: usize = words.iter().chain(merges).map(Vec::len).sum();
        if words.len() > 1 << 20 || bytes > tokenizer_file::MAX_SIZE as usize {
            let what = format!("{} words and {} merges of {bytes} bytes are too many", words.len(), merges.len());
            return Err(Error::Tokenizer { origin, what });
        }
        Self::from_bytes(vocabulary::to_json(words, kinds, merges).to_string().as_bytes(), origin)
    }

    /// The files that say the same, by their names: a tokenizer.json, or a tokenizer.model and what it needs beside it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the library cannot write it.
    pub fn to_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        match &self.shared.inner {
            Inner::Library(_) => Ok(vec![("tokenizer.json", self.to_json()?.into_bytes())]),
            Inner::SentencePiece(text) => Ok(text.to_files(self.shared.begin)),
        }
    }

    /// The tokenizer.json that says the same.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the library cannot write it, and for a sentencepiece model.
    pub fn to_json(&self) -> Result<String> {
        let wrong = |what| Error::Tokenizer { origin: self.shared.origin.clone(), what };
        match &self.shared.inner {
            Inner::Library(inner) => inner.to_string(false).map_err(|e| wrong(e.to_string())),
            Inner::SentencePiece(_) => {
                Err(wrong("a sentencepiece model has no tokenizer.json of the same meaning".into()))
            }
        }
    }

    /// The reverse of [`Tokenizer::from_vocabulary`] and [`Tokenizer::from_pieces`]: words, kinds (1 plain, 3 special, 4 added, 5 padding up
    /// to `count`) with merges or scores.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it is no BPE.
    pub fn to_vocabulary(&self, count: usize) -> Result<Vocabulary> {
        let wrong = |what: String| Error::Tokenizer { origin: self.shared.origin.clone(), what };
        if let Inner::SentencePiece(text) = &self.shared.inner {
            return text.to_vocabulary(count).map_err(wrong);
        }
        let json = serde_json::from_str(&self.to_json()?).map_err(|e| wrong(e.to_string()))?;
        vocabulary::from_json(&json, count).ok_or_else(|| wrong("it is no byte-pair encoding".into()))
    }

    /// Ids below this are the tokenizer's; a model's vocabulary is mostly padded beyond.
    pub fn vocab_size(&self) -> usize {
        self.shared.bytes.len()
    }

    /// The id of `token`, spelled as in the file.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.shared.inner {
            Inner::Library(inner) => inner.token_to_id(token),
            Inner::SentencePiece(text) => text.token_to_id(token),
        }
    }

    /// Text to ids; adds no token of its own.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer says so.
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

    /// The spelling of a token in the file, as messages show it; `None` for an id that the tokenizer does not have.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.shared.inner {
            Inner::Library(inner) => inner.id_to_token(id),
            Inner::SentencePiece(inner) => inner.id_to_token(id),
        }
    }

    /// The token that the tokenizer's configuration puts before a text; `None` for most.
    pub fn begin(&self) -> Option<u32> {
        self.shared.begin
    }

    /// Text to ids, after [`Tokenizer::begin`]: what a model reads that was trained on texts from their beginning.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_from_start(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids: Vec<u32> = self.begin().into_iter().collect();
        ids.extend(self.encode(text)?);
        Ok(ids)
    }

    /// The ids of a prompt in a model's format, after [`Tokenizer::begin`]: as [`Tokenizer::encode_from_start`], and tokens such as `</s>` are
    /// themselves also where a GGUF file gave the tokenizer.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let Inner::SentencePiece(inner) = &self.shared.inner else { return self.encode_from_start(text) };
        Ok(self.begin().into_iter().chain(inner.encode_prompt(text)).collect())
    }

    /// Whether the beginning of a text is encoded unlike its middle, so that texts must not be encoded in parts.
    pub fn has_text_start(&self) -> bool {
        matches!(self.shared.inner, Inner::SentencePiece(_))
    }

    /// Ids of a text from its beginning to text, special tokens included, but for the control tokens of sentencepiece, which have no text. Ids
    /// that the tokenizer does not have are left out. The space that sentencepiece puts before a text is taken off: [`Tokenizer::decode_part`] keeps it.
    pub fn decode(&self, ids: &[u32]) -> String {
        decoded(ids, self.decoder())
    }

    /// As [`Tokenizer::decode`], of ids from the middle of a text.
    pub fn decode_part(&self, ids: &[u32]) -> String {
        decoded(ids, self.decoder_of_part())
    }

    /// As [`Tokenizer::decode`], without special tokens such as `<|endoftext|>`.
    pub fn decode_text(&self, ids: &[u32]) -> String {
        let ids: Vec<u32> = ids.iter().copied().filter(|&id| !self.is_special(id)).collect();
        self.decode(&ids)
    }

    /// As [`Tokenizer::decode`] in transformers with `clean_up_tokenization_spaces`: no space before punctuation and
    /// English contractions.
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

    /// The bytes that a token stands for; mostly UTF-8, sometimes a part of a character.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.shared.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// Whether `id` is a token with a meaning of its own rather than text.
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Decodes a text from its beginning, token by token.
    pub fn decoder(&self) -> TextDecoder {
        let at_start = match &self.shared.inner {
            Inner::Library(_) => false,
            Inner::SentencePiece(text) => text.has_dummy_prefix() || text.merges_spaces(),
        };
        TextDecoder { at_start, ..self.decoder_of_part() }
    }

    /// Decodes a text from its middle, token by token.
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

/// A file of a tokenizer.
fn read(path: &Path) -> Result<Vec<u8>> {
    let bad = |what: String| Error::Tokenizer { origin: path.display().to_string(), what };
    // Looked at before it is read: a pipe would never end.
    let meta = std::fs::metadata(path).map_err(|e| bad(e.to_string()))?;
    if !meta.is_file() || meta.len() > tokenizer_file::MAX_SIZE {
        return Err(bad(format!(
            "{} bytes; a file of a tokenizer has at most {}",
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

/// Turns ids into text as they come, holding back the bytes of an unfinished character.
#[derive(Clone, Debug)]
pub struct TextDecoder {
    tokenizer: Tokenizer,
    pending: Vec<u8>,
    /// Whether the space before the text is still to come.
    at_start: bool,
}

impl TextDecoder {
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.tokenizer.is_special(id)
    }

    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        self.tokenizer.token_bytes(id)
    }

    /// The bytes of the next token, without the space before the text.
    fn take(&mut self, id: u32) -> &[u8] {
        let bytes = self.tokenizer.token_bytes(id);
        if bytes.is_empty() || !std::mem::take(&mut self.at_start) || !self.tokenizer.begins_with_mark(id) {
            return bytes;
        }
        let rest = &bytes[1..];
        // Where runs of spaces are one, the text begins with the first piece that is something else.
        self.at_start = rest.is_empty() && self.tokenizer.merges_spaces();
        rest
    }

    /// The text that `id` completes, possibly none.
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

    /// What is left at the end: a character that was never finished is U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}
