//! Files of a commit, as the Hub lists them.

use crate::Digest;

/// A file as a commit lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listed {
    /// Its path in the repository, with `/`.
    pub path: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its hash. Only of a file that is in the cache and nowhere else it may be unknown.
    pub digest: Option<Digest>,
}

impl Listed {
    /// A file, listed by somebody else than the Hub.
    pub fn new(path: impl Into<String>, size: u64, digest: Option<Digest>) -> Self {
        Self { path: path.into(), size, digest }
    }
}
