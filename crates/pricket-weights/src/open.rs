use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::parts::{parts_of, representatives};
use crate::source::Source;
use crate::{Error, GgufFile, ReadAt, Result, SafetensorsFile, Sharded, Store, TorchFile};

/// What a file's first bytes say it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// safetensors.
    Safetensors,
    /// PyTorch's zip format, 1.6 and later.
    TorchZip,
    /// PyTorch's earlier bare-pickle format.
    TorchLegacy,
    /// GGUF.
    Gguf,
    /// One of the containers before GGUF: ggml, ggmf, ggjt.
    LegacyGgml,
    /// None of them.
    Unknown,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Safetensors => "safetensors",
            Format::TorchZip => "PyTorch (zip)",
            Format::TorchLegacy => "PyTorch (legacy, before 1.6)",
            Format::Gguf => "GGUF",
            Format::LegacyGgml => "legacy GGML",
            Format::Unknown => "unknown",
        })
    }
}

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
    let others = representatives(names().filter(is_other));
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

/// Number of leading bytes that identify a format.
const HEAD: usize = 64;

/// What the first bytes of `path` say it is.
///
/// # Errors
/// [`Error::Io`]; [`Error::Corrupt`] for what is no regular file; [`Error::Unsupported`] for what stands in for a file that was not
/// downloaded, such as a Git LFS pointer.
pub fn sniff(path: &Path) -> Result<Format> {
    let io = |source| Error::Io { path: path.into(), source };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(Error::Corrupt { path: path.into(), what: "not a regular file".into() });
    }
    let mut head = Vec::new();
    File::open(path).map_err(io)?.take(HEAD as u64).read_to_end(&mut head).map_err(io)?;
    match stand_in(&head) {
        Some(what) => Err(Error::Unsupported { path: path.into(), what: format!("not a weight file but {what}") }),
        None => Ok(format_of(&head, path)),
    }
}

/// What stands in for a file that was not downloaded, by its first bytes, and what to do about it: a Git LFS pointer, a web page,
/// the error of a server. `None` for anything else.
///
/// ```
/// let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n";
/// assert!(pricket_weights::stand_in(pointer).unwrap().contains("git lfs pull"));
/// assert_eq!(pricket_weights::stand_in(b"{\"model_type\": \"mpt\"}"), None);
/// ```
pub fn stand_in(head: &[u8]) -> Option<&'static str> {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let begins = |word: &str| text.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word.as_bytes()));
    if begins("version https://git-lfs.github.com/spec/") || begins("version https://hawser.github.com/spec/") {
        return Some("a Git LFS pointer: run `git lfs pull`");
    }
    if begins("<!doctype html") || begins("<html") || begins("<head") {
        return Some("a web page (HTML): the download failed or needs a login; download it again");
    }
    if begins("<?xml") {
        return Some("an XML document, probably the error of a server: download it again");
    }
    let is_error = || {
        let rest = text.strip_prefix(b"{").map(<[u8]>::trim_ascii_start).unwrap_or_default();
        [&b"\"error\""[..], b"\"message\"", b"\"detail\""].iter().any(|key| rest.starts_with(key))
    };
    if is_error() || begins("entry not found") || begins("access to model ") || begins("invalid username or password") {
        return Some("the error of a server: download it again");
    }
    None
}

fn format_of(head: &[u8], path: &Path) -> Format {
    match head {
        [b'P', b'K', 3, 4, ..] => Format::TorchZip,
        [b'G', b'G', b'U', b'F', ..] => Format::Gguf,
        [b'l' | b'f', b'm', b'g', b'g', ..] | [b't', b'j', b'g', b'g', ..] | [b'a', b'l', b'g', b'g', ..] => {
            Format::LegacyGgml
        }
        // PROTO 2, LONG1 of ten bytes: torch's magic number 0x1950a86a20f9469cfc6c.
        [0x80, _, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, ..] => Format::TorchLegacy,
        [_, _, _, _, _, _, _, _, b'{', ..] => Format::Safetensors,
        _ if path.extension().is_some_and(|e| e == "safetensors") => Format::Safetensors,
        _ => Format::Unknown,
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

/// Opens one weight file, whatever it is a part of; a GGUF file with its siblings.
///
/// # Errors
/// As [`open`].
pub fn open_one(path: &Path) -> Result<Box<dyn Store>> {
    if !path.exists() {
        return Err(Error::NotFound { path: path.into(), what: "no such file".into() });
    }
    match sniff(path)? {
        Format::Safetensors => Ok(Box::new(SafetensorsFile::open(path)?)),
        Format::TorchZip => Ok(Box::new(TorchFile::open(path)?)),
        Format::Gguf => Ok(Box::new(GgufFile::open(path)?)),
        other => Err(unread(other, path)),
    }
}

/// Opens one weight file that is somewhere else; of its bytes only headers are read now.
///
/// # Errors
/// As [`open`], and what reading says.
pub fn open_remote(file: Arc<dyn ReadAt>) -> Result<Box<dyn Store>> {
    let source = Source::remote(file);
    let head = source.read(0, source.len().min(HEAD))?.into_owned();
    if let Some(what) = stand_in(&head) {
        return Err(Error::Unsupported { path: source.path().into(), what: format!("not a weight file but {what}") });
    }
    match format_of(&head, source.path()) {
        Format::Safetensors => Ok(Box::new(SafetensorsFile::new(source)?)),
        Format::TorchZip => Ok(Box::new(TorchFile::new(source)?)),
        Format::Gguf => Ok(Box::new(GgufFile::new(source)?)),
        other => Err(unread(other, source.path())),
    }
}

/// What the first bytes of a file that is somewhere else say it is.
///
/// # Errors
/// What reading them says.
pub fn sniff_remote(file: &dyn ReadAt) -> Result<Format> {
    Ok(format_of(&file.read_at(0..file.size().min(16))?, Path::new(&file.name())))
}

fn unread(format: Format, path: &Path) -> Error {
    let unsupported = |what: &str| Error::Unsupported { path: path.into(), what: what.into() };
    match format {
        Format::TorchLegacy => unsupported(
            "legacy PyTorch format (before 1.6, not a zip); load and save it once with a current torch, or use safetensors",
        ),
        Format::LegacyGgml => unsupported("a legacy GGML file, whose header is its family's: see GgmlFile"),
        _ => unsupported("not a weight file: neither safetensors nor a PyTorch zip, GGUF or GGML by its first bytes"),
    }
}
