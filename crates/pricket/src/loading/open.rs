//! Opens a file or directory: configuration, tokenizer, weights and provenance.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_hub::{Hub, ModelId};
use pricket_lm::Tokenizer;
use pricket_nn::Progress;
use pricket_weights::{FourBitTensors, Store};
use serde_json::Value;

use crate::loading::changes::Changes;
use crate::loading::containers;
use crate::loading::family::{checked_family, config_from_shapes, family_of, remove_four_bit};
use crate::loading::opened::Opened;
use crate::loading::provenance::Provenance;
use crate::loading::repository::{Fetched, fetch_tokenizer, snapshot_warnings};
use crate::loading::small_files::{TOKENIZER_FILES, TOKENIZERS, at, parent, read_json, tokenizer_in, unknown_keys};
use crate::suites::cards::card_of;
use crate::{Error, Result};

impl Opened {
    /// If the repository has no tokenizer, takes the one of the repository that its card or configuration names.
    pub(crate) fn borrow_tokenizer(&mut self, id: &ModelId, hub: &Hub, progress: &dyn Progress) -> Result<()> {
        let named = card_of(id.repo.as_str()).and_then(|card| card.tokenizer.as_deref());
        let from = named.or(self.config["tokenizer_name"].as_str()).map(str::to_owned);
        match from.filter(|_| self.tokenizer.is_none()) {
            Some(from) => self.take_tokenizer(&id.to_string(), "it has no tokenizer", &from, hub, progress),
            None => Ok(()),
        }
    }

    /// Takes the tokenizer of a known repository. Used for legacy GGML files, whose vocabulary has lost bytes, and for
    /// weights without a tokenizer file next to them.
    pub(crate) fn take_known_tokenizer(&mut self, whose: &str, hub: &Hub, progress: &dyn Progress) -> Result<()> {
        let why = if self.is_container {
            "the vocabulary in the file has lost bytes and gives no tokenizer"
        } else {
            "it has no tokenizer"
        };
        match self.known_tokenizer.clone().filter(|_| self.tokenizer.is_none()) {
            Some(from) => self.take_tokenizer(whose, why, &from, hub, progress),
            None => Ok(()),
        }
    }

    fn take_tokenizer(&mut self, whose: &str, why: &str, from: &str, hub: &Hub, progress: &dyn Progress) -> Result<()> {
        let found = fetch_tokenizer(from, hub, progress).and_then(|path| Ok((Tokenizer::from_file(&path)?, path)));
        match found {
            Ok((tokenizer, path)) => {
                self.tokenizer = Some(tokenizer);
                self.provenance.replace(&TOKENIZERS, &path);
                self.tokenizer_path = Some(path);
                self.notes.push(format!("{whose}: {why}; the tokenizer of {from} is used"));
            }
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            Err(e) => self.warnings.push(format!("{whose}: {why}; the tokenizer of {from} cannot be loaded: {e}")),
        }
        Ok(())
    }
}

/// Opens a container file (GGUF or legacy GGML); returns `None` for other formats.
fn open_container(path: &Path, given: Option<&Tokenizer>, changes: &Changes) -> Result<Option<Opened>> {
    let Some(container) = containers::open(path, given)? else { return Ok(None) };
    let directory = parent(path);
    let mut config = container.config;
    changes.apply(&mut config)?;
    let store = containers::in_hub_order(container.tensors, &config).map_err(|e| at(path, e))?;
    Ok(Some(Opened {
        config,
        config_path: path.to_owned(),
        tokenizer: container.tokenizer,
        is_container: true,
        provenance: Provenance::of_directory(&directory, &files_of(&*store)),
        warnings: container.warnings,
        notes: container.notes,
        fused: container.fused,
        known_tokenizer: container.known_tokenizer,
        chat_template: container.metadata["tokenizer.chat_template"]
            .is_string()
            .then(|| format!("tokenizer.chat_template of {}", path.display())),
        ..Opened::new(store)
    }))
}

