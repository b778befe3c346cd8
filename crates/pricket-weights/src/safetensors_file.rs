//! The safetensors reader.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::Metadata;

use crate::error::clip;
use crate::source::Source;
use crate::{Bytes, Dtype, Entry, Error, Result, Store};

/// Maximum size of a header in bytes. The header of a 20B model in one file has about 100 kB.
const MAX_HEADER: u64 = 4 << 20;

/// Maximum number of dimensions. No weight has more, and the limit keeps messages with shapes short.
const MAX_DIMS: usize = 8;

/// A safetensors file: memory-mapped, remote, or embedded in the program.
#[derive(Debug)]
pub struct SafetensorsFile {
    source: Source,
    /// Type, shape, offset in the file and length in bytes of each tensor.
    tensors: BTreeMap<String, (safetensors::Dtype, Vec<usize>, usize, usize)>,
    metadata: BTreeMap<String, String>,
    /// Stored names of tensors that share memory. `save_model` of safetensors stores one of them and records the others
    /// in the metadata.
    aliases: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be read, and [`Error::Corrupt`] if its header is invalid: longer than
    /// the file, with overlapping or missing ranges, or with a shape that does not match its range.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(Source::mapped(path.as_ref())?)
    }

    /// Reads the header of a checkpoint embedded in the program.
    ///
    /// # Errors
    /// Returns [`Error::Corrupt`] if the header is invalid.
    pub fn embedded(bytes: &'static [u8]) -> Result<Self> {
        Self::new(Source::Embedded(bytes))
    }

    pub(crate) fn new(source: Source) -> Result<Self> {
        let corrupt = |what: String| Error::Corrupt {
            path: source.path().into(),
            what: format!("not a valid safetensors file: {}", clip(&what)),
        };
        if source.len() < 8 {
            return Err(corrupt("truncated: the file is shorter than 8 bytes".into()));
        }
        let length = source.read(0, 8)?.first_chunk::<8>().map_or(u64::MAX, |length| u64::from_le_bytes(*length));
        if length > MAX_HEADER {
            return Err(corrupt(format!("the header length of {length} bytes is too large")));
        }
        let base = 8 + length as usize;
        if base > source.len() {
            return Err(corrupt(format!("truncated: the file ends inside its header of {length} bytes")));
        }
        let header = source.read(8, length as usize)?;
        // Parsing checks that every shape matches its range and that the ranges have no gaps.
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| corrupt(e.to_string()))?;
        if metadata.data_len().checked_add(base) != Some(source.len()) {
            let (claimed, found) = (metadata.data_len(), source.len() - base);
            return Err(corrupt(format!("the header describes {claimed} bytes of tensors; the file has {found}")));
        }
        if let Some((name, info)) = metadata.tensors().iter().find(|(_, info)| info.shape.len() > MAX_DIMS) {
            return Err(corrupt(format!("tensor {} has too many dimensions: {}", clip(name), info.shape.len())));
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| {
            let (start, end) = info.data_offsets;
            (name, (info.dtype, info.shape.clone(), base + start, end - start))
        });
        let tensors: BTreeMap<String, _> = tensors.collect();
        drop(header);
        let metadata: BTreeMap<String, String> =
            metadata.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        let is_alias =
            |(name, stored): &(&String, &String)| !tensors.contains_key(*name) && tensors.contains_key(*stored);
        let aliases = metadata.iter().filter(is_alias).map(|(name, stored)| (name.clone(), stored.clone())).collect();
        Ok(Self { source, tensors, metadata, aliases })
    }

    /// Returns the `__metadata__` of the header: free text from the program that wrote the file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

fn dtype(stored: safetensors::Dtype) -> Dtype {
    use safetensors::Dtype as S;
    match stored {
        S::F64 => Dtype::F64,
        S::F32 => Dtype::F32,
        S::F16 => Dtype::F16,
        S::BF16 => Dtype::BF16,
        S::I64 => Dtype::I64,
        S::I32 => Dtype::I32,
        S::I16 => Dtype::I16,
        S::I8 => Dtype::I8,
        S::U8 => Dtype::U8,
        S::BOOL => Dtype::Bool,
        S::U64 => Dtype::Other("U64"),
        S::U32 => Dtype::Other("U32"),
        S::U16 => Dtype::Other("U16"),
        S::F8_E4M3 => Dtype::Other("F8_E4M3"),
        S::F8_E5M2 => Dtype::Other("F8_E5M2"),
        _ => Dtype::Other("an unknown type"),
    }
}

impl Store for SafetensorsFile {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let (stored, shape, ..) = self.tensors.get(name)?;
        Some(Entry { shape: shape.clone(), dtype: dtype(*stored) })
    }

    fn resolve<'a>(&'a self, name: &'a str) -> &'a str {
        self.aliases.get(name).map_or(name, String::as_str)
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        let missing = || self.missing(name);
        let &(_, _, start, len) = self.tensors.get(name).ok_or_else(missing)?;
        self.source.bytes(start, len)
    }

    fn origin(&self, _: &str) -> String {
        self.source.path().display().to_string()
    }
}
