//! Devices: parses `--devices` and lists the devices of this machine.

use std::fmt;

use candle_core::{DType, Device};
use outliers_protocol::{DeviceInfo, Precision};
use rayon::prelude::*;
use serde::Serialize;
use sysinfo::System;

use crate::error::{Result, WorkerError};

pub mod gpu;

/// A device to which layers are assigned. Two placements on the CPU are two logical devices over
/// the same memory.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Name as in `--devices`.
    pub name: String,
    /// Candle's device, created once and cloned (two devices made for one GPU count as different).
    pub device: Device,
}

/// Opens devices by name: `cpu`, `cpu:N` (N logical devices), `cuda:I`. Without names: all GPUs,
/// or the CPU if there are none.
///
/// # Errors
/// Job: not a device's name. Device: the GPU is missing or unusable; without names: there are GPUs
/// and none is usable.
pub fn open(typed: &[String]) -> Result<Vec<Placement>> {
    if typed.is_empty() {
        let opened = gpu::find().open_all()?.into_iter().map(|(index, device)| cuda(index, device));
        let opened: Vec<Placement> = opened.collect();
        return Ok(if opened.is_empty() { vec![cpu("cpu")] } else { opened });
    }
    // At the same time: a GPU takes up to a second. The first error in their order is reported.
    let opened: Vec<Result<_>> = typed.par_iter().map(|name| open_one(name.trim())).collect();
    Ok(opened.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
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
        Some(("cuda", index)) => {
            let index = index.parse().map_err(|_| bad())?;
            Ok(vec![cuda(index, gpu::find().open(index)?)])
        }
        _ => Err(bad()),
    }
}

fn cpu(name: &str) -> Placement {
    Placement { name: name.to_owned(), device: Device::Cpu }
}

fn cuda(index: usize, device: Device) -> Placement {
    Placement { name: format!("cuda:{index}"), device }
}

/// Number of devices that share one memory: all devices on the CPU; a GPU shares with none.
pub fn sharing_memory(devices: &[Placement]) -> usize {
    devices.iter().filter(|placement| placement.device.is_cpu()).count().max(1)
}

/// Whether one of the devices is a GPU.
pub fn has_gpu(devices: &[Placement]) -> bool {
    devices.iter().any(|placement| !placement.device.is_cpu())
}

/// The dtype of the forward pass.
pub fn compute_dtype(precision: Precision, devices: &[Placement]) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
        Precision::Auto if has_gpu(devices) => DType::BF16,
        Precision::Auto => DType::F32,
    }
}

/// CPU model and memory of this machine, as reported by the system.
#[derive(Clone, Debug, Default)]
pub struct MachineInfo {
    /// CPU model name.
    pub cpu: String,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
}

/// Reads them from the system.
pub fn machine() -> MachineInfo {
    let Ok(system) = System::new_all() else { return MachineInfo::default() };
    let cpu = system.cpus().first().map_or_else(String::new, |cpu| cpu.brand().trim().to_owned());
    MachineInfo { cpu, memory_bytes: Some(system.total_memory()) }
}

/// Describes the devices for `metadata.json`.
pub fn describe(devices: &[Placement], machine: &MachineInfo) -> Vec<DeviceInfo> {
    // The GPU driver is queried only if a GPU is used.
    let gpus = if has_gpu(devices) { gpu::find().describe() } else { Vec::new() };
    let one = |d: &Placement| {
        let gpu = gpus.iter().find(|gpu| gpu.name == d.name).cloned();
        gpu.unwrap_or_else(|| DeviceInfo {
            name: d.name.clone(),
            description: machine.cpu.clone(),
            memory_bytes: machine.memory_bytes,
        })
    };
    devices.iter().map(one).collect()
}

/// Devices of this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Devices {
    /// The CPU first.
    pub devices: Vec<DeviceStatus>,
    /// Why no GPU is usable; `None` if one is.
    pub why_no_gpu: Option<String>,
}

/// A device and whether it is usable.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceStatus {
    /// Name as in `--devices`, and description.
    #[serde(flatten)]
    pub device: DeviceInfo,
    /// Why it is unusable; `None` if it is usable.
    pub unfit: Option<String>,
}

/// Detects all devices.
pub fn list() -> Devices {
    let gpus = gpu::find();
    let cpu = describe(&[cpu("cpu")], &machine()).into_iter().map(|device| DeviceStatus { device, unfit: None });
    let others = gpus.describe().into_iter().zip(&gpus.gpus);
    let others = others.map(|(device, gpu)| DeviceStatus { device, unfit: gpu.unfit.clone() });
    Devices { devices: cpu.chain(others).collect(), why_no_gpu: gpus.why_none }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for DeviceStatus { device, unfit } in &self.devices {
            write!(f, "{:<8} {}", device.name, device.description)?;
            if let Some(bytes) = device.memory_bytes {
                write!(f, ", {:.1} GiB", bytes as f64 / (1u64 << 30) as f64)?;
            }
            writeln!(f, "{}", unfit.as_ref().map_or_else(String::new, |why| format!(" (unusable: {why})")))?;
        }
        self.why_no_gpu.as_ref().map_or(Ok(()), |why| writeln!(f, "no GPU: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(typed: &[&str]) -> Result<Vec<String>> {
        let typed: Vec<String> = typed.iter().map(|s| (*s).to_owned()).collect();
        Ok(open(&typed)?.into_iter().map(|d| d.name).collect())
    }

    #[test]
    fn listed_devices_can_be_opened() {
        let listed = list();
        assert_eq!(listed.devices[0].device.name, "cpu");
        assert_eq!(listed.why_no_gpu.is_some(), listed.devices.len() == 1, "{listed}");
        for seen in listed.devices.iter().filter(|seen| seen.unfit.is_none()) {
            assert_eq!(names(&[&seen.device.name]).unwrap(), [seen.device.name.as_str()]);
        }
    }

    #[test]
    fn logical_devices_are_counted() {
        assert_eq!(names(&["cpu"]).unwrap(), ["cpu"]);
        assert_eq!(names(&["cpu:2"]).unwrap(), ["cpu#0", "cpu#1"]);
    }

    #[test]
    fn invalid_device_is_refused_with_a_hint() {
        for typed in ["gpu", "cpu:0", "cpu:x", "cuda", "cuda:-1", "cpu:99999999", ""] {
            let error = names(&[typed]).unwrap_err();
            assert!(error.hint_text().is_some(), "{typed:?}");
        }
    }
}
