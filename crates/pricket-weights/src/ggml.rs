//! The reader of legacy GGML files, from before GGUF.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use pricket_kernels::{BlockType, halves_from_pairs};
use serde_json::Value;

use crate::cursor::Cursor;
use crate::error::clip;
use crate::gguf::tensor_bytes;
use crate::source::Source;
use crate::{Bytes, Dtype, Entry, Error, ReadAt, Result, Store};

/// The header layout of a family's legacy GGML files: a sequence of 32-bit fields, including `n_vocab` and `ftype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgmlLayout {
    /// Name of the layout, for descriptions.
    pub name: &'static str,
    /// Names of the fields in order. The flag marks floats; the others are integers.
    pub fields: &'static [(&'static str, bool)],
    /// Block version of quantized files whose `ftype` gives no version.
    pub plain_version: u32,
    /// Name of a tensor that every file with this layout has. It decides between layouts of the same length.
    pub embedding: &'static str,
    /// Contents after the header.
    pub body: GgmlBody,
}

/// The contents of a legacy GGML file after its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlBody {
    /// A vocabulary of `n_vocab` words, then tensors.
    Vocabulary,
    /// Tensors without a vocabulary, in ggmf files of another program with its own version number and type numbers. The
    /// field `ftype` uses the same type numbers.
    Own {
        /// Number in place of the container version.
        version: u32,
        /// Types by number.
        types: &'static [(u32, GgmlType)],
    },
}

/// A tensor type in a file with [`GgmlBody::Own`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    /// 32-bit float.
    F32,
    /// 16-bit float (IEEE half precision).
    F16,
    /// Quantized blocks in the current layout of ggml.
    Block(BlockType),
}

/// A legacy GGML file: one of the containers ggml, ggmf or ggjt, from before GGUF.
///
/// These files do not identify their contents reliably. There are three containers, one header layout per program,
/// three versions of the quantized blocks and, in April 2023, two numberings of the types. The reader tries all
/// combinations and takes one whose records end exactly at the end of the file.
#[derive(Debug)]
pub struct GgmlFile {
    source: Source,
    container: Container,
    layout: GgmlLayout,
    header: BTreeMap<&'static str, Value>,
    vocabulary: Vec<(usize, usize)>,
    version: u32,
    tensors: BTreeMap<String, Record>,
    warnings: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Container {
    name: &'static str,
    /// Whether words have a score.
    scores: bool,
    /// Alignment of tensor data in bytes.
    alignment: usize,
    /// Block version that the container version implies, if any.
    version: Option<u32>,
}

#[derive(Clone, Debug)]
struct Record {
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    len: usize,
}

/// One interpretation of the type numbers of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    /// Whether scales are f16, as in blocks since version 2.
    half_scales: bool,
    /// Whether tensor types use the numbers of `ftype`. Files of three days in April 2023 do.
    file_numbers: bool,
}

impl Reading {
    const ALL: [Self; 4] = [
        Self { half_scales: false, file_numbers: false },
        Self { half_scales: true, file_numbers: false },
        Self { half_scales: false, file_numbers: true },
        Self { half_scales: true, file_numbers: true },
    ];

    fn dtype(self, kind: u32) -> Option<Dtype> {
        let block = |old: BlockType, new: BlockType| Some(Dtype::Block(if self.half_scales { new } else { old }));
        match (kind, self.file_numbers) {
            (0, _) => Some(Dtype::F32),
            (1, _) => Some(Dtype::F16),
            (2, _) => block(BlockType::Q4_0V1, BlockType::Q4_0),
            (3, _) => block(BlockType::Q4_1V1, BlockType::Q4_1),
            (4, false) | (5, true) if !self.half_scales => Some(Dtype::Block(BlockType::Q4_2)),
            (5, false) | (6, true) if !self.half_scales => Some(Dtype::Block(BlockType::Q4_3)),
            (6, false) => Some(Dtype::Block(BlockType::Q5_0)),
            (7, false) => Some(Dtype::Block(BlockType::Q5_1)),
            (8, false) => block(BlockType::Q8_0V1, BlockType::Q8_0),
            (10..=15, false) if self.half_scales => Some(crate::gguf::dtype_of(kind)),
            _ => None,
        }
    }
}

/// The numbering of types in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Types {
    Usual(Reading),
    Own(&'static [(u32, GgmlType)]),
}

