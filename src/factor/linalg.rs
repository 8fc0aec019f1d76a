//! Dense linear algebra on `ndarray` arrays: products by `faer`, decompositions by the [`backend`] in use.
//!
//! Products run on the rayon pool and split only the output, so their bits do not depend on the thread count.
//! Decompositions run on one thread for the same reason: their reductions would be split otherwise.

use faer::linalg::matmul::matmul as faer_matmul;
use faer::traits::ComplexField;
use faer::{Accum, MatMut, MatRef, Par, c64};
use ndarray::{Array1, Array2, ArrayBase, ArrayView2, ArrayViewMut2, Data, Ix2};

use super::FactorError;
use super::decompose::backend;

macro_rules! product {
    ($name:ident, $t:ty, $doc:literal) => {
        #[doc = $doc]
        ///
        /// # Panics
        /// If the inner dimensions differ.
        pub fn $name<A: Data<Elem = $t>, B: Data<Elem = $t>>(
            a: &ArrayBase<A, Ix2>,
            b: &ArrayBase<B, Ix2>,
        ) -> Array2<$t> {
            let mut out = Array2::<$t>::zeros((a.nrows(), b.ncols()));
            strided(out.view_mut(), Accum::Replace, a.view(), b.view(), 1.0, Par::rayon(0));
            out
        }
    };
}

product!(matmul, f64, "`a * b` in f64.");
product!(matmul_f32, f32, "`a * b` in f32.");

/// `out += alpha * a * b` in f64.
///
/// # Panics
/// If the shapes do not fit.
pub fn matmul_add<A: Data<Elem = f64>, B: Data<Elem = f64>>(
    out: &mut Array2<f64>,
    alpha: f64,
    a: &ArrayBase<A, Ix2>,
    b: &ArrayBase<B, Ix2>,
) {
    strided(out.view_mut(), Accum::Add, a.view(), b.view(), alpha, Par::rayon(0));
}

/// `out = a * b` in f32, on the rayon pool, for views of any layout.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn matmul_f32_into(out: ArrayViewMut2<'_, f32>, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) {
    strided(out, Accum::Replace, a, b, 1.0, Par::rayon(0));
}

/// `out = scale * a b`, or `out += scale * a b`, on the calling thread, for views of any layout.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn gemm<T: ComplexField>(
    out: ArrayViewMut2<'_, T>,
    accum: Accum,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    scale: T,
) {
    strided(out, accum, a, b, scale, Par::Seq);
}

fn strided<T: ComplexField>(
    mut out: ArrayViewMut2<'_, T>,
    accum: Accum,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    scale: T,
    par: Par,
) {
    let (rows, columns) = out.dim();
    let inner = a.ncols();
    assert_eq!((a.nrows(), b.ncols(), b.nrows()), (rows, columns, inner), "shapes of a product");
    let [down, across] = [out.strides()[0], out.strides()[1]];
    let to = out.as_mut_ptr();
    // SAFETY: pointer, extents and strides are those of a live view that is held exclusively here.
    let out = unsafe { MatMut::from_raw_parts_mut(to, rows, columns, down, across) };
    // SAFETY: as above, shared.
    let a = unsafe { MatRef::from_raw_parts(a.as_ptr(), rows, inner, a.strides()[0], a.strides()[1]) };
    // SAFETY: as above, shared.
    let b = unsafe { MatRef::from_raw_parts(b.as_ptr(), inner, columns, b.strides()[0], b.strides()[1]) };
    faer_matmul(out, accum, a, b, scale, par);
}

/// `a * b` in f32 on the calling thread, for work that is parallel one level up.
///
/// # Panics
/// If the inner dimensions differ.
pub fn matmul_f32_sequential(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut out = Array2::<f32>::zeros((a.nrows(), b.ncols()));
    gemm(out.view_mut(), Accum::Replace, a, b, 1.0);
    out
}

/// Eigenvalues (descending, `[n]`) and eigenvectors (columns, `[n, n]`) of a symmetric matrix.
///
/// The sign of each eigenvector is fixed: its entry of largest magnitude is positive.
///
/// # Errors
/// [`FactorError::NotFinite`] or [`FactorError::NoConvergence`], with `what` in the message.
pub fn eigh(a: &Array2<f64>, what: &'static str) -> Result<(Array1<f64>, Array2<f64>), FactorError> {
    let n = a.nrows();
    if a.iter().any(|x| !x.is_finite()) {
        return Err(FactorError::NotFinite { what });
    }
    if n == 0 {
        return Ok((Array1::zeros(0), Array2::zeros((0, 0))));
    }
    let (values, mut vectors) = backend().eigh(a).ok_or(FactorError::NoConvergence { what, n })?;
    for mut column in vectors.columns_mut() {
        let peak = column.iter().copied().fold(0.0_f64, |m, x| if x.abs() > m.abs() { x } else { m });
        if peak < 0.0 {
            column.mapv_inplace(|x| -x);
        }
    }
    Ok((values, vectors))
}

