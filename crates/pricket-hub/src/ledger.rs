//! Byte counts that the threads of a fetch share, and a guard that runs code at the end of a scope.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Progress;

/// Byte counts of a fetch, updated by all of its threads and reported to a [`Progress`].
pub(crate) struct Ledger<'a> {
    pub(crate) progress: &'a dyn Progress,
    /// Name of the work, for [`Progress::begin`].
    what: &'static str,
    /// Bytes of all files.
    pub(crate) total: u64,
    /// Bytes on disk.
    pub(crate) done: AtomicU64,
    /// Bytes received over the network.
    pub(crate) received: AtomicU64,
    begun: Once,
}

impl<'a> Ledger<'a> {
    /// Creates a ledger with 0 of `total` bytes done.
    pub(crate) fn new(progress: &'a dyn Progress, what: &'static str, total: u64) -> Self {
        Self { progress, what, total, done: AtomicU64::new(0), received: AtomicU64::new(0), begun: Once::new() }
    }

    /// Counts received bytes.
    pub(crate) fn arrived(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        self.found(bytes);
    }

    /// Counts bytes that are on disk.
    pub(crate) fn found(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.update(done);
    }

    /// Reports `done` bytes. The first call also reports the total.
    pub(crate) fn update(&self, done: u64) {
        self.begun.call_once(|| self.progress.begin(self.what, self.total, "bytes"));
        self.progress.update(done);
    }

    /// Subtracts bytes that were discarded.
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

/// Holder of the mutex of a repository, for the message "waiting for ...".
pub(crate) const MUTEX: &str = "another process that changes this repository in the cache";

/// Runs a closure when it is dropped, also during a panic, so that other threads do not wait forever.
pub(crate) struct AtEnd<F: FnMut()>(pub(crate) F);

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
