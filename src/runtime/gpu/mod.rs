//! Any GPU, through Vulkan, Metal or DX12 (wgpu), with kernels in WGSL.
//!
//! Matrices are f32 on the device as everywhere; weights whose values are all bf16 are kept as such, two to a word, and
//! widened when they are read, so nothing is rounded. Every kernel sums in a fixed order: two runs on one device give the
//! same bits. Operations are recorded and run when results are read; what went wrong by then is told by that.

mod adapter;
mod attention;
mod kernels;
mod queue;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use ndarray::{Array2, ArrayView2};
use wgpu::{BufferBinding, BufferSize};

use self::kernels::{Kernel, MATVEC_OUTS, THREADS};
use self::queue::Queue;
use super::accelerator::{pack, words};
use super::{AttentionShape, Backend, HeadColumns, HeadPart, HostWeight, Rotation, RuntimeError, Span};
use crate::arch::RopeLayout;

pub use adapter::{AdapterDescription, AdapterKind, adapters, open, open_limited};

/// Up to this many rows a product is bound by reading the weight.
const FEW_ROWS: usize = 8;
/// Parts of buffers that kernels see begin at a multiple of this many rows, so at a multiple of 256 bytes.
const ROWS: usize = 64;

/// A GPU, open for work.
#[derive(Debug)]
pub struct Gpu {
    queue: Arc<Queue>,
    software: bool,
    /// The table and positions that `rope` used last: the layers of a model share them.
    angles: Mutex<Option<Angles>>,
}

#[derive(Debug, Clone)]
struct Angles {
    id: u64,
    positions: Vec<usize>,
    table: wgpu::Buffer,
    rows: wgpu::Buffer,
}

/// A matrix on a GPU, row-major.
#[derive(Debug)]
pub struct GpuTensor {
    queue: Arc<Queue>,
    buffer: wgpu::Buffer,
    rows: usize,
    columns: usize,
    /// Two bf16 to a word.
    packed: bool,
    /// Size under which the buffer is taken back.
    recycled: Option<u64>,
}

impl Drop for GpuTensor {
    fn drop(&mut self) {
        if let Some(size) = self.recycled {
            self.queue.recycle(self.buffer.clone(), size);
        }
    }
}

impl GpuTensor {
    /// Bytes of a row.
    fn row_bytes(&self) -> u64 {
        (self.columns * if self.packed { 2 } else { 4 }) as u64
    }

    /// Some rows, for a kernel; the first has to be a multiple of [`ROWS`].
    fn part(&self, rows: Range<usize>) -> BufferBinding<'_> {
        let bytes = (rows.len() as u64 * self.row_bytes()).next_multiple_of(4);
        BufferBinding {
            buffer: &self.buffer,
            offset: rows.start as u64 * self.row_bytes(),
            size: BufferSize::new(bytes.max(4)),
        }
    }

    fn all(&self) -> BufferBinding<'_> {
        self.part(0..self.rows)
    }
}

/// A whole buffer, for a kernel.
fn whole(buffer: &wgpu::Buffer) -> BufferBinding<'_> {
    BufferBinding { buffer, offset: 0, size: None }
}

impl Gpu {
    fn new(queue: Arc<Queue>, software: bool) -> Self {
        Self { queue, software, angles: Mutex::new(None) }
    }

    /// Whether it is the processor pretending to be a GPU.
    pub fn is_software(&self) -> bool {
        self.software
    }

    /// A matrix of anything.
    fn scratch(&self, rows: usize, columns: usize) -> GpuTensor {
        let (buffer, size) = self.queue.scratch((rows * columns * 4) as u64);
        GpuTensor { queue: Arc::clone(&self.queue), buffer, rows, columns, packed: false, recycled: Some(size) }
    }

    fn filled(&self, bytes: &[u8], rows: usize, columns: usize, packed: bool) -> GpuTensor {
        let buffer = self.queue.filled(bytes);
        GpuTensor { queue: Arc::clone(&self.queue), buffer, rows, columns, packed, recycled: None }
    }

