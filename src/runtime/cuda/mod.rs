//! NVIDIA cards, through CUDA: cuBLAS for large products, own kernels in CUDA C for everything else.
//!
//! Nothing of CUDA is needed to build: libcuda, libnvrtc and libcublas are opened when a card is, and what is missing is
//! told. Matrices are f32 on the card as everywhere; weights whose values are all bf16 are kept as such. Products with
//! them run on tensor cores and lose nothing by it (`products.rs`), those of f32 with f32 are true f32, never TF32. Every
//! kernel sums in a fixed order and cuBLAS is told to: two runs on one card give the same bits. Operations run when the
//! card gets to them; what went wrong is told when results are read.

mod attention;
mod cards;
mod gemm;
mod kernels;
mod products;
mod stream;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use ndarray::{Array2, ArrayView2};

use self::kernels::{Kernel, NORM_THREADS, THREADS};
use self::stream::{Arg, Memory, Stream};
use super::accelerator::{pack, pack_rounded, words};
use super::{AttentionShape, Backend, HeadColumns, HeadPart, HostWeight, Precision, Rotation, RuntimeError, Span};
use crate::arch::{Activation, RopeLayout};

pub use cards::{CardDescription, cards, open, open_limited};

/// Tables of rows that are kept.
const TABLES: usize = 4;

/// An NVIDIA card, open for work.
#[derive(Debug)]
pub struct Cuda {
    stream: Arc<Stream>,
    precision: Precision,
    /// Bytes that the parts of a product take at a time.
    part_bytes: usize,
    /// The table and positions that `rope` used last: the layers of a model share them.
    angles: Mutex<Option<Angles>>,
    /// Tables of rows that were used last: those of the layers of a model repeat, and copying one to the card waits for it.
    tables: Mutex<VecDeque<(Vec<usize>, Arc<Memory>)>>,
    /// What `attention` did last.
    plan: Mutex<Option<Arc<attention::Plan>>>,
}

#[derive(Debug, Clone)]
struct Angles {
    id: u64,
    positions: Vec<usize>,
    table: Arc<Memory>,
    rows: Arc<Memory>,
}

/// A matrix on an NVIDIA card, row-major.
#[derive(Debug)]
pub struct CudaTensor {
    memory: Memory,
    rows: usize,
    columns: usize,
    /// In bf16.
    packed: bool,
}

impl CudaTensor {
    fn len(&self) -> usize {
        self.rows * self.columns
    }
}

/// Number of an activation in `elementwise.cu`.
fn number(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
        Activation::Relu2 => 4,
    }
}

impl Cuda {
    fn new(stream: Arc<Stream>, precision: Precision, part_bytes: usize) -> Self {
        Self {
            stream,
            precision,
            part_bytes,
            angles: Mutex::default(),
            tables: Mutex::default(),
            plan: Mutex::default(),
        }
    }

    /// A matrix of anything.
    fn scratch(&self, rows: usize, columns: usize) -> CudaTensor {
        let memory = self.stream.scratch(rows.saturating_mul(columns).saturating_mul(4));
        CudaTensor { memory, rows, columns, packed: false }
    }

    /// Run a kernel with a thread for each of `n` elements.
    fn each(&self, kernel: Kernel, n: usize, args: &[Arg<'_>]) {
        self.stream.launch(kernel, (n.div_ceil(THREADS), 1, 1), THREADS, args);
    }

    fn row_table(&self, rows: &[usize]) -> Arc<Memory> {
        let mut last = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = last.iter().find(|(same, _)| same == rows) {
            return Arc::clone(table);
        }
        let table = Arc::new(self.stream.filled(&words(rows.iter().copied())));
        last.truncate(TABLES - 1);
        last.push_front((rows.to_vec(), Arc::clone(&table)));
        table
    }

    /// Copy some columns of each head of `from` to others of `to`.
    fn copy_heads(&self, from: &CudaTensor, columns: HeadColumns, to: &CudaTensor, at: HeadColumns, heads: usize) {
        let n = to.rows * heads * columns.width;
        let sizes =
            [n, heads, columns.width, from.columns, columns.start, columns.stride, to.columns, at.start, at.stride];
        let mut args = vec![Arg::Memory(&from.memory), Arg::Memory(&to.memory)];
        args.extend(sizes.map(Arg::Size));
        self.each(Kernel::CopyHeads, n, &args);
    }

    fn norm(&self, x: &CudaTensor, gain: &CudaTensor, to: &CudaTensor, eps: f64, columns: HeadColumns, heads: usize) {
        let sizes = [x.columns, heads, columns.start, columns.stride, columns.width];
        let mut args = vec![Arg::Memory(&x.memory), Arg::Memory(&gain.memory), Arg::Memory(&to.memory)];
        args.extend(sizes.map(Arg::Size));
        args.push(Arg::Float(eps as f32));
        self.stream.launch(Kernel::RmsNorm, (x.rows * heads, 1, 1), NORM_THREADS, &args);
    }

    fn angles(&self, rotation: &Rotation, positions: &[usize]) -> Angles {
        let mut last = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(same) if same.id == rotation.id() && same.positions == positions => same.clone(),
            _ => {
                let table: Vec<[f32; 2]> = rotation.table().iter().map(|(cos, sin)| [*cos, *sin]).collect();
                let angles = Angles {
                    id: rotation.id(),
                    positions: positions.to_vec(),
                    table: Arc::new(self.stream.filled(&table)),
                    rows: self.row_table(positions),
                };
                last.insert(angles).clone()
            }
        }
    }
}

