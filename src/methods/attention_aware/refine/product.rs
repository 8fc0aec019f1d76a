//! Matrix products in f32 or f64, cut into fixed tiles.
//!
//! Training runs in f32. The same code runs in f64 where gradients are checked against finite differences, which f32
//! rounding would drown.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::AddAssign;

use faer::Accum;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, LinalgScalar, ScalarOperand};
use rayon::prelude::*;

use crate::factor::linalg;

/// Output tile per task. Fixed, so that sums are cut the same way for any number of threads.
const TILE: (usize, usize) = (128, 256);

/// f32 or f64.
pub(super) trait Real: LinalgScalar + ScalarOperand + AddAssign + Sum + Debug + Send + Sync {
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
    /// Softmax of a row in place.
    fn softmax(row: &mut [Self]);
    /// `out = scale * a b`, or `out += scale * a b`, on the calling thread, for views of any layout.
    fn gemm(out: ArrayViewMut2<'_, Self>, accum: Accum, a: ArrayView2<'_, Self>, b: ArrayView2<'_, Self>, scale: Self);
}

macro_rules! real {
    ($t:ty, $softmax:path) => {
        impl Real for $t {
            fn from_f64(value: f64) -> Self {
                value as $t
            }

            fn to_f64(self) -> f64 {
                f64::from(self)
            }

            fn softmax(row: &mut [$t]) {
                $softmax(row);
            }

            fn gemm(out: ArrayViewMut2<'_, $t>, accum: Accum, a: ArrayView2<'_, $t>, b: ArrayView2<'_, $t>, scale: $t) {
                linalg::gemm(out, accum, a, b, scale);
            }
        }
    };
}

real!(f32, crate::runtime::softmax);
real!(f64, softmax);

/// Softmax in place, as the definition has it: gradients are checked against finite differences of this.
fn softmax(row: &mut [f64]) {
    let peak = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter_mut().for_each(|x| *x = (*x - peak).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// `out = a b` or `out += a b` on the rayon pool.
pub(super) fn product_into<T: Real>(out: &mut Array2<T>, accum: Accum, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) {
    let strips: Vec<_> = out.axis_chunks_iter_mut(Axis(0), TILE.0).zip(a.axis_chunks_iter(Axis(0), TILE.0)).collect();
    strips.into_par_iter().for_each(|(mut strip, a)| {
        let tiles = strip.axis_chunks_iter_mut(Axis(1), TILE.1).into_par_iter();
        tiles.zip(b.axis_chunks_iter(Axis(1), TILE.1)).for_each(|(out, b)| T::gemm(out, accum, a, b, T::one()));
    });
}

/// `a b` on the rayon pool, in standard layout.
pub(super) fn product<T: Real>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
    let mut out = Array2::zeros((a.nrows(), b.ncols()));
    product_into(&mut out, Accum::Replace, a, b);
    out
}

/// Sum over rows, `[columns]`, row after row.
pub(super) fn column_sums<T: Real>(a: &Array2<T>) -> ndarray::Array1<T> {
    let mut sums = ndarray::Array1::zeros(a.ncols());
    for row in a.rows() {
        sums += &row;
    }
    sums
}