    /// Cut `rows` so that no part of a matrix with `row_bytes` a row is larger than a kernel may see.
    fn parts(&self, rows: usize, row_bytes: u64) -> Vec<Range<usize>> {
        let fit = (self.queue.binding_bytes() / row_bytes.max(1)) as usize / ROWS * ROWS;
        let step = fit.max(ROWS);
        (0..rows).step_by(step).map(|first| first..rows.min(first + step)).collect()
    }

    /// Workgroups for `count` of them, in two dimensions where one does not suffice, and the length of the first.
    fn spread(&self, count: usize) -> ((usize, usize, usize), u32) {
        let across = count.min(self.queue.groups()).max(1);
        ((across, count.div_ceil(across), 1), across as u32)
    }

    /// Run `kernel` on equal parts of `x` and `y`, element by element.
    fn pointwise(&self, kernel: Kernel, x: &GpuTensor, y: &GpuTensor) {
        for rows in self.parts(x.rows, x.row_bytes()) {
            let count = rows.len() * x.columns;
            let (groups, across) = self.spread(count.div_ceil(THREADS));
            self.queue.dispatch(kernel, &[y.part(rows.clone()), x.part(rows)], &[count as u32, across, 0, 0], groups);
        }
    }

    /// Copy some columns of each head of `from` to others of `to`.
    fn copy_heads(&self, from: &GpuTensor, columns: HeadColumns, to: &GpuTensor, at: HeadColumns, heads: usize) {
        for rows in self.parts(to.rows, from.row_bytes().max(to.row_bytes())) {
            let (groups, across) = self.spread((rows.len() * heads * columns.width).div_ceil(THREADS));
            let params = [
                [rows.len(), heads, columns.width, across as usize],
                [from.columns, columns.start, columns.stride, 0],
                [to.columns, at.start, at.stride, 0],
            ];
            let params = words(params.into_iter().flatten());
            self.queue.dispatch(Kernel::Gather, &[from.part(rows.clone()), to.part(rows)], &params, groups);
        }
    }

    /// Parameters and workgroups of [`Kernel::RmsNorm`].
    fn norm(
        &self,
        rows: usize,
        stride: usize,
        columns: HeadColumns,
        heads: usize,
        eps: f64,
    ) -> ([u32; 8], (usize, usize, usize)) {
        let (groups, across) = self.spread(rows * heads);
        let [stride, heads, start, step, width] =
            [stride, heads, columns.start, columns.stride, columns.width].map(|n| n as u32);
        ([rows as u32, stride, heads, start, step, width, (eps as f32).to_bits(), across], groups)
    }

    fn angles(&self, rotation: &Rotation, positions: &[usize]) -> Angles {
        let mut last = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(same) if same.id == rotation.id() && same.positions == positions => same.clone(),
            _ => {
                let table: Vec<f32> = rotation.table().iter().flat_map(|(cos, sin)| [*cos, *sin]).collect();
                let rows = words(positions.iter().copied());
                let angles = Angles {
                    id: rotation.id(),
                    positions: positions.to_vec(),
                    table: self.queue.filled(bytemuck::cast_slice(&table)),
                    rows: self.queue.filled(bytemuck::cast_slice(&rows)),
                };
                last.insert(angles).clone()
            }
        }
    }
}

impl Backend for Gpu {
    type Tensor = GpuTensor;
    type Weight = GpuTensor;

    fn name(&self) -> &str {
        &self.queue.name
    }

    fn upload(&self, host: Array2<f32>) -> GpuTensor {
        self.upload_view(host.view())
    }

    fn upload_view(&self, host: ArrayView2<'_, f32>) -> GpuTensor {
        let standard = host.as_standard_layout();
        let values = standard.as_slice().unwrap_or_default();
        self.filled(bytemuck::cast_slice(values), host.nrows(), host.ncols(), false)
    }

    fn upload_weight(&self, host: HostWeight) -> GpuTensor {
        let host = host.into_f32();
        match host.as_slice().filter(|_| host.ncols().is_multiple_of(2)).and_then(pack) {
            Some(words) => self.filled(bytemuck::cast_slice(&words), host.nrows(), host.ncols(), true),
            None => self.upload(host),
        }
    }