/// Returns the files that a store reads, sorted.
fn files_of(store: &dyn Store) -> Vec<PathBuf> {
    let files: std::collections::BTreeSet<String> = store.names().iter().map(|name| store.origin(name)).collect();
    files.into_iter().map(PathBuf::from).collect()
}

/// Opens a directory, a container file, or a weight file with its config.json in the same directory.
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
    if !config_path.is_file()
        && let Some(opened) = open_without_config(path, fetched.as_ref(), given.as_ref(), changes)?
    {
        return Ok(Opened { in_use: fetched.map(|fetched| fetched.in_use), ..opened });
    }
    if !config_path.is_file() {
        let adapter = directory.join("adapter_config.json");
        if adapter.is_file() {
            return Err(unmerged(&adapter, &read_json(&adapter)?));
        }
        // If the file is not a weight file, reports that instead of the missing configuration.
        if path.is_file() && !path.to_string_lossy().ends_with(".json") {
            pricket_weights::open_file(path)?;
        }
        return Err(Error::NotFound {
            path: config_path,
            what: "no such file; a checkpoint needs its config.json".into(),
        });
    }
    let mut config = read_json(&config_path)?;
    remove_four_bit(&mut config);
    changes.apply(&mut config)?;
    // The configuration is checked first, because its errors are the most specific ones.
    checked_family(&config).map_err(|e| at(&config_path, e))?;
    let notes = unknown_keys(&config_path, &config);
    let generation = directory.join("generation_config.json");
    let tokenizer = tokenizer_in(&directory);
    let mut generation_config = generation.is_file().then(|| read_json(&generation)).transpose()?;
    let mistaken = generation_config.as_mut().and_then(|own| leave_out_mistaken_end(&config, own));
    let notes = notes.into_iter().chain(mistaken).collect();
    let weights = if path.is_dir() { pricket_weights::find_weights(path)? } else { path.to_owned() };
    let store: Arc<dyn Store> = Arc::from(pricket_weights::open(&weights)?);
    let store = containers::in_hub_order(store, &config).map_err(|e| at(&config_path, e))?;
    let store = FourBitTensors::over(store)?;
    if store.names().iter().any(|name| name.contains(".base_layer.")) {
        return Err(unmerged(&weights, &Value::Null));
    }
    let (provenance, warnings, in_use) = if let Some(fetched) = fetched {
        (fetched.provenance, fetched.warnings, Some(fetched.in_use))
    } else {
        let mut files = vec![config_path.clone(), generation, weights];
        files.extend(tokenizer.clone());
        // `files_of` returns the shards, found through the tensors in them.
        files.extend(TOKENIZER_FILES.map(|name| directory.join(name)).into_iter().filter(|path| path.is_file()));
        files.extend(files_of(&*store));
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
            None => own_tokenizer(&directory)?,
        },
        tokenizer_path: tokenizer,
        provenance,
        warnings,
        notes,
        in_use,
        chat_template: chat_template(&directory),
        ..Opened::new(store)
    })
}

/// Reads the tokenizer of a directory. If the preferred file is of an unsupported kind, reads the other file.
fn own_tokenizer(directory: &Path) -> Result<Option<Tokenizer>> {
    let mut files = TOKENIZERS.iter().map(|name| directory.join(name)).filter(|path| path.is_file());
    let Some(first) = files.next() else { return Ok(None) };
    match (Tokenizer::from_file(&first), files.next()) {
        (Err(e), Some(second)) => Ok(Some(Tokenizer::from_file(second).map_err(|_| e)?)),
        (found, _) => Ok(Some(found?)),
    }
}

