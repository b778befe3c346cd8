use candle_core::{CpuStorage, Layout, Result, bail};

/// A buffer that several threads write at places that never overlap.
pub(crate) struct Shared<T>(*mut T, usize);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: only a pointer; `Shared::slice` puts the promise of disjointness on its caller.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(buffer: &mut [T]) -> Self {
        Self(buffer.as_mut_ptr(), buffer.len())
    }

    /// A pointer to element `at`, for a strided writer.
    ///
    /// # Safety
    /// The borrow that made this is alive, and no other thread touches what is written through the pointer.
    pub(crate) unsafe fn at(&self, at: usize) -> *mut T {
        assert!(at <= self.1);
        // SAFETY: inside the buffer or one past it.
        unsafe { self.0.add(at) }
    }

    /// Elements `[at, at + len)`, for their one writer.
    ///
    /// # Panics
    /// If they are not inside of the buffer.
    ///
    /// # Safety
    /// The borrow that made this is alive, and no other thread touches these elements meanwhile.
    #[allow(clippy::mut_from_ref, reason = "this is what the type is for; the caller promises disjointness")]
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.1), "a slice beyond its buffer");
        // SAFETY: inside the buffer; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}

/// The elements of a contiguous f32 CPU tensor.
pub(crate) fn f32_slice<'a>(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else { bail!("{name}: expected f32 activations") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("{name}: expected a contiguous tensor, got {layout:?}"),
    }
}
