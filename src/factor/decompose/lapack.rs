//! Decompositions by LAPACK: ndarray-linalg on the system's OpenBLAS.
//!
//! LAPACK overwrites what it is given, so a matrix is copied once on its way in, into the layout that the routine works on, and
//! vectors once on their way out where their order is turned round.

use std::ffi::{CStr, c_char, c_int};

use faer::c64;
use ndarray::{Array1, Array2, ArrayView2, Axis, ShapeBuilder};
use ndarray_linalg::{
    CholeskyInto, Diag, EigValshInto, EighInto, JobSvd, SVDDCInto, SolveTriangularInto, UPLO, svddc::SVDDC,
};
use rayon::prelude::*;

use super::faer::Faer;
use super::{Decompose, SOLVED};
use crate::factor::svd::Svd;

unsafe extern "C" {
    safe fn openblas_set_num_threads(threads: c_int);
    safe fn openblas_get_config() -> *const c_char;
}

/// LAPACK of the system's OpenBLAS.
pub(super) struct Lapack;

/// Keeps OpenBLAS on the calling thread: it would share out sums by the number of cores, and the tool is parallel one level up.
/// Said once by every thread, since a build of OpenBLAS on OpenMP counts by thread.
fn one_thread() {
    thread_local!(static SAID: () = openblas_set_num_threads(1));
    SAID.with(|()| ());
}

/// Whether the SVD of a matrix `[m, n]` can be counted in 32 bits: its vectors, and its work space, which is `4 k^2 + 7 k` and some
/// blocks of columns, `k = min(m, n)`. Projections of 16384 x 16384 can.
fn countable((m, n): (usize, usize)) -> bool {
    let (k, limit) = (m.min(n) as u64, i32::MAX as u64);
    4 * k * k + 1024 * k <= limit && m.max(n) as u64 * k <= limit
}

/// A copy, column by column, as LAPACK has them.
fn columns<T: Copy>(a: ArrayView2<'_, T>) -> Array2<T> {
    // Rows of the transposed matrix.
    Array2::from_shape_vec(a.dim().f(), a.t().iter().copied().collect()).expect("as many values as the shape has")
}

/// LAPACK orders ascending.
fn reversed(values: &Array1<f64>) -> Array1<f64> {
    values.iter().rev().copied().collect()
}

/// Eigenvalues with their vectors the other way round.
fn descending<T: Copy>((values, u): (Array1<f64>, Array2<T>)) -> (Array1<f64>, Array2<T>) {
    let n = values.len();
    let vectors = Array2::from_shape_fn((n, n), |(i, j)| u[[i, n - 1 - j]]);
    (reversed(&values), vectors)
}

impl Decompose for Lapack {
    fn name(&self) -> &'static str {
        "lapack"
    }

    fn describe(&self) -> String {
        // SAFETY: OpenBLAS gives a string of its own that ends in a zero and stays.
        let config = unsafe { CStr::from_ptr(openblas_get_config()) }.to_string_lossy();
        format!("lapack ({})", config.trim())
    }

    fn thin_svd(&self, a: &Array2<f64>) -> Option<Svd> {
        if !countable(a.dim()) {
            return Faer.thin_svd(a);
        }
        one_thread();
        let (u, s, vt) = a.as_standard_layout().into_owned().svddc_into(JobSvd::Some).ok()?;
        Some(Svd { u: u?, s: s.to_vec(), vt: vt? })
    }

    fn singular_values(&self, a: &Array2<f64>) -> Option<Vec<f64>> {
        if !countable(a.dim()) {
            return Faer.singular_values(a);
        }
        one_thread();
        let (_, s, _) = a.as_standard_layout().svddc(JobSvd::None).ok()?;
        Some(s.to_vec())
    }

    fn eigh(&self, a: &Array2<f64>) -> Option<(Array1<f64>, Array2<f64>)> {
        one_thread();
        columns(a.view()).eigh_into(UPLO::Lower).ok().map(descending)
    }

    fn eigvalsh(&self, a: &Array2<f64>) -> Option<Array1<f64>> {
        one_thread();
        let values = columns(a.view()).eigvalsh_into(UPLO::Lower).ok()?;
        Some(reversed(&values))
    }

    fn eigh_complex(&self, a: &Array2<c64>) -> Option<(Array1<f64>, Array2<c64>)> {
        one_thread();
        columns(a.view()).eigh_into(UPLO::Lower).ok().map(descending)
    }

    fn solve_right(&self, a: &Array2<f64>, shift: f64, b: &Array2<f64>) -> Option<Array2<f64>> {
        one_thread();
        let mut lower = columns(a.view());
        lower.diag_mut().mapv_inplace(|x| x + shift);
        let lower = lower.cholesky_into(UPLO::Lower).ok()?;
        let upper = columns(lower.t());
        let mut out = Array2::zeros(b.dim());
        let blocks = out.axis_chunks_iter_mut(Axis(0), SOLVED).into_par_iter();
        blocks.zip(b.axis_chunks_iter(Axis(0), SOLVED)).try_for_each(|(mut out, b)| {
            one_thread();
            // L L^T X^T = B^T; rows of B are the columns of B^T.
            let x = columns(b.t());
            let x = lower.solve_triangular_into(UPLO::Lower, Diag::NonUnit, x).ok()?;
            let x = upper.solve_triangular_into(UPLO::Upper, Diag::NonUnit, x).ok()?;
            out.assign(&x.t());
            Some(())
        })?;
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_counted_in_32_bits_is_known() {
        for shape in [(1, 1), (16384, 16384), (32768, 16384), (1, i32::MAX as usize)] {
            assert!(countable(shape) && countable((shape.1, shape.0)), "{shape:?}");
        }
        for shape in [(32768, 32768), (262_144, 16384), (2, i32::MAX as usize)] {
            assert!(!countable(shape) && !countable((shape.1, shape.0)), "{shape:?}");
        }
    }
}
