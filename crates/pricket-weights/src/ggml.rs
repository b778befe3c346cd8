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

/// The header of a family's files from before GGUF: 32-bit fields in their order, `n_vocab` and `ftype` among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgmlLayout {
    /// What it is called.
    pub name: &'static str,
    /// The fields; those that are marked are floats.
    pub fields: &'static [(&'static str, bool)],
    /// The block version of quantized files whose `ftype` says none.
    pub plain_version: u32,
    /// A tensor that every file with this header has: where several headers fit, it tells which is meant.
    pub embedding: &'static str,
    /// How the file goes on.
    pub body: GgmlBody,
}

/// What follows the header of a file of the containers before GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlBody {
    /// A vocabulary of `n_vocab` words, then tensors.
    Vocabulary,
    /// Tensors at once, in files that another program marked as ggmf with this version and a numbering of types of its own. The field
    /// `ftype` has that numbering too.
    Own {
        /// The number in the place of the container's version.
        version: u32,
        /// The types by their numbers.
        types: &'static [(u32, GgmlType)],
    },
}

/// A type of tensors in such a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// Blocks of today.
    Block(BlockType),
}

/// A file in one of the containers before GGUF: ggml, ggmf or ggjt.
///
/// Nothing in them says for sure what they hold: three containers, a header for each program that wrote them, three
/// versions of the quantized blocks, and in April 2023 two numberings of the types. What reads the records exactly to
/// the end of the file is what it is.
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
    /// Where the data of a tensor may begin.
    alignment: usize,
    /// The block version that it stands for, where it does.
    version: Option<u32>,
}

#[derive(Clone, Debug)]
struct Record {
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    len: usize,
}

/// One way of reading the types of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    /// Whether scales are f16, as from version 2 of the blocks on.
    half_scales: bool,
    /// Whether a tensor's type is numbered as the file's is, as on three days of April 2023.
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

/// How types are numbered in a file.
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

    /// As the usual ways of reading say it.
    fn file_numbers(self) -> bool {
        matches!(self, Types::Usual(reading) if reading.file_numbers)
    }
}

/// What a way of reading found, or how far it came.
struct Walk {
    header: BTreeMap<&'static str, Value>,
    vocabulary: Vec<(usize, usize)>,
    tensors: BTreeMap<String, Record>,
    file_type: u32,
}

impl GgmlFile {
    /// Reads the header, vocabulary and records of `path`, which has one of `layouts`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] with what was wrong under the reading that came furthest.
    pub fn open(path: impl AsRef<Path>, layouts: &[GgmlLayout]) -> Result<Self> {
        Self::new(Source::mapped(path.as_ref())?, layouts)
    }

    /// The same of a file that is somewhere else; its vocabulary and the heads of its records are read now.
    ///
    /// # Errors
    /// As [`GgmlFile::open`], and what reading says.
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
        // Headers of several families may have one length.
        if found.iter().any(|(layout, _, walk)| walk.tensors.contains_key(layout.embedding)) {
            found.retain(|(layout, _, walk)| walk.tensors.contains_key(layout.embedding));
        }
        // Where types are such that several readings come to the end, the first of them is the usual one.
        let Some((layout, types, walk)) = found.into_iter().next() else {
            let nothing = || source.corrupt("none of the known headers fits");
            return Err(furthest.map_or_else(nothing, |(_, e)| e));
        };
        let claimed = walk.file_type / 1000;
        let said = if claimed > 0 { claimed } else { container.version.unwrap_or(layout.plain_version) };
        // Version 1 only reordered the integers, which no size tells; version 2 made scales smaller, which they do.
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
        // A plain file type says nothing.
        if sized && claimed > 0 && version != claimed {
            warnings.push(format!(
                "the header says version {said} of the quantized blocks, and they are of version {version} by their sizes"
            ));
        }
        let Walk { header, vocabulary, tensors, .. } = walk;
        Ok(Self { source, container, layout, header, vocabulary, version, tensors, warnings })
    }

    /// The layout that it was found to have.
    pub fn layout(&self) -> &GgmlLayout {
        &self.layout
    }

    /// The fields of the header by name.
    pub fn header(&self) -> Value {
        self.header.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect()
    }

    /// What it is, for a reader: container, header, version of the blocks.
    pub fn describe(&self) -> String {
        if matches!(self.layout.body, GgmlBody::Own { .. }) {
            return format!("{}, {}", self.container.name, self.layout.name);
        }
        format!("{}, {}, blocks of version {}", self.container.name, self.layout.name, self.version)
    }

    /// What a careful user should know.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The text of token `id`, as the file has it: without the bytes of parts of characters, which are lost.
    pub fn word(&self, id: usize) -> Option<Vec<u8>> {
        let &(start, len) = self.vocabulary.get(id)?;
        self.source.read(start, len).ok().map(std::borrow::Cow::into_owned)
    }

    /// The score of word `id`, which comes after its text in files that have scores.
    pub fn score(&self, id: usize) -> Option<f32> {
        let &(start, len) = self.vocabulary.get(id).filter(|_| self.container.scores)?;
        let bytes = self.source.read(start + len, 4).ok()?;
        Some(f32::from_le_bytes(*bytes.first_chunk()?))
    }

    /// Number of words.
    pub fn words(&self) -> usize {
        self.vocabulary.len()
    }
}