/// Removes an end token from generation_config.json if the family lists it as a mistake; returns a note.
fn leave_out_mistaken_end(config: &Value, generation: &mut Value) -> Option<String> {
    let id = family_of(config).ok()?.mistaken_end_token(config)?;
    let is_it = |value: &Value| value.as_u64() == Some(id.into());
    if is_it(&config["eos_token_id"]) {
        return None;
    }
    match &mut generation["eos_token_id"] {
        Value::Array(ids) if ids.iter().any(is_it) => ids.retain(|id| !is_it(id)),
        own if is_it(own) => *own = config["eos_token_id"].clone(),
        _ => return None,
    }
    Some(format!("generation_config.json: eos_token_id {id} is a mistake of the published file and is ignored"))
}

/// Opens weights that have no config.json, if the configuration follows from the shapes of their tensors.
fn open_without_config(
    path: &Path,
    fetched: Option<&Fetched>,
    given: Option<&Tokenizer>,
    changes: &Changes,
) -> Result<Option<Opened>> {
    let weights = if path.is_dir() { pricket_weights::find_weights(path).ok() } else { Some(path.to_owned()) };
    let Some(weights) = weights.filter(|weights| weights.is_file()) else { return Ok(None) };
    if weights.extension().is_some_and(|end| end == "json") {
        return Ok(None);
    }
    let store: Arc<dyn Store> = Arc::from(pricket_weights::open(&weights)?);
    let shape = |name: &str| store.entry(name).map(|entry| entry.shape);
    let Some(mut config) = config_from_shapes(&shape) else { return Ok(None) };
    changes.apply(&mut config)?;
    checked_family(&config).map_err(|e| at(&weights, e))?;
    let directory = parent(&weights);
    let tokenizer = tokenizer_in(&directory);
    let own = || own_tokenizer(&directory);
    let generation = directory.join("generation_config.json");
    let provenance = if let Some(fetched) = fetched {
        fetched.provenance.clone()
    } else {
        let mut files = files_of(&*store);
        files.extend(tokenizer.clone());
        let beside = TOKENIZER_FILES.map(|name| directory.join(name)).into_iter().chain([generation.clone()]);
        files.extend(beside.filter(|path| path.is_file()));
        files.sort();
        Provenance::of_directory(&directory, &files)
    };
    let name = weights.file_name().unwrap_or_default().to_string_lossy();
    Ok(Some(Opened {
        tokenizer: given.map_or_else(own, |given| Ok(Some(given.clone())))?,
        tokenizer_path: tokenizer,
        generation_config: generation.is_file().then(|| read_json(&generation)).transpose()?,
        chat_template: chat_template(&directory),
        known_tokenizer: config["tokenizer_name"].as_str().map(str::to_owned),
        notes: vec![format!("{name}: no config.json; the configuration follows from the tensor shapes")],
        warnings: fetched.map(|fetched| fetched.warnings.clone()).unwrap_or_default(),
        config,
        config_path: weights,
        provenance,
        ..Opened::new(store)
    }))
}

/// Returns the location of the chat template of a directory, if it has one.
fn chat_template(directory: &Path) -> Option<String> {
    let file = directory.join("chat_template.jinja");
    if file.is_file() {
        return Some(file.display().to_string());
    }
    let file = directory.join("tokenizer_config.json");
    // Errors in this file are reported when its tokens are read.
    let config = file.is_file().then(|| read_json(&file).ok()).flatten()?;
    (!config["chat_template"].is_null()).then(|| format!("chat_template of {}", file.display()))
}

/// Returns the error for an adapter in place of a model, or for a model saved without merging its adapter.
fn unmerged(path: &Path, config: &Value) -> Error {
    let base = config["base_model_name_or_path"].as_str();
    let base = base.map_or(String::new(), |base| format!(" of {}", pricket_weights::clip(base)));
    let kind = config["peft_type"].as_str().map_or(String::new(), |kind| format!(" ({})", pricket_weights::clip(kind)));
    let what = format!(
        "a PEFT adapter{kind}{base} that is not merged; merge it into its base model with PEFT's `merge_and_unload`"
    );
    Error::Unsupported { path: path.into(), what }
}
