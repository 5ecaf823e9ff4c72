//! The bytes of a file: mapped into memory, or built into the program.

use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};

/// The bytes of a file.
#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}

impl Bytes {
    /// Says that `range` is about to be read from its start to its end, once.
    pub(crate) fn read_ahead(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self {
            // Advice only: where it is not taken, reading is slower and no less right.
            let _ = map.advise_range(memmap2::Advice::Sequential, range.start, range.len());
        }
    }

    /// Gives the memory that holds `range` back to the system. The bytes can still be read: they then
    /// come from the file again.
    pub(crate) fn give_back(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self {
            /// The system maps a file's pages together with their neighbours, up to a huge page.
            const HUGE_PAGE: usize = 1 << 21;
            let range = range.start / HUGE_PAGE * HUGE_PAGE..range.end.next_multiple_of(HUGE_PAGE).min(map.len());
            // SAFETY: the map is of a file and read only, so dropping its pages, the neighbours' too,
            // loses nothing.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
    }
}

/// `len` zeros in memory of their own, which take it only as they are written. An error when the system
/// has no such room, which would end the program if a vector asked for it.
pub(crate) fn zeros(len: usize) -> std::io::Result<MmapMut> {
    MmapMut::map_anon(len)
}

/// A part of a file's bytes that keeps the whole alive.
#[derive(Debug)]
pub(crate) struct BytesPart {
    pub(crate) bytes: Arc<Bytes>,
    pub(crate) range: Range<usize>,
}

impl AsRef<[u8]> for BytesPart {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}
