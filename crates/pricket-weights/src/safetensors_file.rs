use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;

use crate::mapped::Mapped;
use crate::{Bytes, Dtype, Entry, Error, Result, Store};

/// One safetensors file, memory-mapped, or the same bytes embedded in the program.
#[derive(Debug)]
pub struct SafetensorsFile {
    source: Source,
    tensors: BTreeMap<String, (safetensors::Dtype, Vec<usize>, usize, usize)>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
enum Source {
    File(Mapped),
    Embedded(&'static [u8]),
}

impl Source {
    fn path(&self) -> &Path {
        match self {
            Source::File(file) => file.path(),
            Source::Embedded(_) => Path::new("embedded.safetensors"),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Source::File(file) => file,
            Source::Embedded(bytes) => bytes,
        }
    }
}

impl SafetensorsFile {
    /// Reads the header of `path`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if header and file disagree: a header longer than the file, overlapping or missing
    /// ranges, a shape that does not fill its range.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(Source::File(Mapped::open(path.as_ref())?))
    }

    /// Reads the header of a checkpoint that is compiled into the program.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`].
    pub fn embedded(bytes: &'static [u8]) -> Result<Self> {
        Self::new(Source::Embedded(bytes))
    }

    fn new(source: Source) -> Result<Self> {
        let (header, metadata) = SafeTensors::read_metadata(source.bytes()).map_err(|e| Error::Corrupt {
            path: source.path().into(),
            what: format!("not a valid safetensors file: {e}"),
        })?;
        let base = header + 8;
        let tensors = metadata.tensors().into_iter().map(|(name, info)| {
            let (start, end) = info.data_offsets;
            (name, (info.dtype, info.shape.clone(), base + start, end - start))
        });
        let tensors = tensors.collect();
        let metadata = metadata.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { source, tensors, metadata })
    }

    /// The `__metadata__` of the header: free text by whoever wrote the file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

fn dtype(stored: safetensors::Dtype) -> Option<Dtype> {
    use safetensors::Dtype as S;
    Some(match stored {
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
        _ => return None,
    })
}

impl Store for SafetensorsFile {
    /// Names of the tensors whose type can be read; others are reported when they are asked for.
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let (stored, shape, ..) = self.tensors.get(name)?;
        Some(Entry { shape: shape.clone(), dtype: dtype(*stored)? })
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        let missing = || Error::Missing { origin: self.origin(name), name: name.into() };
        let &(stored, _, start, len) = self.tensors.get(name).ok_or_else(missing)?;
        if dtype(stored).is_none() {
            return Err(Error::Unsupported {
                path: self.source.path().into(),
                what: format!("tensor {name} is stored as {stored:?}, which is not read"),
            });
        }
        Ok(match &self.source {
            Source::File(file) => Bytes::mapped(file, start, len),
            Source::Embedded(bytes) => bytes[start..start + len].to_vec().into(),
        })
    }

    fn origin(&self, _: &str) -> String {
        self.source.path().display().to_string()
    }
}
