//! The weights of a path: a file, an index, or a directory in Hub layout.

use std::path::{Path, PathBuf};

use crate::format::{Format, open_one, sniff};
use crate::parts::{parts_of, representatives};
use crate::{Error, Result, Sharded, Store};

/// Files that hold a checkpoint in Hub layout, best first.
const CANDIDATES: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Error for a directory that holds only an adapter.
const ADAPTER: &str =
    "a PEFT adapter, not a model: merge it into its base model first, with `merge_and_unload` of PEFT";

/// Opens whatever checkpoint lies at `path`: a weight file, an index, or a directory in Hub layout.
///
/// # Errors
/// [`Error::NotFound`] if nothing is there, [`Error::Unsupported`] for formats that are known and not read, and what
/// the format's reader says.
pub fn open(path: impl AsRef<Path>) -> Result<Box<dyn Store>> {
    let path = path.as_ref();
    let file = if path.is_dir() { find_weights(path)? } else { path.to_owned() };
    if file.to_string_lossy().ends_with(".index.json") { Ok(Box::new(Sharded::open(file)?)) } else { open_file(&file) }
}

/// The file or index of a directory that holds its weights.
///
/// # Errors
/// [`Error::NotFound`] if there is none, [`Error::Unsupported`] for training shards.
pub fn find_weights(directory: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(directory).map_err(|source| Error::Io { path: directory.into(), source })?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    choose_weights(&names, directory).map(|name| directory.join(name))
}

/// The file or index among the names of a directory or repository that holds its weights; `place` is what messages call it.
///
/// # Errors
/// [`Error::NotFound`] if there is none, [`Error::Unsupported`] for training shards.
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
    // Of numbered parts the first stands for all. An adapter is no model.
    let is_adapter = |name: &str| name.starts_with("adapter_model.");
    let weights = representatives(names().filter(|name| name.ends_with(".safetensors") && !is_adapter(name)));
    // Other programs' files, by the names that these give them; what they are is told by what is in them.
    let is_other = |name: &&str| match Path::new(name).extension().and_then(|end| end.to_str()) {
        Some("gguf") => true,
        Some("bin") => name.contains("ggml"),
        _ => false,
    };
    // What some authors save. Training programs save other things so too, and files that say more come first.
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
            let what = format!("{} files of a model ({}, ...): name one of them", files.len(), files[0]);
            Err(Error::Ambiguous { path: place.into(), what })
        }
        [] if names().any(is_adapter) => Err(Error::Unsupported { path: place.into(), what: ADAPTER.into() }),
        [] => not_found(format!("no weights here: none of {}", CANDIDATES.join(", "))),
        [first, ..] => not_found(format!(
            "{} safetensors files ({first}, ...) and no model.safetensors.index.json that maps them",
            weights.len()
        )),
    }
}

/// Opens one weight file by what its first bytes say, never by its name; of a checkpoint in numbered parts, all of them.
///
/// # Errors
/// As [`open`], and [`Error::NotFound`] for a part that is not there.
pub fn open_file(path: &Path) -> Result<Box<dyn Store>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The parts of a GGUF file also have metadata in common.
    if parts_of(&name).is_some() && path.exists() && sniff(path)? != Format::Gguf {
        return Ok(Box::new(Sharded::open_parts(path)?));
    }
    open_one(path)
}
