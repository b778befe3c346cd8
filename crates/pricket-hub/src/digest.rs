//! Hashes of files: SHA-256 for large files, git blob hashes for the others.

use std::io::Read;
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use crate::{Error, Progress, Result};

/// The hash by which the Hub identifies a file. It is also the name of the blob in the cache.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Digest {
    /// SHA-256 of the bytes, for files in large-file storage (Git LFS).
    Sha256(String),
    /// SHA-1 of git's header `blob LENGTH\0` and the bytes, for files in the git repository itself.
    GitBlob(String),
}

impl Digest {
    /// Parses lower-case hexadecimal digits: 64 for SHA-256, 40 for a git blob. Returns `None` for any other text.
    pub fn from_hex(hex: &str) -> Option<Self> {
        let hex_digits = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match hex.len() {
            64 if hex_digits => Some(Digest::Sha256(hex.into())),
            40 if hex_digits => Some(Digest::GitBlob(hex.into())),
            _ => None,
        }
    }

    /// Returns the hexadecimal digits, in lower case.
    pub fn hex(&self) -> &str {
        let (Digest::Sha256(hex) | Digest::GitBlob(hex)) = self;
        hex
    }

    /// Creates a hasher of the same kind as `self` for `size` bytes.
    pub(crate) fn hasher(&self, size: u64) -> Hasher {
        match self {
            Digest::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Digest::GitBlob(_) => Hasher::GitBlob(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }

    /// Returns the SHA-256 hash of a file.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be read, and [`Error::Cancelled`] if `progress` cancels the work.
    pub fn sha256_of(path: &Path, progress: &dyn Progress) -> Result<Self> {
        Digest::Sha256(String::new()).of_file(path, progress)
    }

    /// Returns the digest of a file, of the same kind as `self`.
    pub(crate) fn of_file(&self, path: &Path, progress: &dyn Progress) -> Result<Self> {
        let mut file = std::fs::File::open(path).map_err(Error::io(path))?;
        let mut hasher = self.hasher(file.metadata().map_err(Error::io(path))?.len());
        let mut buffer = vec![0; 1 << 20];
        loop {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            match file.read(&mut buffer).map_err(Error::io(path))? {
                0 => return Ok(hasher.finish()),
                n => hasher.update(&buffer[..n]),
            }
        }
    }

    /// Returns the digest of `bytes`, of the same kind as `self`.
    #[must_use]
    pub fn of(&self, bytes: &[u8]) -> Self {
        let mut hasher = self.hasher(bytes.len() as u64);
        hasher.update(bytes);
        hasher.finish()
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Digest::Sha256(hex) => write!(f, "sha256 {hex}"),
            Digest::GitBlob(hex) => write!(f, "git blob {hex}"),
        }
    }
}

pub(crate) enum Hasher {
    Sha256(Sha256),
    GitBlob(Sha1),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::GitBlob(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self {
            Hasher::Sha256(hasher) => Digest::Sha256(hex(&hasher.finalize())),
            Hasher::GitBlob(hasher) => Digest::GitBlob(hex(&hasher.finalize())),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_are_those_of_the_tools() {
        // Output of `sha256sum` and `git hash-object` for "hello\n".
        let sha = Digest::Sha256("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03".into());
        let git = Digest::GitBlob("ce013625030ba8dba906f756967f9e9ca394464a".into());
        for digest in [sha, git] {
            assert_eq!(digest.of(b"hello\n"), digest);
            assert_eq!(Digest::from_hex(digest.hex()), Some(digest));
        }
        assert_eq!(Digest::from_hex("../../etc/passwd"), None);
    }
}
