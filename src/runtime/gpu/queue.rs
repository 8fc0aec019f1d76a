//! A device with its pending work: buffers, pipelines, dispatches, reading back.
//!
//! Nothing here fails at once. The first thing that goes wrong is kept, everything after it has no effect, and reading
//! back tells.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wgpu::{BindingResource, BufferBinding, BufferUsages};

use super::kernels::Kernel;
use crate::runtime::RuntimeError;
use crate::runtime::accelerator::{Failure, FirstFailure, panic_text};

/// Dispatches that are recorded before the device gets them.
const PENDING: usize = 128;
/// Parameters of one dispatch: at most as many bytes as the least offset every device allows.
const PARAMS: usize = 256;
/// Bytes kept of buffers nobody uses.
const IDLE_BYTES: u64 = 1 << 30;
/// Bytes read back at once.
const READ_BYTES: u64 = 64 << 20;

#[derive(Debug)]
struct Compiled {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

#[derive(Debug, Default)]
struct State {
    encoder: Option<wgpu::CommandEncoder>,
    params: Vec<u8>,
    idle: BTreeMap<u64, Vec<wgpu::Buffer>>,
    idle_bytes: u64,
    pipelines: BTreeMap<Kernel, Arc<Compiled>>,
}

/// A device, its queue, and what is recorded for it.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) name: String,
    device: wgpu::Device,
    queue: wgpu::Queue,
    limits: wgpu::Limits,
    /// Parameters of the dispatches of one submission.
    arena: wgpu::Buffer,
    state: Mutex<State>,
    failure: FirstFailure,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic left behind is still what was recorded.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    pub(super) fn new(name: String, device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let failure = FirstFailure::default();
        let slot = failure.clone();
        device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
            let text = e.to_string();
            slot.keep(if matches!(e, wgpu::Error::OutOfMemory { .. }) {
                Failure::Memory(text)
            } else {
                Failure::Other(text)
            });
        }));
        let slot = failure.clone();
        device.set_device_lost_callback(move |reason, text| {
            // Our own dropping of the device is no loss.
            if reason != wgpu::DeviceLostReason::Destroyed {
                slot.keep(Failure::Other(format!("the device was lost: {text}")));
            }
        });
        let arena = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("parameters"),
            size: (PENDING * PARAMS) as u64,
            usage: BufferUsages::UNIFORM | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let limits = device.limits();
        Self { name, device, queue, limits, arena, state: Mutex::new(State::default()), failure }
    }

    /// Largest part of a buffer that a kernel may see, in bytes.
    pub(super) fn binding_bytes(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size
    }

    /// Workgroups in one dimension, at most.
    pub(super) fn groups(&self) -> usize {
        self.limits.max_compute_workgroups_per_dimension as usize
    }

    /// A buffer that comes back by [`Queue::recycle`], and its size. What it holds is anything.
    pub(super) fn scratch(&self, bytes: u64) -> (wgpu::Buffer, u64) {
        // Eight sizes per octave: at most an eighth is wasted, and sizes repeat.
        let bytes = bytes.max(256);
        let step = (bytes.next_power_of_two() / 16).max(4);
        let size = bytes.next_multiple_of(step);
        let mut state = lock(&self.state);
        if let Some(buffer) = state.idle.get_mut(&size).and_then(Vec::pop) {
            state.idle_bytes -= size;
            return (buffer, size);
        }
        if state.idle_bytes > IDLE_BYTES {
            state.idle.clear();
            state.idle_bytes = 0;
        }
        drop(state);
        (self.buffer(size, BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST, false), size)
    }

    /// Take back a buffer of [`Queue::scratch`]. Work recorded before still sees its contents: the device works in order.
    pub(super) fn recycle(&self, buffer: wgpu::Buffer, size: u64) {
        let mut state = lock(&self.state);
        state.idle.entry(size).or_default().push(buffer);
        state.idle_bytes += size;
    }

    /// A buffer with these contents.
    pub(super) fn filled(&self, bytes: &[u8]) -> wgpu::Buffer {
        let size = (bytes.len() as u64).next_multiple_of(4).max(16);
        let buffer = self.buffer(size, BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST, true);
        match buffer.get_mapped_range_mut(..) {
            Ok(mut view) => view.slice(..bytes.len()).copy_from_slice(bytes),
            Err(e) => self.failure.keep(Failure::Memory(e.to_string())),
        }
        buffer.unmap();
        buffer
    }

    fn buffer(&self, size: u64, usage: BufferUsages, mapped_at_creation: bool) -> wgpu::Buffer {
        if size > self.limits.max_buffer_size {
            let text = format!("a matrix of {size} bytes, the device allows {}", self.limits.max_buffer_size);
            self.failure.keep(Failure::Memory(text));
        }
        self.device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation })
    }

    /// Record a kernel: `buffers` in the order of its bindings, `params` as its struct has them.
    pub(super) fn dispatch(
        &self,
        kernel: Kernel,
        buffers: &[BufferBinding<'_>],
        params: &[u32],
        groups: (usize, usize, usize),
    ) {
        if groups.0 == 0 || groups.1 == 0 || groups.2 == 0 || self.failure.happened() {
            return;
        }
        let compiled = self.compiled(kernel);
        let first = wgpu::BindGroupEntry {
            binding: 0,
            resource: BindingResource::Buffer(BufferBinding {
                buffer: &self.arena,
                offset: 0,
                size: wgpu::BufferSize::new(PARAMS as u64),
            }),
        };
        let rest = buffers.iter().zip(1..).map(|(buffer, binding)| wgpu::BindGroupEntry {
            binding,
            resource: BindingResource::Buffer(buffer.clone()),
        });
        let entries: Vec<_> = std::iter::once(first).chain(rest).collect();
        let bind_group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &compiled.layout,
            entries: &entries,
        });
        let mut state = lock(&self.state);
        if state.params.len() == PENDING * PARAMS {
            self.submit(&mut state);
        }
        let offset = state.params.len();
        state.params.extend_from_slice(bytemuck::cast_slice(params));
        state.params.resize(offset + PARAMS, 0);
        let mut pass = self.encoder(&mut state).begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&compiled.pipeline);
        pass.set_bind_group(0, &bind_group, &[offset as u32]);
        pass.dispatch_workgroups(groups.0 as u32, groups.1 as u32, groups.2 as u32);
    }

    /// Fail because of something that no kernel of this device can see at once.
    pub(super) fn refuse(&self, what: String) {
        let text = format!("{what} needs more than the {} bytes that a kernel may see", self.binding_bytes());
        self.failure.keep(Failure::Memory(text));
    }

    /// Record a copy of `bytes` bytes.
    pub(super) fn copy(&self, from: (&wgpu::Buffer, u64), to: (&wgpu::Buffer, u64), bytes: u64) {
        if bytes > 0 {
            let mut state = lock(&self.state);
            self.encoder(&mut state).copy_buffer_to_buffer(from.0, from.1, to.0, to.1, bytes);
        }
    }

    /// Record the zeroing of a buffer.
    pub(super) fn clear(&self, buffer: &wgpu::Buffer) {
        let mut state = lock(&self.state);
        self.encoder(&mut state).clear_buffer(buffer, 0, None);
    }

    /// Wait for everything recorded, and read `out.len()` values from the start of a buffer.
    pub(super) fn read(&self, buffer: &wgpu::Buffer, out: &mut [f32]) -> Result<(), RuntimeError> {
        let read = || {
            let mut offset = 0;
            for part in out.chunks_mut((READ_BYTES / 4) as usize) {
                let bytes = size_of_val(part) as u64;
                let landing = self.buffer(bytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST, false);
                self.copy((buffer, offset), (&landing, 0), bytes);
                self.submit(&mut lock(&self.state));
                landing.map_async(wgpu::MapMode::Read, .., |_| {});
                if let Err(e) = self.device.poll(wgpu::PollType::wait_indefinitely()) {
                    self.failure.keep(Failure::Other(e.to_string()));
                }
                // What made the mapping fail is the first failure already.
                if self.failure.happened() {
                    return;
                }
                match landing.get_mapped_range(..) {
                    Ok(view) => part.copy_from_slice(bytemuck::cast_slice(&view)),
                    Err(e) => return self.failure.keep(Failure::Other(e.to_string())),
                }
                offset += bytes;
            }
        };
        // A driver's failure must not end the process.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(read)) {
            self.failure.keep(Failure::Other(panic_text(panic.as_ref())));
        }
        self.failure.check(&self.name)
    }

    fn encoder<'s>(&self, state: &'s mut State) -> &'s mut wgpu::CommandEncoder {
        state
            .encoder
            .get_or_insert_with(|| self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default()))
    }

    fn submit(&self, state: &mut State) {
        let Some(encoder) = state.encoder.take() else { return };
        // Takes effect before the commands, and after those of earlier submissions.
        if !state.params.is_empty() {
            self.queue.write_buffer(&self.arena, 0, &state.params);
            state.params.clear();
        }
        self.queue.submit([encoder.finish()]);
    }

    fn compiled(&self, kernel: Kernel) -> Arc<Compiled> {
        if let Some(found) = lock(&self.state).pipelines.get(&kernel) {
            return Arc::clone(found);
        }
        let compiled = Arc::new(self.compile(kernel));
        lock(&self.state).pipelines.insert(kernel, Arc::clone(&compiled));
        compiled
    }

    fn compile(&self, kernel: Kernel) -> Compiled {
        let label = format!("{kernel:?}");
        let entry = |(binding, ty): (u32, wgpu::BufferBindingType)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: binding == 0, min_binding_size: None },
            count: None,
        };
        let storage = kernel.reads().iter().map(|&read_only| wgpu::BufferBindingType::Storage { read_only });
        let types = std::iter::once(wgpu::BufferBindingType::Uniform).chain(storage);
        let entries: Vec<_> = (0..).zip(types).map(entry).collect();
        let layout = self
            .device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(&label), entries: &entries });
        let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(&label),
            source: wgpu::ShaderSource::Wgsl(kernel.source().into()),
        });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&label),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        Compiled { pipeline, layout }
    }
}
