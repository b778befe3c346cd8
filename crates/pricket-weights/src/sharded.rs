//! Checkpoints in several files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use crate::error::clip;
use crate::format::open_one;
use crate::json::parse_json;
use crate::parts::parts_of;
use crate::{Bytes, Entry, Error, Result, Store};

/// Maximum size of an index in bytes. The index of a 30B checkpoint has 20 kB.
const MAX_INDEX: u64 = 4 << 20;

/// A checkpoint in several files: the shards of an `*.index.json`, or all numbered parts.
///
/// Tensors in a shard that the index does not list are available, as in transformers. Tensors that the index lists but
/// the shard lacks are an error only when they are read, because old indexes list attention masks that were never
/// saved.
pub struct Sharded {
    origin: String,
    shards: Vec<Box<dyn Store>>,
    /// Positions in `shards` by tensor name.
    tensors: BTreeMap<String, usize>,
    /// Tensors that the index lists but their shard lacks, with the position of the shard.
    lacking: BTreeMap<String, usize>,
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Parses an `*.index.json` and returns the file name of each tensor. Messages call the index `path`.
///
/// # Errors
/// Returns [`Error::Corrupt`] if the bytes are not a valid index, and [`Error::Refused`] if a shard is not a plain file
/// name.
pub fn shard_map(index: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    let corrupt = |what: String| Error::Corrupt { path: path.into(), what };
    if index.len() as u64 > MAX_INDEX {
        return Err(corrupt(format!("the index has {} bytes; the limit is {MAX_INDEX}", index.len())));
    }
    let map: Index = parse_json(index)
        .and_then(serde_json::from_value)
        .map_err(|e| corrupt(format!("not a shard index: {}", clip(&e.to_string()))))?;
    match map.weight_map.values().find(|file| !is_plain_file_name(file)) {
        Some(file) => Err(Error::Refused {
            path: path.into(),
            what: format!("the shard name {:?} is not a plain file name", clip(file)),
        }),
        None => Ok(map.weight_map),
    }
}

impl Sharded {
    /// Opens an index: reads the index and the headers of all its shards.
    ///
    /// # Errors
    /// - [`Error::Refused`] if a shard is not a plain file name;
    /// - [`Error::NotFound`] if a shard is missing;
    /// - [`Error::Corrupt`] if the index is invalid, or the shards have none of its tensors.
    pub fn open(index: impl AsRef<Path>) -> Result<Self> {
        let index = index.as_ref();
        let io = |source| Error::Io { path: index.into(), source };
        let corrupt = |what: String| Error::Corrupt { path: index.into(), what };
        let meta = std::fs::metadata(index).map_err(io)?;
        let size = meta.len();
        if !meta.is_file() {
            return Err(corrupt("not a regular file".into()));
        }
        if size > MAX_INDEX {
            return Err(corrupt(format!("the index has {size} bytes; the limit is {MAX_INDEX}")));
        }
        let map = shard_map(&std::fs::read(index).map_err(io)?, index)?;
        let files: BTreeSet<&String> = map.values().collect();
        let named = format!("this shard of {} is missing", index.display());
        let shards = open_all(parent(index), &files, &named)?;
        let positions: BTreeMap<&String, usize> = files.into_iter().zip(0..).collect();
        let holds = |name: &str, position: usize| shards[position].entry(shards[position].resolve(name)).is_some();
        let (mut tensors, lacking): (BTreeMap<_, _>, BTreeMap<_, _>) =
            map.iter().map(|(name, file)| (name.clone(), positions[file])).partition(|(name, at)| holds(name, *at));
        if let (true, Some((name, at))) = (tensors.is_empty(), lacking.first_key_value()) {
            let shard = shards[*at].origin(name);
            return Err(corrupt(format!(
                "the index lists tensors that are not in their shards: {} has no tensor {}",
                clip(&shard),
                clip(name)
            )));
        }
        for (position, shard) in shards.iter().enumerate() {
            for name in shard.names() {
                tensors.entry(name).or_insert(position);
            }
        }
        Ok(Self { origin: index.display().to_string(), shards, tensors, lacking })
    }

    /// Opens all numbered parts of the checkpoint that `part` belongs to, such as `model-00001-of-00002.safetensors`.
    ///
    /// # Errors
    /// Returns [`Error::NotFound`] if a part is missing, and [`Error::Corrupt`] if two parts have the same tensor.
    pub fn open_parts(part: &Path) -> Result<Self> {
        let name = part.file_name().unwrap_or_default().to_string_lossy();
        let files = parts_of(&name).unwrap_or_else(|| vec![name.clone().into_owned()]);
        let missing = format!("this part is missing; {name} is one of {} parts", files.len());
        let shards = open_all(parent(part), &files, &missing)?;
        let mut tensors = BTreeMap::new();
        for (position, shard) in shards.iter().enumerate() {
            for name in shard.names() {
                if let Some(other) = tensors.insert(name.clone(), position) {
                    let what = format!("tensor {} is also in {}", clip(&name), clip(&files[other]));
                    return Err(Error::Corrupt { path: shard.origin(&name).into(), what });
                }
            }
        }
        Ok(Self { origin: part.display().to_string(), shards, tensors, lacking: BTreeMap::new() })
    }

    fn shard(&self, name: &str) -> Option<&dyn Store> {
        self.tensors.get(name).map(|&position| &*self.shards[position])
    }
}

/// Opens files of one directory. `missing` is the message for a missing file.
fn open_all(
    directory: &Path,
    files: impl IntoIterator<Item = impl AsRef<str>>,
    missing: &str,
) -> Result<Vec<Box<dyn Store>>> {
    let open = |file: &str| {
        let path = directory.join(file);
        if !path.exists() {
            return Err(Error::NotFound { path, what: missing.into() });
        }
        open_one(&path)
    };
    files.into_iter().map(|file| open(file.as_ref())).collect()
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

impl std::fmt::Debug for Sharded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sharded({}, {} shards, {} tensors)", self.origin, self.shards.len(), self.tensors.len())
    }
}

/// Returns whether a name is one path component on every platform.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(_))) && components.next().is_none();
    plain && name.len() <= 255 && !name.contains(|c: char| c.is_control() || matches!(c, '/' | '\\' | ':'))
}

impl Store for Sharded {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        self.shard(name)?.entry(name)
    }

    fn resolve<'a>(&'a self, name: &'a str) -> &'a str {
        let other = || self.shards.iter().map(|shard| shard.resolve(name)).find(|stored| *stored != name);
        if self.tensors.contains_key(name) { name } else { other().unwrap_or(name) }
    }

    fn claims(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.lacking.contains_key(name)
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        let missing = || self.missing(name);
        self.shard(name).ok_or_else(missing)?.bytes(name)
    }

    fn origin(&self, name: &str) -> String {
        let lacking = || self.lacking.get(name).map(|&position| self.shards[position].origin(name));
        self.shard(name).map(|shard| shard.origin(name)).or_else(lacking).unwrap_or_else(|| self.origin.clone())
    }
}
