//! How the C library's allocator treats what each step frees.

/// Just below the largest threshold that glibc raises itself to, 32 MiB.
const BLOCK_BYTES: usize = 31 << 20;

/// Lets freed blocks be used again instead of going back to the kernel.
///
/// glibc maps blocks above a threshold, at first 128 KiB, anew each time, and so every step would fault all its
/// activations in again: a fifth of the time of a small network on a CPU. It raises the threshold to the largest
/// mapped block that it has seen freed (mallopt(3), M_MMAP_THRESHOLD): this one, of which no page is touched.
pub fn keep_freed_blocks() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(BLOCK_BYTES)));
}