impl Backend for Cuda {
    type Tensor = CudaTensor;
    type Weight = CudaTensor;

    fn name(&self) -> &str {
        &self.stream.name
    }

    fn upload(&self, host: Array2<f32>) -> CudaTensor {
        self.upload_view(host.view())
    }

    fn upload_view(&self, host: ArrayView2<'_, f32>) -> CudaTensor {
        let standard = host.as_standard_layout();
        let memory = self.stream.filled(standard.as_slice().unwrap_or_default());
        CudaTensor { memory, rows: host.nrows(), columns: host.ncols(), packed: false }
    }

    fn upload_weight(&self, host: HostWeight) -> CudaTensor {
        let host = host.into_f32();
        let packed = host.as_slice().and_then(|values| match self.precision {
            Precision::F32 => pack(values),
            Precision::Bf16 => Some(pack_rounded(values)),
        });
        match packed {
            Some(words) => {
                let memory = self.stream.filled(&words);
                CudaTensor { memory, rows: host.nrows(), columns: host.ncols(), packed: true }
            }
            None => self.upload(host),
        }
    }

    fn weight_shape(&self, weight: &CudaTensor) -> (usize, usize) {
        self.shape(weight)
    }

    fn download(&self, tensor: CudaTensor) -> Result<Array2<f32>, RuntimeError> {
        self.copy_to_host(&tensor)
    }

    fn copy_to_host(&self, x: &CudaTensor) -> Result<Array2<f32>, RuntimeError> {
        let mut out = Array2::zeros((x.rows, x.columns));
        if let Some(out) = out.as_slice_mut() {
            self.stream.read(&x.memory, out)?;
        }
        Ok(out)
    }

    fn shape(&self, tensor: &CudaTensor) -> (usize, usize) {
        (tensor.rows, tensor.columns)
    }

    fn zeros(&self, rows: usize, columns: usize) -> CudaTensor {
        let tensor = self.scratch(rows, columns);
        self.stream.clear(&tensor.memory, rows.saturating_mul(columns).saturating_mul(4));
        tensor
    }

    fn write_rows(&self, into: &mut CudaTensor, to: &[usize], rows: &CudaTensor) {
        let table = self.row_table(to);
        let n = to.len().min(rows.rows) * rows.columns;
        let (from, table, to) = (Arg::Memory(&rows.memory), Arg::Memory(&table), Arg::Memory(&into.memory));
        self.each(Kernel::WriteRows, n, &[from, table, to, Arg::Size(n), Arg::Size(rows.columns)]);
    }

    fn rows(&self, x: &CudaTensor, rows: Range<usize>) -> CudaTensor {
        let out = self.scratch(rows.len(), x.columns);
        self.stream.copy(&x.memory, 4 * rows.start * x.columns, &out.memory, 4 * out.len());
        out
    }

    fn linear(&self, x: &CudaTensor, weight: &CudaTensor, bias: Option<&CudaTensor>) -> CudaTensor {
        products::linear(self, x, weight, bias)
    }

    fn head_linear(
        &self,
        x: &CudaTensor,
        weight: &CudaTensor,
        of: HeadColumns,
        heads: usize,
        absorb: bool,
    ) -> CudaTensor {
        products::head_linear(self, x, weight, of, heads, absorb)
    }

    fn absorb(&self, x: &CudaTensor, weight: &CudaTensor, of: HeadColumns, heads: usize) -> CudaTensor {
        products::absorb(self, x, weight, of, heads)
    }

    fn rms_norm(&self, x: &CudaTensor, gain: &CudaTensor, eps: f64) -> CudaTensor {
        let out = self.scratch(x.rows, x.columns);
        self.norm(x, gain, &out, eps, HeadColumns::dense(x.columns), 1);
        out
    }

