//! NVIDIA cards, through CUDA: cuBLAS for large products, own kernels in CUDA C for everything else.
//!
//! Nothing of CUDA is needed to build: libcuda, libnvrtc and libcublas are opened when a card is, and what is missing is
//! told. Matrices are f32 on the card as everywhere; weights whose values are all bf16 are kept as such and widened when
//! they are read, so nothing is rounded. Products are true f32, never TF32. Every kernel sums in a fixed order and cuBLAS
//! is told to: two runs on one card give the same bits. Operations run when the card gets to them; what went wrong is told
//! when results are read.

mod attention;
mod cards;
mod gemm;
mod kernels;
mod stream;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use ndarray::{Array2, ArrayView2};

use self::gemm::Product;
use self::kernels::{BLOCK_OUTPUTS, BLOCK_THREADS, Kernel, NORM_THREADS, THREADS};
use self::stream::{Arg, Memory, Stream};
use super::accelerator::{pack, words};
use super::{AttentionShape, Backend, HeadColumns, HeadPart, Rotation, RuntimeError, Span};
use crate::arch::{Activation, RopeLayout};

pub use cards::{CardDescription, cards, open, open_limited};

/// Up to this many rows a product is bound by reading the weight, which the kernels do once, as bf16 where it is.
const FEW_ROWS: usize = 8;

/// An NVIDIA card, open for work.
#[derive(Debug)]
pub struct Cuda {
    stream: Arc<Stream>,
    /// Bytes of f32 that a bf16 weight becomes at a time.
    widened_bytes: usize,
    /// The table and positions that `rope` used last: the layers of a model share them.
    angles: Mutex<Option<Angles>>,
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
    fn new(stream: Arc<Stream>, widened_bytes: usize) -> Self {
        Self { stream, widened_bytes, angles: Mutex::new(None) }
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

    fn row_table(&self, rows: &[usize]) -> Memory {
        self.stream.filled(&words(rows.iter().copied()))
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

    /// A product whose weight begins so many elements behind the start of its matrix, and whose result begins so many
    /// behind the start of `y`.
    fn product(
        &self,
        product: &Product,
        x: &CudaTensor,
        (weight, w_first): (&CudaTensor, usize),
        bias: Option<&CudaTensor>,
        (y, y_first): (&CudaTensor, usize),
    ) {
        if product.m == 0 || product.n == 0 || product.heads == 0 {
            return;
        }
        if product.m <= FEW_ROWS {
            return self.few_rows(product, x, (weight, w_first), bias, (y, y_first));
        }
        // cuBLAS has no product of f32 and bf16.
        let widened = weight.packed.then(|| self.widened(product, weight, w_first));
        let from = widened.as_ref().map_or((&weight.memory, w_first), |wide| (&wide.memory, 0));
        match product.gemm() {
            Some(gemm) => self.stream.gemm(&gemm, from, (&x.memory, 0), (&y.memory, y_first)),
            None => self.stream.refuse(format!("a product is too large for cuBLAS: {product:?}")),
        }
    }

    /// What a product reads of a bf16 weight, in f32.
    fn widened(&self, product: &Product, weight: &CudaTensor, first: usize) -> CudaTensor {
        let n = (product.heads - 1) * product.w_batch + product.n * product.k;
        let wide = self.scratch(1, n);
        let args = [Arg::Behind(&weight.memory, 2 * first), Arg::Memory(&wide.memory), Arg::Size(n)];
        self.each(Kernel::Widen, n, &args);
        wide
    }

    fn few_rows(
        &self,
        product: &Product,
        x: &CudaTensor,
        (weight, w_first): (&CudaTensor, usize),
        bias: Option<&CudaTensor>,
        (y, y_first): (&CudaTensor, usize),
    ) {
        let packed = weight.packed;
        let (kernel, blocks) = match product.absorb {
            true => (Kernel::Absorbed { packed }, product.n.div_ceil(BLOCK_THREADS)),
            false => (Kernel::Outputs { packed }, product.n.div_ceil(BLOCK_OUTPUTS)),
        };
        let mut args = vec![Arg::Memory(&x.memory), Arg::Memory(&weight.memory)];
        if !product.absorb {
            args.push(bias.map_or(Arg::Null, |b| Arg::Behind(&b.memory, 4 * y_first)));
        }
        args.push(Arg::Behind(&y.memory, 4 * y_first));
        args.extend([product.m, product.n, product.k].map(|n| Arg::Word(n as u32)));
        let p = product;
        args.extend([p.x_stride, p.x_batch, w_first, p.w_batch, p.y_stride, p.y_batch].map(Arg::Size));
        self.stream.launch(kernel, (blocks, product.heads, 1), BLOCK_THREADS, &args);
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
                    rows: Arc::new(self.row_table(positions)),
                };
                last.insert(angles).clone()
            }
        }
    }
}

impl Backend for Cuda {
    type Tensor = CudaTensor;

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

    fn upload_weight(&self, host: Array2<f32>) -> CudaTensor {
        match host.as_slice().and_then(pack) {
            Some(words) => {
                let memory = self.stream.filled(&words);
                CudaTensor { memory, rows: host.nrows(), columns: host.ncols(), packed: true }
            }
            None => self.upload(host),
        }
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
        let (n, k) = (weight.rows, weight.columns);
        if k == 0 {
            return self.zeros(x.rows, n);
        }
        let out = self.scratch(x.rows, n);
        let step = if weight.packed && x.rows > FEW_ROWS { (self.widened_bytes / 4 / k).max(1) } else { n.max(1) };
        for first in (0..n).step_by(step) {
            let product = Product {
                m: x.rows,
                n: step.min(n - first),
                k,
                absorb: false,
                x_stride: k,
                x_batch: 0,
                w_batch: 0,
                y_stride: n,
                y_batch: 0,
                heads: 1,
            };
            self.product(&product, x, (weight, first * k), bias, (&out, first));
        }
        if let Some(bias) = bias.filter(|_| x.rows > FEW_ROWS) {
            let args = [Arg::Memory(&out.memory), Arg::Memory(&bias.memory), Arg::Size(out.len()), Arg::Size(n)];
            self.each(Kernel::AddBias, out.len(), &args);
        }
        out
    }

    fn head_linear(
        &self,
        x: &CudaTensor,
        weight: &CudaTensor,
        of: HeadColumns,
        heads: usize,
        absorb: bool,
    ) -> CudaTensor {
        let r = weight.columns;
        let (inner, outer) = if absorb { (of.width, r) } else { (r, of.width) };
        if inner == 0 {
            return self.zeros(x.rows, heads * outer);
        }
        let out = self.scratch(x.rows, heads * outer);
        let product = Product {
            m: x.rows,
            n: outer,
            k: inner,
            absorb,
            x_stride: heads * inner,
            x_batch: inner,
            w_batch: of.stride * r,
            y_stride: heads * outer,
            y_batch: outer,
            heads,
        };
        self.product(&product, x, (weight, of.start * r), None, (&out, 0));
        out
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
