//! Buffers that several threads write to, and access to the elements of candle tensors.

use std::marker::PhantomData;

use candle_core::{CpuStorage, Layout, Result, bail};

/// Part of a buffer that several threads write to, each at different places.
pub(crate) struct Shared<'a, T> {
    at: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<'_, T> {}

// SAFETY: this is a pointer and a length. Whoever makes a reference from them promises that no other thread has a
// reference to the same places.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above: nothing is read or written through a `&Shared` without that promise.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(buffer: &'a mut [T]) -> Self {
        Self { at: buffer.as_mut_ptr(), len: buffer.len(), of: PhantomData }
    }

    /// Returns the part from element `at` on.
    ///
    /// # Panics
    /// If `at` is beyond the end of the buffer.
    #[inline]
    pub(crate) fn from(self, at: usize) -> Self {
        assert!(at <= self.len, "an offset beyond the buffer");
        // SAFETY: the pointer is inside the buffer or one past its end.
        Self { at: unsafe { self.at.add(at) }, len: self.len - at, of: PhantomData }
    }

    /// Returns the number of elements.
    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// Returns a pointer to the first element.
    pub(crate) fn as_mut_ptr(self) -> *mut T {
        self.at
    }

    /// Returns elements `[at, at + len)` to their only writer.
    ///
    /// # Panics
    /// If the elements are not inside the buffer.
    ///
    /// # Safety
    /// Nothing else accesses these elements while the result is used.
    #[inline]
    pub(crate) unsafe fn slice(self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "a slice beyond the buffer");
        // SAFETY: the elements are inside the buffer, which is borrowed for `'a`. Nothing else refers to them, as the
        // caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(at), len) }
    }
}

/// Returns whether `len` elements hold `rows` rows of `columns` elements that begin `stride` elements apart.
pub(crate) fn holds(len: usize, rows: usize, stride: usize, columns: usize) -> bool {
    let last = rows.checked_sub(1).map_or(Some(0), |last| last.checked_mul(stride)?.checked_add(columns));
    last.is_some_and(|end| end <= len)
}

/// Returns the elements of a contiguous f32 tensor on the CPU. `name` names the tensor in errors.
pub(crate) fn f32_slice<'a>(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else { bail!("{name}: expected an f32 tensor") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("{name}: expected a contiguous tensor, got {layout:?}"),
    }
}
