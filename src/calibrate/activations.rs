//! Projections of activations, and how far two of them lie apart.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use rayon::prelude::*;

use super::moments::column_sums;
use crate::factor::linalg::matmul_f32;

/// Rows per task of sums over tokens.
const ROWS: usize = 512;

/// `x W^T + b` in f32, `x` `[T, D]`, `weight` `[out, D]`.
pub(crate) fn project(x: ArrayView2<'_, f32>, weight: &Array2<f64>, bias: Option<&Array1<f64>>) -> Array2<f32> {
    let w = weight.mapv(|v| v as f32);
    let mut out = matmul_f32(&x, &w.t());
    if let Some(b) = bias {
        out += &b.mapv(|v| v as f32);
    }
    out
}

/// `E |a - b|^2 / E |b - mean b|^2`, in f64, for activations `[T, D]`.
pub fn relative_error(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> f64 {
    let n = b.nrows().max(1) as f64;
    let mean = column_sums(b) / n;
    let energy = |rows: ArrayView1<'_, f32>, other: ArrayView1<'_, f32>| -> (f64, f64) {
        let mut out = (0.0, 0.0);
        for ((x, y), mean) in rows.iter().zip(other).zip(&mean) {
            out.0 += f64::from(x - y).powi(2);
            out.1 += (f64::from(*y) - mean).powi(2);
        }
        out
    };
    // Blocks are summed side by side and added up in order: the sums do not depend on the number of threads.
    let blocks = a.axis_chunks_iter(Axis(0), ROWS).into_par_iter().zip(b.axis_chunks_iter(Axis(0), ROWS));
    let parts: Vec<(f64, f64)> = blocks
        .map(|(a, b)| {
            let rows = a.rows().into_iter().zip(b.rows());
            rows.map(|(x, y)| energy(x, y)).fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
        })
        .collect();
    let (error, total) = parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
    if total > 0.0 { error / total } else { 0.0 }
}