impl Types {
    fn dtype(self, kind: u32) -> Option<Dtype> {
        match self {
            Types::Usual(reading) => reading.dtype(kind),
            Types::Own(types) => types.iter().find(|(number, _)| *number == kind).map(|(_, of)| match of {
                GgmlType::F32 => Dtype::F32,
                GgmlType::F16 => Dtype::F16,
                GgmlType::Block(block) => Dtype::Block(*block),
            }),
        }
    }

    /// Returns whether this is a [`Reading`] with `file_numbers`.
    fn file_numbers(self) -> bool {
        matches!(self, Types::Usual(reading) if reading.file_numbers)
    }
}

/// The contents found by one interpretation of a file.
struct Walk {
    header: BTreeMap<&'static str, Value>,
    vocabulary: Vec<(usize, usize)>,
    tensors: BTreeMap<String, Record>,
    file_type: u32,
}

impl GgmlFile {
    /// Opens a file with one of the header `layouts`: reads its header, its vocabulary and the headers of its tensors.
    ///
    /// # Errors
    /// - [`Error::Io`] if the file cannot be read;
    /// - [`Error::Unsupported`] for LoRA adapters and unknown container versions;
    /// - [`Error::Corrupt`] if no interpretation fits, with the error of the one that came furthest.
    pub fn open(path: impl AsRef<Path>, layouts: &[GgmlLayout]) -> Result<Self> {
        Self::new(Source::mapped(path.as_ref())?, layouts)
    }

    /// Opens a remote file as [`GgmlFile::open`] does. Tensor data is read later.
    ///
    /// # Errors
    /// Returns the errors of [`GgmlFile::open`] and of [`ReadAt::read_at`].
    pub fn open_remote(file: Arc<dyn ReadAt>, layouts: &[GgmlLayout]) -> Result<Self> {
        Self::new(Source::remote(file), layouts)
    }

    fn new(source: Source, layouts: &[GgmlLayout]) -> Result<Self> {
        let (container, start, own) = container(&source, layouts)?;
        let mut furthest: Option<(usize, Error)> = None;
        let mut found: Vec<(GgmlLayout, Types, Walk)> = Vec::new();
        for layout in layouts {
            let ways = match (layout.body, own) {
                (GgmlBody::Vocabulary, None) => Reading::ALL.map(Types::Usual).to_vec(),
                (GgmlBody::Own { version, types }, Some(own)) if version == own => vec![Types::Own(types)],
                _ => continue,
            };
            for types in ways {
                match walk(&source, start, container, layout, types) {
                    Ok(walk) => found.push((*layout, types, walk)),
                    Err((at, e)) if furthest.as_ref().is_none_or(|(best, _)| at > *best) => furthest = Some((at, e)),
                    Err(_) => {}
                }
            }
        }
        // Headers of different families may have the same length.
        if found.iter().any(|(layout, _, walk)| walk.tensors.contains_key(layout.embedding)) {
            found.retain(|(layout, _, walk)| walk.tensors.contains_key(layout.embedding));
        }
        // If several interpretations fit, the first is the most common one.
        let Some((layout, types, walk)) = found.into_iter().next() else {
            let nothing = || source.corrupt("no known header layout fits");
            return Err(furthest.map_or_else(nothing, |(_, e)| e));
        };
        let claimed = walk.file_type / 1000;
        let said = if claimed > 0 { claimed } else { container.version.unwrap_or(layout.plain_version) };
        // Version 1 reordered the integers, which does not change sizes. Version 2 made the scales smaller, which does.
        let sized = walk.tensors.values().any(|record| match record.dtype {
            Dtype::Block(kind) => !matches!(kind, BlockType::Q5_0 | BlockType::Q5_1),
            _ => false,
        });
        let version = match (types, sized) {
            (Types::Own(_), _) | (Types::Usual(Reading { half_scales: true, .. }), true) => 2,
            (Types::Usual(_), true) => said.min(1).max(layout.plain_version.min(1)),
            (Types::Usual(_), false) => said,
        };
        let mut warnings = Vec::new();
        // An `ftype` below 1000 claims no version.
        if sized && claimed > 0 && version != claimed {
            warnings.push(format!(
                "the header gives block version {said}, but the sizes of the quantized blocks show version {version}"
            ));
        }
        let Walk { header, vocabulary, tensors, .. } = walk;
        Ok(Self { source, container, layout, header, vocabulary, version, tensors, warnings })
    }

