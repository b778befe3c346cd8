//! States of ended rows, kept for later requests that begin with the same tokens.

use pricket_nn::State;

use super::queue::common_prefix;

/// Maximum number of states. Finding a prefix compares the tokens of all of them.
const MOST: usize = 64;

/// Kept states, the least recently used first.
#[derive(Clone, Debug, Default)]
pub(super) struct Prefixes {
    entries: Vec<Entry>,
    /// Maximum size of all states, in bytes.
    limit: u64,
}

/// State of one row after `ids`.
#[derive(Clone, Debug)]
struct Entry {
    model: usize,
    ids: Vec<u32>,
    state: State,
    bytes: u64,
}

/// A kept state that begins with the tokens of a prompt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    entry: usize,
    /// Number of tokens that the prompt and the state share.
    pub(super) shared: usize,
}

impl Prefixes {
    pub(super) fn with_limit(self, limit: u64) -> Self {
        Self { limit, ..self }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// Keeps the state of a row after `ids`. Discards the least recently used states to stay below the limit.
    pub(super) fn keep(&mut self, model: usize, ids: Vec<u32>, mut state: State) {
        state.mark(0);
        let bytes = state.bytes() as u64;
        if ids.is_empty() || bytes > self.limit {
            return;
        }
        // A state with keys and values serves for all prefixes of its tokens.
        let is_recurrent = state.is_recurrent(0);
        let is_part = |entry: &Entry| entry.model == model && ids.starts_with(&entry.ids);
        self.entries.retain(|entry| !is_part(entry) || (is_recurrent && entry.ids.len() < ids.len()));
        self.shrink(self.limit - bytes);
        if self.entries.len() >= MOST {
            self.entries.remove(0);
        }
        self.entries.push(Entry { model, ids, state, bytes });
    }

    /// Discards the least recently used states until all others together have at most `limit` bytes.
    pub(super) fn shrink(&mut self, limit: u64) {
        while self.bytes() > limit {
            self.entries.remove(0);
        }
    }

    /// Returns the state that shares the most tokens with the start of `ids`, but at most `most` of them.
    pub(super) fn find(&self, model: usize, ids: &[u32], most: usize) -> Option<Found> {
        let same = self.entries.iter().enumerate().filter(|(_, entry)| entry.model == model);
        let shared = same.map(|(i, entry)| Found { entry: i, shared: common_prefix(&entry.ids, ids).min(most) });
        shared.max_by_key(|found| found.shared).filter(|found| found.shared > 0)
    }

    /// Returns a state of one row that holds the shared tokens, and their number. A recurrent state may hold fewer.
    pub(super) fn take(&mut self, found: Found) -> (State, usize) {
        let mut entry = self.entries.remove(found.entry);
        let lost = entry.ids.len() - found.shared;
        // A state is moved to the new row if that loses little, because a copy takes time and memory.
        if lost > 16 && lost > entry.ids.len() / 8 || entry.state.is_recurrent(0) {
            self.entries.push(entry.clone());
        }
        let kept = entry.state.rewind(0, found.shared);
        (entry.state, kept)
    }
}
