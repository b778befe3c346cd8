//! State that the threads of a fetch share.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Progress;

/// Bytes of a fetch, counted by all of its threads.
pub(crate) struct Ledger<'a> {
    pub(crate) progress: &'a dyn Progress,
    what: &'static str,
    pub(crate) total: u64,
    pub(crate) done: AtomicU64,
    pub(crate) received: AtomicU64,
    begun: Once,
}

impl<'a> Ledger<'a> {
    /// Nothing yet of `total` bytes.
    pub(crate) fn new(progress: &'a dyn Progress, what: &'static str, total: u64) -> Self {
        Self { progress, what, total, done: AtomicU64::new(0), received: AtomicU64::new(0), begun: Once::new() }
    }

    pub(crate) fn arrived(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        self.found(bytes);
    }

    pub(crate) fn found(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.update(done);
    }

    /// Reports `done` bytes, the first time also their total.
    pub(crate) fn update(&self, done: u64) {
        self.begun.call_once(|| self.progress.begin(self.what, self.total, "bytes"));
        self.progress.update(done);
    }

    pub(crate) fn lost(&self, bytes: u64) {
        let done = self.done.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        self.update(done);
    }
}

impl Drop for Ledger<'_> {
    fn drop(&mut self) {
        if self.begun.is_completed() {
            self.progress.end();
        }
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
