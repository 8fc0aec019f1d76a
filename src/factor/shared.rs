//! One left factor for several matrices with the same rows.

use ndarray::{Array2, ArrayView2, Axis, concatenate, s};

use super::FactorError;
use super::linalg::{eigh, matmul, matmul_add};

/// The best approximation of given rank of `[X_1 | X_2 | ..]`, as one left factor and a right factor per matrix:
/// `X_i ~ left right_i^T`.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedFactors {
    /// `[T, r]`.
    pub left: Array2<f32>,
    /// Per matrix `[w_i, r]`, transposed so that reconstruction is a linear layer `[out, in]`.
    pub right: Vec<Array2<f32>>,
}

/// Factorise matrices `[T, w_i]` side by side: xKV's shared factors (arXiv 2503.18893, section 4.1).
///
/// With `X = U S V^T` the result is `U_r (S_r V_r^T)` or `(U_r S_r) V_r^T`: the smaller side is taken from the eigenvectors of
/// its Gram matrix, in f64, the other is the projection of `X` on it. At rank `min(T, sum w_i)` the basis is square and
/// orthogonal, however inexact the Gram's small eigenvalues are, so the factors give `X` to their rounding to f32.
///
/// # Errors
/// [`FactorError::Rank`] for a rank of 0 or above `min(T, sum w_i)`; [`FactorError::NotFinite`],
/// [`FactorError::NoConvergence`].
pub fn shared_factors(
    parts: &[ArrayView2<'_, f32>],
    rank: usize,
    what: &'static str,
) -> Result<SharedFactors, FactorError> {
    let tokens = parts.first().map_or(0, |p| p.nrows());
    let columns: usize = parts.iter().map(|p| p.ncols()).sum();
    let max = tokens.min(columns);
    if rank == 0 || rank > max {
        return Err(FactorError::Rank { what, rank, max });
    }
    let narrow = |m: Array2<f64>| m.mapv(|x| x as f32);
    if tokens <= columns {
        let mut gram = Array2::zeros((tokens, tokens));
        for part in parts {
            let x = part.mapv(f64::from);
            matmul_add(&mut gram, 1.0, &x, &x.t());
        }
        let (_, vectors) = eigh(&gram, what)?;
        let left = vectors.slice(s![.., ..rank]).to_owned();
        let right = parts.iter().map(|part| narrow(matmul(&part.mapv(f64::from).t(), &left))).collect();
        return Ok(SharedFactors { left: narrow(left), right });
    }
    let wide: Vec<Array2<f64>> = parts.iter().map(|p| p.mapv(f64::from)).collect();
    let views: Vec<_> = wide.iter().map(|x| x.view()).collect();
    let x = concatenate(Axis(1), &views).map_err(|_| FactorError::Rank { what, rank, max: 0 })?;
    let (_, vectors) = eigh(&matmul(&x.t(), &x), what)?;
    let basis = vectors.slice(s![.., ..rank]).to_owned();
    let left = narrow(matmul(&x, &basis));
    let mut first = 0;
    let right = parts
        .iter()
        .map(|part| {
            let rows = s![first..first + part.ncols(), ..];
            first += part.ncols();
            basis.slice(rows).mapv(|x| x as f32)
        })
        .collect();
    Ok(SharedFactors { left, right })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::svd::singular_values;

    fn sample(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, cols), || (crate::random::uniform(&mut state) * 2.0 - 1.0) as f32)
    }

    fn error(parts: &[Array2<f32>], factors: &SharedFactors) -> f64 {
        let difference = |(x, right): (&Array2<f32>, &Array2<f32>)| {
            let back = factors.left.mapv(f64::from).dot(&right.mapv(f64::from).t());
            (&back - &x.mapv(f64::from)).iter().map(|e| e * e).sum::<f64>()
        };
        parts.iter().zip(&factors.right).map(difference).sum::<f64>()
    }

    /// The error of every rank is the tail of the singular values of the matrices side by side, taken directly.
    #[test]
    fn the_error_is_that_of_the_best_approximation_on_either_side() {
        for (tokens, widths) in [(9, [7, 5, 7]), (30, [7, 5, 7])] {
            let parts: Vec<_> = widths.iter().zip(1..).map(|(&w, seed)| sample(tokens, w, seed)).collect();
            let views: Vec<_> = parts.iter().map(|x| x.view()).collect();
            let x = concatenate(Axis(1), &views).unwrap();
            let svd = singular_values(&x.mapv(f64::from), "test").unwrap();
            let norm: f64 = svd.iter().map(|s| s * s).sum();
            for rank in 1..=svd.len() {
                let factors = shared_factors(&views, rank, "test").unwrap();
                let tail: f64 = svd[rank..].iter().map(|s| s * s).sum();
                // Factors are rounded to f32: entries of the product move by 2^-24 relative, so the error by its square
                // times the norm, and its cross term with the tail.
                let rounding = norm * 2f64.powi(-46) + (tail * norm).sqrt() * 2f64.powi(-22);
                let found = error(&parts, &factors);
                assert!((found - tail).abs() <= rounding, "T {tokens}, rank {rank}: {found} instead of {tail}");
                assert_eq!(factors.left.dim(), (tokens, rank));
                assert!(factors.right.iter().zip(widths).all(|(r, w)| r.dim() == (w, rank)));
            }
        }
    }

    #[test]
    fn ranks_that_are_not_possible_are_refused() {
        let x = sample(4, 6, 3);
        for rank in [0, 5] {
            let found = shared_factors(&[x.view()], rank, "keys");
            assert_eq!(found, Err(FactorError::Rank { what: "keys", rank, max: 4 }));
        }
        assert!(shared_factors(&[], 1, "keys").is_err());
    }
}
