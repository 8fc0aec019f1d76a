//! Singular value decomposition of weights, and ranks by share of energy.

use ndarray::{Array2, s};

use super::FactorError;
use super::decompose::backend;

/// Thin decomposition `W = U diag(s) V^T` of `W` `[m, n]`, `k = min(m, n)`.
#[derive(Debug, Clone)]
pub struct Svd {
    /// `[m, k]`, orthonormal columns.
    pub u: Array2<f64>,
    /// Descending, `[k]`.
    pub s: Vec<f64>,
    /// `[k, n]`, orthonormal rows.
    pub vt: Array2<f64>,
}

/// Decompose. The sign of each triple is fixed: the entry of largest magnitude in its right vector is positive.
///
/// # Errors
/// [`FactorError::NotFinite`] or [`FactorError::NoConvergence`], with `what` in the message.
pub fn svd(w: &Array2<f64>, what: &'static str) -> Result<Svd, FactorError> {
    let n = checked(w, what)?;
    if n == 0 {
        return Ok(Svd { u: Array2::zeros((w.nrows(), 0)), s: Vec::new(), vt: Array2::zeros((0, w.ncols())) });
    }
    let mut out = backend().thin_svd(w).ok_or(FactorError::NoConvergence { what, n })?;
    for i in 0..n {
        let peak = out.vt.row(i).iter().copied().fold(0.0_f64, |m, x| if x.abs() > m.abs() { x } else { m });
        if peak < 0.0 {
            out.vt.row_mut(i).mapv_inplace(|x| -x);
            out.u.column_mut(i).mapv_inplace(|x| -x);
        }
    }
    Ok(out)
}

/// Singular values alone, descending.
///
/// # Errors
/// As [`svd`].
pub fn singular_values(w: &Array2<f64>, what: &'static str) -> Result<Vec<f64>, FactorError> {
    match checked(w, what)? {
        0 => Ok(Vec::new()),
        n => backend().singular_values(w).ok_or(FactorError::NoConvergence { what, n }),
    }
}

/// Number of singular values of a matrix that has to be finite.
fn checked(w: &Array2<f64>, what: &'static str) -> Result<usize, FactorError> {
    if w.iter().any(|x| !x.is_finite()) {
        return Err(FactorError::NotFinite { what });
    }
    Ok(w.nrows().min(w.ncols()))
}

impl Svd {
    /// `diag(s) V^T` of the `rank` largest, under it zero rows up to `width`: `[width, n]`.
    pub fn scaled_right(&self, rank: usize, width: usize) -> Array2<f64> {
        let mut out = Array2::zeros((width, self.vt.ncols()));
        for i in 0..rank.min(self.s.len()) {
            out.row_mut(i).assign(&(&self.vt.row(i) * self.s[i]));
        }
        out
    }

    /// `V^T` of the `rank` largest, under it zero rows up to `width`: `[width, n]`.
    pub fn right(&self, rank: usize, width: usize) -> Array2<f64> {
        let rank = rank.min(self.s.len());
        let mut out = Array2::zeros((width, self.vt.ncols()));
        out.slice_mut(s![..rank, ..]).assign(&self.vt.slice(s![..rank, ..]));
        out
    }

    /// `U` of the `rank` largest, beside it zero columns up to `width`: `[m, width]`.
    pub fn left(&self, rank: usize, width: usize) -> Array2<f64> {
        let rank = rank.min(self.s.len());
        let mut out = Array2::zeros((self.u.nrows(), width));
        out.slice_mut(s![.., ..rank]).assign(&self.u.slice(s![.., ..rank]));
        out
    }

    /// `U diag(s)` of the `rank` largest, beside it zero columns up to `width`: `[m, width]`.
    pub fn scaled_left(&self, rank: usize, width: usize) -> Array2<f64> {
        let mut out = self.left(rank, width);
        for (mut column, s) in out.columns_mut().into_iter().zip(&self.s).take(rank) {
            column *= *s;
        }
        out
    }

    /// Share of the energy `sum s^2` outside the `rank` largest.
    pub fn lost(&self, rank: usize) -> f64 {
        let energy = |s: &[f64]| s.iter().map(|v| v * v).sum::<f64>();
        let total = energy(&self.s);
        if total > 0.0 { energy(&self.s[rank.min(self.s.len())..]) / total } else { 0.0 }
    }
}

/// Rank by share of energy (X-EcoMLA, arXiv 2503.11132, dynamic ranks):
///
/// ```text
/// max(1, #{k : sum_{i <= k} s_i^2 <= energy * sum_i s_i^2}),   rounded up to a multiple of `divisor`
/// ```
///
/// and no more than there are singular values. `values` descending, `energy` in `(0, 1]`.
pub fn energy_rank(values: &[f64], energy: f64, divisor: usize) -> usize {
    let sums: Vec<f64> = values
        .iter()
        .scan(0.0, |sum, s| {
            *sum += s * s;
            Some(*sum)
        })
        .collect();
    // The last sum is the total, to the last bit: an energy of 1 takes all.
    let total = sums.last().copied().unwrap_or(0.0);
    let within = sums.iter().filter(|sum| total > 0.0 && **sum / total <= energy).count();
    within.max(1).next_multiple_of(divisor.max(1)).min(values.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::linalg::matmul;

    #[test]
    fn the_factors_make_the_matrix() {
        for (m, n) in [(9, 4), (4, 9), (6, 6)] {
            let w = Array2::from_shape_fn((m, n), |(i, j)| ((i * n + j) as f64 * 0.7).sin() + (i == j) as u8 as f64);
            let found = svd(&w, "test").unwrap();
            let k = m.min(n);
            let back = matmul(&found.left(k, k + 2), &found.scaled_right(k, k + 2));
            let other = matmul(&found.scaled_left(k, k), &found.right(k, k));
            // 20 roundings of values near one.
            assert!((&back - &w).iter().chain((&other - &w).iter()).all(|e| e.abs() < 1e-13));
            assert!(found.s.windows(2).all(|p| p[0] >= p[1]));
            let alone = singular_values(&w, "test").unwrap();
            assert!(alone.iter().zip(&found.s).all(|(a, b)| (a - b).abs() < 1e-13));
            // What is lost at a rank is the distance of the best approximation (Eckart-Young).
            let cut = &matmul(&found.left(2, 2), &found.scaled_right(2, 2)) - &w;
            let (lost, all) = (cut.iter().map(|e| e * e).sum::<f64>(), w.iter().map(|e| e * e).sum::<f64>());
            assert!((found.lost(2) - lost / all).abs() < 1e-13);
        }
    }

    #[test]
    fn ranks_by_energy_are_those_of_the_rule() {
        // Squares 16, 4, 4, 1, 0: sums 16, 20, 24, 25, 25 of 25.
        let s = [4.0, 2.0, 2.0, 1.0, 0.0];
        for (energy, rank) in [(0.1, 1), (0.64, 1), (0.79, 1), (0.8, 2), (0.95, 2), (0.96, 3), (0.99, 3), (1.0, 5)] {
            assert_eq!(energy_rank(&s, energy, 1), rank, "{energy}");
        }
        assert_eq!(energy_rank(&s, 0.8, 2), 2);
        assert_eq!(energy_rank(&s, 0.96, 2), 4);
        // A multiple beyond what there is: all there is.
        assert_eq!(energy_rank(&s, 0.96, 8), 5);
        assert_eq!(energy_rank(&[0.0, 0.0], 0.9, 1), 1);
    }
}
