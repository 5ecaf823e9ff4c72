//! The CUDA path: loads the kernels of `kernels/` and launches them.
//!
//! Everything of a device goes through the one stream that Candle has for it, in order: a launch needs no
//! synchronisation with the copies and launches around it, and memory that is given back is reused only behind
//! the launches that still use it. From Hopper on a kernel may start before earlier ones end; until it has waited for them
//! it touches nothing but weights, which nobody writes once there is an `Int8Matrix` of them.

mod attention;
mod elementwise;
mod layer_norm;
pub(crate) mod limits;
mod matmul;
mod matrix;

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule, CudaStream, DevicePtr, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{DType, Result, Storage, Tensor, bail};

pub(crate) use attention::{attention, write_cache};
pub(crate) use elementwise::{activate, add, finish};
pub(crate) use layer_norm::layer_norm;
pub(crate) use matmul::int8_matmul;
pub(crate) use matrix::{dequantize_rows, quantize_weight};

/// The compiled kernels by the names of their files.
static FATBINS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// What has been loaded on every device.
static LOADED: Mutex<Option<HashMap<DeviceId, Loaded>>> = Mutex::new(None);

#[derive(Default)]
struct Loaded {
    /// By file.
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// By name, and the dynamic shared memory that it has been allowed.
    functions: HashMap<String, (CudaFunction, usize)>,
    /// Small vectors, such as ALiBi's slopes, by the bits of their values.
    vectors: HashMap<Vec<u32>, Tensor>,
}

/// Threads of a block in kernels that go over a row.
const THREADS: u32 = 256;

/// Dynamic shared memory that every kernel may have without being allowed it.
const SHARED_BYTES: usize = 48 << 10;

fn with_loaded<R>(device: &CudaDevice, f: impl FnOnce(&mut Loaded) -> Result<R>) -> Result<R> {
    let mut all: MutexGuard<_> = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    f(all.get_or_insert_default().entry(device.id()).or_default())
}

/// The kernel `name` of `kernels/<file>.cu`, allowed `shared_bytes` of dynamic shared memory.
fn function(device: &CudaDevice, file: &'static str, name: &str, shared_bytes: usize) -> Result<CudaFunction> {
    with_loaded(device, |loaded| {
        if !loaded.functions.contains_key(name) {
            if !loaded.modules.contains_key(file) {
                let Some((_, fatbin)) = FATBINS.iter().find(|(stem, _)| *stem == file) else {
                    bail!("there is no file {file}.cu among the kernels of this build")
                };
                let context = device.cuda_stream().context().clone();
                loaded.modules.insert(file, context.load_module(Ptx::from_binary(fatbin.to_vec())).w()?);
            }
            let function = loaded.modules[file].load_function(name).w()?;
            loaded.functions.insert(name.to_string(), (function, SHARED_BYTES));
        }
        let Some((function, allowed)) = loaded.functions.get_mut(name) else { bail!("kernel {name}: not loaded") };
        if *allowed < shared_bytes {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared_bytes as i32).w()?;
            *allowed = shared_bytes;
        }
        Ok(function.clone())
    })
}

/// The values in f32 on the device; uploaded the first time.
fn constant(device: &CudaDevice, values: &[f32]) -> Result<Tensor> {
    with_loaded(device, |loaded| {
        let key: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
        if !loaded.vectors.contains_key(&key) {
            let device = candle_core::Device::Cuda(device.clone());
            loaded.vectors.insert(key.clone(), Tensor::from_slice(values, values.len(), &device)?);
        }
        Ok(loaded.vectors[&key].clone())
    })
}

/// Multiprocessors of the device.
fn multiprocessors(stream: &CudaStream) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    Ok(stream.context().attribute(attribute).w()?.max(1) as usize)
}

/// The chip's, (9, 0) for Hopper.
fn compute_capability(stream: &CudaStream) -> Result<(i32, i32)> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    Ok((stream.context().attribute(MAJOR).w()?, stream.context().attribute(MINOR).w()?))
}

/// The dynamic shared memory that a block may be allowed.
fn shared_bytes_of_block(stream: &CudaStream) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    Ok(stream.context().attribute(attribute).w()?.max(0) as usize)
}

/// An argument of a kernel.
enum Arg {
    Pointer(u64),
    Int(i32),
    Long(i64),
    Float(f32),
}

impl Arg {
    /// Where its value lies.
    fn address(&self) -> *mut c_void {
        match self {
            Self::Pointer(value) => (&raw const *value).cast_mut().cast(),
            Self::Int(value) => (&raw const *value).cast_mut().cast(),
            Self::Long(value) => (&raw const *value).cast_mut().cast(),
            Self::Float(value) => (&raw const *value).cast_mut().cast(),
        }
    }
}

/// A kernel and its arguments, in the order in which its file has them.
struct Launch<'a> {
    device: &'a CudaDevice,
    file: &'static str,
    name: String,
    args: Vec<Arg>,
}

impl<'a> Launch<'a> {
    /// Of the kernel `name` of `kernels/<file>.cu`.
    fn new(device: &'a CudaDevice, file: &'static str, name: String) -> Self {
        Self { device, file, name, args: Vec::new() }
    }