    /// Returns the header layout of the file.
    pub fn layout(&self) -> &GgmlLayout {
        &self.layout
    }

    /// Returns the fields of the header by name, as a JSON object.
    pub fn header(&self) -> Value {
        self.header.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect()
    }

    /// Describes the file in one line: container, header layout and block version.
    pub fn describe(&self) -> String {
        if matches!(self.layout.body, GgmlBody::Own { .. }) {
            return format!("{}, {}", self.container.name, self.layout.name);
        }
        format!("{}, {}, blocks of version {}", self.container.name, self.layout.name, self.version)
    }

    /// Returns warnings, such as a block version that contradicts the header.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns the bytes of vocabulary word `id`, as stored. These files have lost the bytes of tokens that are parts
    /// of UTF-8 characters.
    pub fn word(&self, id: usize) -> Option<Vec<u8>> {
        let &(start, len) = self.vocabulary.get(id)?;
        self.source.read(start, len).ok().map(std::borrow::Cow::into_owned)
    }

    /// Returns the score of vocabulary word `id`, or `None` if the container has no scores.
    pub fn score(&self, id: usize) -> Option<f32> {
        let &(start, len) = self.vocabulary.get(id).filter(|_| self.container.scores)?;
        let bytes = self.source.read(start + len, 4).ok()?;
        Some(f32::from_le_bytes(*bytes.first_chunk()?))
    }

    /// Returns the number of words in the vocabulary.
    pub fn words(&self) -> usize {
        self.vocabulary.len()
    }
}

/// Reads the magic number and the container version. Returns the container, the offset of the header, and the version
/// number of a [`GgmlBody::Own`] file.
fn container(source: &Source, layouts: &[GgmlLayout]) -> Result<(Container, usize, Option<u32>)> {
    let mut cursor = Cursor::new(source, 0);
    let magic = cursor.take(4, "the magic")?;
    let plain = Container { name: "ggml", scores: false, alignment: 1, version: None };
    let made = match &*magic {
        b"lmgg" => return Ok((plain, cursor.at, None)),
        b"fmgg" => Container { name: "ggmf", scores: true, ..plain },
        b"tjgg" => Container { name: "ggjt", scores: true, alignment: 32, version: None },
        b"algg" => {
            let what = "a LoRA adapter (ggla), not a model".into();
            return Err(Error::Unsupported { path: source.path().into(), what });
        }
        _ => return Err(source.corrupt("not a GGML file")),
    };
    let version = cursor.u32("the container's version")?;
    let is_own = |layout: &GgmlLayout| matches!(layout.body, GgmlBody::Own { version: own, .. } if own == version);
    if made.name == "ggmf" && layouts.iter().any(is_own) {
        return Ok((Container { scores: false, ..made }, cursor.at, Some(version)));
    }
    let most = if made.alignment == 1 { 1 } else { 3 };
    if version == 0 || version > most {
        let what = format!("{} version {version} is not supported; the latest supported version is {most}", made.name);
        return Err(Error::Unsupported { path: source.path().into(), what });
    }
    let blocks = (made.alignment > 1).then_some(version - 1);
    Ok((Container { version: blocks, ..made }, cursor.at, None))
}

/// Reads a file under one interpretation. An error includes the offset that was reached.
fn walk(
    source: &Source,
    start: usize,
    container: Container,
    layout: &GgmlLayout,
    types: Types,
) -> Result<Walk, (usize, Error)> {
    let mut cursor = Cursor::new(source, start);
    let mut walk = Walk { header: BTreeMap::new(), vocabulary: Vec::new(), tensors: BTreeMap::new(), file_type: 0 };
    let result = read_header(&mut cursor, layout, types, &mut walk)
        .and_then(|words| match layout.body {
            GgmlBody::Vocabulary => read_vocabulary(&mut cursor, container, words, &mut walk),
            GgmlBody::Own { .. } => Ok(()),
        })
        .and_then(|()| {
            while cursor.left() > 0 {
                read_record(&mut cursor, container, types, &mut walk)?;
            }
            if walk.tensors.is_empty() {
                Err(cursor.corrupt("truncated: no tensor follows the header and the vocabulary"))
            } else {
                Ok(())
            }
        });
    match result {
        Ok(()) => Ok(walk),
        Err(e) => Err((cursor.at, e)),
    }
}

