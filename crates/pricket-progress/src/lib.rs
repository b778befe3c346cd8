//! Progress and cancellation of long work.
//!
//! Downloads, loading, scoring, sweeps and training call the methods of a [`Progress`] while they work. Every method has a default:
//! a type implements what it wants to know.
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

/// Phase of the download of a file, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// The Hub is asked for revisions or for a listing. The name is that of the repository.
    Metadata,
    /// Bytes arrive and are hashed.
    Body,
    /// The last bytes have arrived. The hash is completed and compared.
    Hash,
    /// The file gets its final name, and the snapshot its link.
    Rename,
}

/// Receives the progress of long work and can stop it.
///
/// Methods are called from several threads and should return soon.
pub trait Progress: Send + Sync {
    /// Work named `what` begins. `total` is in `unit` ("bytes", "tokens", "documents").
    fn begin(&self, what: &str, total: u64, unit: &str) {
        let _ = (what, total, unit);
    }

    /// `done` of the total is done. The number falls if downloaded bytes turn out to be wrong.
    fn update(&self, done: u64) {
        let _ = done;
    }

    /// The download of `file` enters a phase.
    fn phase(&self, file: &str, phase: Phase) {
        let _ = (file, phase);
    }

    /// The network failed, and the cache is used instead. Calls [`Progress::notice`] by default.
    fn fallback(&self, message: &str) {
        self.notice(message);
    }

    /// A message for the user, such as a retry or a wait.
    fn notice(&self, message: &str) {
        let _ = message;
    }

    /// The work has ended, with or without success.
    fn end(&self) {}

    /// Returns whether the work should stop at the next convenient place, with the error `Cancelled` of its crate. Bytes that have arrived
    /// stay on disk.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Reports nothing and never stops the work.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {}
