//! The CPU backend: faer's gemm for products, rayon for everything else.
//!
//! Results do not depend on the number of threads: work is cut by shape alone, and every sum is taken in one task.

mod attention;
mod decode;
mod elementwise;
mod gemm;
mod mlp;
mod simd;
mod tiles;

use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

use crate::arch::Activation;

use super::backend::mlp_in_steps;
use super::{AttentionShape, Backend, HeadColumns, HeadPart, HostWeight, MlpWeights, Rotation, RuntimeError, Span};
use crate::runtime::weight::WeightView;

pub(crate) use elementwise::{erf, exponentials, silu_mul_backward, silu_times, softmax};
pub(crate) use mlp::LONG as LONG_MLP;

pub(super) use attention::{probability_tile, tile_rows};
pub(super) use tiles::TiledAttention;

/// Rows per task of elementwise work.
const ROWS: usize = 16;

/// The host processor. Tensors are `Array2<f32>` in standard layout.
#[derive(Debug, Default, Clone, Copy)]
pub struct Cpu;

/// Elements above which a copy is spread over the threads.
const LARGE: usize = 1 << 18;

/// A copy in standard layout, large ones by all threads.
fn copied(host: ArrayView2<'_, f32>) -> Array2<f32> {
    if host.len() < LARGE {
        return host.as_standard_layout().into_owned();
    }
    let mut out = Array2::zeros(host.raw_dim());
    ndarray::Zip::from(&mut out).and(host).par_for_each(|to, from| *to = *from);
    out
}

/// The elements of a tensor, row-major. Every constructor in this module makes the standard layout.
fn flat(x: &Array2<f32>) -> &[f32] {
    x.as_slice().expect("cpu tensors are in standard layout")
}

fn flat_mut(x: &mut Array2<f32>) -> &mut [f32] {
    x.as_slice_mut().expect("cpu tensors are in standard layout")
}

/// `x W^T` of matrices in memory: `x [T, in]`, `w [out, in]`, both in standard layout.
pub(super) fn product(x: ArrayView2<'_, f32>, w: ArrayView2<'_, f32>) -> Array2<f32> {
    gemm::linear(x, WeightView::F32(w))
}

/// Run `f(first row, rows)` over blocks of rows of `x`, in parallel.
fn for_row_blocks(x: &mut Array2<f32>, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    let columns = x.ncols();
    if columns == 0 {
        return;
    }
    let run = |(block, rows): (usize, &mut [f32])| f(block * ROWS, rows);
    flat_mut(x).par_chunks_mut(ROWS * columns).enumerate().for_each(run);
}

impl Backend for Cpu {
    type Tensor = Array2<f32>;
    type Weight = HostWeight;

    fn name(&self) -> &str {
        "cpu"
    }

    fn upload(&self, host: Array2<f32>) -> Array2<f32> {
        if host.is_standard_layout() { host } else { host.as_standard_layout().into_owned() }
    }

    fn upload_view(&self, host: ArrayView2<'_, f32>) -> Array2<f32> {
        copied(host)
    }

    fn upload_weight(&self, host: HostWeight) -> HostWeight {
        host
    }

    fn weight_shape(&self, weight: &HostWeight) -> (usize, usize) {
        weight.shape()
    }

    fn takes_weights_in_place(&self) -> bool {
        true
    }

    fn download(&self, tensor: Array2<f32>) -> Result<Array2<f32>, RuntimeError> {
        Ok(tensor)
    }

    fn shape(&self, tensor: &Array2<f32>) -> (usize, usize) {
        tensor.dim()
    }

    fn zeros(&self, rows: usize, columns: usize) -> Array2<f32> {
        Array2::zeros((rows, columns))
    }

    fn write_rows(&self, into: &mut Array2<f32>, to: &[usize], rows: &Array2<f32>) {
        for (&to, from) in to.iter().zip(rows.rows()) {
            into.row_mut(to).assign(&from);
        }
    }

    fn rows(&self, x: &Array2<f32>, rows: Range<usize>) -> Array2<f32> {
        x.slice(s![rows, ..]).to_owned()
    }

    fn linear(&self, x: &Array2<f32>, weight: &HostWeight, bias: Option<&Array2<f32>>) -> Array2<f32> {
        let mut out = gemm::linear(x.view(), weight.view());
        if let Some(bias) = bias {
            let columns = out.ncols();
            for_row_blocks(&mut out, |_, rows| {
                for row in rows.chunks_exact_mut(columns) {
                    row.iter_mut().zip(flat(bias)).for_each(|(y, b)| *y += b);
                }
            });
        }
        out
    }

    fn head_linear(
        &self,
        x: &Array2<f32>,
        weight: &HostWeight,
        of: HeadColumns,
        heads: usize,
        absorb: bool,
    ) -> Array2<f32> {
        let columns = weight.shape().1;
        let (inner, outer) = if absorb { (of.width, columns) } else { (columns, of.width) };
        let mut out = Array2::zeros((x.nrows(), heads * outer));
        if outer == 0 || inner == 0 {
            return out;
        }
        out.axis_chunks_iter_mut(Axis(1), outer).into_par_iter().enumerate().for_each(|(h, out)| {
            let x = x.slice(s![.., h * inner..(h + 1) * inner]);
            gemm::with_wide(weight.view().rows(of.of(h)), |w| {
                gemm::serial(out, x, if absorb { w } else { w.reversed_axes() }, 1.0);
            });
        });
        out
    }

