//! Listings of commits kept in the cache, as JSON.

use serde::{Deserialize, Serialize};

use crate::id::is_relative_path;
use crate::layout::Layout;
use crate::{Digest, Listed};

/// Maximum size of a listing in bytes. A listing of 154 branches has 20 kB, and a listing of files less.
pub(crate) const MAX_LISTING: u64 = 16 << 20;
/// Maximum size of a listed file in bytes, so that sums of sizes cannot overflow.
pub(crate) const MAX_FILE: u64 = 1 << 50;

/// A [`Listed`] file as JSON, with the key names of the Hub.
#[derive(Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) path: String,
    pub(crate) size: u64,
    pub(crate) oid: String,
}

/// Returns the kept listing of a commit, or `None` if there is none or it is invalid.
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
