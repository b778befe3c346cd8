//! The GGUF reader.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use pricket_kernels::BlockType;
use serde_json::Value;

use crate::cursor::Cursor;
use crate::error::clip;
use crate::parts::Part;
use crate::source::Source;
use crate::{Bytes, Dtype, Entry, Error, ReadAt, Result, Store};

/// Maximum length of keys and tensor names in bytes. They usually have a few dozen.
const MAX_NAME: usize = 256;
/// Maximum length of texts outside of arrays in bytes, such as licenses and templates. Longer ones are not kept in
/// memory.
const MAX_TEXT: usize = 1 << 20;
/// Maximum number of dimensions, as in ggml.
const MAX_DIMS: u32 = 4;

/// A memory-mapped GGUF file, version 1 to 3 (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
///
/// A split file (`split.count`) is read with all its parts. Its metadata is that of the first part. Tensors of
/// unsupported types are listed; reading their bytes is an error.
#[derive(Debug)]
pub struct GgufFile {
    /// The parts in order. A file that is not split has one.
    parts: Vec<Source>,
    version: u32,
    metadata: BTreeMap<String, Meta>,
    tensors: BTreeMap<String, Place>,
}

/// Type, shape (outermost dimension first) and location of a tensor.
#[derive(Debug)]
struct Place {
    /// Index of its part.
    part: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    len: usize,
}

/// A metadata value. Arrays stay in the file, because a header may claim arrays larger than memory.
#[derive(Clone, Debug)]
enum Meta {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Vec<u8>),
    /// A text longer than [`MAX_TEXT`], by its length. It stays in the file.
    Long(usize),
    Array {
        kind: u32,
        count: usize,
        start: usize,
    },
}

/// Returns the bytes of a number of a metadata type, or `None` for strings, arrays and unknown types.
fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Returns the type with a ggml type number.
pub(crate) fn dtype_of(kind: u32) -> Dtype {
    match kind {
        0 => Dtype::F32,
        1 => Dtype::F16,
        24 => Dtype::I8,
        25 => Dtype::I16,
        26 => Dtype::I32,
        27 => Dtype::I64,
        28 => Dtype::F64,
        30 => Dtype::BF16,
        _ => match NUMBERS.iter().find(|(number, _)| *number == kind) {
            Some((_, block)) => Dtype::Block(*block),
            None => Dtype::Other(NAMES.iter().find(|(number, _)| *number == kind).map_or("an unknown type", |n| n.1)),
        },
    }
}

/// The ggml type numbers of the block types.
pub(crate) const NUMBERS: [(u32, BlockType); 12] = [
    (2, BlockType::Q4_0),
    (3, BlockType::Q4_1),
    (6, BlockType::Q5_0),
    (7, BlockType::Q5_1),
    (8, BlockType::Q8_0),
    (9, BlockType::Q8_1),
    (10, BlockType::Q2K),
    (11, BlockType::Q3K),
    (12, BlockType::Q4K),
    (13, BlockType::Q5K),
    (14, BlockType::Q6K),
    (15, BlockType::Q8K),
];

/// Names of unsupported types.
const NAMES: [(u32, &str); 21] = [
    (4, "q4_2, which ggml removed"),
    (5, "q4_3, which ggml removed"),
    (31, "q4_0_4_4, which ggml removed"),
    (32, "q4_0_4_8, which ggml removed"),
    (33, "q4_0_8_8, which ggml removed"),
    (36, "iq4_nl_4_4, which ggml removed"),
    (37, "iq4_nl_4_8, which ggml removed"),
    (38, "iq4_nl_8_8, which ggml removed"),
    (16, "iq2_xxs"),
    (17, "iq2_xs"),
    (18, "iq3_xxs"),
    (19, "iq1_s"),
    (20, "iq4_nl"),
    (21, "iq3_s"),
    (22, "iq2_s"),
    (23, "iq4_xs"),
    (29, "iq1_m"),
    (34, "tq1_0"),
    (35, "tq2_0"),
    (39, "mxfp4"),
    (40, "nvfp4"),
];