    fn rms_norm(&self, x: &Array2<f32>, gain: &Array2<f32>, eps: f64) -> Array2<f32> {
        let mut out = x.clone();
        let columns = out.ncols();
        for_row_blocks(&mut out, |_, rows| {
            for row in rows.chunks_exact_mut(columns) {
                elementwise::rms_norm(row, flat(gain), eps);
            }
        });
        out
    }

    fn rope(&self, x: &mut Array2<f32>, rotation: &Rotation, positions: &[usize], columns: HeadColumns, heads: usize) {
        let width = x.ncols();
        for_row_blocks(x, |first, rows| {
            for (row, position) in rows.chunks_exact_mut(width).zip(&positions[first..]) {
                for h in 0..heads {
                    rotation.turn(&mut row[columns.of(h)], *position);
                }
            }
        });
    }

    fn gather_heads(&self, parts: &[HeadPart<'_, Array2<f32>>], heads: usize) -> Array2<f32> {
        let rows = parts.first().map_or(0, |p| p.from.nrows());
        let width: usize = parts.iter().map(|p| p.columns.width).sum();
        let mut out = Array2::zeros((rows, heads * width));
        for_row_blocks(&mut out, |first, block| {
            for (t, row) in block.chunks_exact_mut(heads * width).enumerate() {
                let mut rest = row;
                for h in 0..heads {
                    for part in parts {
                        let from = &flat(part.from)[(first + t) * part.from.ncols()..][part.columns.of(h)];
                        let (head, tail) = rest.split_at_mut(from.len());
                        head.copy_from_slice(from);
                        rest = tail;
                    }
                }
            }
        });
        out
    }

    fn attention(
        &self,
        q: &Array2<f32>,
        k: &Array2<f32>,
        v: &Array2<f32>,
        shape: &AttentionShape,
        spans: &[Span],
    ) -> Array2<f32> {
        attention::attention(q.view(), k.view(), v.view(), shape, None, spans)
    }

    fn capped_attention(
        &self,
        q: &Array2<f32>,
        k: &Array2<f32>,
        v: &Array2<f32>,
        shape: &AttentionShape,
        cap: f64,
        spans: &[Span],
    ) -> Result<Array2<f32>, RuntimeError> {
        Ok(attention::attention(q.view(), k.view(), v.view(), shape, Some(cap), spans))
    }

    fn mlp(&self, x: &Array2<f32>, mlp: &MlpWeights<'_, HostWeight, Array2<f32>>) -> Result<Array2<f32>, RuntimeError> {
        if x.nrows() >= mlp::LONG {
            return Ok(mlp::mlp(x.view(), mlp));
        }
        mlp_in_steps(self, x, mlp)
    }

    fn copy_to_host(&self, x: &Array2<f32>) -> Result<Array2<f32>, RuntimeError> {
        Ok(x.clone())
    }

    fn gated(
        &self,
        mut gate: Array2<f32>,
        up: &Array2<f32>,
        activation: Activation,
    ) -> Result<Array2<f32>, RuntimeError> {
        let columns = gate.ncols();
        for_row_blocks(&mut gate, |first, rows| elementwise::gated(rows, &flat(up)[first * columns..], activation));
        Ok(gate)
    }

    fn activated(&self, mut x: Array2<f32>, activation: Activation) -> Result<Array2<f32>, RuntimeError> {
        for_row_blocks(&mut x, |_, rows| rows.iter_mut().for_each(|x| *x = elementwise::activate(*x, activation)));
        Ok(x)
    }

    fn rms_norm_heads(
        &self,
        x: &mut Array2<f32>,
        gain: &Array2<f32>,
        eps: f64,
        columns: HeadColumns,
        heads: usize,
    ) -> Result<(), RuntimeError> {
        let width = x.ncols();
        for_row_blocks(x, |_, rows| {
            for row in rows.chunks_exact_mut(width) {
                for h in 0..heads {
                    elementwise::rms_norm(&mut row[columns.of(h)], flat(gain), eps);
                }
            }
        });
        Ok(())
    }

    fn softcap(&self, mut x: Array2<f32>, cap: f64) -> Result<Array2<f32>, RuntimeError> {
        for_row_blocks(&mut x, |_, rows| elementwise::softcap(rows, cap));
        Ok(x)
    }

    fn gather_rows(&self, x: &Array2<f32>, rows: &[usize]) -> Result<Array2<f32>, RuntimeError> {
        Ok(x.select(Axis(0), rows))
    }

    fn scatter_add_rows(
        &self,
        into: &mut Array2<f32>,
        rows: &[usize],
        weights: &[f32],
        y: &Array2<f32>,
    ) -> Result<(), RuntimeError> {
        for ((&row, &weight), from) in rows.iter().zip(weights).zip(y.rows()) {
            into.row_mut(row).scaled_add(weight, &from);
        }
        Ok(())
    }

    fn silu_mul(&self, mut gate: Array2<f32>, up: &Array2<f32>) -> Array2<f32> {
        let columns = gate.ncols();
        for_row_blocks(&mut gate, |first, rows| {
            elementwise::silu_mul(rows, &flat(up)[first * columns..]);
        });
        gate
    }

    fn add(&self, x: &mut Array2<f32>, y: &Array2<f32>) {
        let columns = x.ncols();
        for_row_blocks(x, |first, rows| {
            rows.iter_mut().zip(&flat(y)[first * columns..]).for_each(|(x, y)| *x += y);
        });
    }
}
