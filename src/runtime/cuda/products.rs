//! Products with weights: few rows by own kernels, bf16 weights on tensor cores, f32 weights in true f32.
//!
//! A tensor core multiplies bf16 and sums in f32. An f32 has 24 bits and a bf16 8, so that an activation is the sum of
//! three bf16, each the leading bits of what those before it leave: `x = x_1 + x_2 + x_3`, exactly. With a weight that is
//! bf16 already every product is exact, and `W x_1 + W x_2 + W x_3` is as good as f32, at a third of the rate of bf16: four
//! times that of f32 on a card like the H100. The parts lie under each other, so that one call multiplies all of them.
//! [`Precision::Bf16`] rounds instead, and multiplies once.

use super::gemm::Product;
use super::kernels::{ABSORBED_OUTPUTS, BLOCK_OUTPUTS, BLOCK_THREADS, Kernel};
use super::stream::Arg;
use super::{Cuda, CudaTensor};
use crate::runtime::backend::absorb_in_steps;
use crate::runtime::{HeadColumns, Precision};

/// Up to this many rows a product is bound by reading the weight, which the kernels do once, as bf16 where it is.
const FEW_ROWS: usize = 16;

/// `x W^T + bias`.
pub(super) fn linear(cuda: &Cuda, x: &CudaTensor, weight: &CudaTensor, bias: Option<&CudaTensor>) -> CudaTensor {
    let (n, k) = (weight.rows, weight.columns);
    let out = cuda.scratch(x.rows, n);
    if k == 0 {
        cuda.stream.clear(&out.memory, 4 * out.len());
    }
    if k == 0 || out.len() == 0 {
        return out;
    }
    let whole = Product {
        m: x.rows,
        n,
        k,
        absorb: false,
        x_stride: k,
        x_batch: 0,
        w_batch: 0,
        y_stride: n,
        y_batch: 0,
        heads: 1,
    };
    if x.rows <= FEW_ROWS {
        few_rows(cuda, &whole, x, (weight, 0), Beside::Bias(bias), &out);
    } else if weight.packed {
        let parts = Parts::of(cuda, x);
        // At least 8 outputs, and a multiple of it, which tensor cores want.
        let step = match parts.count {
            1 => n,
            count => (cuda.part_bytes / 4 / count / x.rows).next_multiple_of(8).clamp(8, n.max(8)),
        };
        for first in (0..n).step_by(step) {
            let part = Product { n: step.min(n - first), ..whole };
            parts.product(cuda, &part, (weight, first * k), bias, (&out, first));
        }
    } else {
        true_f32(cuda, &whole, x, (weight, 0), &out);
        if let Some(bias) = bias {
            add_bias(cuda, &out, bias);
        }
    }
    out
}

/// See [`Backend::head_linear`](crate::runtime::Backend::head_linear).
pub(super) fn head_linear(
    cuda: &Cuda,
    x: &CudaTensor,
    weight: &CudaTensor,
    of: HeadColumns,
    heads: usize,
    absorb: bool,
) -> CudaTensor {
    let r = weight.columns;
    let (inner, outer) = if absorb { (of.width, r) } else { (r, of.width) };
    let out = cuda.scratch(x.rows, heads * outer);
    if inner == 0 {
        cuda.stream.clear(&out.memory, 4 * out.len());
    }
    if inner == 0 || out.len() == 0 {
        return out;
    }
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
    let weight = (weight, of.start * r);
    if x.rows <= FEW_ROWS {
        few_rows(cuda, &product, x, weight, if absorb { Beside::Tail(0) } else { Beside::Bias(None) }, &out);
    } else if weight.0.packed {
        Parts::of(cuda, x).product(cuda, &product, weight, None, (&out, 0));
    } else {
        true_f32(cuda, &product, x, weight, &out);
    }
    out
}

/// See [`Backend::absorb`](crate::runtime::Backend::absorb).
pub(super) fn absorb(cuda: &Cuda, x: &CudaTensor, weight: &CudaTensor, of: HeadColumns, heads: usize) -> CudaTensor {
    let (r, each) = (weight.columns, x.columns / heads);
    let tail = each - of.width;
    if x.rows > FEW_ROWS {
        return absorb_in_steps(cuda, x, weight, of, heads);
    }
    let out = cuda.scratch(x.rows, heads * (r + tail));
    if out.len() == 0 {
        return out;
    }
    let product = Product {
        m: x.rows,
        n: r,
        k: of.width,
        absorb: true,
        x_stride: x.columns,
        x_batch: each,
        w_batch: of.stride * r,
        y_stride: out.columns,
        y_batch: r + tail,
        heads,
    };
    few_rows(cuda, &product, x, (weight, of.start * r), Beside::Tail(tail), &out);
    out
}

