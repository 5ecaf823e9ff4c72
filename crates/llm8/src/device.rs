//! The device that a model runs on: from the arguments to an open one, and what is said of it.

use int8_models::Device;
use int8_ops::device::{self, DeviceError};

use crate::args::{DeviceArgs, DeviceName, OutputArgs};
use crate::failure::Failure;
use crate::{machine, output};

/// Opens the device that the arguments name. Where that is any, a CUDA device that there is but that cannot be
/// used is told; why there is none, where more is to be said.
pub fn open(args: DeviceArgs, output: &OutputArgs) -> Result<Device, Failure> {
    match args.name {
        DeviceName::Cpu => Ok(Device::Cpu),
        DeviceName::Cuda(ordinal) => device::cuda(ordinal).map_err(|error| failure(ordinal, &error)),
        DeviceName::Auto => Ok(device::cuda(0).unwrap_or_else(|error| {
            let is_absent = matches!(error, DeviceError::NotBuilt | DeviceError::NoDriver | DeviceError::NoDevice);
            let is_worth_a_line = !is_absent || (output.verbose && error != DeviceError::NotBuilt);
            if is_worth_a_line && !output.quiet {
                output::say(&format!("Running on the CPU: {error}"));
            }
            Device::Cpu
        })),
    }
}

/// Why there is no such device, and what to do.
fn failure(ordinal: usize, error: &DeviceError) -> Failure {
    let hint = match error {
        DeviceError::NotBuilt => {
            let hint = "build it with `make cuda`, which runs `cargo build --release --features cuda`; or give \
                        --device cpu";
            return Failure::new("--device cuda: this llm8 has no CUDA support").with_hint(hint);
        }
        DeviceError::NoDriver => "install NVIDIA's driver, or give --device cpu".to_string(),
        DeviceError::NoDevice => {
            "see what `nvidia-smi` lists, and whether CUDA_VISIBLE_DEVICES hides it; or give --device cpu".to_string()
        }
        DeviceError::NoSuchDevice { count: 1, .. } => "give --device cuda:0".to_string(),
        DeviceError::NoSuchDevice { count, .. } => format!("give --device cuda:0 to cuda:{}", count - 1),
        DeviceError::DriverTooOld { wanted, .. } => {
            format!("install a driver for CUDA {wanted} or later, or give --device cpu")
        }
        DeviceError::NoKernels { .. } => {
            "build llm8 for it: `make cuda CUDA_COMPUTE_CAP=75` for 7.5, say; or give --device cpu".to_string()
        }
        DeviceError::Other { .. } => "see what `nvidia-smi` says of it, or give --device cpu".to_string(),
    };
    Failure::new(format!("--device cuda:{ordinal}: {error}")).with_hint(hint)
}

/// Bytes that a model can have on the device; `None` where the system does not tell.
pub fn free_memory(device: &Device) -> Option<u64> {
    match device.is_cpu() {
        true => machine::memory().map(|memory| memory.available),
        false => device::memory(device).ok().flatten().map(|memory| memory.free as u64),
    }
}

/// Begins new counts of the peaks of main memory and of the device's, whose memory that is not used goes back to
/// the system first.
pub fn reset_peaks(device: &Device) -> Result<(), Failure> {
    output::reset_peak_rss();
    // What is given back counts until the work that uses it is done.
    device::synchronize(device)
        .map_err(|error| Failure::new(format!("{}: {}", device::label(device), first_line(&error))))?;
    device::give_back(device);
    device::reset_peak(device);
    Ok(())
}

/// A line about a device that is not the CPU: its name and memory.
pub fn describe(device: &Device) -> Option<String> {
    let name = device::name(device)?;
    let memory = device::memory(device).ok().flatten().map_or(String::new(), |memory| {
        format!(", {} free of {}", output::bytes(memory.free), output::bytes(memory.total))
    });
    Some(format!("{}: {name}{memory}", device::label(device)))
}

/// A Candle error's message, which may carry a backtrace.
fn first_line(error: &impl std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_device_is_told_with_what_to_do() {
        let cases = [
            (DeviceError::NotBuilt, "--device cuda: this llm8 has no CUDA support"),
            (DeviceError::NoDriver, "--device cuda:2: no NVIDIA driver is installed"),
            (DeviceError::NoDevice, "--device cuda:2: the NVIDIA driver finds no CUDA device"),
            (
                DeviceError::NoSuchDevice { ordinal: 2, count: 1 },
                "--device cuda:2: there is no CUDA device 2; 1 found, counted from 0",
            ),
            (
                DeviceError::DriverTooOld { found: "12.4".to_string(), wanted: "13.0".to_string() },
                "--device cuda:2: the NVIDIA driver is for CUDA 12.4, which is too old: wanted 13.0 or later",
            ),
        ];
        for (error, message) in cases {
            let failure = failure(2, &error);
            assert_eq!(failure.to_string(), message);
            assert!(failure.has_hint(), "{message}");
        }
    }
}
