//! Listings of commits that are kept in the cache.

use serde::{Deserialize, Serialize};

use crate::id::is_relative_path;
use crate::layout::Layout;
use crate::{Digest, Listed};

/// Bytes of a listing at most. One of 154 branches has 20 kB, one of a repository's files less.
pub(crate) const MAX_LISTING: u64 = 16 << 20;
/// Bytes of a listed file at most, so that sums of sizes cannot overflow.
pub(crate) const MAX_FILE: u64 = 1 << 50;

/// A [`Listed`] file in our records, in the words of the Hub.
#[derive(Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) path: String,
    pub(crate) size: u64,
    pub(crate) oid: String,
}

/// The listing of a commit that we fetched from.
pub(crate) fn read_record(layout: &Layout, commit: &str) -> Option<Vec<Listed>> {
    let path = layout.record(commit);
    let small = std::fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() < MAX_LISTING);
    let bytes = small.then(|| std::fs::read(path).ok()).flatten()?;
    let entries: Vec<Entry> = serde_json::from_slice(&bytes).ok()?;
    let entry = |entry: Entry| {
        let digest = Some(Digest::from_hex(&entry.oid)?);
        (is_relative_path(&entry.path) && entry.size <= MAX_FILE).then_some(Listed {
            path: entry.path,
            size: entry.size,
            digest,
        })
    };
    entries.into_iter().map(entry).collect()
}