fn read_header(cursor: &mut Cursor<'_>, layout: &GgmlLayout, types: Types, walk: &mut Walk) -> Result<usize> {
    for (name, is_float) in layout.fields {
        let bits = cursor.u32(name)?;
        let value = if *is_float { Value::from(f32::from_bits(bits)) } else { Value::from(bits) };
        walk.header.insert(name, value);
    }
    let field = |name: &str| walk.header.get(name).and_then(Value::as_u64).unwrap_or(0);
    let (words, file_type) = (field("n_vocab") as usize, field("ftype") as u32);
    if words > (cursor.left() / 4).min(1 << 24) {
        return Err(cursor.corrupt(format!("the vocabulary size of {words} words exceeds the file")));
    }
    // Files with this numbering had no versions, and it differs from the usual one only for these two types.
    if types.file_numbers() && !matches!(file_type, 5 | 6) {
        return Err(cursor.corrupt("the type numbers of April 2023 do not apply to this ftype"));
    }
    if file_type % 1000 > 64 || file_type / 1000 > 2 {
        return Err(cursor.corrupt(format!("unknown ftype {file_type}")));
    }
    walk.file_type = file_type;
    Ok(words)
}

fn read_vocabulary(cursor: &mut Cursor<'_>, container: Container, words: usize, walk: &mut Walk) -> Result<()> {
    for id in 0..words {
        let len = cursor.u32("the length of a word of the vocabulary")? as usize;
        if len > cursor.left().min(1 << 16) {
            return Err(cursor.corrupt(format!("word {id} of the vocabulary has an invalid length of {len} bytes")));
        }
        walk.vocabulary.push((cursor.at, len));
        cursor.skip(len, "a word of the vocabulary")?;
        if container.scores {
            cursor.skip(4, "the score of a word of the vocabulary")?;
        }
    }
    Ok(())
}

fn read_record(cursor: &mut Cursor<'_>, container: Container, types: Types, walk: &mut Walk) -> Result<()> {
    let (dims, name_len, kind) = (cursor.u32("a tensor")?, cursor.u32("a tensor")? as usize, cursor.u32("a tensor")?);
    if !(1..=4).contains(&dims) || name_len == 0 || name_len > 256 {
        return Err(cursor.corrupt(format!("invalid tensor header: {dims} dimensions and a name of {name_len} bytes")));
    }
    let mut shape = Vec::with_capacity(dims as usize);
    for _ in 0..dims {
        shape.push(cursor.u32("the size of a tensor")? as usize);
    }
    shape.reverse();
    let name = cursor.take(name_len, "the name of a tensor")?.into_owned();
    let Ok(name) = String::from_utf8(name) else {
        return Err(cursor.corrupt("the name of a tensor is not UTF-8"));
    };
    let shown = clip(&name);
    let Some(dtype) = types.dtype(kind) else {
        return Err(cursor.corrupt(match types {
            Types::Usual(_) => format!("tensor {shown} has the unknown type {kind}"),
            Types::Own(_) => format!(
                "tensor {shown} has the type {kind}, whose block layout in this version of the format is not supported"
            ),
        }));
    };
    let len = tensor_bytes(dtype, &shape).map_err(|what| cursor.corrupt(format!("tensor {shown}: {what}")))?;
    let start = cursor.at.next_multiple_of(container.alignment);
    cursor.skip(start - cursor.at, &shown)?;
    cursor.skip(len, &format!("the data of tensor {shown}, {shape:?} in {dtype},"))?;
    if walk.tensors.insert(name, Record { dtype, shape, start, len }).is_some() {
        return Err(cursor.corrupt(format!("tensor {shown} occurs twice")));
    }
    Ok(())
}

impl Store for GgmlFile {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let record = self.tensors.get(name)?;
        Some(Entry { shape: record.shape.clone(), dtype: record.dtype })
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        let missing = || self.missing(name);
        let record = self.tensors.get(name).ok_or_else(missing)?;
        let bytes = self.source.bytes(record.start, record.len)?;
        match record.dtype {
            // Version 0 stored neighboring values in one byte. Reordering them to the current layout is lossless.
            Dtype::Block(kind) if self.version == 0 && kind.elements() == 32 => {
                let mut bytes = bytes.into_vec();
                halves_from_pairs(kind, &mut bytes);
                Ok(bytes.into())
            }
            _ => Ok(bytes),
        }
    }

    fn origin(&self, _: &str) -> String {
        self.source.path().display().to_string()
    }
}
