//! The devices of this machine behind one type, chosen by name.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use ndarray::{Array2, ArrayView2};
use serde::Serialize;

use crate::arch::Activation;

use super::{AttentionShape, Backend, Cpu, HeadColumns, HeadPart, Rotation, RuntimeError, Span};

#[cfg(feature = "gpu")]
use super::gpu::{self, AdapterDescription, AdapterKind, Gpu, GpuTensor};

/// Which device to compute on, as a user says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The best GPU that is no software, else the CPU.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU by its number in [`devices`], or the first.
    Gpu(Option<usize>),
    /// The first GPU that is reached through Vulkan.
    Vulkan,
    /// The first GPU that is reached through Metal.
    Metal,
    /// An NVIDIA card through CUDA, by its number, or the first.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (name, number) = match s.split_once(':') {
            Some((name, number)) => (name, Some(number.parse::<usize>().map_err(|_| UNKNOWN.to_owned())?)),
            None => (s, None),
        };
        match (name, number) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            ("gpu", n) => Ok(Self::Gpu(n)),
            ("vulkan", None) => Ok(Self::Vulkan),
            ("metal", None) => Ok(Self::Metal),
            ("cuda", n) => Ok(Self::Cuda(n)),
            _ => Err(UNKNOWN.to_owned()),
        }
    }
}

impl Serialize for DeviceChoice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

const UNKNOWN: &str =
    "expected auto, cpu, gpu, gpu:N, vulkan, metal, cuda or cuda:N; `gqa2mla devices` lists what this machine has";

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu(None) => f.write_str("gpu"),
            Self::Gpu(Some(n)) => write!(f, "gpu:{n}"),
            Self::Vulkan => f.write_str("vulkan"),
            Self::Metal => f.write_str("metal"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(n)) => write!(f, "cuda:{n}"),
        }
    }
}

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
    found.push(absent(
        "cuda",
        "cuda",
        "this version has no CUDA backend; NVIDIA cards are used through Vulkan, as gpu",
    ));
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
fn choose(found: &[AdapterDescription]) -> Option<usize> {
    found.iter().position(|a| a.unusable.is_none() && a.kind != AdapterKind::Software)
}

/// An open device. A [`Backend`] by itself: code that is told the device at run time needs no type parameter.
#[derive(Debug)]
pub enum Device {
    /// The processor.
    Cpu(Cpu),
    /// A GPU.
    #[cfg(feature = "gpu")]
    Gpu(Gpu),
}

/// A matrix on a [`Device`].
#[derive(Debug)]
pub enum DeviceTensor {
    /// In host memory.
    Cpu(Array2<f32>),
    /// On a GPU.
    #[cfg(feature = "gpu")]
    Gpu(GpuTensor),
}

impl Device {
    /// Open what was chosen. Where `auto` finds a GPU whose driver fails, it is the processor.
    ///
    /// # Errors
    /// [`RuntimeError::NoDevice`] for one that is not there, with what is; [`RuntimeError::Device`] for one that fails.
    pub fn open(choice: DeviceChoice) -> Result<Self, RuntimeError> {
        match choice {
            DeviceChoice::Cpu => Ok(Self::Cpu(Cpu)),
            DeviceChoice::Auto => Ok(Self::best()),
            _ => Self::chosen(choice),
        }
    }

    /// Whether it is the processor pretending to be a GPU.
    pub fn is_software_gpu(&self) -> bool {
        match self {
            Self::Cpu(_) => false,
            #[cfg(feature = "gpu")]
            Self::Gpu(gpu) => gpu.is_software(),
        }
    }

    #[cfg(feature = "gpu")]
    fn best() -> Self {
        let chosen = gpu::adapters().ok().and_then(|found| choose(&found));
        chosen.and_then(|index| gpu::open(index).ok()).map_or(Self::Cpu(Cpu), Self::Gpu)
    }

    #[cfg(not(feature = "gpu"))]
    fn best() -> Self {
        Self::Cpu(Cpu)
    }

    #[cfg(feature = "gpu")]
    fn chosen(choice: DeviceChoice) -> Result<Self, RuntimeError> {
        let found = gpu::adapters().unwrap_or_default();
        let by_interface = |name: &str| found.iter().position(|a| a.interface == name && a.unusable.is_none());
        let index = match choice {
            DeviceChoice::Gpu(None) => found.iter().position(|a| a.unusable.is_none()),
            DeviceChoice::Gpu(Some(n)) => Some(n).filter(|n| *n < found.len()),
            DeviceChoice::Vulkan => by_interface("vulkan"),
            DeviceChoice::Metal => by_interface("metal"),
            DeviceChoice::Auto | DeviceChoice::Cpu | DeviceChoice::Cuda(_) => None,
        };
        index.map_or_else(|| Err(no_device(choice)), |index| gpu::open(index).map(Self::Gpu))
    }

