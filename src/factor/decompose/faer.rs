//! Decompositions by faer.

use std::sync::Once;

use faer::linalg::solvers::Solve;
use faer::{Mat, Par, Side, c64};
use ndarray::{Array1, Array2, Axis};
use rayon::prelude::*;

use super::{Decompose, SOLVED};
use crate::factor::svd::Svd;

/// faer, on the calling thread: its reductions would be split otherwise.
pub(super) struct Faer;

/// Keeps faer's solvers on the calling thread.
fn sequential_solvers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| faer::set_global_parallelism(Par::Seq));
}

fn matrix<T: Copy>(a: &Array2<T>) -> Mat<T> {
    sequential_solvers();
    Mat::from_fn(a.nrows(), a.ncols(), |i, j| a[[i, j]])
}

impl Decompose for Faer {
    fn name(&self) -> &'static str {
        "faer"
    }

    fn describe(&self) -> String {
        self.name().to_owned()
    }

    fn thin_svd(&self, a: &Array2<f64>) -> Option<Svd> {
        let ((m, n), k) = (a.dim(), a.nrows().min(a.ncols()));
        let found = matrix(a).thin_svd().ok()?;
        let (u, s, v) = (found.U(), found.S(), found.V());
        Some(Svd {
            u: Array2::from_shape_fn((m, k), |(i, j)| u[(i, j)]),
            s: (0..k).map(|i| s[i]).collect(),
            vt: Array2::from_shape_fn((k, n), |(i, j)| v[(j, i)]),
        })
    }

    fn singular_values(&self, a: &Array2<f64>) -> Option<Vec<f64>> {
        matrix(a).singular_values().ok()
    }

    fn eigh(&self, a: &Array2<f64>) -> Option<(Array1<f64>, Array2<f64>)> {
        let n = a.nrows();
        let found = matrix(a).self_adjoint_eigen(Side::Lower).ok()?;
        let (u, s) = (found.U(), found.S());
        // faer orders ascending.
        let values = Array1::from_shape_fn(n, |i| s[n - 1 - i]);
        Some((values, Array2::from_shape_fn((n, n), |(i, j)| u[(i, n - 1 - j)])))
    }

    fn eigvalsh(&self, a: &Array2<f64>) -> Option<Array1<f64>> {
        Some(matrix(a).self_adjoint_eigenvalues(Side::Lower).ok()?.into_iter().rev().collect())
    }

    fn eigh_complex(&self, a: &Array2<c64>) -> Option<(Array1<f64>, Array2<c64>)> {
        let n = a.nrows();
        let found = matrix(a).self_adjoint_eigen(Side::Lower).ok()?;
        let (u, s) = (found.U(), found.S());
        let values = Array1::from_shape_fn(n, |i| s[n - 1 - i].re);
        Some((values, Array2::from_shape_fn((n, n), |(i, j)| u[(i, n - 1 - j)])))
    }

    fn solve_right(&self, a: &Array2<f64>, shift: f64, b: &Array2<f64>) -> Option<Array2<f64>> {
        sequential_solvers();
        let n = a.nrows();
        let m = Mat::from_fn(n, n, |i, j| a[[i, j]] + if i == j { shift } else { 0.0 });
        let llt = m.llt(Side::Lower).ok()?;
        let mut out = Array2::zeros((b.nrows(), n));
        let blocks = out.axis_chunks_iter_mut(Axis(0), SOLVED).into_par_iter();
        blocks.zip(b.axis_chunks_iter(Axis(0), SOLVED)).for_each(|(mut out, b)| {
            let x = llt.solve(Mat::from_fn(n, b.nrows(), |i, j| b[[j, i]]));
            out.indexed_iter_mut().for_each(|((i, j), out)| *out = x[(j, i)]);
        });
        Some(out)
    }
}
