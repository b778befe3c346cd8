//! A model's files, opened and not yet read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_hub::{Hub, InUse, ModelId};
use pricket_lm::Tokenizer;
use pricket_nn::Progress;
use pricket_weights::Store;
use serde_json::Value;

use crate::family::Family;
use crate::qkv::Fused;
use crate::repository::{Fetched, fetch_tokenizer, snapshot_warnings};
use crate::{Error, Provenance, Result, containers, prompts};

/// Whose tokenizer legacy GGML files were made with.
const NEOX_TOKENIZER: &str = "EleutherAI/gpt-neox-20b";

/// A config.json is a kilobyte.
const MAX_JSON: u64 = 1 << 20;

/// What a user changes about a configuration, before anything looks at it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    /// Keys and their new values, `outer.inner` for a key inside an object.
    pub(crate) keys: Vec<(String, Value)>,
    /// Another activation function.
    pub(crate) activation: Option<String>,
}

impl Changes {
    /// Changes `config`, and refuses keys that its family does not know: they would have no effect.
    pub(crate) fn apply(&self, config: &mut Value) -> Result<()> {
        for (key, value) in &self.keys {
            set(config, key, value.clone())?;
        }
        if let Some((key, _)) = self.keys.iter().find(|(key, _)| !Family::knows(config, key)) {
            return Err(Error::Input(format!("{key}: no key of this family's configuration; it would have no effect")));
        }
        match &self.activation {
            Some(name) => Ok(Family::set_activation(config, name)?),
            None => Ok(()),
        }
    }
}

/// Sets a key, `outer.inner` for one inside another.
fn set(config: &mut Value, key: &str, value: Value) -> Result<()> {
    let mut at = config;
    for part in key.split('.') {
        if !(at.is_object() || at.is_null()) {
            return Err(Error::Input(format!("{key}: the configuration has no such place")));
        }
        at = &mut at[part];
    }
    *at = value;
    Ok(())
}

/// What lies at a path, opened and not yet read.
pub(crate) struct Opened {
    pub(crate) config: Value,
    pub(crate) config_path: PathBuf,
    pub(crate) generation_config: Option<Value>,
    pub(crate) tokenizer: Option<Tokenizer>,
    /// The tokenizer.json that it was read from, if it was.
    pub(crate) tokenizer_path: Option<PathBuf>,
    /// Whether configuration, tokenizer and weights are in one file.
    pub(crate) is_container: bool,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) provenance: Provenance,
    pub(crate) warnings: Vec<String>,
    pub(crate) notes: Vec<String>,
    pub(crate) in_use: Option<InUse>,
    pub(crate) fused: Fused,
    pub(crate) wants_neox_tokenizer: bool,
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
            fused: Fused::Trained,
            wants_neox_tokenizer: false,
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
        match (&provenance.repo, file) {
            (Some(_), _) => provenance.name(),
            (None, Some(file)) => file.to_string_lossy().into_owned(),
            (None, None) => directory().unwrap_or_else(|| provenance.name()),
        }
    }

    /// Where a repository has no tokenizer, takes that of the one that its card or configuration names.
    pub(crate) fn borrow_tokenizer(&mut self, id: &ModelId, hub: &Hub, progress: &dyn Progress) -> Result<()> {
        let named = prompts::card_of(id.repo.as_str()).and_then(|card| card.tokenizer.as_deref());
        let from = named.or(self.config["tokenizer_name"].as_str()).map(str::to_owned);
        match from.filter(|_| self.tokenizer.is_none()) {
            Some(from) => self.take_tokenizer(&id.to_string(), "it has no tokenizer", &from, hub, progress),
            None => Ok(()),
        }
    }

    /// For a legacy GGML file, whose words are those of GPT-NeoX-20B and have lost bytes.
    pub(crate) fn take_neox_tokenizer(&mut self, whose: &str, hub: &Hub, progress: &dyn Progress) -> Result<()> {
        let why = "no tokenizer can be made of the words in the file, which have lost bytes";
        self.take_tokenizer(whose, why, NEOX_TOKENIZER, hub, progress)
    }

    fn take_tokenizer(&mut self, whose: &str, why: &str, from: &str, hub: &Hub, progress: &dyn Progress) -> Result<()> {
        let found = fetch_tokenizer(from, hub, progress).and_then(|path| Ok((Tokenizer::from_file(&path)?, path)));
        match found {
            Ok((tokenizer, path)) => {
                self.tokenizer = Some(tokenizer);
                self.provenance.replace("tokenizer.json", &path);
                self.tokenizer_path = Some(path);
                self.notes.push(format!("{whose}: {why}, so that of {from} is used"));
            }
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            Err(e) => self.warnings.push(format!("{whose}: {why}, and that of {from} cannot be had: {e}")),
        }
        Ok(())
    }
}