/// The container, where its header begins, and the version by which another program marked it, if it did.
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
        let what = format!("{} version {version}; up to {most} is read", made.name);
        return Err(Error::Unsupported { path: source.path().into(), what });
    }
    let blocks = (made.alignment > 1).then_some(version - 1);
    Ok((Container { version: blocks, ..made }, cursor.at, None))
}

/// Reads a file in one way; an error comes with the place up to which that went well.
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
        return Err(cursor.corrupt(format!("a vocabulary of {words} words")));
    }
    // The numbering of three days had no versions, and only two types tell it from the usual one.
    if types.file_numbers() && !matches!(file_type, 5 | 6) {
        return Err(cursor.corrupt("tensors numbered as files"));
    }
    if file_type % 1000 > 64 || file_type / 1000 > 2 {
        return Err(cursor.corrupt(format!("ftype {file_type}")));
    }
    walk.file_type = file_type;
    Ok(words)
}

fn read_vocabulary(cursor: &mut Cursor<'_>, container: Container, words: usize, walk: &mut Walk) -> Result<()> {
    for id in 0..words {
        let len = cursor.u32("the length of a word of the vocabulary")? as usize;
        if len > cursor.left().min(1 << 16) {
            return Err(cursor.corrupt(format!("word {id} of the vocabulary says that it is {len} bytes long")));
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
        return Err(cursor.corrupt(format!("a tensor of {dims} dimensions with a name of {name_len} bytes")));
    }
    let mut shape = Vec::with_capacity(dims as usize);
    for _ in 0..dims {
        shape.push(cursor.u32("the size of a tensor")? as usize);
    }
    shape.reverse();
    let name = cursor.take(name_len, "the name of a tensor")?.into_owned();
    let Ok(name) = String::from_utf8(name) else {
        return Err(cursor.corrupt("the name of a tensor is no UTF-8"));
    };
    let shown = clip(&name);
    let Some(dtype) = types.dtype(kind) else {
        return Err(cursor.corrupt(match types {
            Types::Usual(_) => format!("tensor {shown} has the type {kind}"),
            Types::Own(_) => format!("tensor {shown} has the type {kind}, whose blocks this version of the file had in another form, which is not read"),
        }));
    };
    let len = tensor_bytes(dtype, &shape).map_err(|what| cursor.corrupt(format!("tensor {shown}: {what}")))?;
    let start = cursor.at.next_multiple_of(container.alignment);
    cursor.skip(start - cursor.at, &shown)?;
    cursor.skip(len, &format!("the data of tensor {shown}, {shape:?} in {dtype},"))?;
    if walk.tensors.insert(name, Record { dtype, shape, start, len }).is_some() {
        return Err(cursor.corrupt(format!("tensor {shown} is there twice")));
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
            // Neighbors shared a byte; nothing is lost by putting them where they are today.
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
