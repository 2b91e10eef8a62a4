//! Devices: what `--devices` means, and what is there.

use candle_core::{DType, Device};
use outliers_protocol::{DeviceInfo, Precision};
use sysinfo::System;

use crate::error::{Result, WorkerError};

/// One device that layers are dealt to. Two placements on the CPU are two logical devices over the same memory.
#[derive(Clone, Debug)]
pub struct Placement {
    /// As in `--devices`.
    pub name: String,
    /// Candle's handle; made once, cloned everywhere (two handles of one GPU count as different devices).
    pub device: Device,
}

/// Opens the devices typed: `cpu`, `cpu:N` (N logical devices), `cuda:I`. None typed: all GPUs, or the CPU.
///
/// # Errors
/// Job: not a device's name. Device: a GPU that is not there, or a worker built without CUDA.
pub fn open(typed: &[String]) -> Result<Vec<Placement>> {
    if typed.is_empty() {
        let gpus: Vec<Placement> = (0..).map_while(|i| cuda(i).ok()).collect();
        return Ok(if gpus.is_empty() { vec![cpu("cpu")] } else { gpus });
    }
    let opened = typed.iter().map(|name| open_one(name.trim())).collect::<Result<Vec<_>>>()?;
    Ok(opened.into_iter().flatten().collect())
}

fn open_one(name: &str) -> Result<Vec<Placement>> {
    let bad = || {
        WorkerError::job(format!("--devices: {name:?} is not a device"))
            .hint("use `cpu`, `cpu:2` for two logical CPU devices, or `cuda:0,cuda:1`")
    };
    match name.split_once(':') {
        None if name == "cpu" => Ok(vec![cpu("cpu")]),
        Some(("cpu", n)) => match n.parse().map_err(|_| bad())? {
            0 => Err(bad()),
            n if n > 64 => Err(bad()),
            n => Ok((0usize..n).map(|i| cpu(&format!("cpu#{i}"))).collect()),
        },
        Some(("cuda", i)) => Ok(vec![cuda(i.parse().map_err(|_| bad())?)?]),
        _ => Err(bad()),
    }
}

fn cpu(name: &str) -> Placement {
    Placement { name: name.to_owned(), device: Device::Cpu }
}

fn cuda(index: usize) -> Result<Placement> {
    // A stream of its own: the per-thread default stream would leave loader and compute thread unordered.
    let device = Device::new_cuda_with_stream(index)
        .map_err(|e| WorkerError::device(format!("cuda:{index} cannot be opened: {e}")).hint("use --devices cpu"))?;
    Ok(Placement { name: format!("cuda:{index}"), device })
}

/// How many devices hold their weights and work in the same memory: all on the CPU do, every GPU has its own.
pub fn sharing_memory(devices: &[Placement]) -> usize {
    devices.iter().filter(|placement| placement.device.is_cpu()).count().max(1)
}

/// The dtype of the forward pass.
pub fn compute_dtype(precision: Precision, devices: &[Placement]) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
        Precision::Auto if devices.iter().all(|d| d.device.is_cpu()) => DType::F32,
        Precision::Auto => DType::BF16,
    }
}

/// CPU model and memory of this machine, as far as the system tells.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// CPU model name.
    pub cpu: String,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
}

/// Asks the system.
pub fn machine() -> Machine {
    let Ok(system) = System::new_all() else { return Machine::default() };
    let cpu = system.cpus().first().map_or_else(String::new, |cpu| cpu.brand().trim().to_owned());
    Machine { cpu, memory_bytes: Some(system.total_memory()) }
}

/// Provenance of the devices.
pub fn describe(devices: &[Placement], machine: &Machine) -> Vec<DeviceInfo> {
    let one = |d: &Placement| DeviceInfo {
        name: d.name.clone(),
        description: if d.device.is_cpu() { machine.cpu.clone() } else { "NVIDIA GPU".to_owned() },
        memory_bytes: machine.memory_bytes.filter(|_| d.device.is_cpu()),
    };
    devices.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(typed: &[&str]) -> Result<Vec<String>> {
        let typed: Vec<String> = typed.iter().map(|s| (*s).to_owned()).collect();
        Ok(open(&typed)?.into_iter().map(|d| d.name).collect())
    }

    #[test]
    fn logical_devices_are_counted() {
        assert_eq!(names(&["cpu"]).unwrap(), ["cpu"]);
        assert_eq!(names(&["cpu:2"]).unwrap(), ["cpu#0", "cpu#1"]);
    }

    #[test]
    fn what_is_no_device_is_refused_with_a_hint() {
        for typed in ["gpu", "cpu:0", "cpu:x", "cuda", "cuda:-1", "cpu:99999999", ""] {
            let error = names(&[typed]).unwrap_err();
            assert!(error.hint_text().is_some(), "{typed:?}");
        }
    }
}
