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

/// What lies at a path, opened and not yet read.
pub(crate) struct Opened {
    pub(crate) config: Value,
    pub(crate) config_path: PathBuf,
    pub(crate) generation_config: Option<Value>,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) provenance: Provenance,
    pub(crate) warnings: Vec<String>,
    pub(crate) notes: Vec<String>,
    pub(crate) in_use: Option<InUse>,
    pub(crate) fused: Fused,
    pub(crate) wants_neox_tokenizer: bool,
}

impl Opened {
    pub(crate) fn new(store: Arc<dyn Store>) -> Self {
        Self {
            config: Value::Null,
            config_path: PathBuf::new(),
            generation_config: None,
            tokenizer: None,
            store,
            provenance: Provenance::default(),
            warnings: Vec::new(),
            notes: Vec::new(),
            in_use: None,
            fused: Fused::Trained,
            wants_neox_tokenizer: false,
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
                self.notes.push(format!("{whose}: {why}, so that of {from} is used"));
            }
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            Err(e) => self.warnings.push(format!("{whose}: {why}, and that of {from} cannot be had: {e}")),
        }
        Ok(())
    }
}

/// Opens a file that holds everything, if it is one.
fn open_container(path: &Path, given: Option<&Tokenizer>) -> Result<Option<Opened>> {
    let Some(container) = containers::open(path, given)? else { return Ok(None) };
    let directory = parent(path);
    Ok(Some(Opened {
        config: container.config,
        config_path: path.to_owned(),
        tokenizer: container.tokenizer,
        provenance: Provenance::of_directory(&directory, &[path.to_owned()]),
        warnings: container.warnings,
        fused: container.fused,
        wants_neox_tokenizer: container.wants_neox_tokenizer,
        ..Opened::new(container.store)
    }))
}

/// Opens a directory or a weight file with its configuration beside it.
pub(crate) fn open_files(path: &Path, fetched: Option<Fetched>, given: Option<Tokenizer>) -> Result<Opened> {
    let file = containers::candidate(path)?;
    if let Some(mut opened) = file.map(|file| open_container(&file, given.as_ref())).transpose()?.flatten() {
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
        // What is no weight file at all needs no configuration.
        if path.is_file() && !path.to_string_lossy().ends_with(".json") {
            pricket_weights::open_file(path)?;
        }
        return Err(Error::NotFound {
            path: config_path,
            what: "no such file; a checkpoint needs its config.json".into(),
        });
    }
    let config = read_json(&config_path)?;
    // The configuration first: its errors say more than those of files that belong to another model.
    Family::from_config(&config).map_err(|e| at(&config_path, e))?;
    let generation = directory.join("generation_config.json");
    let tokenizer = directory.join("tokenizer.json");
    let generation_config = generation.is_file().then(|| read_json(&generation)).transpose()?;
    let weights = if path.is_dir() { pricket_weights::find_weights(path)? } else { path.to_owned() };
    let store: Arc<dyn Store> = Arc::from(pricket_weights::open(&weights)?);
    let (provenance, warnings, in_use) = if let Some(fetched) = fetched {
        (fetched.provenance, fetched.warnings, Some(fetched.in_use))
    } else {
        let mut files = vec![config_path.clone(), generation, tokenizer.clone(), weights];
        // Shards are known by the tensors that they hold.
        files.extend(store.names().iter().map(|name| PathBuf::from(store.origin(name))));
        files.sort();
        files.dedup();
        let provenance = Provenance::of_directory(&directory, &files);
        let warnings = snapshot_warnings(&provenance);
        (provenance, warnings, None)
    };
    Ok(Opened {
        config,
        config_path,
        generation_config,
        tokenizer: match given {
            Some(tokenizer) => Some(tokenizer),
            None => tokenizer.is_file().then(|| Tokenizer::from_file(&tokenizer)).transpose()?,
        },
        provenance,
        warnings,
        in_use,
        ..Opened::new(store)
    })
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
    let io = |error: std::io::Error| Error::Io { path: path.into(), error };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > MAX_JSON {
        return Err(corrupt(path, format!("{size} bytes are no configuration")));
    }
    std::fs::read(path).map_err(io)
}

pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|e| corrupt(path, format!("not valid JSON: {e}")))
}

fn corrupt(path: &Path, what: String) -> Error {
    Error::Corrupt { tensor: None, error: pricket_weights::Error::Corrupt { path: path.into(), what } }
}

/// End tokens: those of generation_config.json and config.json together, each a number or a list. Early MPT repositories name
/// none and would never end: theirs is the tokenizer's end of text.
pub(crate) fn eos_ids(config: &Value, generation_config: Option<&Value>, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    let sources = [Some(config), generation_config];
    let values = sources.into_iter().flatten().map(|source| &source["eos_token_id"]);
    let mut ids: Vec<u32> = values
        .flat_map(|value| value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]))
        .filter_map(|value| value.as_u64().and_then(|id| u32::try_from(id).ok()))
        .collect();
    if ids.is_empty() {
        ids.extend(tokenizer.and_then(|tokenizer| tokenizer.token_to_id("<|endoftext|>")));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}
