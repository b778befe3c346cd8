//! A model's files, opened and not yet read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_hub::InUse;
use pricket_lm::Tokenizer;
use pricket_nn::FusedRows;
use pricket_weights::Store;
use serde_json::Value;

use crate::loading::provenance::Provenance;

/// What lies at a path, opened and not yet read.
pub(crate) struct Opened {
    pub(crate) config: Value,
    pub(crate) config_path: PathBuf,
    pub(crate) generation_config: Option<Value>,
    pub(crate) tokenizer: Option<Tokenizer>,
    /// The file that it was read from, if it was.
    pub(crate) tokenizer_path: Option<PathBuf>,
    /// Whether configuration, tokenizer and weights are in one file.
    pub(crate) is_container: bool,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) provenance: Provenance,
    pub(crate) warnings: Vec<String>,
    pub(crate) notes: Vec<String>,
    pub(crate) in_use: Option<InUse>,
    pub(crate) fused: FusedRows,
    /// The repository of the tokenizer that its words are those of, where it has none of its own.
    pub(crate) known_tokenizer: Option<String>,
    /// The place of a chat template, which is not evaluated.
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

    /// What the checkpoint is called where others read it: its repository, or the name of its file or directory without the
    /// path of this machine.
    pub(crate) fn base_name(&self) -> String {
        let provenance = &self.provenance;
        let file = self.config_path.file_stem().filter(|_| self.is_container);
        let directory = || {
            let path = std::path::absolute(provenance.directory.as_deref()?).ok()?;
            let name = |path: &Path| Some(path.file_name()?.to_string_lossy().into_owned());
            // A training step is kept below its model.
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

/// The values of `eos_token_id`, each a number or a list.
fn end_tokens(config: &Value, generation_config: Option<&Value>) -> Vec<Value> {
    let sources = [Some(config), generation_config].into_iter().flatten();
    let values = sources.map(|source| &source["eos_token_id"]);
    values.flat_map(|value| value.as_array().cloned().unwrap_or_else(|| vec![value.clone()])).collect()
}

/// A token's number, which old files write as a float too.
fn token_id(value: &Value) -> Option<u32> {
    let whole = || value.as_f64().filter(|id| id.fract() == 0.0 && *id >= 0.0).map(|id| id as u64);
    u32::try_from(value.as_u64().or_else(whole)?).ok()
}

/// Says so if `eos_token_id` is something that no token is called by: text would not end where it should. -1 is none in Python.
pub(crate) fn eos_warning(config: &Value, generation_config: Option<&Value>) -> Option<String> {
    let values = end_tokens(config, generation_config);
    let odd =
        values.iter().find(|value| !value.is_null() && value.as_i64() != Some(-1) && token_id(value).is_none())?;
    Some(format!(
        "eos_token_id: {} is not a token's number, so it ends no text",
        pricket_weights::clip(&odd.to_string())
    ))
}

/// End tokens: those of generation_config.json and config.json together, each a number or a list. Early MPT repositories name
/// none and would never end: theirs is the tokenizer's end of text.
pub(crate) fn eos_ids(config: &Value, generation_config: Option<&Value>, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    let mut ids: Vec<u32> = end_tokens(config, generation_config).iter().filter_map(token_id).collect();
    if ids.is_empty() {
        ids.extend(tokenizer.and_then(|tokenizer| tokenizer.token_to_id("<|endoftext|>")));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}
