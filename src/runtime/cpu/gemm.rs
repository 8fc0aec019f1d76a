//! Matrix products over ndarray views: by faer, and by dot products where there are few rows.

use faer::Accum;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

use super::simd::{self, Rows};
use crate::factor::linalg;

/// Up to this many rows, a product is bound by reading the weight, and dot products beat a packed gemm.
const FEW_ROWS: usize = 16;
/// Elements of the weight per task of a thin product: half a megabyte.
const THIN: usize = 1 << 17;
/// Output tile per task of a wide product. Fixed, so that sums are cut the same way for any number of threads.
const TILE: (usize, usize) = (256, 512);

/// `out = scale * a b` on the calling thread.
pub(super) fn serial(out: ArrayViewMut2<'_, f32>, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, scale: f32) {
    linalg::gemm(out, Accum::Replace, a, b, scale);
}

/// `x W^T`: `x [T, in]`, `weight [out, in]`, both in standard layout, to `[T, out]`.
pub(super) fn linear(x: ArrayView2<'_, f32>, weight: ArrayView2<'_, f32>) -> Array2<f32> {
    let (rows, outs) = (x.nrows(), weight.nrows());
    let mut out = Array2::zeros((rows, outs));
    if rows == 0 || outs == 0 {
        return out;
    }
    if let (true, Some(x), Some(weight)) = (rows <= FEW_ROWS, x.as_slice(), weight.as_slice()) {
        thin(&mut out, x, weight);
        return out;
    }
    let strips: Vec<_> = out.axis_chunks_iter_mut(Axis(0), TILE.0).zip(x.axis_chunks_iter(Axis(0), TILE.0)).collect();
    strips.into_par_iter().for_each(|(mut strip, x)| {
        strip
            .axis_chunks_iter_mut(Axis(1), TILE.1)
            .into_par_iter()
            .zip(weight.axis_chunks_iter(Axis(0), TILE.1))
            .for_each(|(out, weight)| serial(out, x, weight.reversed_axes(), 1.0));
    });
    out
}

/// `out [rows, outs] = x W^T` for few rows.
fn thin(out: &mut Array2<f32>, x: &[f32], weight: &[f32]) {
    let (rows, outs) = out.dim();
    let width = x.len() / rows;
    let x = Rows { data: x, stride: width, width, count: rows };
    let count = (THIN / width.max(1)).clamp(1, outs);
    let of = |first: usize, count: usize| Rows { data: &weight[first * width..], stride: width, width, count };
    if let Some(out) = out.as_slice_mut().filter(|_| count == outs) {
        // Not worth waking another thread.
        return simd::dots(out, outs, x, of(0, outs), 1.0);
    }
    if rows == 1 {
        if let Some(out) = out.as_slice_mut() {
            let run = |(i, out): (usize, &mut [f32])| simd::dots(out, 0, x, of(i * count, out.len()), 1.0);
            out.par_chunks_mut(count).enumerate().for_each(run);
        }
        return;
    }
    out.axis_chunks_iter_mut(Axis(1), count).into_par_iter().enumerate().for_each(|(i, mut out)| {
        let mut tile = vec![0.0; rows * out.ncols()];
        simd::dots(&mut tile, out.ncols(), x, of(i * count, out.ncols()), 1.0);
        let columns = out.ncols();
        for (mut to, from) in out.rows_mut().into_iter().zip(tile.chunks_exact(columns)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
    });
}
