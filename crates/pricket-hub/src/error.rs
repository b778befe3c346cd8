//! The error type of this crate.

use std::path::PathBuf;

/// An error of a request, a download or the cache.
///
/// Messages never contain the token or the query of a signed URL.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An invalid repository id, revision, selection of steps, setting or argument.
    #[error("{0}")]
    Input(String),
    /// The Hub does not show this repository: it does not exist, was removed, or needs another token.
    #[error("{repo}: {what}")]
    Repository {
        /// The repository.
        repo: String,
        /// HTTP status of the response.
        status: u16,
        /// Meaning of the status.
        what: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repo}: revision {revision:?} does not exist{}", listed(known))]
    Revision {
        /// The repository.
        repo: String,
        /// The requested revision.
        revision: String,
        /// Existing branches and tags.
        known: Vec<String>,
    },
    /// The revision has no such file.
    #[error("{repo}@{revision}: {what}")]
    NoFile {
        /// The repository.
        repo: String,
        /// The revision or commit.
        revision: String,
        /// Description of the missing file or bytes.
        what: String,
    },
    /// Something is not in the cache, and offline mode forbids requests.
    #[error("{what}; offline mode is on (HF_HUB_OFFLINE), so no request was sent to the Hub")]
    Offline {
        /// Description of the missing item.
        what: String,
    },
    /// The network failed until the retries were used up, or the server returned an error that a retry does not change.
    #[error("{url}: {what}")]
    Network {
        /// The URL without its query.
        url: String,
        /// The last failure.
        what: String,
    },
    /// A mirror or a proxy does not support this request.
    #[error("{url}: refused with status {status}: the server or a proxy does not support this request")]
    Refused {
        /// The URL without its query.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// An invalid response: a wrong length or range, or a body that is not the expected JSON.
    #[error("{url}: {what}")]
    Protocol {
        /// The URL without its query.
        url: String,
        /// Expected and received values.
        what: String,
    },
    /// A file arrived complete, but its hash differs from the listing.
    #[error("{repo}@{commit}: {file}: expected {expected}, received {found}; discarded after {times} attempts")]
    Mismatch {
        /// The repository.
        repo: String,
        /// The commit.
        commit: String,
        /// The file.
        file: String,
        /// Listed hash.
        expected: String,
        /// Hash of the received bytes.
        found: String,
        /// Number of attempts.
        times: u32,
    },
    /// The disk has too little free space.
    #[error("{}: {needed} bytes are needed and {available} are free", path.display())]
    NoSpace {
        /// The cache.
        path: PathBuf,
        /// Bytes to download.
        needed: u64,
        /// Free bytes.
        available: u64,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// [`crate::Progress::cancelled`] returned true.
    #[error("cancelled")]
    Cancelled,
}

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        |source| Error::Io { path, source }
    }

    /// Returns whether the network or the server failed, so that the cache may answer instead.
    pub fn is_network(&self) -> bool {
        matches!(self, Error::Network { .. } | Error::Protocol { .. } | Error::Refused { .. })
    }
}

/// Formats the existing revisions for a message, training steps in numerical order. Long lists are shortened.
pub(crate) fn listed(known: &[String]) -> String {
    if known.is_empty() {
        return String::new();
    }
    let mut names: Vec<&str> = known.iter().map(String::as_str).collect();
    names.sort_by_key(|name| (crate::step_name::step_of(name), *name));
    let (first, last) = (names.iter().take(16), names.len().saturating_sub(16));
    let mut text = format!("; available: {}", first.copied().collect::<Vec<_>>().join(", "));
    match last {
        0 => {}
        1..=4 => text = format!("{text}, {}", names[16..].join(", ")),
        _ => text = format!("{text}, ... ({} more) ..., {}", last - 2, names[names.len() - 2..].join(", ")),
    }
    text
}