    fn weight_shape(&self, weight: &GpuTensor) -> (usize, usize) {
        self.shape(weight)
    }

    fn download(&self, tensor: GpuTensor) -> Result<Array2<f32>, RuntimeError> {
        let mut out = Array2::zeros((tensor.rows, tensor.columns));
        if let Some(out) = out.as_slice_mut() {
            self.queue.read(&tensor.buffer, out)?;
        }
        Ok(out)
    }

    fn shape(&self, tensor: &GpuTensor) -> (usize, usize) {
        (tensor.rows, tensor.columns)
    }

    fn zeros(&self, rows: usize, columns: usize) -> GpuTensor {
        let tensor = self.scratch(rows, columns);
        self.queue.clear(&tensor.buffer);
        tensor
    }

    fn write_rows(&self, into: &mut GpuTensor, to: &[usize], rows: &GpuTensor) {
        let table = self.queue.filled(bytemuck::cast_slice(&words(to.iter().copied())));
        for target in self.parts(into.rows, into.row_bytes()) {
            if !to.iter().any(|row| target.contains(row)) {
                continue;
            }
            for from in self.parts(rows.rows, rows.row_bytes()) {
                let (groups, across) = self.spread((from.len() * rows.columns).div_ceil(THREADS));
                let params = [from.len(), rows.columns, target.start, target.end, from.start, across as usize, 0, 0];
                let buffers = [whole(&table), rows.part(from), into.part(target.clone())];
                self.queue.dispatch(Kernel::Scatter, &buffers, &words(params.into_iter()), groups);
            }
        }
    }

    fn rows(&self, x: &GpuTensor, rows: Range<usize>) -> GpuTensor {
        let out = self.scratch(rows.len(), x.columns);
        let bytes = rows.len() as u64 * x.row_bytes();
        self.queue.copy((&x.buffer, rows.start as u64 * x.row_bytes()), (&out.buffer, 0), bytes);
        out
    }

    fn linear(&self, x: &GpuTensor, weight: &GpuTensor, bias: Option<&GpuTensor>) -> GpuTensor {
        let out = self.scratch(x.rows, weight.rows);
        let (n, k) = (weight.rows, weight.columns);
        // Something has to be bound where there is no bias.
        let bound = bias.map_or_else(|| x.part(0..x.rows.min(1)), GpuTensor::all);
        let has_bias = usize::from(bias.is_some());
        for columns in self.parts(n, weight.row_bytes()) {
            for rows in self.parts(x.rows, x.row_bytes().max(out.row_bytes())) {
                let buffers =
                    [x.part(rows.clone()), weight.part(columns.clone()), bound.clone(), out.part(rows.clone())];
                let (m, width) = (rows.len(), columns.len());
                if m <= FEW_ROWS {
                    let ((across, down, _), first) = self.spread(width.div_ceil(MATVEC_OUTS));
                    let params = [m, width, k, has_bias, n, columns.start, columns.start, first as usize];
                    let kernel = Kernel::Matvec { rows: m.next_power_of_two() as u32, packed: weight.packed };
                    self.queue.dispatch(kernel, &buffers, &words(params.into_iter()), (across, down, 1));
                    continue;
                }
                let params = [[m, width, k, k, 0, 0, 0, 0], [k, 1, n, columns.start, 0, has_bias, columns.start, 0]];
                let large = m >= 64 && width >= 64;
                let kernel = Kernel::Matmul { large, packed: weight.packed };
                let side = Kernel::tile(large);
                let groups = (width.div_ceil(side), m.div_ceil(side), 1);
                self.queue.dispatch(kernel, &buffers, &words(params.into_iter().flatten()), groups);
            }
        }
        out
    }

