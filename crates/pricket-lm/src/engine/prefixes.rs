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
    /// Whether a waiting request needs the state, so that it is kept whatever the limit is.
    is_awaited: bool,
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

    /// Returns the size in bytes of the states that other requests wait for.
    pub(super) fn awaited_bytes(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.is_awaited).map(|entry| entry.bytes).sum()
    }

    /// Keeps the state of a row after `ids`. Discards the least recently used states to stay below the limit. A state
    /// that another request waits for is kept in any case, until [`Prefixes::release`].
    pub(super) fn keep(&mut self, model: usize, ids: Vec<u32>, mut state: State, is_awaited: bool) {
        state.mark(0);
        let bytes = state.bytes() as u64;
        if ids.is_empty() || (bytes > self.limit && !is_awaited) {
            return;
        }
        // A state with keys and values serves for all prefixes of its tokens.
        let is_recurrent = state.is_recurrent(0);
        let is_part = |entry: &Entry| entry.model == model && ids.starts_with(&entry.ids);
        self.entries.retain(|entry| !is_part(entry) || (is_recurrent && entry.ids.len() < ids.len()));
        self.shrink(self.limit.saturating_sub(bytes));
        if self.entries.len() >= MOST {
            self.discard_oldest();
        }
        self.entries.push(Entry { model, ids, state, bytes, is_awaited });
    }

    /// Ends the protection of awaited states: the requests that waited have joined by now, or wait for another row.
    pub(super) fn release(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.is_awaited = false);
        self.shrink(self.limit);
    }

    /// Discards all states of a model.
    pub(super) fn clear(&mut self, model: usize) {
        self.entries.retain(|entry| entry.model != model);
    }

    /// Discards the least recently used states until all others together have at most `limit` bytes.
    pub(super) fn shrink(&mut self, limit: u64) {
        while self.bytes() > limit && self.discard_oldest() {}
    }

    /// Discards the least recently used state that no request waits for. Returns whether there was one.
    fn discard_oldest(&mut self) -> bool {
        let oldest = self.entries.iter().position(|entry| !entry.is_awaited);
        oldest.map(|oldest| self.entries.remove(oldest)).is_some()
    }

    /// Returns the state that shares the most tokens with the start of `ids`, but at most `most` of them.
    pub(super) fn find(&self, model: usize, ids: &[u32], most: usize) -> Option<Found> {
        let same = self.entries.iter().enumerate().filter(|(_, entry)| entry.model == model);
        let shared = same.map(|(i, entry)| Found { entry: i, shared: common_prefix(&entry.ids, ids).min(most) });
        shared.max_by_key(|found| found.shared).filter(|found| found.shared > 0)
    }

    /// Returns a state of one row that holds the shared tokens, and their number. A recurrent state may hold fewer. A
    /// kept state of which much more is left stays.
    pub(super) fn take(&mut self, found: Found) -> (State, usize) {
        let mut entry = self.entries.remove(found.entry);
        let lost = entry.ids.len() - found.shared;
        // A state is moved to the new row if that loses little, because a copy takes time and memory.
        if (lost > 16 && lost > entry.ids.len() / 8) || entry.is_awaited || entry.state.is_recurrent(0) {
            self.entries.push(entry.clone());
        }
        let kept = entry.state.rewind(0, found.shared);
        (entry.state, kept)
    }
}
