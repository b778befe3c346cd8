//! Finds and opens the weights of a path: a file, an index, or a directory in Hub layout.

use std::path::{Path, PathBuf};

use crate::format::{Format, open_one, sniff};
use crate::parts::{parts_of, representatives};
use crate::{Error, Result, Sharded, Store};

/// Names of weight files in Hub layout, in order of preference.
const CANDIDATES: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Error for a directory that holds only an adapter.
const ADAPTER: &str =
    "a PEFT adapter, not a model: merge it into its base model first, with `merge_and_unload` of PEFT";

/// Opens the checkpoint at `path`: a weight file, an index, or a directory in Hub layout.
///
/// # Errors
/// - [`Error::NotFound`] if the path does not exist or has no weights;
/// - [`Error::Ambiguous`] if a directory has the weights of several models;
/// - [`Error::Unsupported`] if the format is known but not supported;
/// - [`Error::Corrupt`], [`Error::Refused`] or [`Error::Io`] if the file cannot be read.
pub fn open(path: impl AsRef<Path>) -> Result<Box<dyn Store>> {
    let path = path.as_ref();
    let file = if path.is_dir() { find_weights(path)? } else { path.to_owned() };
    if file.to_string_lossy().ends_with(".index.json") { Ok(Box::new(Sharded::open(file)?)) } else { open_file(&file) }
}

/// Returns the path of the weight file or index in a directory.
///
/// # Errors
/// Returns the errors of [`choose_weights`], and [`Error::Io`] if the directory cannot be read.
pub fn find_weights(directory: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(directory).map_err(|source| Error::Io { path: directory.into(), source })?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    choose_weights(&names, directory).map(|name| directory.join(name))
}

/// Chooses the weight file or index among the file names of a directory or repository. Messages call the directory
/// `place`.
///
/// The names of the Hub layout are preferred: `model.safetensors`, its index, `pytorch_model.bin`, its index. The next
/// candidates are a single safetensors file, numbered PyTorch parts, a single GGUF or GGML file, and a single `.pth`
/// file.
///
/// # Errors
/// - [`Error::NotFound`] if no name fits, or if there are several safetensors files without an index;
/// - [`Error::Ambiguous`] if the names belong to several models;
/// - [`Error::Unsupported`] if there are only DeepSpeed training shards or only a PEFT adapter.
pub fn choose_weights<'a>(names: &'a [impl AsRef<str>], place: &Path) -> Result<&'a str> {
    let names = || names.iter().map(AsRef::as_ref);
    if let Some(found) = CANDIDATES.iter().find_map(|candidate| names().find(|name| name == candidate)) {
        return Ok(found);
    }
    if let Some(name) = names().find(|name| name.ends_with("model_states.pt") || name.ends_with("optim_states.pt")) {
        return Err(Error::Unsupported {
            path: place.into(),
            what: format!(
                "{name} is a DeepSpeed training shard, not a checkpoint in Hub layout; use the converted repository"
            ),
        });
    }
    let not_found = |what: String| Err(Error::NotFound { path: place.into(), what });
    // The first of several numbered parts represents all. Adapters do not count as weights.
    let is_adapter = |name: &str| name.starts_with("adapter_model.");
    let weights = representatives(names().filter(|name| name.ends_with(".safetensors") && !is_adapter(name)));
    // GGUF and GGML files by their usual names. Opening checks the contents.
    let is_other = |name: &&str| match Path::new(name).extension().and_then(|end| end.to_str()) {
        Some("gguf") => true,
        Some("bin") => name.contains("ggml"),
        _ => false,
    };
    // Some checkpoints are `.pth` files. Training programs also save other states as `.pth`, so this is the last
    // choice.
    let is_pth = |name: &&str| {
        let state = ["rng_state", "optimizer", "scheduler", "scaler", "training_state", "trainer_state"];
        Path::new(name).extension().is_some_and(|end| end == "pth")
            && !state.iter().any(|state| name.starts_with(state))
    };
    let mut others = representatives(names().filter(is_other));
    if others.is_empty() {
        others = names().filter(is_pth).collect();
    }
    let is_torch_part = |name: &&str| {
        Path::new(name).extension().is_some_and(|end| end == "bin") && crate::parts::Part::of(name).is_some()
    };
    let numbered = representatives(names().filter(is_torch_part));
    match weights[..] {
        [only] => Ok(only),
        [] if numbered.len() == 1 => Ok(numbered[0]),
        [] if others.len() == 1 => Ok(others[0]),
        [] if others.len() + numbered.len() > 1 => {
            let files = [&numbered[..], &others].concat();
            let what = format!("found {} files of a model ({}, ...); name one of them", files.len(), files[0]);
            Err(Error::Ambiguous { path: place.into(), what })
        }
        [] if names().any(is_adapter) => Err(Error::Unsupported { path: place.into(), what: ADAPTER.into() }),
        [] => not_found(format!("no weights found; expected one of {}", CANDIDATES.join(", "))),
        [first, ..] => not_found(format!(
            "found {} safetensors files ({first}, ...) without a model.safetensors.index.json",
            weights.len()
        )),
    }
}

/// Opens one weight file. If it is a numbered part of a checkpoint, opens all parts.
///
/// The first bytes of the file determine its format, not its name.
///
/// # Errors
/// Returns the errors of [`open`], and [`Error::NotFound`] if a part is missing.
pub fn open_file(path: &Path) -> Result<Box<dyn Store>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The reader of GGUF files opens their parts itself, because they share metadata.
    if parts_of(&name).is_some() && path.exists() && sniff(path)? != Format::Gguf {
        return Ok(Box::new(Sharded::open_parts(path)?));
    }
    open_one(path)
}
