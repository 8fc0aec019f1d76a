//! Matrix products over ndarray views, by faer.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

/// Up to this many rows, a product is bound by reading the weight, and dot products beat a packed gemm.
const FEW_ROWS: usize = 2;
/// Output columns per task of a thin product.
const THIN: usize = 64;
/// Output tile per task of a wide product. Fixed, so that sums are cut the same way for any number of threads.
const TILE: (usize, usize) = (256, 512);

fn reference<'a>(view: &ArrayView2<'a, f32>) -> MatRef<'a, f32> {
    let (rows, columns) = view.dim();
    let [row_stride, column_stride] = [view.strides()[0], view.strides()[1]];
    // SAFETY: pointer, extents and strides are those of a live view, which outlives the returned one by `'a`.
    unsafe { MatRef::from_raw_parts(view.as_ptr(), rows, columns, row_stride, column_stride) }
}

fn mutable<'a>(mut view: ArrayViewMut2<'a, f32>) -> MatMut<'a, f32> {
    let (rows, columns) = view.dim();
    let [row_stride, column_stride] = [view.strides()[0], view.strides()[1]];
    // SAFETY: as above; the view is consumed, so the borrow stays exclusive.
    unsafe { MatMut::from_raw_parts_mut(view.as_mut_ptr(), rows, columns, row_stride, column_stride) }
}

/// `out = scale * a b` on the calling thread.
pub(super) fn serial(out: ArrayViewMut2<'_, f32>, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, scale: f32) {
    matmul(mutable(out), Accum::Replace, reference(&a), reference(&b), scale, Par::Seq);
}

/// `x W^T`: `x [T, in]`, `weight [out, in]`, both in standard layout, to `[T, out]`.
pub(super) fn linear(x: ArrayView2<'_, f32>, weight: ArrayView2<'_, f32>) -> Array2<f32> {
    let (rows, outs) = (x.nrows(), weight.nrows());
    let mut out = Array2::zeros((rows, outs));
    if rows == 0 || outs == 0 {
        return out;
    }
    if rows <= FEW_ROWS {
        out.axis_chunks_iter_mut(Axis(1), THIN)
            .into_par_iter()
            .zip(weight.axis_chunks_iter(Axis(0), THIN))
            .for_each(|(out, weight)| thin(out, x, weight));
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

fn thin(mut out: ArrayViewMut2<'_, f32>, x: ArrayView2<'_, f32>, weight: ArrayView2<'_, f32>) {
    for (mut out, x) in out.rows_mut().into_iter().zip(x.rows()) {
        let Some(x) = x.to_slice() else { continue };
        for (y, w) in out.iter_mut().zip(weight.rows()) {
            if let Some(w) = w.to_slice() {
                *y = dot(x, w);
            }
        }
    }
}

/// Inner product in 32 interleaved partial sums, added pairwise.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 32;
    let mut sums = [0.0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0] + tail
}
