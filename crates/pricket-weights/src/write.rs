//! Writers of GGUF and safetensors files. Tensors are written one at a time, so only one needs to be in memory.

use std::collections::{BTreeMap, HashSet};
use std::io::{Error as IoError, Write};

use serde_json::{Value, json};

use crate::Dtype;
use crate::gguf::{NUMBERS, tensor_bytes};

/// Name, type and shape of a tensor to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outline {
    /// Name of the tensor.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl Outline {
    /// Returns the size of the tensor in bytes.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes(self.shape.iter().product())
    }
}

/// A value of GGUF metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// Unsigned 32-bit integer.
    U32(u32),
    /// 32-bit float.
    F32(f32),
    /// Boolean.
    Bool(bool),
    /// String.
    Text(String),
    /// Array of strings, which need not be UTF-8.
    Texts(Vec<Vec<u8>>),
    /// Array of signed 32-bit integers.
    Integers(Vec<i32>),
    /// Array of 32-bit floats.
    Floats(Vec<f32>),
    /// Array of unsigned 8-bit integers.
    Bytes(Vec<u8>),
}

/// Alignment of tensor data in GGUF files, in bytes.
const ALIGNMENT: usize = 32;

/// Writer of one file. The constructor writes the header; then the bytes of the tensors follow in the order of the
/// outlines.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    outlines: Vec<Outline>,
    next: usize,
    /// Bytes of the current tensor that are not written yet.
    left: usize,
    alignment: usize,
}

fn invalid(what: String) -> IoError {
    IoError::new(std::io::ErrorKind::InvalidInput, what)
}

/// Checks that every tensor has a valid size and a unique name.
fn check(outlines: &[Outline]) -> Result<(), IoError> {
    let mut names = HashSet::new();
    for outline in outlines {
        tensor_bytes(outline.dtype, &outline.shape)
            .map_err(|what| invalid(format!("tensor {}: {what}", outline.name)))?;
        if !names.insert(&outline.name) {
            return Err(invalid(format!("tensor {} occurs twice", outline.name)));
        }
    }
    Ok(())
}

