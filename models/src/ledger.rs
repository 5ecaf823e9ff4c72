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
    /// The bytes of it that a step of one token reads: all, or one row where it is only looked up.
    pub bytes_per_token: usize,
    /// The products of int8 codes that each token takes with it; 0 for what is not multiplied in int8. The
    /// head is left out: it runs on the last token only.
    pub int8_products_per_token: usize,
}

impl Ledger {
    pub(crate) fn enter(&mut self, entry: LedgerEntry) {
        self.entries.push(entry);
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

    /// The bytes of weights that a step of one token reads, the head included.
    pub fn bytes_per_token(&self) -> usize {
        self.entries.iter().map(|entry| entry.bytes_per_token).sum()
    }

    /// The products of int8 codes that each token takes, those of the head aside.
    pub fn int8_products_per_token(&self) -> usize {
        self.entries.iter().map(|entry| entry.int8_products_per_token).sum()
    }
}
