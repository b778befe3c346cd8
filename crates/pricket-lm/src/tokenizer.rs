use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use pricket_nn::{clip, parse_json, stand_in};
use serde_json::Value;

use crate::tokenizer_file::Siblings;
use crate::vocabulary::{self, Vocabulary, byte_alphabet};
use crate::{Error, Result, tokenizer_file};

/// A repository's tokenizer.json, with the tokens that the files beside it add. Cheap to clone.
///
/// Decoding is of bytes: the bytes of all tokens, put together, read as UTF-8 with U+FFFD for what is none. So
/// decoding at once and decoding token by token give the same text, whatever the ids.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: tokenizers::Tokenizer,
    origin: String,
    /// Bytes of each id, empty for ids that are none.
    bytes: Vec<Vec<u8>>,
    special: Vec<bool>,
}

impl Tokenizer {
    /// Reads a tokenizer.json. Beside a file of that name, tokenizer_config.json, special_tokens_map.json and
    /// added_tokens.json add tokens as they do in transformers.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], naming the file.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let json = read(path)?;
        let sibling = |name: &str| -> Result<Option<Value>> {
            let path = path.with_file_name(name);
            if !path.exists() {
                return Ok(None);
            }
            let what = |e: serde_json::Error| format!("not valid JSON: {}", clip(&e.to_string()));
            let wrong = |e| Error::Tokenizer { origin: path.display().to_string(), what: what(e) };
            parse_json(&read(&path)?).map(Some).map_err(wrong)
        };
        let siblings = if path.file_name().is_some_and(|name| name == "tokenizer.json") {
            Siblings {
                config: sibling("tokenizer_config.json")?,
                map: sibling("special_tokens_map.json")?,
                added: sibling("added_tokens.json")?,
            }
        } else {
            Siblings::default()
        };
        Self::new(&json, &siblings, path.display().to_string())
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
        Ok(Self { shared: Arc::new(Shared { inner, origin, bytes, special }) })
    }

    /// A byte-level BPE tokenizer from the lists that GGUF files carry: words, their kinds (3 is special, 4 is added, 5 is
    /// padding; an empty list where there are none) and merges. Text is normalised as NFC, as GPT-NeoX's tokenizer does.
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

    /// The tokenizer.json that says the same.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the library cannot write it.
    pub fn to_json(&self) -> Result<String> {
        let wrong = |e: tokenizers::Error| Error::Tokenizer { origin: self.shared.origin.clone(), what: e.to_string() };
        self.shared.inner.to_string(false).map_err(wrong)
    }

    /// The reverse of [`Tokenizer::from_vocabulary`]: words, kinds (1 plain, 3 special, 4 added, 5 padding up to `count`) and merges.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it is no BPE.
    pub fn to_vocabulary(&self, count: usize) -> Result<Vocabulary> {
        let wrong = |what: String| Error::Tokenizer { origin: self.shared.origin.clone(), what };
        let json = self.shared.inner.to_string(false).map_err(|e| wrong(e.to_string()))?;
        let json = serde_json::from_str(&json).map_err(|e| wrong(e.to_string()))?;
        vocabulary::from_json(&json, count).ok_or_else(|| wrong("it is no byte-pair encoding".into()))
    }

    /// Ids below this are the tokenizer's; a model's vocabulary is mostly padded beyond.
    pub fn vocab_size(&self) -> usize {
        self.shared.bytes.len()
    }

    /// The id of `token`, spelled as in the file.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    /// Text to ids; adds no token of its own.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer says so.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.shared.inner.encode_fast(text, false);
        let encoding =
            encoding.map_err(|e| Error::Tokenizer { origin: self.shared.origin.clone(), what: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids to text, special tokens included; ids that are none are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
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

    /// Decodes token by token.
    pub fn decoder(&self) -> Decoder {
        Decoder { tokenizer: self.clone(), pending: Vec::new() }
    }
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
pub struct Decoder {
    tokenizer: Tokenizer,
    pending: Vec<u8>,
}

impl Decoder {
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.tokenizer.is_special(id)
    }

    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        self.tokenizer.token_bytes(id)
    }

    /// The text that `id` completes, possibly none.
    pub fn push(&mut self, id: u32) -> String {
        self.pending.extend_from_slice(self.tokenizer.token_bytes(id));
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
