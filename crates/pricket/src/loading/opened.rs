//! A checkpoint that is open but whose weights are not read yet.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_hub::InUse;
use pricket_lm::Tokenizer;
use pricket_nn::FusedRows;
use pricket_weights::Store;
use serde_json::Value;

use crate::loading::provenance::Provenance;

/// An open checkpoint. No weights are read yet.
pub(crate) struct Opened {
    pub(crate) config: Value,
    pub(crate) config_path: PathBuf,
    pub(crate) generation_config: Option<Value>,
    pub(crate) tokenizer: Option<Tokenizer>,
    /// The file of the tokenizer, if it was read from one.
    pub(crate) tokenizer_path: Option<PathBuf>,
    /// Whether configuration, tokenizer and weights are in one file (GGUF or GGML).
    pub(crate) is_container: bool,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) provenance: Provenance,
    pub(crate) warnings: Vec<String>,
    pub(crate) notes: Vec<String>,
    pub(crate) in_use: Option<InUse>,
    pub(crate) fused: FusedRows,
    /// For a checkpoint without a tokenizer, the repository with a tokenizer of the same vocabulary.
    pub(crate) known_tokenizer: Option<String>,
    /// Location of the chat template, which is not evaluated.
    pub(crate) chat_template: Option<String>,
}

impl Opened {
    pub(crate) fn new(store: Arc<dyn Store>) -> Self {
        Self {
            config: Value::Null,
            config_path: PathBuf::new(),
            generation_config: None,
            tokenizer: None,
            tokenizer_path: None,
            is_container: false,
            store,
            provenance: Provenance::default(),
            warnings: Vec::new(),
            notes: Vec::new(),
            in_use: None,
            fused: FusedRows::AsTrained,
            known_tokenizer: None,
            chat_template: None,
        }
    }

    /// Returns a name for use in written files: the repository, or the name of the file or directory without its local
    /// path.
    pub(crate) fn base_name(&self) -> String {
        let provenance = &self.provenance;
        let file = self.config_path.file_stem().filter(|_| self.is_container);
        let directory = || {
            let path = std::path::absolute(provenance.directory.as_deref()?).ok()?;
            let name = |path: &Path| Some(path.file_name()?.to_string_lossy().into_owned());
            // A training step is a directory below the directory of its model.
            match path.parent().filter(|parent| parent.ends_with("revisions")).and_then(Path::parent).and_then(name) {
                Some(model) => Some(format!("{model}@{}", name(&path)?)),
                None => name(&path),
            }
        };
        let is_step = provenance.directory.as_deref().and_then(Path::parent).is_some_and(|p| p.ends_with("revisions"));
        match (&provenance.repo, file.filter(|_| !is_step)) {
            (Some(_), _) => provenance.name(),
            (None, Some(file)) => file.to_string_lossy().into_owned(),
            (None, None) => directory().unwrap_or_else(|| provenance.name()),
        }
    }
}

/// Returns all values of `eos_token_id`, which is a number or a list in each file.
fn end_tokens(config: &Value, generation_config: Option<&Value>) -> Vec<Value> {
    let sources = [Some(config), generation_config].into_iter().flatten();
    let values = sources.map(|source| &source["eos_token_id"]);
    values.flat_map(|value| value.as_array().cloned().unwrap_or_else(|| vec![value.clone()])).collect()
}

/// Returns a token id. Some old files write it as a float.
fn token_id(value: &Value) -> Option<u32> {
    let whole = || value.as_f64().filter(|id| id.fract() == 0.0 && *id >= 0.0).map(|id| id as u64);
    u32::try_from(value.as_u64().or_else(whole)?).ok()
}

/// Returns a warning if `eos_token_id` is not a token id, because text would then not end where it should. -1 is valid:
/// it means no end token in Python.
pub(crate) fn eos_warning(config: &Value, generation_config: Option<&Value>) -> Option<String> {
    let values = end_tokens(config, generation_config);
    let odd =
        values.iter().find(|value| !value.is_null() && value.as_i64() != Some(-1) && token_id(value).is_none())?;
    Some(format!(
        "eos_token_id: {} is not a token id and is ignored, so text may not end where it should",
        pricket_weights::clip(&odd.to_string())
    ))
}

/// Returns the end tokens of config.json and generation_config.json together. Early MPT repositories name none; for
/// them `<|endoftext|>` of the tokenizer is used, because text would otherwise never end.
pub(crate) fn eos_ids(config: &Value, generation_config: Option<&Value>, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    let mut ids: Vec<u32> = end_tokens(config, generation_config).iter().filter_map(token_id).collect();
    if ids.is_empty() {
        ids.extend(tokenizer.and_then(|tokenizer| tokenizer.token_to_id("<|endoftext|>")));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}
