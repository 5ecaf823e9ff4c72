//! The memory of this machine, and of common GPUs.

use int8_ops::device::{self, DeviceMemory};
use sysinfo::System;

/// Bytes of main memory.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    pub total: u64,
    /// What a program can still have without swapping.
    pub available: u64,
}

/// The main memory of this machine, or of the container that the program is in; `None` where the
/// system does not tell.
pub fn memory() -> Option<Memory> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    let (mut total, mut available) = (system.total_memory(), system.available_memory());
    if let Some(container) = system.cgroup_limits() {
        total = total.min(container.total_memory);
        // What is free leaves out the page cache, which a program can have, too.
        available = available.min(container.total_memory.saturating_sub(container.rss));
    }
    (total > 0).then_some(Memory { total, available })
}

/// The name and memory of the first CUDA device here that can be used.
pub fn local_device() -> Option<(String, DeviceMemory)> {
    let device = device::cuda(0).ok()?;
    Some((device::name(&device)?, device::memory(&device).ok()??))
}

/// A kind of GPU.
#[derive(Debug)]
pub struct Gpu {
    /// The name it is sold under.
    pub name: &'static str,
    /// MiB of memory, as `nvidia-smi` tells it: less than the name says where error correction or the
    /// firmware takes a part.
    mebibytes: u64,
}

impl Gpu {
    pub fn bytes(&self) -> u64 {
        self.mebibytes << 20
    }
}

/// Common GPUs, by memory.
#[rustfmt::skip] // a table
pub const GPUS: &[Gpu] = &[
    Gpu { name: "RTX 3060 12 GB", mebibytes:  12_288 },
    Gpu { name: "T4 16 GB",       mebibytes:  15_360 },
    Gpu { name: "A10 24 GB",      mebibytes:  23_028 },
    Gpu { name: "L4 24 GB",       mebibytes:  23_034 },
    Gpu { name: "RTX 4090 24 GB", mebibytes:  24_564 },
    Gpu { name: "RTX 5090 32 GB", mebibytes:  32_607 },
    Gpu { name: "A100 40 GB",     mebibytes:  40_960 },
    Gpu { name: "L40S 48 GB",     mebibytes:  46_068 },
    Gpu { name: "H100 80 GB",     mebibytes:  81_559 },
    Gpu { name: "A100 80 GB",     mebibytes:  81_920 },
    Gpu { name: "H200 141 GB",    mebibytes: 143_771 },
    Gpu { name: "B200 192 GB",    mebibytes: 183_359 },
];