    fn head_linear(&self, x: &GpuTensor, weight: &GpuTensor, of: HeadColumns, heads: usize, absorb: bool) -> GpuTensor {
        let r = weight.columns;
        let (inner, outer) = if absorb { (of.width, r) } else { (r, of.width) };
        let out = self.scratch(x.rows, heads * outer);
        let (w_n, w_k) = if absorb { (1, r) } else { (r, 1) };
        for rows in self.parts(x.rows, x.row_bytes().max(out.row_bytes())) {
            let m = rows.len();
            let buffers = [x.part(rows.clone()), weight.all(), x.part(0..1), out.part(rows)];
            let params = [
                [m, outer, inner, heads * inner, 0, inner, of.start * r, of.stride * r],
                [w_n, w_k, heads * outer, 0, outer, 0, 0, 0],
            ];
            let large = m >= 64 && outer >= 64;
            let side = Kernel::tile(large);
            let groups = (outer.div_ceil(side), m.div_ceil(side), heads);
            let kernel = Kernel::Matmul { large, packed: weight.packed };
            self.queue.dispatch(kernel, &buffers, &words(params.into_iter().flatten()), groups);
        }
        out
    }

    fn rms_norm(&self, x: &GpuTensor, gain: &GpuTensor, eps: f64) -> GpuTensor {
        let out = self.scratch(x.rows, x.columns);
        let columns = HeadColumns::dense(x.columns);
        for rows in self.parts(x.rows, x.row_bytes()) {
            let (params, groups) = self.norm(rows.len(), x.columns, columns, 1, eps);
            let buffers = [x.part(rows.clone()), gain.all(), out.part(rows)];
            self.queue.dispatch(Kernel::RmsNorm { in_place: false }, &buffers, &params, groups);
        }
        out
    }

    fn rms_norm_heads(
        &self,
        x: &mut GpuTensor,
        gain: &GpuTensor,
        eps: f64,
        columns: HeadColumns,
        heads: usize,
    ) -> Result<(), RuntimeError> {
        for rows in self.parts(x.rows, x.row_bytes()) {
            let (params, groups) = self.norm(rows.len(), x.columns, columns, heads, eps);
            self.queue.dispatch(Kernel::RmsNorm { in_place: true }, &[gain.all(), x.part(rows)], &params, groups);
        }
        Ok(())
    }

    fn rope(&self, x: &mut GpuTensor, rotation: &Rotation, positions: &[usize], columns: HeadColumns, heads: usize) {
        if rotation.width() == 0 || positions.is_empty() {
            return;
        }
        let angles = self.angles(rotation, positions);
        let pairs = rotation.width() / 2;
        let interleaved = usize::from(rotation.layout() == RopeLayout::Interleaved);
        for rows in self.parts(x.rows, x.row_bytes()) {
            let (groups, across) = self.spread((rows.len() * heads * pairs).div_ceil(THREADS));
            let params = [
                [rows.len(), x.columns, heads, pairs],
                [columns.start, columns.stride, interleaved, rows.start],
                [rotation.first(), across as usize, 0, 0],
            ];
            let buffers = [whole(&angles.table), whole(&angles.rows), x.part(rows)];
            self.queue.dispatch(Kernel::Rope, &buffers, &words(params.into_iter().flatten()), groups);
        }
    }

    fn gather_heads(&self, parts: &[HeadPart<'_, GpuTensor>], heads: usize) -> GpuTensor {
        let width: usize = parts.iter().map(|p| p.columns.width).sum();
        let out = self.scratch(parts.first().map_or(0, |p| p.from.rows), heads * width);
        let mut start = 0;
        for part in parts {
            let at = HeadColumns { start, stride: width, width: part.columns.width };
            self.copy_heads(part.from, part.columns, &out, at, heads);
            start += part.columns.width;
        }
        out
    }

    fn attention(
        &self,
        q: &GpuTensor,
        k: &GpuTensor,
        v: &GpuTensor,
        shape: &AttentionShape,
        spans: &[Span],
    ) -> GpuTensor {
        attention::attention(self, q, k, v, shape, spans)
    }

    fn silu_mul(&self, gate: GpuTensor, up: &GpuTensor) -> GpuTensor {
        self.pointwise(Kernel::SiluMul, &gate, up);
        gate
    }

    fn add(&self, x: &mut GpuTensor, y: &GpuTensor) {
        self.pointwise(Kernel::Add, x, y);
    }
}
