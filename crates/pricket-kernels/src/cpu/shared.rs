//! Buffers that several threads write, and the numbers of candle's tensors.

use std::marker::PhantomData;

use candle_core::{CpuStorage, Layout, Result, bail};

/// Part of a buffer that several threads write, each at places of its own.
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

// SAFETY: a pointer and a length; whoever makes a reference of them promises that no other thread has one to the same places.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: the same: nothing is read or written through a `&Shared` without that promise.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(buffer: &'a mut [T]) -> Self {
        Self { at: buffer.as_mut_ptr(), len: buffer.len(), of: PhantomData }
    }

    /// The elements from `at` on.
    ///
    /// # Panics
    /// If it lies behind the buffer.
    #[inline]
    pub(crate) fn from(self, at: usize) -> Self {
        assert!(at <= self.len, "a place beyond its buffer");
        // SAFETY: inside the buffer or one past it.
        Self { at: unsafe { self.at.add(at) }, len: self.len - at, of: PhantomData }
    }

    /// Number of elements.
    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// The first element.
    pub(crate) fn as_mut_ptr(self) -> *mut T {
        self.at
    }

    /// Elements `[at, at + len)`, for their one writer.
    ///
    /// # Panics
    /// If they are not inside of the buffer.
    ///
    /// # Safety
    /// While the result is used nothing else touches these elements.
    #[inline]
    pub(crate) unsafe fn slice(self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "a slice beyond its buffer");
        // SAFETY: inside the buffer, which is borrowed for `'a`; nothing else refers to it, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(at), len) }
    }
}

/// Whether `len` elements hold `rows` rows of `columns`, `stride` apart.
pub(crate) fn holds(len: usize, rows: usize, stride: usize, columns: usize) -> bool {
    let last = rows.checked_sub(1).map_or(Some(0), |last| last.checked_mul(stride)?.checked_add(columns));
    last.is_some_and(|end| end <= len)
}

/// The elements of a contiguous f32 CPU tensor.
pub(crate) fn f32_slice<'a>(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else { bail!("{name}: expected f32 activations") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("{name}: expected a contiguous tensor, got {layout:?}"),
    }
}
