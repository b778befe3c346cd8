use std::collections::BTreeMap;
use std::path::{Component, Path};

use crate::error::clip;
use crate::{Bytes, Entry, Error, Result, Store, open_file};

/// An index with more than this is no index of a checkpoint (a 30B one is 20 kB).
const MAX_INDEX: u64 = 4 << 20;

/// A checkpoint in several files, as `*.index.json` maps its tensors to them.
pub struct Sharded {
    index: String,
    shards: Vec<Box<dyn Store>>,
    /// Tensor to position in `shards`.
    tensors: BTreeMap<String, usize>,
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Which file holds each tensor, as the bytes of an `*.index.json` say; `path` is what messages call it.
///
/// # Errors
/// [`Error::Corrupt`] if they are no index, [`Error::Refused`] for a shard that is not a plain file name.
pub fn shard_map(index: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    let corrupt = |what: String| Error::Corrupt { path: path.into(), what };
    if index.len() as u64 > MAX_INDEX {
        return Err(corrupt(format!("an index of {} bytes is out of all proportion", index.len())));
    }
    let map: Index =
        serde_json::from_slice(index).map_err(|e| corrupt(format!("not a shard index: {}", clip(&e.to_string()))))?;
    match map.weight_map.values().find(|file| !is_plain_file_name(file)) {
        Some(file) => Err(Error::Refused {
            path: path.into(),
            what: format!("the shard name {:?} is not a plain file name", clip(file)),
        }),
        None => Ok(map.weight_map),
    }
}

impl Sharded {
    /// Reads the index and the header of every shard that it names.
    ///
    /// # Errors
    /// [`Error::Refused`] for a shard that is not a plain file name beside the index, [`Error::NotFound`] for one
    /// that is not there, [`Error::Corrupt`] if the index names a tensor that its shard does not hold.
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
            return Err(corrupt(format!("an index of {size} bytes is out of all proportion")));
        }
        let map = shard_map(&std::fs::read(index).map_err(io)?, index)?;
        let folder = index.parent().unwrap_or(Path::new("."));
        let mut positions = BTreeMap::new();
        let mut shards: Vec<Box<dyn Store>> = Vec::new();
        let mut tensors = BTreeMap::new();
        for (name, file) in &map {
            let position = if let Some(&position) = positions.get(file) {
                position
            } else {
                let path = folder.join(file);
                if !path.exists() {
                    return Err(Error::NotFound {
                        path,
                        what: format!("the shard is named by {} but is not there", index.display()),
                    });
                }
                shards.push(open_file(&path)?);
                positions.insert(file, shards.len() - 1);
                shards.len() - 1
            };
            if shards[position].entry(name).is_none() {
                return Err(corrupt(format!("it says that {} holds {}, which it does not", clip(file), clip(name))));
            }
            tensors.insert(name.clone(), position);
        }
        Ok(Self { index: index.display().to_string(), shards, tensors })
    }

    fn shard(&self, name: &str) -> Option<&dyn Store> {
        self.tensors.get(name).map(|&position| &*self.shards[position])
    }
}

impl std::fmt::Debug for Sharded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sharded({}, {} shards, {} tensors)", self.index, self.shards.len(), self.tensors.len())
    }
}

/// One component, nothing that any platform reads as a path.
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

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        let missing = || Error::Missing { origin: self.index.clone(), name: name.into() };
        self.shard(name).ok_or_else(missing)?.bytes(name)
    }

    fn origin(&self, name: &str) -> String {
        self.shard(name).map_or_else(|| self.index.clone(), |shard| shard.origin(name))
    }
}
