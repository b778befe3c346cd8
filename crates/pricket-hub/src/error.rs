use std::path::PathBuf;

/// Everything that can go wrong between a repository's name and its files on disk.
///
/// No message holds a token or the query of a signed address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A text that is no repository id, revision or selection of steps.
    #[error("{0}")]
    Input(String),
    /// The Hub does not show this repository: it is not there, was taken down, or asks for another token.
    #[error("{repo}: {what}")]
    Repository {
        /// The repository.
        repo: String,
        /// The HTTP status it was answered with.
        status: u16,
        /// What that means.
        what: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repo}: no revision {revision:?}{}", listed(known))]
    Revision {
        /// The repository.
        repo: String,
        /// What was asked for.
        revision: String,
        /// Branches and tags that are there.
        known: Vec<String>,
    },
    /// The revision has no such file.
    #[error("{repo}@{revision}: {what}")]
    NoFile {
        /// The repository.
        repo: String,
        /// The revision or commit.
        revision: String,
        /// Which file.
        what: String,
    },
    /// Something is not in the cache and the network may not be asked.
    #[error("{what}; offline mode is on (HF_HUB_OFFLINE), so the Hub was not asked")]
    Offline {
        /// What is missing.
        what: String,
    },
    /// The network failed for longer than our patience, or a server refused for good.
    #[error("{url}: {what}")]
    Network {
        /// The address, without its query.
        url: String,
        /// The last failure.
        what: String,
    },
    /// A mirror or a proxy does not support this request.
    #[error("{url}: refused with status {status}: the server or a proxy does not support this request")]
    Refused {
        /// The address, without its query.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// A server's answer that makes no sense: another length, another range, no JSON.
    #[error("{url}: {what}")]
    Protocol {
        /// The address, without its query.
        url: String,
        /// What was expected and what was found.
        what: String,
    },
    /// A file that came complete and is not what the repository lists.
    #[error("{repo}@{commit}: {file}: expected {expected}, received {found}; nothing of {times} tries was kept")]
    Mismatch {
        /// The repository.
        repo: String,
        /// The commit.
        commit: String,
        /// The file.
        file: String,
        /// Its hash as listed.
        expected: String,
        /// The hash of what was received.
        found: String,
        /// How often it was fetched.
        times: u32,
    },
    /// The files do not fit on the disk.
    #[error("{}: {needed} bytes are needed and {available} are free", path.display())]
    NoSpace {
        /// The cache.
        path: PathBuf,
        /// Bytes still to be fetched.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// The system would not read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// [`crate::Progress::cancelled`] said so.
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

    /// Whether the network is at fault rather than the question, so that an answer from the cache will do.
    pub fn is_network(&self) -> bool {
        matches!(self, Error::Network { .. } | Error::Protocol { .. } | Error::Refused { .. })
    }
}

/// The revisions that are there, steps by number, runs of them abridged.
pub(crate) fn listed(known: &[String]) -> String {
    if known.is_empty() {
        return String::new();
    }
    let mut names: Vec<&str> = known.iter().map(String::as_str).collect();
    names.sort_by_key(|name| (crate::step_name::step_of(name), *name));
    let (first, last) = (names.iter().take(16), names.len().saturating_sub(16));
    let mut text = format!("; there are {}", first.copied().collect::<Vec<_>>().join(", "));
    match last {
        0 => {}
        1..=4 => text = format!("{text}, {}", names[16..].join(", ")),
        _ => text = format!("{text}, ... ({} more) ..., {}", last - 2, names[names.len() - 2..].join(", ")),
    }
    text
}
