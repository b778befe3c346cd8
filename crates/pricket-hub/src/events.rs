/// What a download does to a file, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// The Hub is asked for revisions or a listing; the name told is the repository's.
    Metadata,
    /// Bytes arrive. They are hashed as they do.
    Body,
    /// The last bytes have arrived; the rest of the hash is taken and compared.
    Hash,
    /// The file gets its final name, and the snapshot its link.
    Rename,
}

/// Whom a download tells how it goes, and who can stop it. Called from several threads; it should return soon.
pub trait Events: Send + Sync {
    /// `done` of `total` bytes are on disk. Falls if bytes turn out to be worthless.
    fn progress(&self, done: u64, total: u64) {
        let _ = (done, total);
    }

    /// `file` enters a phase.
    fn phase(&self, file: &str, phase: Phase) {
        let _ = (file, phase);
    }

    /// The network failed, and what the cache has is used in its place.
    fn fallback(&self, message: &str) {
        self.notice(message);
    }

    /// Something that a user may want to know: a retry, a wait.
    fn notice(&self, message: &str) {
        let _ = message;
    }

    /// Whether to stop. What has arrived stays on disk, for the next time.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Events for Quiet {}
