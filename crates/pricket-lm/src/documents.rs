//! Readers of documents from files: JSON lines or one JSON array, plain or compressed with gzip or Zstandard, and
//! parquet.
//!
//! Compressed files and parquet need the feature `parquet`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Chain, Cursor, Read};
use std::path::{Path, PathBuf};

use pricket_nn::parse_json;
use serde_json::Value;

use crate::{Error, Result};

/// Maximum length of a line, in bytes. Allows for the text of a whole book.
const MAX_LINE: usize = 256 << 20;

/// Maximum size of a file that is one JSON array, in bytes. Unlike JSON lines, it is read as a whole.
const MAX_ARRAY: u64 = 1 << 30;

/// Number of bytes at the beginning of a file that decide its format.
const PEEKED: u64 = 4096;

/// Place of a document: a file, and a line, row or element in it.
///
/// ```
/// let place = pricket_lm::Place { path: "data.jsonl".into(), unit: "line", number: 3 };
/// assert_eq!(place.to_string(), "data.jsonl, line 3");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// `line` of a text file, `row` of a parquet file, or `element` of a JSON array.
    pub unit: &'static str,
    /// Number of the line, row or element, counted from 1.
    pub number: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} {}", self.path.display(), self.unit, self.number)
    }
}

/// Iterator over the documents of files of JSON lines or parquet, one file after the other.
///
/// Memory use does not depend on the file size. JSON lines take the memory of one line. Parquet takes the memory of
/// some pages of each column. A file that is one JSON array is read as a whole.
pub struct Documents {
    waiting: VecDeque<PathBuf>,
    path: PathBuf,
    rows: Rows,
    number: usize,
    ended: bool,
}

/// Reader of the current file.
enum Rows {
    Lines(Lines),
    Array(std::vec::IntoIter<Value>),
    #[cfg(feature = "parquet")]
    Parquet(ParquetRows),
}

/// Reader of the rows of a parquet file.
#[cfg(feature = "parquet")]
type ParquetRows = Box<dyn Iterator<Item = parquet::errors::Result<parquet::record::Row>> + Send>;

/// Reader of the lines of a file, decompressed if necessary.
type Lines = BufReader<Box<dyn Read + Send>>;

/// First bytes of a file, followed by the rest. The first bytes identify the format, and a pipe cannot be read twice.
type Whole = Chain<Cursor<Vec<u8>>, File>;

/// Maximum size of the text that [`read_text`] returns, in bytes.
const MAX_TEXT: u64 = 4 << 30;

/// Reads a text file and decompresses it if necessary. Returns its bytes.
///
/// # Errors
/// Returns [`Error::Input`], naming the file, if it cannot be read, is a parquet file or holds more than 4 GiB of text.
pub fn read_text(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let path = path.as_ref();
    let wrong = |e: std::io::Error| Error::Input(format!("{}: {e}", path.display()));
    let mut text = Vec::new();
    match open(path)? {
        Opened::Text(lines) => lines.take(MAX_TEXT + 1).read_to_end(&mut text).map_err(wrong)?,
        #[cfg(feature = "parquet")]
        Opened::Parquet(_) => return Err(Error::Input(format!("{}: a parquet file, not text", path.display()))),
    };
    if text.len() as u64 > MAX_TEXT {
        return Err(Error::Input(format!("{}: the text exceeds the limit of {MAX_TEXT} bytes", path.display())));
    }
    Ok(text)
}

/// Reads a UTF-8 text file as [`read_text`] does. Removes a byte order mark at the beginning.
///
/// # Errors
/// Returns the errors of [`read_text`]. Returns [`Error::Input`], naming the file and the offset of the first invalid
/// byte, if the text is not UTF-8.
pub fn read_utf8(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let wrong = |e: std::string::FromUtf8Error| {
        Error::Input(format!(
            "{}: not UTF-8 text: invalid byte at offset {}",
            path.display(),
            e.utf8_error().valid_up_to()
        ))
    };
    let text = String::from_utf8(read_text(path)?).map_err(wrong)?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Documents({}, {} read)", self.path.display(), self.number)
    }
}

impl Documents {
    /// Opens a file of JSON lines or parquet. The first bytes of the file identify the format.
    ///
    /// # Errors
    /// Returns [`Error::Input`], naming the file, if it cannot be opened or if this build does not support its format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_all([path])
    }

    /// Opens several files, to be read one after the other. Only the first file is opened at once.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if `paths` is empty. Returns [`Error::Input`], naming the file, if the first file
    /// cannot be opened or if this build does not support its format.
    pub fn open_all(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Self> {
        let mut waiting: VecDeque<PathBuf> = paths.into_iter().map(|path| path.as_ref().to_owned()).collect();
        let path =
            waiting.pop_front().ok_or_else(|| Error::Input("no document files given; expected at least one".into()))?;
        Ok(Self { rows: rows(&path)?, waiting, path, number: 0, ended: false })
    }

    /// Returns the place of the last document that was read.
    pub fn place(&self) -> Place {
        let unit = match &self.rows {
            Rows::Lines(_) => "line",
            Rows::Array(_) => "element",
            #[cfg(feature = "parquet")]
            Rows::Parquet(_) => "row",
        };
        Place { path: self.path.clone(), unit, number: self.number }
    }

    fn row(&mut self) -> Option<std::result::Result<Value, String>> {
        match &mut self.rows {
            Rows::Lines(lines) => match line(lines, &mut self.number) {
                Ok(None) => None,
                Ok(Some(line)) => Some(parse_json(&line).map_err(|e| {
                    // Drops the parser's own line number, which is always 1.
                    let (what, column) = (e.to_string(), e.column());
                    let what = what.split(" at line ").next().unwrap_or_default();
                    format!("not valid JSON at column {column}: {what}")
                })),
                Err(e) => Some(Err(e.to_string())),
            },
            Rows::Array(elements) => {
                self.number += 1;
                elements.next().map(Ok)
            }
            #[cfg(feature = "parquet")]
            Rows::Parquet(rows) => {
                self.number += 1;
                guarded(|| rows.next().map(|row| Ok(row?.to_json_value())).transpose()).transpose()
            }
        }
    }
}

