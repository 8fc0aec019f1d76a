//! The orthogonal matrices that turn a latent.

use std::fmt;
use std::sync::Arc;

use ndarray::{Array2, ArrayViewMut2};
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
    /// Principal directions of each layer's latents, as its queries read them on calibration text.
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

/// Eigenvectors of the second moments of what is absorbed into queries, `sum_h E[q~ q~^T]` `[r, r]`, by falling eigenvalue;
/// and the eigenvalues. The first slice of a latent in these coordinates holds what scores depend on most.
///
/// # Errors
/// [`FactorError`] for moments that are not finite.
pub fn principal(moments: &Array2<f64>) -> Result<(Turn, Vec<f64>), FactorError> {
    let (values, vectors) = eigh(moments, "second moments of absorbed queries")?;
    Ok((Turn::Dense(vectors), values.iter().map(|v| v.max(0.0)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn principal_directions_diagonalise_the_moments() {
        let a = Array2::from_shape_fn((40, 8), |(i, j)| ((i * 31 + j * 17 + i * j) % 53) as f64 / (1 + j) as f64);
        let c = matmul(&a.t(), &a);
        let (Turn::Dense(u), energies) = principal(&c).unwrap() else { panic!("dense") };
        let turned = matmul(&u.t(), &matmul(&c, &u));
        for ((i, j), x) in turned.indexed_iter() {
            let want = if i == j { energies[i] } else { 0.0 };
            assert!((x - want).abs() <= 1e-12 * c.diag().sum(), "{i} {j} {x}");
        }
    }
}
