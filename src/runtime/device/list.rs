//! What devices there are.

use serde::Serialize;

use super::DeviceChoice;
use crate::runtime::RuntimeError;
#[cfg(feature = "cuda")]
use crate::runtime::cuda;
#[cfg(feature = "gpu")]
use crate::runtime::gpu::{self, AdapterDescription, AdapterKind};

/// A device as `devices` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceDescription {
    /// What `--device` takes: `cpu`, `gpu:0`.
    pub id: String,
    /// Name of the hardware.
    pub name: String,
    /// `processor`, `discrete`, `integrated`, `virtual`, `software`, `unknown`; empty where there is no device.
    pub kind: String,
    /// How it is reached: `native`, `vulkan`, `metal`, `dx12`, `cuda`.
    pub interface: String,
    /// Driver and its version, or the instruction sets of a processor.
    pub driver: String,
    /// Bytes of memory, where they are known.
    pub memory_bytes: Option<u64>,
    /// Largest matrix in bytes, where there is a limit.
    pub max_buffer_bytes: Option<u64>,
    /// Largest part of a matrix that one kernel sees in bytes, where there is a limit: larger ones are tiled.
    pub max_binding_bytes: Option<u64>,
    /// Whether `--device auto` takes it.
    pub automatic: bool,
    /// Why it cannot be used, if so.
    pub unusable: Option<String>,
}

/// What this machine has, and why what it has not cannot be used. Starts drivers, so it takes a moment.
pub fn devices() -> Vec<DeviceDescription> {
    let mut found = vec![processor()];
    found.extend(gpus());
    let cards = nvidia_cards();
    if cards.iter().any(|d| d.automatic) {
        // CUDA before Vulkan: it is the faster way to the same card.
        found.iter_mut().for_each(|d| d.automatic = false);
    }
    found.extend(cards);
    if !found.iter().any(|d| d.automatic) {
        found[0].automatic = true;
    }
    found
}

fn absent(id: &str, interface: &str, why: &str) -> DeviceDescription {
    DeviceDescription {
        id: id.to_owned(),
        name: String::new(),
        kind: String::new(),
        interface: interface.to_owned(),
        driver: String::new(),
        memory_bytes: None,
        max_buffer_bytes: None,
        max_binding_bytes: None,
        automatic: false,
        unusable: Some(why.to_owned()),
    }
}

fn processor() -> DeviceDescription {
    let info = fs_err::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, n)| n.trim().to_owned()));
    let memory = fs_err::read_to_string("/proc/meminfo").unwrap_or_default();
    let total =
        memory.lines().find_map(|l| l.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
    let threads = rayon::current_num_threads();
    let sets = instruction_sets();
    DeviceDescription {
        id: "cpu".to_owned(),
        name: name.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        kind: "processor".to_owned(),
        interface: "native".to_owned(),
        driver: format!("{threads} threads{}{sets}", if sets.is_empty() { "" } else { ", " }),
        memory_bytes: total.map(|kib| kib * 1024),
        max_buffer_bytes: None,
        max_binding_bytes: None,
        automatic: false,
        unusable: None,
    }
}

#[cfg(target_arch = "x86_64")]
fn instruction_sets() -> String {
    let sets = [
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("AVX-512", is_x86_feature_detected!("avx512f")),
    ];
    sets.iter().filter(|s| s.1).map(|s| s.0).collect::<Vec<_>>().join(", ")
}

#[cfg(not(target_arch = "x86_64"))]
fn instruction_sets() -> String {
    String::new()
}

#[cfg(feature = "gpu")]
fn gpus() -> Vec<DeviceDescription> {
    let found = match gpu::adapters() {
        Ok(found) => found,
        Err(why) => return vec![absent("gpu", "vulkan, metal, dx12", &why)],
    };
    if found.is_empty() {
        return vec![absent("gpu", "vulkan, metal, dx12", NO_ADAPTER)];
    }
    let automatic = choose(&found);
    let kind = |kind: AdapterKind| match kind {
        AdapterKind::Discrete => "discrete",
        AdapterKind::Integrated => "integrated",
        AdapterKind::Virtual => "virtual",
        AdapterKind::Software => "software",
        AdapterKind::Unknown => "unknown",
    };
    let describe = |(index, a): (usize, AdapterDescription)| DeviceDescription {
        id: format!("gpu:{index}"),
        name: a.name,
        kind: kind(a.kind).to_owned(),
        interface: a.interface,
        driver: a.driver,
        memory_bytes: a.memory_bytes,
        max_buffer_bytes: Some(a.max_buffer_bytes),
        max_binding_bytes: Some(a.max_binding_bytes),
        automatic: automatic == Some(index),
        unusable: a.unusable,
    };
    found.into_iter().enumerate().map(describe).collect()
}

