/// Receives the progress of long work and can stop it. Every method has a default, so `impl Progress for X {}` is
/// silent and never stops.
///
/// ```
/// use std::sync::atomic::{AtomicBool, Ordering};
/// /// Stops when Ctrl-C has been seen.
/// struct Interrupt(AtomicBool);
/// impl pricket_nn::Progress for Interrupt {
///     fn cancelled(&self) -> bool { self.0.load(Ordering::Relaxed) }
/// }
/// ```
pub trait Progress: Send + Sync {
    /// Work called `what` begins; `total` is in `unit` ("bytes", "tokens", "documents").
    fn begin(&self, what: &str, total: u64, unit: &str) {
        let _ = (what, total, unit);
    }

    /// `done` of the total is done.
    fn update(&self, done: u64) {
        let _ = done;
    }

    /// Something that a user may want to know meanwhile: a retry, a wait.
    fn notice(&self, message: &str) {
        let _ = message;
    }

    /// The work has ended, one way or the other.
    fn end(&self) {}

    /// Whether the work should stop at the next convenient place, with [`crate::Error::Cancelled`].
    fn cancelled(&self) -> bool {
        false
    }
}

/// Says nothing and never stops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {}
