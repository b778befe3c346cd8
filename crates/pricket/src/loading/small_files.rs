//! Small files of a checkpoint: configurations and tokenizer files.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::loading::family;
use crate::{Error, Result};

/// Size limit in bytes of a configuration. Usual sizes are about one kilobyte.
const MAX_JSON: u64 = 1 << 20;

/// Tokenizer files, in order of preference.
pub(crate) const TOKENIZERS: [&str; 2] = ["tokenizer.model", "tokenizer.json"];

/// Files next to a tokenizer that define additional tokens.
pub(crate) const TOKENIZER_FILES: [&str; 3] = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

/// Returns the tokenizer file of a directory. A sentencepiece model is preferred to a tokenizer.json converted from it,
/// which often splits text differently.
pub(crate) fn tokenizer_in(directory: &Path) -> Option<PathBuf> {
    TOKENIZERS.iter().map(|name| directory.join(name)).find(|path| path.is_file())
}

/// Returns a note that lists the configuration keys unknown to every version of its class. A misspelled key has no
/// effect.
pub(crate) fn unknown_keys(path: &Path, config: &Value) -> Vec<String> {
    let unknown = family::unknown_keys(config);
    let shown: Vec<&str> = unknown.iter().take(8).map(String::as_str).collect();
    let more = if unknown.len() > shown.len() { ", ..." } else { "" };
    let note = || format!("{}: unknown keys without effect: {}{more}", path.display(), shown.join(", "));
    if unknown.is_empty() { Vec::new() } else { vec![note()] }
}

/// Adds the path of the configuration to an error.
pub(crate) fn at(config_path: &Path, e: pricket_nn::Error) -> Error {
    match e {
        pricket_nn::Error::Config { key, what } => Error::Refused { path: config_path.into(), key, what },
        other => other.into(),
    }
}

pub(crate) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    parse_json(path, &read_small(path)?)
}

/// Reads a small settings file.
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>> {
    read_at_most(path, MAX_JSON)
}

pub(crate) fn read_at_most(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let io = |error: std::io::Error| Error::Io { path: path.into(), error };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > limit {
        return Err(corrupt(path, format!("the file has {size} bytes; the limit for its kind is {limit}")));
    }
    std::fs::read(path).map_err(io)
}

pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    // The error response of a server can be valid JSON.
    if let Some(what) = pricket_weights::stand_in(bytes) {
        return Err(corrupt(path, what.into()));
    }
    pricket_weights::parse_json(bytes).map_err(|e| corrupt(path, format!("not valid JSON: {e}")))
}

fn corrupt(path: &Path, what: String) -> Error {
    Error::Corrupt { tensor: None, error: pricket_weights::Error::Corrupt { path: path.into(), what } }
}
