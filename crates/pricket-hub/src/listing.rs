//! Files of a commit, as the Hub lists them.

use crate::Digest;

/// An entry in the listing of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listed {
    /// Path in the repository, with `/` as separator.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
    /// Hash of the file. It may be unknown if the listing comes from the cache or from [`Listed::new`].
    pub digest: Option<Digest>,
}

impl Listed {
    /// Creates an entry for a listing that does not come from the Hub.
    pub fn new(path: impl Into<String>, size: u64, digest: Option<Digest>) -> Self {
        Self { path: path.into(), size, digest }
    }
}
