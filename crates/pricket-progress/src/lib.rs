//! Progress and cancellation of long work.
//!
//! Downloads, loading, scoring, sweeps and training call the methods of a [`Progress`] while they work. Every method
//! has a default, so a type implements only the methods that it needs.
//!
//! ```
//! use std::sync::atomic::{AtomicBool, Ordering};
//! use pricket_progress::Progress;
//!
//! /// Stops the work after Ctrl-C.
//! struct Interrupt(AtomicBool);
//!
//! impl Progress for Interrupt {
//!     fn update(&self, done: u64) {
//!         eprintln!("{done}");
//!     }
//!
//!     fn cancelled(&self) -> bool {
//!         self.0.load(Ordering::Relaxed)
//!     }
//! }
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

/// Phases of a download, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Revisions or a listing are requested from the Hub. [`Progress::phase`] gets the name of the repository instead
    /// of a file.
    Metadata,
    /// Bytes arrive and are hashed.
    Body,
    /// All bytes have arrived, and the hash is verified.
    Hash,
    /// The file gets its final name, and the snapshot its link.
    Rename,
}

/// Receives the progress of long work and can cancel it.
///
/// Methods may be called from several threads. They should return quickly.
pub trait Progress: Send + Sync {
    /// Called when the work named `what` begins. `total` is its size in `unit` ("bytes", "tokens", "documents").
    fn begin(&self, what: &str, total: u64, unit: &str) {
        let _ = (what, total, unit);
    }

    /// Called when `done` units of the total are done. The number decreases if downloaded bytes are discarded.
    fn update(&self, done: u64) {
        let _ = done;
    }

    /// Called when the download of `file` enters a phase.
    fn phase(&self, file: &str, phase: Phase) {
        let _ = (file, phase);
    }

    /// Called when the network failed and the cache is used instead. Calls [`Progress::notice`] by default.
    fn fallback(&self, message: &str) {
        self.notice(message);
    }

    /// Called with a message for the user, for example about a retry or a wait.
    fn notice(&self, message: &str) {
        let _ = message;
    }

    /// Called when the work ends, successfully or not.
    fn end(&self) {}

    /// Returns whether to cancel the work.
    ///
    /// Canceled work stops at the next suitable point with the error `Cancelled` of its crate. Downloaded bytes stay on
    /// disk.
    fn cancelled(&self) -> bool {
        false
    }
}

/// A [`Progress`] that ignores all reports and never cancels the work.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {}