    #[cfg(not(feature = "gpu"))]
    fn chosen(choice: DeviceChoice) -> Result<Self, RuntimeError> {
        Err(no_device(choice))
    }
}

fn no_device(choice: DeviceChoice) -> RuntimeError {
    let line = |d: DeviceDescription| match (d.unusable, d.name.as_str()) {
        (Some(why), _) => format!("{}: {why}", d.id),
        (None, name) => format!("{}: {name} ({}, {})", d.id, d.kind, d.interface),
    };
    RuntimeError::NoDevice { wanted: choice.to_string(), found: devices().into_iter().map(line).collect() }
}

impl DeviceTensor {
    fn cpu(&self) -> &Array2<f32> {
        match self {
            Self::Cpu(t) => t,
            #[cfg(feature = "gpu")]
            Self::Gpu(_) => unreachable!("a matrix of another device"),
        }
    }

    fn cpu_mut(&mut self) -> &mut Array2<f32> {
        match self {
            Self::Cpu(t) => t,
            #[cfg(feature = "gpu")]
            Self::Gpu(_) => unreachable!("a matrix of another device"),
        }
    }

    fn into_cpu(self) -> Array2<f32> {
        match self {
            Self::Cpu(t) => t,
            #[cfg(feature = "gpu")]
            Self::Gpu(_) => unreachable!("a matrix of another device"),
        }
    }
}

#[cfg(feature = "gpu")]
impl DeviceTensor {
    fn gpu(&self) -> &GpuTensor {
        match self {
            Self::Gpu(t) => t,
            Self::Cpu(_) => unreachable!("a matrix of another device"),
        }
    }

    fn gpu_mut(&mut self) -> &mut GpuTensor {
        match self {
            Self::Gpu(t) => t,
            Self::Cpu(_) => unreachable!("a matrix of another device"),
        }
    }

    fn into_gpu(self) -> GpuTensor {
        match self {
            Self::Gpu(t) => t,
            Self::Cpu(_) => unreachable!("a matrix of another device"),
        }
    }
}

/// Do the same on either device: `$b` is its backend, `$get`, `$get_mut` and `$into` open matrices, `$made` wraps one.
macro_rules! on {
    ($device:expr, |$b:ident, $get:ident, $get_mut:ident, $into:ident, $made:ident| $e:expr) => {
        match $device {
            Device::Cpu($b) => {
                #[allow(unused_variables)]
                let ($get, $get_mut, $into, $made) =
                    (DeviceTensor::cpu, DeviceTensor::cpu_mut, DeviceTensor::into_cpu, DeviceTensor::Cpu);
                $e
            }
            #[cfg(feature = "gpu")]
            Device::Gpu($b) => {
                #[allow(unused_variables)]
                let ($get, $get_mut, $into, $made) =
                    (DeviceTensor::gpu, DeviceTensor::gpu_mut, DeviceTensor::into_gpu, DeviceTensor::Gpu);
                $e
            }
        }
    };
}

impl Backend for Device {
    type Tensor = DeviceTensor;

    fn name(&self) -> &str {
        on!(self, |b, get, get_mut, into, made| b.name())
    }

