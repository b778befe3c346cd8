//! Detection of weight file formats by their first bytes.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use crate::source::Source;
use crate::{Error, GgufFile, ReadAt, Result, SafetensorsFile, Store, TorchFile};

/// The format of a weight file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// safetensors.
    Safetensors,
    /// PyTorch zip format (1.6 and later).
    TorchZip,
    /// PyTorch pickle format without a zip (before 1.6).
    TorchLegacy,
    /// GGUF.
    Gguf,
    /// A container from before GGUF: ggml, ggmf or ggjt.
    LegacyGgml,
    /// Any other format.
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

/// Number of leading bytes that identify a format.
const HEAD: usize = 64;

/// Detects the format of a file by its first bytes.
///
/// # Errors
/// - [`Error::Io`] if the file cannot be read;
/// - [`Error::Corrupt`] if `path` is not a regular file;
/// - [`Error::Unsupported`] for a placeholder of a file that was not downloaded, such as a Git LFS pointer.
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

/// Detects a placeholder of a file that was not downloaded: a Git LFS pointer, a web page, or the error of a server.
///
/// Returns a description of the placeholder with a remedy, or `None` for any other file.
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
        // PROTO 2, then LONG1 with ten bytes: the magic number of torch, 0x1950a86a20f9469cfc6c.
        [0x80, _, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, ..] => Format::TorchLegacy,
        [_, _, _, _, _, _, _, _, b'{', ..] => Format::Safetensors,
        _ if path.extension().is_some_and(|e| e == "safetensors") => Format::Safetensors,
        _ => Format::Unknown,
    }
}

/// Opens one weight file, without the other shards of its checkpoint. A split GGUF file is opened with all its parts.
///
/// # Errors
/// Returns the errors of [`crate::open`].
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

/// Opens one remote weight file and reads its headers.
///
/// # Errors
/// Returns the errors of [`crate::open`] and of [`ReadAt::read_at`].
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

/// Detects the format of a remote file by its first bytes.
///
/// # Errors
/// Returns the errors of [`ReadAt::read_at`].
pub fn sniff_remote(file: &dyn ReadAt) -> Result<Format> {
    Ok(format_of(&file.read_at(0..file.size().min(16))?, Path::new(&file.name())))
}

/// Returns the error for a format that cannot be opened without further information.
fn unread(format: Format, path: &Path) -> Error {
    let unsupported = |what: &str| Error::Unsupported { path: path.into(), what: what.into() };
    match format {
        Format::TorchLegacy => unsupported(
            "legacy PyTorch format (before 1.6, not a zip); load and save it with a current PyTorch, or use safetensors",
        ),
        Format::LegacyGgml => unsupported("a legacy GGML file; open it with GgmlFile and the layouts of its family"),
        _ => unsupported("not a weight file: expected safetensors, a PyTorch zip, GGUF or GGML"),
    }
}
