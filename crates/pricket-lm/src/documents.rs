//! Documents from files.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Error, Result};

/// A line may be a whole book, and no more.
const MAX_LINE: usize = 256 << 20;

/// The documents of a file of JSON lines, one after the other: a file of any size takes the memory of one line.
#[derive(Debug)]
pub struct Documents {
    path: PathBuf,
    lines: BufReader<File>,
    number: usize,
    ended: bool,
}

impl Documents {
    /// Opens a file of JSON lines.
    ///
    /// # Errors
    /// [`Error::Input`], naming the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let file = File::open(&path).map_err(|e| Error::Input(format!("{}: {e}", path.display())))?;
        Ok(Self { path, lines: BufReader::with_capacity(1 << 20, file), number: 0, ended: false })
    }

    /// The next line that is not empty.
    fn line(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        loop {
            let mut line = Vec::new();
            let read = std::io::Read::take(&mut self.lines, MAX_LINE as u64).read_until(b'\n', &mut line)?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            if read == MAX_LINE && line.last() != Some(&b'\n') {
                return Err(std::io::Error::other(format!("a line of more than {MAX_LINE} bytes")));
            }
            if line.iter().any(|byte| !byte.is_ascii_whitespace()) {
                return Ok(Some(line));
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Value>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let document = match self.line() {
            Ok(None) => None,
            Ok(Some(line)) => Some(serde_json::from_slice(&line).map_err(|e| format!("not valid JSON: {e}"))),
            Err(e) => Some(Err(e.to_string())),
        };
        let what = |what: String| Error::Input(format!("{}, line {}: {what}", self.path.display(), self.number));
        let document = document.map(|document| document.map_err(what));
        self.ended = !matches!(document, Some(Ok(_)));
        document
    }
}