    fn rope(&self, x: &mut CudaTensor, rotation: &Rotation, positions: &[usize], columns: HeadColumns, heads: usize) {
        let pairs = rotation.width() / 2;
        let n = positions.len().min(x.rows) * heads * pairs;
        if n == 0 {
            return;
        }
        let angles = self.angles(rotation, positions);
        let interleaved = rotation.layout() == RopeLayout::Interleaved;
        let mut args = vec![Arg::Memory(&x.memory), Arg::Memory(&angles.table), Arg::Memory(&angles.rows)];
        args.extend([n, x.columns, heads, pairs, columns.start, columns.stride].map(Arg::Size));
        args.extend([Arg::Word(interleaved.into()), Arg::Size(rotation.first())]);
        self.each(Kernel::Rope, n, &args);
    }

    fn gather_heads(&self, parts: &[HeadPart<'_, CudaTensor>], heads: usize) -> CudaTensor {
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
        q: &CudaTensor,
        k: &CudaTensor,
        v: &CudaTensor,
        shape: &AttentionShape,
        spans: &[Span],
    ) -> CudaTensor {
        attention::attention(self, (q, k, v), shape, None, spans)
    }

    fn silu_mul(&self, gate: CudaTensor, up: &CudaTensor) -> CudaTensor {
        let (x, y) = (Arg::Memory(&gate.memory), Arg::Memory(&up.memory));
        self.each(Kernel::Gated, gate.len(), &[x, y, Arg::Size(gate.len()), Arg::Word(number(Activation::Silu))]);
        gate
    }

    fn add(&self, x: &mut CudaTensor, y: &CudaTensor) {
        self.each(Kernel::Add, x.len(), &[Arg::Memory(&x.memory), Arg::Memory(&y.memory), Arg::Size(x.len())]);
    }

    fn gated(&self, gate: CudaTensor, up: &CudaTensor, activation: Activation) -> Result<CudaTensor, RuntimeError> {
        let (x, y) = (Arg::Memory(&gate.memory), Arg::Memory(&up.memory));
        self.each(Kernel::Gated, gate.len(), &[x, y, Arg::Size(gate.len()), Arg::Word(number(activation))]);
        Ok(gate)
    }

    fn activated(&self, x: CudaTensor, activation: Activation) -> Result<CudaTensor, RuntimeError> {
        let args = [Arg::Memory(&x.memory), Arg::Size(x.len()), Arg::Word(number(activation))];
        self.each(Kernel::Activated, x.len(), &args);
        Ok(x)
    }

    fn rms_norm_heads(
        &self,
        x: &mut CudaTensor,
        gain: &CudaTensor,
        eps: f64,
        columns: HeadColumns,
        heads: usize,
    ) -> Result<(), RuntimeError> {
        self.norm(x, gain, x, eps, columns, heads);
        Ok(())
    }

    fn capped_attention(
        &self,
        q: &CudaTensor,
        k: &CudaTensor,
        v: &CudaTensor,
        shape: &AttentionShape,
        cap: f64,
        spans: &[Span],
    ) -> Result<CudaTensor, RuntimeError> {
        Ok(attention::attention(self, (q, k, v), shape, Some(cap), spans))
    }

    fn softcap(&self, x: CudaTensor, cap: f64) -> Result<CudaTensor, RuntimeError> {
        self.each(Kernel::Softcap, x.len(), &[Arg::Memory(&x.memory), Arg::Size(x.len()), Arg::Float(cap as f32)]);
        Ok(x)
    }

    fn gather_rows(&self, x: &CudaTensor, rows: &[usize]) -> Result<CudaTensor, RuntimeError> {
        let out = self.scratch(rows.len(), x.columns);
        let table = self.row_table(rows);
        let (from, table, to) = (Arg::Memory(&x.memory), Arg::Memory(&table), Arg::Memory(&out.memory));
        self.each(Kernel::GatherRows, out.len(), &[from, table, to, Arg::Size(out.len()), Arg::Size(x.columns)]);
        Ok(out)
    }

    fn scatter_add_rows(
        &self,
        into: &mut CudaTensor,
        rows: &[usize],
        weights: &[f32],
        y: &CudaTensor,
    ) -> Result<(), RuntimeError> {
        let (table, weights) = (self.row_table(rows), self.stream.filled(weights));
        let n = rows.len().min(y.rows) * y.columns;
        let memories = [&y.memory, &table, &weights, &into.memory].map(Arg::Memory);
        let mut args = memories.to_vec();
        args.extend([Arg::Size(n), Arg::Size(y.columns)]);
        self.each(Kernel::ScatterAdd, n, &args);
        Ok(())
    }
}
