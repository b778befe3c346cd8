//! Progress reporting that ends when its scope ends.

use pricket_nn::Progress;

/// A unit of work reported to a [`Progress`]. Dropping it reports the end of the work, also after an error.
pub(crate) struct Task<'a>(&'a dyn Progress);

impl<'a> Task<'a> {
    pub(crate) fn begin(progress: &'a dyn Progress, what: &str, total: usize, unit: &str) -> Self {
        progress.begin(what, total as u64, unit);
        Self(progress)
    }

    pub(crate) fn update(&self, done: usize) {
        self.0.update(done as u64);
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}