#[cfg(feature = "gpu")]
const NO_ADAPTER: &str = "no driver for Vulkan, Metal or DX12 was found (Debian: mesa-vulkan-drivers, or the vendor's)";

#[cfg(not(feature = "gpu"))]
fn gpus() -> Vec<DeviceDescription> {
    vec![absent("gpu", "vulkan, metal, dx12", "this program was built without the feature `gpu`")]
}

/// What `auto` takes: never software, which is slower than the processor it runs on.
#[cfg(feature = "gpu")]
pub(super) fn choose(found: &[AdapterDescription]) -> Option<usize> {
    found.iter().position(|a| a.unusable.is_none() && a.kind != AdapterKind::Software)
}

#[cfg(feature = "cuda")]
fn nvidia_cards() -> Vec<DeviceDescription> {
    let found = match cuda::cards() {
        Ok(found) => found,
        Err(why) => return vec![absent("cuda", "cuda", &why)],
    };
    if found.is_empty() {
        return vec![absent("cuda", "cuda", "NVIDIA's driver finds no card")];
    }
    let automatic = found.iter().position(|c| c.unusable.is_none());
    let describe = |(index, c): (usize, cuda::CardDescription)| DeviceDescription {
        id: format!("cuda:{index}"),
        name: c.name,
        kind: if c.integrated { "integrated" } else { "discrete" }.to_owned(),
        interface: "cuda".to_owned(),
        driver: format!("CUDA {}.{}, compute capability {}.{}", c.driver.0, c.driver.1, c.capability.0, c.capability.1),
        memory_bytes: Some(c.memory_bytes),
        max_buffer_bytes: None,
        max_binding_bytes: None,
        automatic: automatic == Some(index),
        unusable: c.unusable,
    };
    found.into_iter().enumerate().map(describe).collect()
}

#[cfg(not(feature = "cuda"))]
fn nvidia_cards() -> Vec<DeviceDescription> {
    vec![absent(
        "cuda",
        "cuda",
        "this program was built without CUDA (`--features cuda`); `--device gpu` takes NVIDIA cards through Vulkan",
    )]
}

pub(super) fn no_device(choice: DeviceChoice) -> RuntimeError {
    let line = |d: DeviceDescription| match (d.unusable, d.name.as_str()) {
        (Some(why), _) => format!("{}: {why}", d.id),
        (None, name) => format!("{}: {name} ({}, {})", d.id, d.kind, d.interface),
    };
    RuntimeError::NoDevice { wanted: choice.to_string(), found: devices().into_iter().map(line).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_device_is_automatic_and_it_is_usable() {
        let found = devices();
        let automatic: Vec<_> = found.iter().filter(|d| d.automatic).collect();
        assert_eq!(automatic.len(), 1, "{found:?}");
        assert!(automatic[0].unusable.is_none() && automatic[0].kind != "software", "{found:?}");
        assert!(found.iter().any(|d| d.id.starts_with("gpu")) && found.iter().any(|d| d.id.starts_with("cuda")));
    }

    #[cfg(feature = "gpu")]
    #[test]
    fn software_is_never_taken_without_being_asked_for() {
        let adapter = |kind, unusable: bool| AdapterDescription {
            name: String::new(),
            interface: "vulkan".into(),
            kind,
            driver: String::new(),
            memory_bytes: None,
            max_buffer_bytes: 1,
            max_binding_bytes: 1,
            unusable: unusable.then(|| "too small".to_owned()),
        };
        assert_eq!(choose(&[]), None);
        assert_eq!(choose(&[adapter(AdapterKind::Software, false)]), None);
        let both = [adapter(AdapterKind::Software, false), adapter(AdapterKind::Integrated, false)];
        assert_eq!(choose(&both), Some(1));
        assert_eq!(choose(&[adapter(AdapterKind::Discrete, true), adapter(AdapterKind::Software, false)]), None);
    }
}
