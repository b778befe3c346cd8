use pricket_nn::Progress;

/// A piece of work that a [`Progress`] is told of; it ends with the value, also when an error ends it.
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
