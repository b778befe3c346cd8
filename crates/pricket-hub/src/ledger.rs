//! State that the threads of a fetch share.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::Events;

/// Bytes of a fetch, counted by all of its threads.
pub(crate) struct Ledger<'a> {
    pub(crate) events: &'a dyn Events,
    pub(crate) total: u64,
    pub(crate) done: AtomicU64,
    pub(crate) received: AtomicU64,
}

impl<'a> Ledger<'a> {
    /// Nothing yet of `total` bytes.
    pub(crate) fn new(events: &'a dyn Events, total: u64) -> Self {
        Self { events, total, done: AtomicU64::new(0), received: AtomicU64::new(0) }
    }

    pub(crate) fn arrived(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        self.found(bytes);
    }

    pub(crate) fn found(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.events.progress(done, self.total);
    }

    pub(crate) fn lost(&self, bytes: u64) {
        let done = self.done.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        self.events.progress(done, self.total);
    }
}

/// Holder of a repository's mutex, for a message while waiting for it.
pub(crate) const MUTEX: &str = "another process that changes this repository in the cache";

/// Does something when it goes, also in a panic: whoever waits for a thread must not wait for ever.
pub(crate) struct AtEnd<F: FnMut()>(pub(crate) F);

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