/// Eigenvalues of a symmetric matrix, descending, `[n]`: as [`eigh`], at a fraction of its cost.
///
/// # Errors
/// As [`eigh`].
pub fn eigvalsh(a: &Array2<f64>, what: &'static str) -> Result<Array1<f64>, FactorError> {
    let n = a.nrows();
    if a.iter().any(|x| !x.is_finite()) {
        return Err(FactorError::NotFinite { what });
    }
    if n == 0 {
        return Ok(Array1::zeros(0));
    }
    backend().eigvalsh(a).ok_or(FactorError::NoConvergence { what, n })
}

/// Eigenvalues (descending) and eigenvectors (columns) of a Hermitian matrix.
///
/// The phase of each eigenvector is fixed: its entry of largest magnitude is real and positive.
///
/// # Errors
/// As [`eigh`].
pub fn eigh_complex(a: &Array2<c64>, what: &'static str) -> Result<(Array1<f64>, Array2<c64>), FactorError> {
    let n = a.nrows();
    if a.iter().any(|x| !(x.re.is_finite() && x.im.is_finite())) {
        return Err(FactorError::NotFinite { what });
    }
    if n == 0 {
        return Ok((Array1::zeros(0), Array2::zeros((0, 0))));
    }
    let (values, mut vectors) = backend().eigh_complex(a).ok_or(FactorError::NoConvergence { what, n })?;
    for mut column in vectors.columns_mut() {
        let peak = column.iter().copied().fold(c64::new(0.0, 0.0), |m, x| if x.norm() > m.norm() { x } else { m });
        if peak.norm() > 0.0 {
            let phase = peak.conj() / peak.norm();
            column.mapv_inplace(|x| x * phase);
        }
    }
    Ok((values, vectors))
}

/// Solve `x * a = b` for `x`, with `a` symmetric positive definite `[n, n]` and `b` `[m, n]`.
///
/// `ridge` times the mean diagonal of `a` is added to its diagonal; when the factorisation still fails the ridge grows
/// tenfold, at most six times. Returns the solution and the ridge that was used.
///
/// # Errors
/// [`FactorError::NotFinite`] or [`FactorError::Singular`].
pub fn solve_right_spd(
    a: &Array2<f64>,
    b: &Array2<f64>,
    ridge: f64,
    what: &'static str,
) -> Result<(Array2<f64>, f64), FactorError> {
    let n = a.nrows();
    if n == 0 {
        return Ok((Array2::zeros((b.nrows(), 0)), ridge));
    }
    if a.iter().chain(b.iter()).any(|x| !x.is_finite()) {
        return Err(FactorError::NotFinite { what });
    }
    let mean = a.diag().mean().unwrap_or(0.0);
    if mean <= 0.0 && a.iter().all(|x| *x == 0.0) {
        // Features that are always zero: no weight on them.
        return Ok((Array2::zeros((b.nrows(), n)), ridge));
    }
    let mean = mean.max(f64::MIN_POSITIVE);
    let mut ridge = ridge;
    for _ in 0..7 {
        if let Some(out) = backend().solve_right(a, ridge * mean, b)
            && out.iter().all(|v| v.is_finite())
        {
            return Ok((out, ridge));
        }
        ridge = if ridge == 0.0 { 1e-12 } else { ridge * 10.0 };
    }
    Err(FactorError::Singular { what })
}

/// Symmetric square root and its inverse of a positive semidefinite matrix; eigenvalues below `floor` times the largest
/// are raised to it, so that the inverse exists.
///
/// # Errors
/// As [`eigh`].
pub fn sqrt_and_inverse(
    a: &Array2<f64>,
    floor: f64,
    what: &'static str,
) -> Result<(Array2<f64>, Array2<f64>), FactorError> {
    if a.iter().all(|x| *x == 0.0) {
        // Nothing is read: any metric will do.
        return Ok((Array2::eye(a.nrows()), Array2::eye(a.nrows())));
    }
    let (values, u) = eigh(a, what)?;
    let least = values.first().copied().unwrap_or(0.0).max(f64::MIN_POSITIVE) * floor;
    let scaled = |power: f64| {
        let mut m = u.clone();
        for (mut column, &v) in m.columns_mut().into_iter().zip(values.iter()) {
            column *= v.max(least).powf(power);
        }
        matmul(&m, &u.t())
    };
    Ok((scaled(0.5), scaled(-0.5)))
}

