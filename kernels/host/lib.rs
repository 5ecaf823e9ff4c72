//! Runs the CUDA kernels on the CPU, so that tests can compare them with the CPU's ops without a GPU.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;

unsafe extern "C" {
    fn kernels_on_host_launch(
        name: *const c_char,
        grid: *const c_uint,
        block: *const c_uint,
        shared_bytes: c_uint,
        args: *mut *mut c_void,
        count: usize,
        seed: c_uint,
    ) -> c_int;
}

/// An argument of a kernel, as `cuLaunchKernel` takes it.
#[derive(Debug)]
pub enum Arg {
    /// A pointer.
    Pointer(*const c_void),
    /// A whole number.
    Int(c_int),
    /// A whole number of 64 bits.
    Long(i64),
    /// A float.
    Float(f32),
}

impl<T> From<&[T]> for Arg {
    fn from(values: &[T]) -> Self {
        Self::Pointer(values.as_ptr().cast())
    }
}

impl<T> From<&mut [T]> for Arg {
    fn from(values: &mut [T]) -> Self {
        Self::Pointer(values.as_mut_ptr().cast())
    }
}

impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        Self::Int(value as c_int)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::Int(value)
    }
}

impl From<i64> for Arg {
    fn from(value: i64) -> Self {
        Self::Long(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl Arg {
    /// No values.
    pub const NULL: Self = Self::Pointer(std::ptr::null());
}

/// How many blocks of how many threads, and the bytes of shared memory that each block is given.
#[derive(Debug, Clone, Copy, Default)]
pub struct Config {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// For the order in which lanes, warps and blocks run.
    pub seed: u32,
}

/// One kernel at a time: the place of a thread is a global variable there.
static RUNNING: Mutex<()> = Mutex::new(());

/// Runs the kernel `name`, all of it, before it returns.
///
/// # Panics
/// When there is no such kernel, or when it takes another number of arguments.
///
/// # Safety
/// The arguments must have the kernel's types, and its pointers must be good for what it reads and writes.
pub unsafe fn launch(name: &str, config: Config, args: &[Arg]) {
    let mut pointers: Vec<*mut c_void> = args
        .iter()
        .map(|arg| match arg {
            Arg::Pointer(value) => (&raw const *value).cast_mut().cast(),
            Arg::Int(value) => (&raw const *value).cast_mut().cast(),
            Arg::Long(value) => (&raw const *value).cast_mut().cast(),
            Arg::Float(value) => (&raw const *value).cast_mut().cast(),
        })
        .collect();
    let name_z = CString::new(name).expect("a kernel's name has no zeros");
    let _running = RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // SAFETY: every pointer leads to an argument; the caller vouches for the rest.
    let wanted = unsafe {
        kernels_on_host_launch(
            name_z.as_ptr(),
            config.grid.as_ptr(),
            config.block.as_ptr(),
            config.shared_bytes,
            pointers.as_mut_ptr(),
            args.len(),
            config.seed,
        )
    };
    assert_ne!(wanted, -1, "there is no kernel `{name}`");
    assert_eq!(wanted as usize, args.len(), "arguments of `{name}`");
}
