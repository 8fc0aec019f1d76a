//! The decompositions that everything else is made of, by one of two backends.
//!
//! [`Decompose`] has what the project uses and no more. `faer` is the backend of every build; with the feature `lapack` the
//! system's OpenBLAS is there too and takes its place ([`backend`]). Products of matrices are faer's in either case.

mod faer;
#[cfg(feature = "lapack")]
mod lapack;
#[cfg(test)]
mod tests;

use ::faer::c64;
use ndarray::{Array1, Array2};

use super::svd::Svd;

/// Decompositions of matrices that are not empty and hold neither NaN nor infinity; the callers in
/// [`linalg`](super::linalg) and [`svd`](super::svd) see to both. Values are those of f32 or products of two: squares of what is
/// far below may underflow.
///
/// Each runs on the calling thread and gives the same bits on any thread and with any number of them. Signs and phases of
/// vectors are as the backend leaves them.
pub trait Decompose: Send + Sync {
    /// Name: `faer` or `lapack`.
    fn name(&self) -> &'static str;

    /// Name and version, as far as the version is not settled by the tool's own: what reports say.
    fn describe(&self) -> String;

    /// `A = U diag(s) V^T` of `a` `[m, n]`: `U` `[m, k]`, `s` `[k]` descending, `V^T` `[k, n]`, `k = min(m, n)`. `None` where
    /// the iteration does not converge.
    fn thin_svd(&self, a: &Array2<f64>) -> Option<Svd>;

    /// Singular values alone, descending. `None` as in [`thin_svd`](Self::thin_svd).
    fn singular_values(&self, a: &Array2<f64>) -> Option<Vec<f64>>;

    /// Eigenvalues (descending, `[n]`) and eigenvectors (columns, `[n, n]`) of a symmetric matrix, of which the lower triangle
    /// is read. `None` where the iteration does not converge.
    fn eigh(&self, a: &Array2<f64>) -> Option<(Array1<f64>, Array2<f64>)>;

    /// Eigenvalues alone, descending. `None` as in [`eigh`](Self::eigh).
    fn eigvalsh(&self, a: &Array2<f64>) -> Option<Array1<f64>>;

    /// As [`eigh`](Self::eigh), of a Hermitian matrix.
    fn eigh_complex(&self, a: &Array2<c64>) -> Option<(Array1<f64>, Array2<c64>)>;

    /// `X` `[m, n]` with `X (A + shift I) = B`, by Cholesky's decomposition of `a` `[n, n]`, of which the lower triangle is
    /// read; `b` `[m, n]`. Rows of `b` are shared out over the rayon pool in blocks that do not depend on its size. `None` where
    /// `A + shift I` is not positive definite.
    fn solve_right(&self, a: &Array2<f64>, shift: f64, b: &Array2<f64>) -> Option<Array2<f64>>;
}

/// Every backend of this build; the last is the one in use.
pub const BACKENDS: &[&dyn Decompose] = &[
    &faer::Faer,
    #[cfg(feature = "lapack")]
    &lapack::Lapack,
];

/// The backend in use.
pub fn backend() -> &'static dyn Decompose {
    BACKENDS[BACKENDS.len() - 1]
}

/// What a report says of the backend in use. Nothing where it is faer, whose bits the tool's version settles.
pub fn reported() -> Option<String> {
    (backend().name() != "faer").then(|| backend().describe())
}

/// Rows that are solved for together, one task each.
const SOLVED: usize = 64;