/// Largest asymmetry removed: `(a + a^T) / 2`.
pub fn symmetrise(a: &Array2<f64>) -> Array2<f64> {
    (a + &a.t()) * 0.5
}

/// `tr(a b)` without the product; both `[n, n]`.
pub fn trace_product(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
    a.indexed_iter().map(|((i, j), x)| x * b[[j, i]]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::s;

    /// A fixed, well-mixed matrix: no random crate needed.
    fn sample(rows: usize, cols: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, cols), |(i, j)| ((i * 37 + j * 101 + i * j * 7) % 97) as f64 / 48.5 - 1.0)
    }

    #[test]
    fn products_take_any_layout() {
        let (a, b) = (sample(7, 5), sample(5, 9));
        let want = a.dot(&b);
        for got in [
            matmul(&a, &b),
            matmul(&a.t().to_owned().t(), &b),
            matmul(&a, &b.t().to_owned().t()),
            matmul(&sample(14, 5).slice(s![..;2, ..]), &b) - sample(14, 5).slice(s![..;2, ..]).dot(&b) + &want,
        ] {
            let error = (&got - &want).iter().fold(0.0_f64, |m, x| m.max(x.abs()));
            // 5 products of values in [-1, 1], each rounded once: 5 * 5 * 2^-53 at most.
            assert!(error <= 25.0 * f64::EPSILON, "{error}");
        }
    }

    #[test]
    fn eigh_reconstructs_in_descending_order() {
        let a = sample(23, 11);
        let gram = matmul(&a.t(), &a);
        let (values, u) = eigh(&gram, "gram").unwrap();
        assert!(values.windows(2).into_iter().all(|w| w[0] >= w[1]));
        let alone = eigvalsh(&gram, "gram").unwrap();
        assert!((&alone - &values).iter().all(|x| x.abs() <= 32.0 * f64::EPSILON * values[0]));
        let back = matmul(&(&u * &values), &u.t());
        let tolerance = f64::EPSILON * values[0] * (8.0 * 11.0_f64).sqrt();
        assert!((&back - &gram).iter().all(|x| x.abs() <= tolerance * 4.0));
        let eye = matmul(&u.t(), &u);
        assert!((&eye - &Array2::<f64>::eye(11)).iter().all(|x| x.abs() <= 32.0 * f64::EPSILON));
    }

    #[test]
    fn hermitian_eigenvectors_diagonalise() {
        let n = 6;
        let z = Array2::from_shape_fn((9, n), |(i, j)| c64::new(sample(9, n)[[i, j]], sample(9, 12)[[i, j + 6]]));
        let gram = Array2::from_shape_fn((n, n), |(i, j)| (0..9).map(|t| z[[t, i]] * z[[t, j]].conj()).sum::<c64>());
        let (values, u) = eigh_complex(&gram, "gram").unwrap();
        for c in 0..n {
            for i in 0..n {
                let au: c64 = (0..n).map(|k| gram[[i, k]] * u[[k, c]]).sum();
                assert!((au - u[[i, c]] * values[c]).norm() <= 1e-12 * values[0]);
            }
        }
    }

    #[test]
    fn right_solve_and_square_root_invert() {
        let a = sample(40, 8);
        let spd = matmul(&a.t(), &a);
        let b = sample(3, 8);
        let (x, _) = solve_right_spd(&spd, &b, 0.0, "spd").unwrap();
        assert!((matmul(&x, &spd) - &b).iter().all(|e| e.abs() < 1e-9));
        let (root, inverse) = sqrt_and_inverse(&spd, 1e-14, "spd").unwrap();
        assert!((matmul(&root, &root) - &spd).iter().all(|e| e.abs() < 1e-10));
        assert!((matmul(&root, &inverse) - &Array2::<f64>::eye(8)).iter().all(|e| e.abs() < 1e-9));
    }

    #[test]
    fn a_singular_matrix_is_regularised_and_a_poisoned_one_refused() {
        let spd = Array2::from_elem((4, 4), 1.0);
        let (x, ridge) = solve_right_spd(&spd, &sample(2, 4), 0.0, "rank one").unwrap();
        assert!(ridge > 0.0 && x.iter().all(|v| v.is_finite()));
        let mut nan = spd;
        nan[[1, 2]] = f64::NAN;
        assert!(matches!(eigh(&nan, "poisoned"), Err(FactorError::NotFinite { what: "poisoned" })));
    }
}