    /// A pointer; 0 for none.
    fn pointer(mut self, address: u64) -> Self {
        self.args.push(Arg::Pointer(address));
        self
    }

    /// A vector and the number of its dtype, as `vector_value` in device_prims.cuh takes them.
    fn vector(self, vector: Option<&Tensor>) -> Result<Self> {
        let (address, dtype) = match vector {
            Some(vector) => {
                let number = match vector.dtype() {
                    DType::F32 => 0,
                    DType::F16 => 1,
                    DType::BF16 => 2,
                    dtype => bail!("{}: a vector must be F32, F16 or BF16, found {dtype:?}", self.name),
                };
                (address_of(self.device, vector)?, number)
            }
            None => (0, 0),
        };
        let mut launch = self.pointer(address);
        launch.args.push(Arg::Int(dtype));
        Ok(launch)
    }

    /// A whole number; an error when it is too large for the kernels.
    fn int(mut self, value: usize) -> Result<Self> {
        match i32::try_from(value) {
            Ok(value) => self.args.push(Arg::Int(value)),
            Err(_) => bail!("{}: {value} is more than the kernels can count to", self.name),
        }
        Ok(self)
    }

    fn long(mut self, value: usize) -> Self {
        self.args.push(Arg::Long(value as i64));
        self
    }

    fn float(mut self, value: f32) -> Self {
        self.args.push(Arg::Float(value));
        self
    }

    /// Launches blocks of `threads`; nothing where there are no blocks.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and its pointers must be good for what it reads and writes.
    unsafe fn run(self, grid: [usize; 3], threads: u32, shared_bytes: usize) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let [x, y, z] = grid;
        if x > i32::MAX as usize || y.max(z) > u16::MAX as usize {
            bail!("{}: a grid of {x} x {y} x {z} blocks is more than a device takes", self.name);
        }
        let function = function(self.device, self.file, &self.name, shared_bytes)?;
        let stream = self.device.cuda_stream();
        // Every kernel waits by itself for what earlier ones write, so it may start before they end. For chips before
        // Hopper there is no such launch.
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: Default::default(),
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x as u32,
            gridDimY: y as u32,
            gridDimZ: z as u32,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(compute_capability(&stream)?.0 >= 9),
        };
        let mut args: Vec<*mut c_void> = self.args.iter().map(Arg::address).collect();
        stream.context().bind_to_thread().w()?;
        // SAFETY: the caller vouches for the arguments, which live to the end of the call, as the attribute does.
        unsafe { sys::cuLaunchKernelEx(&raw const config, function.cu_function(), args.as_mut_ptr(), null_mut()) }
            .result()
            .w()
    }
}

/// What the names of a dtype's kernels end in.
fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        dtype => bail!("activations must be F32, F16 or BF16, found {dtype:?}"),
    }
}

/// Where value `offset` of a storage lies on the device.
fn address(storage: &CudaStorage, offset: usize) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    macro_rules! at {
        ($slice:expr) => {{
            let (first, _in_order) = $slice.device_ptr(&stream);
            first + (offset * size_of_element($slice)) as u64
        }};
    }
    Ok(match &storage.slice {
        CudaStorageSlice::U8(slice) => at!(slice),
        CudaStorageSlice::U32(slice) => at!(slice),
        CudaStorageSlice::I32(slice) => at!(slice),
        CudaStorageSlice::F32(slice) => at!(slice),
        CudaStorageSlice::F16(slice) => at!(slice),
        CudaStorageSlice::BF16(slice) => at!(slice),
        _ => bail!("the kernels take no tensors of this dtype"),
    })
}

fn size_of_element<T>(_slice: &candle_core::cuda_backend::cudarc::driver::CudaSlice<T>) -> usize {
    size_of::<T>()
}

/// Where a contiguous tensor's values lie; an error when it is not on this device.
pub(crate) fn address_of(device: &CudaDevice, tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) if storage.device.id() == device.id() && layout.is_contiguous() => {
            address(storage, layout.start_offset())
        }
        Storage::Cuda(_) if !layout.is_contiguous() => bail!("wanted a contiguous tensor, found {tensor:?}"),
        _ => bail!("activations are on a CUDA device, but {tensor:?} is not on it"),
    }
}

/// Room for `len` values, not yet written.
fn uninitialized(device: &CudaDevice, dtype: DType, len: usize) -> Result<CudaStorage> {
    // SAFETY (of all): whoever asks for it has a kernel write all of it before anything reads it.
    #[allow(clippy::undocumented_unsafe_blocks)]
    let slice = unsafe {
        match dtype {
            DType::U8 => CudaStorageSlice::U8(device.alloc(len)?),
            DType::U32 => CudaStorageSlice::U32(device.alloc(len)?),
            DType::F32 => CudaStorageSlice::F32(device.alloc(len)?),
            DType::F16 => CudaStorageSlice::F16(device.alloc(len)?),
            DType::BF16 => CudaStorageSlice::BF16(device.alloc(len)?),
            dtype => bail!("the kernels write no {dtype:?}"),
        }
    };
    Ok(CudaStorage { slice, device: device.clone() })
}