impl<W: Write> Writer<W> {
    /// Writes the header of a GGUF file, version 3.
    ///
    /// # Errors
    /// Returns an error if an outline is invalid, if GGUF does not support its type, or if writing fails.
    pub fn gguf(mut out: W, metadata: &[(String, GgufValue)], outlines: Vec<Outline>) -> Result<Self, IoError> {
        check(&outlines)?;
        let mut header = b"GGUF".to_vec();
        let text = |header: &mut Vec<u8>, bytes: &[u8]| {
            header.extend((bytes.len() as u64).to_le_bytes());
            header.extend(bytes);
        };
        header.extend(3u32.to_le_bytes());
        header.extend((outlines.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            text(&mut header, key.as_bytes());
            let kind = |header: &mut Vec<u8>, kinds: &[u32]| kinds.iter().for_each(|k| header.extend(k.to_le_bytes()));
            match value {
                GgufValue::U32(n) => {
                    kind(&mut header, &[4]);
                    header.extend(n.to_le_bytes());
                }
                GgufValue::F32(x) => {
                    kind(&mut header, &[6]);
                    header.extend(x.to_le_bytes());
                }
                GgufValue::Bool(flag) => {
                    kind(&mut header, &[7]);
                    header.push(u8::from(*flag));
                }
                GgufValue::Text(value) => {
                    kind(&mut header, &[8]);
                    text(&mut header, value.as_bytes());
                }
                GgufValue::Texts(values) => {
                    kind(&mut header, &[9, 8]);
                    header.extend((values.len() as u64).to_le_bytes());
                    for value in values {
                        text(&mut header, value);
                    }
                }
                GgufValue::Floats(values) => {
                    kind(&mut header, &[9, 6]);
                    header.extend((values.len() as u64).to_le_bytes());
                    header.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                }
                GgufValue::Bytes(values) => {
                    kind(&mut header, &[9, 0]);
                    header.extend((values.len() as u64).to_le_bytes());
                    header.extend(values);
                }
                GgufValue::Integers(values) => {
                    kind(&mut header, &[9, 5]);
                    header.extend((values.len() as u64).to_le_bytes());
                    header.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                }
            }
        }
        let mut offset = 0u64;
        for outline in &outlines {
            text(&mut header, outline.name.as_bytes());
            header.extend((outline.shape.len() as u32).to_le_bytes());
            outline.shape.iter().rev().for_each(|&n| header.extend((n as u64).to_le_bytes()));
            let number = match outline.dtype {
                Dtype::F32 => 0,
                Dtype::F16 => 1,
                Dtype::BF16 => 30,
                Dtype::Block(kind) => NUMBERS
                    .iter()
                    .find(|(_, known)| *known == kind)
                    .map(|(number, _)| *number)
                    .ok_or_else(|| invalid(format!("tensor {}: GGUF has no type {kind}", outline.name)))?,
                other => return Err(invalid(format!("tensor {}: writing {other} is not supported", outline.name))),
            };
            header.extend(number.to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += outline.bytes().next_multiple_of(ALIGNMENT) as u64;
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        out.write_all(&header)?;
        Ok(Self { out, outlines, next: 0, left: 0, alignment: ALIGNMENT })
    }

    /// Writes the header of a safetensors file. `metadata` may hold any text. The entry `format: pt` is added for
    /// Python programs.
    ///
    /// # Errors
    /// Returns an error if an outline is invalid, if safetensors does not support its type, or if writing fails.
    pub fn safetensors(
        mut out: W,
        metadata: &BTreeMap<String, String>,
        outlines: Vec<Outline>,
    ) -> Result<Self, IoError> {
        check(&outlines)?;
        let mut header = serde_json::Map::new();
        let mut about = json!({"format": "pt"});
        for (key, value) in metadata {
            about[key] = Value::from(value.clone());
        }
        header.insert("__metadata__".into(), about);
        let mut offset = 0;
        for outline in &outlines {
            if outline.dtype.to_candle().is_none() {
                return Err(invalid(format!("tensor {}: safetensors has no type {}", outline.name, outline.dtype)));
            }
            let end = offset + outline.bytes();
            let entry = json!({"dtype": outline.dtype.name(), "shape": outline.shape, "data_offsets": [offset, end]});
            header.insert(outline.name.clone(), entry);
            offset = end;
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        Ok(Self { out, outlines, next: 0, left: 0, alignment: 1 })
    }

    /// Returns the outlines of the tensors, in the order in which their bytes must be written.
    pub fn outlines(&self) -> &[Outline] {
        &self.outlines
    }

    /// Writes the next bytes of the current tensor. A tensor may be written in several pieces; a piece must not extend
    /// into the next one.
    ///
    /// # Errors
    /// Returns an error if the bytes exceed the current tensor, if all tensors are written, or if writing fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        if self.left == 0 {
            let outline =
                self.outlines.get(self.next).ok_or_else(|| invalid("every tensor has been written".into()))?;
            self.left = outline.bytes();
            self.next += 1;
        }
        if bytes.len() > self.left {
            let name = &self.outlines[self.next - 1].name;
            return Err(invalid(format!("{} bytes for tensor {name}; only {} are left", bytes.len(), self.left)));
        }
        self.out.write_all(bytes)?;
        self.left -= bytes.len();
        if self.left == 0 {
            let len = self.outlines[self.next - 1].bytes();
            self.out.write_all(&vec![0; len.next_multiple_of(self.alignment) - len])?;
        }
        Ok(())
    }

    /// Flushes and returns the output.
    ///
    /// # Errors
    /// Returns an error if a tensor is incomplete or missing, or if flushing fails.
    pub fn finish(mut self) -> Result<W, IoError> {
        if self.next != self.outlines.len() || self.left > 0 {
            return Err(invalid(format!(
                "incomplete file: {} of {} tensors were begun",
                self.next,
                self.outlines.len()
            )));
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

#[cfg(test)]
mod tests {
    use pricket_kernels::BlockType;

    use super::*;
    use crate::{GgufFile, SafetensorsFile, Store};

    fn outline(name: &str, dtype: Dtype, shape: &[usize]) -> Outline {
        Outline { name: name.into(), dtype, shape: shape.into() }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let outlines = vec![
            outline("a", Dtype::F16, &[3, 5]),
            outline("b", Dtype::Block(BlockType::Q4_0), &[2, 64]),
            outline("c", Dtype::F32, &[1]),
        ];
        let metadata = [
            ("n".to_owned(), GgufValue::U32(7)),
            ("x".to_owned(), GgufValue::F32(0.5)),
            ("flag".to_owned(), GgufValue::Bool(true)),
            ("text".to_owned(), GgufValue::Text("\u{e9}".into())),
            ("words".to_owned(), GgufValue::Texts(vec![b"one".to_vec(), vec![255]])),
            ("kinds".to_owned(), GgufValue::Integers(vec![-1, 3])),
        ];
        let data: Vec<Vec<u8>> = outlines.iter().map(|o| (0..o.bytes()).map(|i| (i * 7) as u8).collect()).collect();
        let mut writer = Writer::gguf(std::fs::File::create(&path).unwrap(), &metadata, outlines.clone()).unwrap();
        assert!(writer.write(&[0; 31]).unwrap_err().to_string().contains("31 bytes for tensor a; only 30 are left"));
        for bytes in &data {
            bytes.chunks(10).for_each(|piece| writer.write(piece).unwrap());
        }
        assert!(writer.write(&[0]).is_err());
        writer.finish().unwrap();
        let file = GgufFile::open(&path).unwrap();
        let read = file.metadata();
        assert_eq!((read["n"].as_u64(), read["x"].as_f64(), read["flag"].as_bool()), (Some(7), Some(0.5), Some(true)));
        assert_eq!((read["text"].as_str(), file.integers("kinds").unwrap()), (Some("\u{e9}"), Some(vec![-1, 3])));
        assert_eq!(file.texts("words").unwrap().unwrap(), [b"one".to_vec(), vec![255]]);
        for (outline, bytes) in outlines.iter().zip(&data) {
            let entry = file.entry(&outline.name).unwrap();
            assert_eq!((entry.dtype, &entry.shape), (outline.dtype, &outline.shape));
            assert_eq!(&*file.bytes(&outline.name).unwrap(), &bytes[..]);
        }
        let path = dir.path().join("a.safetensors");
        let outlines = vec![outlines[0].clone(), outlines[2].clone()];
        let mut writer =
            Writer::safetensors(std::fs::File::create(&path).unwrap(), &BTreeMap::new(), outlines).unwrap();
        writer.write(&data[0]).unwrap();
        writer.write(&data[2]).unwrap();
        writer.finish().unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!((file.names().len(), &*file.bytes("c").unwrap()), (2, &data[2][..]));
    }

    #[test]
    fn a_file_that_is_not_whole_is_an_error() {
        let one = || vec![outline("a", Dtype::F32, &[2])];
        let mut writer = Writer::gguf(Vec::new(), &[], one()).unwrap();
        writer.write(&[0; 4]).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("1 of 1 tensors"));
        assert!(
            Writer::gguf(Vec::new(), &[], [one(), one()].concat()).unwrap_err().to_string().contains("a occurs twice")
        );
        let odd = vec![outline("a", Dtype::Block(BlockType::Q4K), &[2, 32])];
        assert!(Writer::gguf(Vec::new(), &[], odd).unwrap_err().to_string().contains("not whole q4k blocks"));
    }
}