/// A file whose format is known.
enum Opened {
    Text(Lines),
    #[cfg(feature = "parquet")]
    Parquet(ParquetRows),
}

/// Removes a byte order mark at the beginning of a text.
fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text)
}

/// Opens a file of documents.
fn rows(path: &Path) -> Result<Rows> {
    match open(path)? {
        Opened::Text(lines) => rows_of_text(path, lines),
        #[cfg(feature = "parquet")]
        Opened::Parquet(rows) => Ok(Rows::Parquet(rows)),
    }
}

/// Returns the lines of a text file, or the elements of its JSON array.
fn rows_of_text(path: &Path, mut lines: Lines) -> Result<Rows> {
    // Documents are objects, so a bracket can only begin an array of them.
    let begins_with_bracket = |bytes: &[u8]| without_mark(bytes).trim_ascii_start().starts_with(b"[");
    if lines.fill_buf().is_ok_and(begins_with_bracket) {
        let wrong = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let mut text = Vec::new();
        lines.take(MAX_ARRAY + 1).read_to_end(&mut text).map_err(|e| wrong(e.to_string()))?;
        if text.len() as u64 > MAX_ARRAY {
            return Err(wrong(format!(
                "the JSON array exceeds the limit of {MAX_ARRAY} bytes; convert it to JSON lines"
            )));
        }
        return match parse_json(without_mark(&text)) {
            Ok(Value::Array(elements)) => Ok(Rows::Array(elements.into_iter())),
            Ok(_) => Err(wrong("not a JSON array".into())),
            Err(e) => Err(wrong(format!("not valid JSON: {e}"))),
        };
    }
    Ok(Rows::Lines(lines))
}

fn open(path: &Path) -> Result<Opened> {
    let wrong = |what: String| Error::Input(format!("{}: {what}", path.display()));
    let mut file = File::open(path).map_err(|e| wrong(e.to_string()))?;
    let mut magic = Vec::new();
    file.by_ref().take(PEEKED).read_to_end(&mut magic).map_err(|e| wrong(e.to_string()))?;
    if magic.starts_with(b"PAR1") {
        // The parquet reader seeks by itself, so the bytes read so far do not matter.
        return parquet(file).map_err(wrong);
    }
    let compressed = magic.starts_with(&[0x1f, 0x8b]) || magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
    let is_gzip = magic.starts_with(&[0x1f]);
    let whole = Cursor::new(magic).chain(file);
    let text = if compressed { unpacked(whole, is_gzip).map_err(wrong)? } else { Box::new(whole) };
    Ok(Opened::Text(BufReader::with_capacity(1 << 20, text)))
}

#[cfg(not(feature = "parquet"))]
fn unpacked(_: Whole, _: bool) -> std::result::Result<Box<dyn Read + Send>, String> {
    Err("compressed files are not supported by this build; build with the feature `parquet`, or decompress the file"
        .into())
}

#[cfg(feature = "parquet")]
fn unpacked(file: Whole, is_gzip: bool) -> std::result::Result<Box<dyn Read + Send>, String> {
    if is_gzip {
        return Ok(Box::new(flate2::read::MultiGzDecoder::new(file)));
    }
    Ok(Box::new(zstd::stream::read::Decoder::new(file).map_err(|e| e.to_string())?))
}

#[cfg(not(feature = "parquet"))]
fn parquet(_: File) -> std::result::Result<Opened, String> {
    Err("parquet is not supported by this build; build with the feature `parquet`, or use JSON lines".into())
}

#[cfg(feature = "parquet")]
fn parquet(file: File) -> std::result::Result<Opened, String> {
    use parquet::file::reader::SerializedFileReader;
    let reader = guarded(|| SerializedFileReader::new(file))?;
    Ok(Opened::Parquet(Box::new(reader.into_iter())))
}

/// Runs a call of the parquet library and turns errors and panics into messages. Some corrupt files make the library
/// panic.
#[cfg(feature = "parquet")]
fn guarded<T>(work: impl FnOnce() -> parquet::errors::Result<T>) -> std::result::Result<T, String> {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    let broken = || "not readable as parquet: the file is corrupt".to_owned();
    outcome.map_err(|_| broken())?.map_err(|e| format!("not readable as parquet: {e}"))
}

/// Returns the next line that is not blank. Counts all lines in `number`.
fn line(lines: &mut Lines, number: &mut usize) -> std::io::Result<Option<Vec<u8>>> {
    loop {
        let mut line = Vec::new();
        let read = Read::take(&mut *lines, MAX_LINE as u64).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(None);
        }
        *number += 1;
        if read == MAX_LINE && line.last() != Some(&b'\n') {
            return Err(std::io::Error::other(format!("the line exceeds the limit of {MAX_LINE} bytes")));
        }
        if line.iter().any(|byte| !byte.is_ascii_whitespace()) {
            return Ok(Some(line));
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Value>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            if let Some(row) = self.row() {
                self.ended = row.is_err();
                return Some(row.map_err(|what| Error::Input(format!("{}: {what}", self.place()))));
            }
            let Some(path) = self.waiting.pop_front() else {
                self.ended = true;
                break;
            };
            match rows(&path) {
                Ok(rows) => (self.rows, self.path, self.number) = (rows, path, 0),
                Err(e) => {
                    self.ended = true;
                    return Some(Err(e));
                }
            }
        }
        None
    }
}
