//! What the allocator does with freed memory.

/// Asks the C library's allocator to keep freed buffers of activations (up to 32 MiB each, 256 MiB together) rather than to
/// give each back to the system, which clears every page of it again for the next operation: reading a prompt is a quarter to
/// a half faster for it. It holds for the whole process, so a program decides; the examples do. Does nothing but under glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // glibc's malloc.h.
        const M_TRIM_THRESHOLD: i32 = -1;
        const M_MMAP_THRESHOLD: i32 = -3;
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        // SAFETY: sets two numbers of the allocator; it may be called at any time.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, 32 << 20);
            mallopt(M_TRIM_THRESHOLD, 256 << 20);
        }
    }
}