    fn upload(&self, host: Array2<f32>) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.upload(host)))
    }

    fn upload_view(&self, host: ArrayView2<'_, f32>) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.upload_view(host)))
    }

    fn upload_weight(&self, host: Array2<f32>) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.upload_weight(host)))
    }

    fn download(&self, tensor: DeviceTensor) -> Result<Array2<f32>, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.download(into(tensor)))
    }

    fn shape(&self, tensor: &DeviceTensor) -> (usize, usize) {
        on!(self, |b, get, get_mut, into, made| b.shape(get(tensor)))
    }

    fn zeros(&self, rows: usize, columns: usize) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.zeros(rows, columns)))
    }

    fn write_rows(&self, target: &mut DeviceTensor, to: &[usize], rows: &DeviceTensor) {
        on!(self, |b, get, get_mut, into, made| b.write_rows(get_mut(target), to, get(rows)));
    }

    fn rows(&self, x: &DeviceTensor, rows: Range<usize>) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.rows(get(x), rows)))
    }

    fn linear(&self, x: &DeviceTensor, weight: &DeviceTensor, bias: Option<&DeviceTensor>) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.linear(get(x), get(weight), bias.map(get))))
    }

    fn head_linear(
        &self,
        x: &DeviceTensor,
        weight: &DeviceTensor,
        of: HeadColumns,
        heads: usize,
        absorb: bool,
    ) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.head_linear(get(x), get(weight), of, heads, absorb)))
    }

    fn rms_norm(&self, x: &DeviceTensor, gain: &DeviceTensor, eps: f64) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.rms_norm(get(x), get(gain), eps)))
    }

    fn rope(&self, x: &mut DeviceTensor, rotation: &Rotation, positions: &[usize], columns: HeadColumns, heads: usize) {
        on!(self, |b, get, get_mut, into, made| b.rope(get_mut(x), rotation, positions, columns, heads));
    }

    fn gather_heads(&self, parts: &[HeadPart<'_, DeviceTensor>], heads: usize) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| {
            let parts: Vec<_> = parts.iter().map(|p| HeadPart { from: get(p.from), columns: p.columns }).collect();
            made(b.gather_heads(&parts, heads))
        })
    }

    fn attention(
        &self,
        q: &DeviceTensor,
        k: &DeviceTensor,
        v: &DeviceTensor,
        shape: &AttentionShape,
        spans: &[Span],
    ) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.attention(get(q), get(k), get(v), shape, spans)))
    }

    fn silu_mul(&self, gate: DeviceTensor, up: &DeviceTensor) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.silu_mul(into(gate), get(up))))
    }

    fn add(&self, x: &mut DeviceTensor, y: &DeviceTensor) {
        on!(self, |b, get, get_mut, into, made| b.add(get_mut(x), get(y)));
    }

    fn copy_to_host(&self, x: &DeviceTensor) -> Result<Array2<f32>, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.copy_to_host(get(x)))
    }

    fn gated(
        &self,
        gate: DeviceTensor,
        up: &DeviceTensor,
        activation: Activation,
    ) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.gated(into(gate), get(up), activation).map(made))
    }

    fn activated(&self, x: DeviceTensor, activation: Activation) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.activated(into(x), activation).map(made))
    }

    fn rms_norm_heads(
        &self,
        x: &mut DeviceTensor,
        gain: &DeviceTensor,
        eps: f64,
        columns: HeadColumns,
        heads: usize,
    ) -> Result<(), RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.rms_norm_heads(get_mut(x), get(gain), eps, columns, heads))
    }

    fn capped_attention(
        &self,
        q: &DeviceTensor,
        k: &DeviceTensor,
        v: &DeviceTensor,
        shape: &AttentionShape,
        cap: f64,
        spans: &[Span],
    ) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| {
            b.capped_attention(get(q), get(k), get(v), shape, cap, spans).map(made)
        })
    }

    fn softcap(&self, x: DeviceTensor, cap: f64) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.softcap(into(x), cap).map(made))
    }

    fn gather_rows(&self, x: &DeviceTensor, rows: &[usize]) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.gather_rows(get(x), rows).map(made))
    }

    fn scatter_add_rows(
        &self,
        target: &mut DeviceTensor,
        rows: &[usize],
        weights: &[f32],
        y: &DeviceTensor,
    ) -> Result<(), RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.scatter_add_rows(get_mut(target), rows, weights, get(y)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["auto", "cpu", "gpu", "gpu:3", "vulkan", "metal", "cuda", "cuda:1"] {
            assert_eq!(name.parse::<DeviceChoice>().map(|d| d.to_string()), Ok(name.to_owned()));
        }
        for bad in ["", "GPU", "gpu:", "gpu:-1", "cpu:0", "rocm", "vulkan:1", "gpu:1:2"] {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn exactly_one_device_is_automatic_and_it_is_usable() {
        let found = devices();
        let automatic: Vec<_> = found.iter().filter(|d| d.automatic).collect();
        assert_eq!(automatic.len(), 1, "{found:?}");
        assert!(automatic[0].unusable.is_none() && automatic[0].kind != "software", "{found:?}");
        assert!(found.iter().any(|d| d.id.starts_with("gpu")) && found.iter().any(|d| d.id == "cuda"));
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

    #[test]
    fn an_absent_device_is_an_error_with_those_there_are() {
        let error = Device::open(DeviceChoice::Cuda(Some(3))).unwrap_err().to_string();
        assert!(error.contains("cuda:3") && error.contains("cpu:") && error.contains("--device gpu"), "{error}");
        assert!(Device::open(DeviceChoice::Gpu(Some(99))).is_err());
    }
}
