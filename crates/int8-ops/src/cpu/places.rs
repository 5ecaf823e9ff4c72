//! A slice that threads fill together, each other places of it.

use std::marker::PhantomData;
use std::ops::Range;

/// A slice that is borrowed whole, and given away in pieces.
pub(super) struct Places<'a, T> {
    first: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: who takes a piece vouches for it that nobody else has any of it, so that values only move to other threads.
unsafe impl<T: Send> Sync for Places<'_, T> {}

impl<'a, T> Places<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { first: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// A piece, which must be within the slice.
    ///
    /// # Safety
    /// As long as the piece is borrowed, no other may hold any of its places.
    #[expect(clippy::mut_from_ref)]
    pub(super) unsafe fn take(&self, places: Range<usize>) -> &mut [T] {
        assert!(places.start <= places.end && places.end <= self.len);
        // SAFETY: the places are within the slice (asserted), and nobody else has them (the caller vouches for it).
        unsafe { std::slice::from_raw_parts_mut(self.first.add(places.start), places.len()) }
    }

    /// Where a place is, or would be.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn address(&self, place: usize) -> *const T {
        self.first.wrapping_add(place)
    }
}