/// Reader of a header. In version 1, counts and lengths have 32 bits instead of 64.
struct Reader<'a> {
    cursor: Cursor<'a>,
    version: u32,
}

impl Reader<'_> {
    fn count(&mut self, what: &str) -> Result<usize> {
        let count = if self.version == 1 { u64::from(self.cursor.u32(what)?) } else { self.cursor.u64(what)? };
        usize::try_from(count).map_err(|_| self.cursor.corrupt(format!("{what}: {count} is too large")))
    }

    fn text(&mut self, most: usize, what: &str) -> Result<Vec<u8>> {
        let len = self.count(what)?;
        if len > most {
            return Err(self.cursor.corrupt(format!("{what} has {len} bytes; the limit is {most}")));
        }
        Ok(self.cursor.take(len, what)?.into_owned())
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let bytes = self.text(MAX_NAME, what)?;
        String::from_utf8(bytes).map_err(|_| self.cursor.corrupt(format!("{what} is not UTF-8")))
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Meta> {
        if kind == TEXT {
            let len = self.count(key)?;
            if len > MAX_TEXT {
                self.cursor.skip(len, key)?;
                return Ok(Meta::Long(len));
            }
            return Ok(Meta::Text(self.cursor.take(len, key)?.into_owned()));
        }
        if kind == ARRAY {
            let (kind, count, start) = self.skip_array(key, 0)?;
            return Ok(Meta::Array { kind, count, start });
        }
        let Some(width) = width(kind) else {
            return Err(self.cursor.corrupt(format!("{key} has the unknown value type {kind}")));
        };
        let bytes = self.cursor.take(width, key)?;
        Ok(number(kind, &bytes))
    }
}

impl Reader<'_> {
    /// Skips an array. Returns the type of its elements, their number and their offset.
    fn skip_array(&mut self, key: &str, depth: u32) -> Result<(u32, usize, usize)> {
        let kind = self.cursor.u32(key)?;
        let count = self.count(key)?;
        let start = self.cursor.at;
        if let Some(width) = width(kind) {
            self.cursor.skip(count.saturating_mul(width), key)?;
            return Ok((kind, count, start));
        }
        // Each element takes at least 4 bytes, so a count larger than the file is rejected before the loop.
        if count > self.cursor.left() / 4 {
            return Err(self.cursor.corrupt(format!("truncated: {key} has {count} elements, more than the file")));
        }
        for _ in 0..count {
            match kind {
                TEXT => {
                    let len = self.count(key)?;
                    self.cursor.skip(len, key)?;
                }
                ARRAY if depth < 4 => {
                    self.skip_array(key, depth + 1)?;
                }
                _ => {
                    return Err(self
                        .cursor
                        .corrupt(format!("{key} is an array of type {kind}, which is unknown or nested too deeply")));
                }
            }
        }
        Ok((kind, count, start))
    }
}

/// Converts the bytes of a number of a metadata type.
fn number(kind: u32, bytes: &[u8]) -> Meta {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let unsigned = u64::from_le_bytes(wide);
    // Shifting left and right again extends the sign to 64 bits.
    let signed = || {
        let unused = 64 - 8 * bytes.len() as u32;
        ((unsigned << unused) as i64) >> unused
    };
    match kind {
        1 | 3 | 5 | 11 => Meta::Signed(signed()),
        6 => Meta::Float(f64::from(f32::from_bits(unsigned as u32))),
        12 => Meta::Float(f64::from_bits(unsigned)),
        7 => Meta::Bool(unsigned != 0),
        _ => Meta::Unsigned(unsigned),
    }
}