fn add_bias(cuda: &Cuda, out: &CudaTensor, bias: &CudaTensor) {
    let args = [Arg::Memory(&out.memory), Arg::Memory(&bias.memory), Arg::Size(out.len()), Arg::Size(out.columns)];
    cuda.each(Kernel::AddBias, out.len(), &args);
}

fn refuse(cuda: &Cuda, product: &Product) {
    cuda.stream.refuse(format!("a product is too large for cuBLAS: {product:?}"));
}

/// With a weight in f32, so many elements past its start.
fn true_f32(cuda: &Cuda, product: &Product, x: &CudaTensor, (weight, first): (&CudaTensor, usize), out: &CudaTensor) {
    match product.gemm() {
        Some(gemm) => cuda.stream.gemm(&gemm, false, (&weight.memory, first), &x.memory, (&out.memory, 0)),
        None => refuse(cuda, product),
    }
}

/// Activations in bf16, `[count * rows, columns]`.
struct Parts {
    memory: CudaTensor,
    count: usize,
}

impl Parts {
    fn of(cuda: &Cuda, x: &CudaTensor) -> Self {
        let (kernel, count) = match cuda.precision {
            Precision::F32 => (Kernel::Split, 3),
            Precision::Bf16 => (Kernel::Round, 1),
        };
        // Two bf16 to an element of it.
        let memory = cuda.scratch((count * x.len()).div_ceil(2), 1);
        let args = [Arg::Memory(&x.memory), Arg::Memory(&memory.memory), Arg::Size(x.len())];
        cuda.each(kernel, x.len(), &args);
        Self { memory, count }
    }

    /// With a weight in bf16, so many elements past its start. The result begins so many past the start of `y`.
    fn product(
        &self,
        cuda: &Cuda,
        product: &Product,
        (weight, w_first): (&CudaTensor, usize),
        bias: Option<&CudaTensor>,
        (y, y_first): (&CudaTensor, usize),
    ) {
        let (m, width) = (product.m, product.heads * product.n);
        if self.count == 1 {
            // The whole of `y`: `linear` cuts only what has several parts.
            let Some(gemm) = product.gemm() else { return refuse(cuda, product) };
            cuda.stream.gemm(&gemm, true, (&weight.memory, w_first), &self.memory.memory, (&y.memory, y_first));
            if let Some(bias) = bias {
                add_bias(cuda, y, bias);
            }
            return;
        }
        let stacked = Product { m: self.count * m, y_stride: width, y_batch: product.n, ..*product };
        let Some(gemm) = stacked.gemm() else { return refuse(cuda, &stacked) };
        let parts = cuda.scratch(stacked.m, width);
        cuda.stream.gemm(&gemm, true, (&weight.memory, w_first), &self.memory.memory, (&parts.memory, 0));
        let bias = bias.map_or(Arg::Null, |b| Arg::Behind(&b.memory, 4 * y_first));
        let mut args = vec![Arg::Memory(&parts.memory), bias, Arg::Behind(&y.memory, 4 * y_first)];
        args.extend([m * width, width, product.y_stride].map(Arg::Size));
        cuda.each(Kernel::SumParts, m * width, &args);
    }
}

/// What [`few_rows`] does besides multiplying.
#[derive(Debug, Clone, Copy)]
enum Beside<'a> {
    /// Add this to every row of `x W^T`.
    Bias(Option<&'a CudaTensor>),
    /// Copy so many columns after those of `x W`, of what follows the factors in `x`.
    Tail(usize),
}

/// A weight, so many elements past its start, read once.
fn few_rows(
    cuda: &Cuda,
    product: &Product,
    x: &CudaTensor,
    (weight, w_first): (&CudaTensor, usize),
    beside: Beside<'_>,
    y: &CudaTensor,
) {
    let (packed, p) = (weight.packed, product);
    let sizes = [p.m, p.n, p.k].map(|n| Arg::Word(n as u32));
    let strides = [p.x_stride, p.x_batch, w_first, p.w_batch, p.y_stride, p.y_batch].map(Arg::Size);
    let mut args = vec![Arg::Memory(&x.memory), Arg::Memory(&weight.memory)];
    let (kernel, blocks) = match beside {
        Beside::Bias(bias) => {
            args.push(bias.map_or(Arg::Null, |b| Arg::Memory(&b.memory)));
            (Kernel::Outputs { packed }, p.n.div_ceil(BLOCK_OUTPUTS))
        }
        Beside::Tail(tail) => (Kernel::Absorbed { packed }, (p.n + tail).div_ceil(ABSORBED_OUTPUTS)),
    };
    args.push(Arg::Memory(&y.memory));
    args.extend(sizes.into_iter().chain(strides));
    if let Beside::Tail(tail) = beside {
        args.push(Arg::Word(tail as u32));
    }
    cuda.stream.launch(kernel, (blocks, p.heads, 1), BLOCK_THREADS, &args);
}