/// Opens a file that holds everything, if it is one.
fn open_container(path: &Path, given: Option<&Tokenizer>, changes: &Changes) -> Result<Option<Opened>> {
    let Some(container) = containers::open(path, given)? else { return Ok(None) };
    let directory = parent(path);
    let mut config = container.config;
    changes.apply(&mut config)?;
    Ok(Some(Opened {
        config,
        config_path: path.to_owned(),
        tokenizer: container.tokenizer,
        is_container: true,
        provenance: Provenance::of_directory(&directory, &files_of(&*container.store)),
        warnings: container.warnings,
        notes: container.notes,
        fused: container.fused,
        wants_neox_tokenizer: container.wants_neox_tokenizer,
        chat_template: container.metadata["tokenizer.chat_template"]
            .is_string()
            .then(|| format!("tokenizer.chat_template of {}", path.display())),
        ..Opened::new(container.store)
    }))
}

/// The files that a store reads, sorted.
fn files_of(store: &dyn Store) -> Vec<PathBuf> {
    let files: std::collections::BTreeSet<String> = store.names().iter().map(|name| store.origin(name)).collect();
    files.into_iter().map(PathBuf::from).collect()
}

/// Opens a directory or a weight file with its configuration beside it.
pub(crate) fn open_files(
    path: &Path,
    fetched: Option<Fetched>,
    given: Option<Tokenizer>,
    changes: &Changes,
) -> Result<Opened> {
    let file = containers::candidate(path)?;
    if let Some(mut opened) = file.map(|file| open_container(&file, given.as_ref(), changes)).transpose()?.flatten() {
        if let Some(fetched) = fetched {
            opened.provenance = fetched.provenance;
            opened.warnings.extend(fetched.warnings);
            opened.in_use = Some(fetched.in_use);
        }
        return Ok(opened);
    }
    let directory = if path.is_dir() { path.to_owned() } else { parent(path) };
    let config_path = directory.join("config.json");
    if !config_path.is_file() {
        let adapter = directory.join("adapter_config.json");
        if adapter.is_file() {
            return Err(unmerged(&adapter, &read_json(&adapter)?));
        }
        // What is no weight file at all needs no configuration.
        if path.is_file() && !path.to_string_lossy().ends_with(".json") {
            pricket_weights::open_file(path)?;
        }
        return Err(Error::NotFound {
            path: config_path,
            what: "no such file; a checkpoint needs its config.json".into(),
        });
    }
    let mut config = read_json(&config_path)?;
    changes.apply(&mut config)?;
    // The configuration first: its errors say more than those of files that belong to another model.
    Family::from_config(&config).map_err(|e| at(&config_path, e))?;
    let notes = unknown_keys(&config_path, &config);
    let generation = directory.join("generation_config.json");
    let tokenizer = directory.join("tokenizer.json");
    let generation_config = generation.is_file().then(|| read_json(&generation)).transpose()?;
    let weights = if path.is_dir() { pricket_weights::find_weights(path)? } else { path.to_owned() };
    let store: Arc<dyn Store> = Arc::from(pricket_weights::open(&weights)?);
    if store.names().iter().any(|name| name.contains(".base_layer.")) {
        return Err(unmerged(&weights, &Value::Null));
    }
    let (provenance, warnings, in_use) = if let Some(fetched) = fetched {
        (fetched.provenance, fetched.warnings, Some(fetched.in_use))
    } else {
        let mut files = vec![config_path.clone(), generation, tokenizer.clone(), weights];
        // Shards are known by the tensors that they hold.
        files.extend(TOKENIZER_FILES.map(|name| directory.join(name)).into_iter().filter(|path| path.is_file()));
        files.extend(files_of(&*store));
        files.sort();
        files.dedup();
        let provenance = Provenance::of_directory(&directory, &files);
        let warnings = snapshot_warnings(&provenance);
        (provenance, warnings, None)
    };
    let has_tokenizer = tokenizer.is_file();
    Ok(Opened {
        config,
        config_path,
        generation_config,
        tokenizer_path: has_tokenizer.then(|| tokenizer.clone()),
        tokenizer: match given {
            Some(tokenizer) => Some(tokenizer),
            None => has_tokenizer.then(|| Tokenizer::from_file(&tokenizer)).transpose()?,
        },
        provenance,
        warnings,
        notes,
        in_use,
        chat_template: chat_template(&directory),
        ..Opened::new(store)
    })
}