impl GgufFile {
    /// Opens a file and reads its header. If it is a part of a split file, opens all parts.
    ///
    /// # Errors
    /// - [`Error::Io`] if a file cannot be read;
    /// - [`Error::Corrupt`] if a header is invalid, with the key or tensor;
    /// - [`Error::NotFound`] if a part is missing;
    /// - [`Error::Unsupported`] for other versions and big-endian files.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let given = Self::read(Source::mapped(path)?)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let named = Part::of(&name).filter(|part| part.count > 1);
        let (number, count) = match (given.split(), named) {
            (None, None) => return Ok(given),
            (None, Some(part)) => (part.number, part.count),
            (Some(split), Some(part)) if split == (part.number, part.count) => split,
            (Some((number, count)), _) => {
                let what = format!(
                    "split.no and split.count give part {number} of {count}; rename the file to end in \
                     -{number:05}-of-{count:05}.gguf, so that the other parts are found"
                );
                return Err(given.parts[0].corrupt(what));
            }
        };
        let names = named.map(|part| part.names()).unwrap_or_default();
        let mut given = Some(given);
        let mut whole: Option<Self> = None;
        for (position, name) in (1..=count).zip(&names) {
            let path = path.with_file_name(name);
            let part = match given.take_if(|_| position == number) {
                Some(given) => given,
                None if path.exists() => Self::read(Source::mapped(&path)?)?,
                None => return Err(Error::NotFound { path, what: format!("part {position} of {count} is missing") }),
            };
            if part.split().is_some_and(|split| split != (position, count)) {
                return Err(
                    part.parts[0].corrupt(format!("split.no and split.count do not give part {position} of {count}"))
                );
            }
            match &mut whole {
                Some(whole) => whole.append(part)?,
                None => whole = Some(part),
            }
        }
        let whole = whole.unwrap_or_else(|| unreachable!("a split has at least two parts"));
        let found = whole.tensors.len() as u64;
        match whole.number("split.tensors.count") {
            Some(claimed) if claimed > found => Err(whole.parts[0]
                .corrupt(format!("split.tensors.count is {claimed}, but the {count} parts have {found} tensors"))),
            _ => Ok(whole),
        }
    }

    /// Returns the number of this part, from 1, and the number of parts. Returns `None` for a file that is not split.
    fn split(&self) -> Option<(u32, u32)> {
        let number = |key: &str| self.number(key).and_then(|n| u32::try_from(n).ok());
        let count = number("split.count").filter(|&count| count > 1)?;
        Some((number("split.no").unwrap_or(0).saturating_add(1), count))
    }

    /// Returns a metadata value that is a non-negative integer.
    fn number(&self, key: &str) -> Option<u64> {
        match self.metadata.get(key)? {
            Meta::Unsigned(n) => Some(*n),
            Meta::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// Adds the tensors of the next part.
    fn append(&mut self, part: Self) -> Result<()> {
        let number = self.parts.len();
        for (name, place) in part.tensors {
            if self.tensors.contains_key(&name) {
                return Err(part.parts[0].corrupt(format!("tensor {} is also in an earlier part", clip(&name))));
            }
            self.tensors.insert(name, Place { part: number, ..place });
        }
        self.parts.extend(part.parts);
        Ok(())
    }

    /// Opens a remote file and reads its header.
    ///
    /// # Errors
    /// Returns the errors of [`GgufFile::open`] and of [`ReadAt::read_at`], and [`Error::Unsupported`] for a part of a
    /// split file.
    pub fn open_remote(file: Arc<dyn ReadAt>) -> Result<Self> {
        Self::new(Source::remote(file))
    }

    pub(crate) fn new(source: Source) -> Result<Self> {
        let file = Self::read(source)?;
        match file.split() {
            Some((number, count)) => {
                let what =
                    format!("part {number} of {count} of a split GGUF file; download all parts into one directory");
                Err(Error::Unsupported { path: file.parts[0].path().into(), what })
            }
            None => Ok(file),
        }
    }

    /// Reads the header of one file, without its other parts.
    fn read(source: Source) -> Result<Self> {
        let mut cursor = Cursor::new(&source, 0);
        if *cursor.take(4, "the magic")? != *b"GGUF" {
            return Err(source.corrupt("not a GGUF file"));
        }
        let version = cursor.u32("the version")?;
        if version.swap_bytes() < 16 && version >= 16 {
            let what = "big-endian GGUF files are not supported".into();
            return Err(Error::Unsupported { path: source.path().into(), what });
        }
        if !(1..=3).contains(&version) {
            let what = format!("GGUF version {version} is not supported; expected 1 to 3");
            return Err(Error::Unsupported { path: source.path().into(), what });
        }
        let mut reader = Reader { cursor, version };
        let tensor_count = reader.count("the number of tensors")?;
        let value_count = reader.count("the number of metadata values")?;
        // Each takes at least 12 bytes, so a header cannot claim more than the file can hold.
        let most = reader.cursor.left() / 12;
        if tensor_count > most || value_count > most {
            let what = format!("truncated: {tensor_count} tensors and {value_count} values in {} bytes", source.len());
            return Err(source.corrupt(what));
        }
        let mut metadata = BTreeMap::new();
        for _ in 0..value_count {
            let key = reader.name("the key of a metadata value")?;
            let kind = reader.cursor.u32(&clip(&key))?;
            let value = reader.value(kind, &format!("metadata {}", clip(&key)))?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(source.corrupt(format!("metadata {} occurs twice", clip(&key))));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Meta::Unsigned(n)) if n.is_power_of_two() && (8..=1 << 20).contains(n) => *n as usize,
            Some(other) => return Err(source.corrupt(format!("invalid general.alignment {other:?}"))),
        };
        let mut headers = Vec::with_capacity(tensor_count.min(1 << 16));
        for _ in 0..tensor_count {
            headers.push(Self::tensor(&mut reader)?);
        }
        let base = reader.cursor.at.next_multiple_of(alignment);
        let tensors = Self::places(&source, headers, base, alignment)?;
        Ok(Self { parts: vec![source], version, metadata, tensors })
    }

    /// Reads name, type, shape and offset of the next tensor.
    fn tensor(reader: &mut Reader<'_>) -> Result<(String, Dtype, Vec<usize>, u64)> {
        let name = reader.name("the name of a tensor")?;
        let shown = clip(&name);
        let dims = reader.cursor.u32(&shown)?;
        if dims == 0 || dims > MAX_DIMS {
            return Err(reader.cursor.corrupt(format!("tensor {shown} has {dims} dimensions")));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            shape.push(reader.count(&shown)?);
        }
        // ggml stores the innermost dimension first.
        shape.reverse();
        let dtype = dtype_of(reader.cursor.u32(&shown)?);
        let offset = reader.cursor.u64(&shown)?;
        Ok((name, dtype, shape, offset))
    }

    /// Checks that every tensor lies inside the file and that no two overlap.
    fn places(
        source: &Source,
        headers: Vec<(String, Dtype, Vec<usize>, u64)>,
        base: usize,
        alignment: usize,
    ) -> Result<BTreeMap<String, Place>> {
        let mut tensors = BTreeMap::new();
        let mut ranges = Vec::with_capacity(headers.len());
        for (name, dtype, shape, offset) in headers {
            let shown = clip(&name);
            let len = tensor_bytes(dtype, &shape).map_err(|what| source.corrupt(format!("tensor {shown}: {what}")))?;
            let start = usize::try_from(offset).ok().filter(|offset| offset.is_multiple_of(alignment));
            let start = start.and_then(|offset| base.checked_add(offset));
            let end = start.and_then(|start| start.checked_add(len)).filter(|&end| end <= source.len());
            let (Some(start), Some(end)) = (start, end) else {
                return Err(source.corrupt(format!(
                    "truncated or misaligned: tensor {shown} of {len} bytes at data offset {offset} does not fit in the file of {} bytes",
                    source.len()
                )));
            };
            ranges.push((start, end, name.clone()));
            if tensors.insert(name, Place { part: 0, dtype, shape, start, len }).is_some() {
                return Err(source.corrupt(format!("tensor {shown} occurs twice")));
            }
        }
        ranges.sort();
        if let Some(pair) = ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            let (a, b) = (clip(&pair[0].2), clip(&pair[1].2));
            return Err(source.corrupt(format!("tensors {a} and {b} overlap")));
        }
        Ok(tensors)
    }

    /// Returns the version of the format, 1 to 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Returns the metadata as a JSON object: numbers, texts and booleans by key. Arrays appear as their length
    /// (`{"array": 3}`), long texts as their length in bytes.
    pub fn metadata(&self) -> Value {
        let value = |meta: &Meta| match meta {
            Meta::Unsigned(n) => Value::from(*n),
            Meta::Signed(n) => Value::from(*n),
            Meta::Float(x) => Value::from(*x),
            Meta::Bool(b) => Value::from(*b),
            Meta::Text(text) => Value::from(String::from_utf8_lossy(text)),
            Meta::Long(bytes) => serde_json::json!({ "text of bytes": bytes }),
            Meta::Array { count, .. } => serde_json::json!({ "array": count }),
        };
        self.metadata.iter().map(|(key, meta)| (key.clone(), value(meta))).collect()
    }

    /// Returns type, length and offset of a metadata array whose type is among `kinds`.
    fn array(&self, key: &str, kinds: &[u32]) -> Option<(u32, usize, usize)> {
        match self.metadata.get(key) {
            Some(Meta::Array { kind, count, start }) if kinds.contains(kind) => Some((*kind, *count, *start)),
            _ => None,
        }
    }

    /// Returns a metadata array of strings, which need not be UTF-8, or `None` if `key` is not such an array.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<Vec<u8>>>> {
        let Some((_, count, start)) = self.array(key, &[TEXT]) else { return Ok(None) };
        let mut reader = Reader { cursor: Cursor::new(&self.parts[0], start), version: self.version };
        let mut out = Vec::with_capacity(count);
        for _ in 0..count {
            let len = reader.count(key)?;
            out.push(reader.cursor.take(len, key)?.into_owned());
        }
        Ok(Some(out))
    }

    /// Returns a metadata array of 32-bit floats, or `None` if `key` is not such an array.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some((_, count, start)) = self.array(key, &[6]) else { return Ok(None) };
        let mut cursor = Cursor::new(&self.parts[0], start);
        let bytes = cursor.take(count.saturating_mul(4), key)?;
        Ok(Some(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
    }

    /// Returns a metadata array of integers of any width, or `None` if `key` is not such an array.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        let Some((kind, count, start)) = self.array(key, &[0, 1, 2, 3, 4, 5, 10, 11]) else { return Ok(None) };
        let mut cursor = Cursor::new(&self.parts[0], start);
        let width = width(kind).unwrap_or(1);
        let bytes = cursor.take(count.saturating_mul(width), key)?;
        let value = |bytes: &[u8]| match number(kind, bytes) {
            Meta::Signed(n) => n,
            Meta::Unsigned(n) => n as i64,
            _ => 0,
        };
        Ok(Some(bytes.chunks_exact(width).map(value).collect()))
    }
}

