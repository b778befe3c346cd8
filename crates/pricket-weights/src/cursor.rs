//! Sequential reads of numbers and byte strings, with checks against the end of the file.

use std::borrow::Cow;

use crate::source::Source;
use crate::{Error, Result};

/// A position in a file.
pub(crate) struct Cursor<'a> {
    source: &'a Source,
    pub(crate) at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(source: &'a Source, at: usize) -> Self {
        Self { source, at }
    }

    /// Returns the number of bytes from the position to the end of the file.
    pub(crate) fn left(&self) -> usize {
        self.source.len().saturating_sub(self.at)
    }

    /// Creates an error that gives the position.
    pub(crate) fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        self.source.corrupt(format!("{what} (at byte {})", self.at))
    }

    /// Returns the next `len` bytes. `what` names them in the error.
    pub(crate) fn take(&mut self, len: usize, what: &str) -> Result<Cow<'a, [u8]>> {
        if len > self.left() {
            return Err(self.corrupt(format!("truncated: {what} takes {len} bytes, but only {} are left", self.left())));
        }
        let bytes = self.source.read(self.at, len)?;
        self.at += len;
        Ok(bytes)
    }

    /// Skips the next `len` bytes.
    pub(crate) fn skip(&mut self, len: usize, what: &str) -> Result<()> {
        if len > self.left() {
            return Err(self.corrupt(format!("truncated: {what} takes {len} bytes, but only {} are left", self.left())));
        }
        self.at += len;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let bytes = self.take(N, what)?;
        let mut out = [0; N];
        out.copy_from_slice(&bytes);
        Ok(out)
    }

    pub(crate) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }
}