/// The place of the chat template of a directory, if it has one.
fn chat_template(directory: &Path) -> Option<String> {
    let file = directory.join("chat_template.jinja");
    if file.is_file() {
        return Some(file.display().to_string());
    }
    let file = directory.join("tokenizer_config.json");
    // What is wrong with this file is said where its tokens are read.
    let config = file.is_file().then(|| read_json(&file).ok()).flatten()?;
    (!config["chat_template"].is_null()).then(|| format!("chat_template of {}", file.display()))
}

/// An adapter that is taken for a model, or a model whose adapter was not merged before it was saved.
fn unmerged(path: &Path, config: &Value) -> Error {
    let base = config["base_model_name_or_path"].as_str();
    let base = base.map_or(String::new(), |base| format!(" of {}", pricket_weights::clip(base)));
    let kind = config["peft_type"].as_str().map_or(String::new(), |kind| format!(" ({})", pricket_weights::clip(kind)));
    let what = format!(
        "a PEFT adapter{kind}{base} that is not merged: merge it into its base model first, with `merge_and_unload` of PEFT"
    );
    Error::Unsupported { path: path.into(), what }
}

/// Files beside a tokenizer.json that name more tokens.
pub(crate) const TOKENIZER_FILES: [&str; 3] = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

/// Says which keys of a configuration no version of its class has: a key that is misspelled has no effect.
pub(crate) fn unknown_keys(path: &Path, config: &Value) -> Vec<String> {
    let unknown = Family::unknown_keys(config);
    let shown: Vec<&str> = unknown.iter().take(8).map(String::as_str).collect();
    let more = if unknown.len() > shown.len() { ", ..." } else { "" };
    let note = || format!("{}: unknown keys without effect: {}{more}", path.display(), shown.join(", "));
    if unknown.is_empty() { Vec::new() } else { vec![note()] }
}

/// An error of configuration, with the file that it is in.
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

/// A file of settings.
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>> {
    read_at_most(path, MAX_JSON)
}

pub(crate) fn read_at_most(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let io = |error: std::io::Error| Error::Io { path: path.into(), error };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > limit {
        return Err(corrupt(path, format!("{size} bytes; a file of this kind has at most {limit}")));
    }
    std::fs::read(path).map_err(io)
}

pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    // The error of a server is JSON too.
    if let Some(what) = pricket_weights::stand_in(bytes) {
        return Err(corrupt(path, what.into()));
    }
    pricket_weights::parse_json(bytes).map_err(|e| corrupt(path, format!("not valid JSON: {e}")))
}

fn corrupt(path: &Path, what: String) -> Error {
    Error::Corrupt { tensor: None, error: pricket_weights::Error::Corrupt { path: path.into(), what } }
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
