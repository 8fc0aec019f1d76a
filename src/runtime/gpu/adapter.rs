//! What adapters there are, and opening one.

use std::sync::Arc;

use serde::Serialize;

use super::Gpu;
use super::queue::Queue;
use crate::runtime::RuntimeError;
use crate::runtime::accelerator::guarded;

/// What an adapter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// A card with memory of its own.
    Discrete,
    /// Shares the processor's memory.
    Integrated,
    /// Lent to a virtual machine.
    Virtual,
    /// The processor pretending to be a GPU: right, and slow.
    Software,
    /// The driver does not say.
    Unknown,
}

/// One way to a GPU. A card may be reached through several interfaces and is then listed several times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AdapterDescription {
    /// Name of the device.
    pub name: String,
    /// `vulkan`, `metal` or `dx12`.
    pub interface: String,
    /// What it is.
    pub kind: AdapterKind,
    /// Driver and its version.
    pub driver: String,
    /// Bytes of memory of its own, where the interface tells.
    pub memory_bytes: Option<u64>,
    /// Largest matrix, bytes.
    pub max_buffer_bytes: u64,
    /// Largest part of a matrix that one kernel sees, bytes: larger ones are worked on in tiles.
    pub max_binding_bytes: u64,
    /// Why it cannot be used, if so.
    pub unusable: Option<String>,
}

/// Every adapter of every interface, best first: discrete, integrated, virtual, others, software. Empty where there is no
/// driver.
///
/// # Errors
/// A driver that fails, in its own words.
pub fn adapters() -> Result<Vec<AdapterDescription>, String> {
    Ok(guarded(found)?.iter().map(describe).collect())
}

/// Open adapter `index` of [`adapters`].
///
/// # Errors
/// [`RuntimeError::Device`] when the adapter is gone or its driver fails.
pub fn open(index: usize) -> Result<Gpu, RuntimeError> {
    open_limited(index, u64::MAX)
}

/// As [`open`], with kernels that see at most `binding_bytes` of a matrix at a time: what does not fit is worked on in
/// tiles, as on a device that allows no more. No less than 64 rows of the widest matrix.
///
/// # Errors
/// As [`open`].
pub fn open_limited(index: usize, binding_bytes: u64) -> Result<Gpu, RuntimeError> {
    let failed = |message: String| RuntimeError::Device { device: format!("gpu:{index}"), message };
    let opened = guarded(|| {
        let adapter = found().into_iter().nth(index).ok_or_else(|| "there is no such adapter".to_owned())?;
        if let Some(why) = unusable(&adapter.limits()) {
            return Err(why);
        }
        let mut limits = adapter.limits();
        limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(binding_bytes);
        let descriptor = wgpu::DeviceDescriptor {
            label: None,
            required_features: wgpu::Features::empty(),
            required_limits: limits,
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).map_err(|e| e.to_string())?;
        let info = adapter.get_info();
        let name = format!("gpu:{index} ({}, {})", info.name, info.backend.to_str());
        Ok(Gpu::new(Arc::new(Queue::new(name, device, queue)), info.device_type == wgpu::DeviceType::Cpu))
    });
    opened.and_then(|inner| inner).map_err(failed)
}

fn found() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    // Refuse what does not fit where the driver tells how much there is, rather than push others out of memory.
    descriptor.memory_budget_thresholds.for_resource_creation = Some(97);
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    adapters.sort_by_key(|adapter| rank(adapter.get_info().device_type));
    adapters
}

fn rank(kind: wgpu::DeviceType) -> u8 {
    match kind {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

/// What the kernels need beyond what every adapter has to offer.
fn unusable(limits: &wgpu::Limits) -> Option<String> {
    let needed: [(&str, u64, u64); 4] = [
        ("threads in a workgroup", limits.max_compute_invocations_per_workgroup.into(), 256),
        ("bytes of shared memory", limits.max_compute_workgroup_storage_size.into(), 16_384),
        ("buffers per kernel", limits.max_storage_buffers_per_shader_stage.into(), 7),
        ("bytes per binding", limits.max_storage_buffer_binding_size, 64 << 20),
    ];
    let short = needed.iter().find(|(_, has, needs)| has < needs)?;
    Some(format!("it offers {} {}, {} are needed", short.1, short.0, short.2))
}

fn describe(adapter: &wgpu::Adapter) -> AdapterDescription {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    AdapterDescription {
        name: info.name.clone(),
        interface: info.backend.to_str().to_owned(),
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => AdapterKind::Discrete,
            wgpu::DeviceType::IntegratedGpu => AdapterKind::Integrated,
            wgpu::DeviceType::VirtualGpu => AdapterKind::Virtual,
            wgpu::DeviceType::Cpu => AdapterKind::Software,
            wgpu::DeviceType::Other => AdapterKind::Unknown,
        },
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        memory_bytes: memory(adapter),
        max_buffer_bytes: limits.max_buffer_size,
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        unusable: unusable(&limits),
    }
}

/// Sum of the heaps on the device, which only Vulkan tells.
#[cfg(not(target_vendor = "apple"))]
fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    // Of VkMemoryHeapFlagBits.
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the handle is only read while the adapter lives, and nothing is destroyed.
    let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let device = adapter.raw_physical_device();
    // SAFETY: the physical device belongs to this very instance.
    let memory = unsafe { adapter.shared_instance().raw_instance().get_physical_device_memory_properties(device) };
    let heaps = memory.memory_heaps.iter().take(memory.memory_heap_count as usize);
    let local = heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size);
    Some(local.sum())
}

#[cfg(target_vendor = "apple")]
fn memory(_: &wgpu::Adapter) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_are_too_small_are_named() {
        let limits = wgpu::Limits { max_storage_buffer_binding_size: 1 << 20, ..wgpu::Limits::default() };
        assert!(unusable(&limits).is_some_and(|why| why.contains("bytes per binding")));
        assert_eq!(unusable(&wgpu::Limits::default()), None);
    }
}
