//! The orthogonal matrices that turn a latent, and how its directions are dealt to slices.

use std::fmt;
use std::sync::Arc;

use ndarray::{Array2, ArrayViewMut2, Axis};
use serde::{Deserialize, Serialize};

use crate::factor::FactorError;
use crate::factor::hadamard::Spread;
use crate::factor::linalg::{eigh, matmul};

/// Which orthogonal matrix turns the latents of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transform {
    /// None: latents stay as they are.
    None,
    /// A Hadamard matrix, or what comes nearest to one; the same in every layer, no data needed.
    Hadamard,
    /// Principal directions of each layer's latents on calibration text.
    Pca,
}

impl Transform {
    /// Every transform.
    pub const ALL: [Transform; 3] = [Transform::None, Transform::Hadamard, Transform::Pca];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Transform::None => "none",
            Transform::Hadamard => "hadamard",
            Transform::Pca => "pca",
        }
    }
}

impl fmt::Display for Transform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An orthogonal matrix `U` `[r, r]`.
#[derive(Debug, Clone, PartialEq)]
pub enum Turn {
    /// The identity.
    None,
    /// Applied by its factors.
    Spread(Arc<Spread>),
    /// Columns are the new directions.
    Dense(Array2<f64>),
}

impl Turn {
    /// The Hadamard matrix of order `r`, or what comes nearest to one.
    pub fn hadamard(r: usize) -> Self {
        Turn::Spread(Arc::new(Spread::new(r)))
    }

    /// Every row `x` `[.., r]` becomes `x U`.
    ///
    /// # Panics
    /// If the rows have another length than `U`.
    pub fn apply(&self, mut rows: ArrayViewMut2<'_, f64>) {
        match self {
            Turn::None => {}
            Turn::Spread(spread) => spread.apply(rows),
            Turn::Dense(u) => {
                let turned = matmul(&rows, u);
                rows.assign(&turned);
            }
        }
    }
}

/// Eigenvectors of a latent's second moments `E[c c^T]` `[r, r]`, dealt to `slices` slices: the columns of slice `t` are
/// `t r/T .. (t + 1) r/T` of the result. Also the energies of the columns.
///
/// Directions are dealt in order of falling energy, forth and back (`0, 1, .., T-1, T-1, .., 1, 0, 0, ..`), so that every
/// slice gets as many and nearly the same energy; within a slice energies fall.
///
/// # Errors
/// [`FactorError`] for moments that are not finite.
pub fn principal(moments: &Array2<f64>, slices: usize) -> Result<(Turn, Vec<f64>), FactorError> {
    let (values, vectors) = eigh(moments, "second moments of the latent")?;
    let order = deal(values.len(), slices);
    let energies = order.iter().map(|&i| values[i].max(0.0)).collect();
    Ok((Turn::Dense(vectors.select(Axis(1), &order)), energies))
}

/// `0..n` dealt forth and back to `slices` hands, hand after hand.
pub fn deal(n: usize, slices: usize) -> Vec<usize> {
    let hand = |i: usize| {
        let (round, place) = (i / slices, i % slices);
        if round.is_multiple_of(2) { place } else { slices - 1 - place }
    };
    (0..slices).flat_map(|t| (0..n).filter(move |i| hand(*i) == t)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dealing_is_a_permutation_in_even_hands() {
        assert_eq!(deal(8, 2), [0, 3, 4, 7, 1, 2, 5, 6]);
        assert_eq!(deal(4, 1), [0, 1, 2, 3]);
        for (n, t) in [(12, 3), (64, 8), (16, 16), (10, 5)] {
            let mut dealt = deal(n, t);
            let sums: Vec<usize> = dealt.chunks(n / t).map(|hand| hand.iter().sum()).collect();
            // Two neighbouring rounds cancel; an odd round leaves at most `t - 1`.
            assert!(sums.iter().max().unwrap() - sums.iter().min().unwrap() < t, "{sums:?}");
            dealt.sort_unstable();
            assert_eq!(dealt, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn principal_directions_diagonalise_the_moments() {
        let a = Array2::from_shape_fn((40, 8), |(i, j)| ((i * 31 + j * 17 + i * j) % 53) as f64 / (1 + j) as f64);
        let c = matmul(&a.t(), &a);
        let (Turn::Dense(u), energies) = principal(&c, 4).unwrap() else { panic!("dense") };
        let turned = matmul(&u.t(), &matmul(&c, &u));
        for ((i, j), x) in turned.indexed_iter() {
            let want = if i == j { energies[i] } else { 0.0 };
            assert!((x - want).abs() <= 1e-12 * c.diag().sum(), "{i} {j} {x}");
        }
    }
}
