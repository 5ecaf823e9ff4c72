//! The bytes that a model takes, counted as its tensors are loaded.

use candle_core::DType;

/// The bytes of every tensor of a model as it was loaded.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    entries: Vec<LedgerEntry>,
}

/// What one tensor takes.
#[derive(Debug, Clone)]
pub struct LedgerEntry {
    /// The tensor's full name in the checkpoint.
    pub name: String,
    /// How many values it has.
    pub values: usize,
    /// The bytes it takes as it was loaded, scales included.
    pub bytes: usize,
}

impl Ledger {
    pub(crate) fn enter(&mut self, name: &str, values: usize, bytes: usize) {
        self.entries.push(LedgerEntry { name: name.to_string(), values, bytes });
    }

    /// One entry a tensor, in the order of loading.
    pub fn entries(&self) -> &[LedgerEntry] {
        &self.entries
    }

    /// The bytes of all weights as they were loaded.
    pub fn bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// The bytes that the same weights take with 16 bits each.
    pub fn bytes_at_16_bits(&self) -> usize {
        self.entries.iter().map(|entry| entry.values * DType::F16.size_in_bytes()).sum()
    }
}