/// Returns the bytes of a tensor, or 0 for a type of unknown size. Fails with a message for shapes without elements,
/// with too many elements, or with rows that are not whole blocks.
pub(crate) fn tensor_bytes(dtype: Dtype, shape: &[usize]) -> Result<usize, String> {
    let elements = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n).filter(|&n| n < 1 << 48));
    let elements = elements.filter(|&n| n > 0).ok_or_else(|| format!("invalid shape {shape:?}"))?;
    if let (Dtype::Block(kind), Some(columns)) = (dtype, shape.last())
        && !columns.is_multiple_of(kind.elements())
    {
        return Err(format!("rows of {columns} elements are not whole {kind} blocks of {}", kind.elements()));
    }
    Ok(dtype.bytes(elements))
}

impl Store for GgufFile {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let place = self.tensors.get(name)?;
        Some(Entry { shape: place.shape.clone(), dtype: place.dtype })
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        let missing = || self.missing(name);
        let place = self.tensors.get(name).ok_or_else(missing)?;
        if let Dtype::Other(kind) = place.dtype {
            let what = format!("tensor {name} is stored as {kind}, which is not supported");
            return Err(Error::Unsupported { path: self.parts[place.part].path().into(), what });
        }
        self.parts[place.part].bytes(place.start, place.len)
    }

    fn origin(&self, name: &str) -> String {
        let part = self.tensors.get(name).map_or(0, |place| place.part);
        self.parts[part].path().display().to_string()
    }
}
