//! The matrices by which latents are rotated (docs/maths.md, 11).

use std::fmt;
use std::sync::Arc;

use ndarray::{Array2, ArrayViewMut2};
use serde::{Deserialize, Serialize};

use super::{LatentMoments, LatentWeights};
use crate::arch::MlaShape;
use crate::factor::FactorError;
use crate::factor::hadamard::Spread;
use crate::factor::linalg::{eigh, matmul};
use crate::runtime::{AttentionTensors, LayerTensors};

/// Least energy of a scaled direction, relative to the largest: its coordinates shrink to a thousandth.
pub const SCALE_FLOOR: f64 = 1e-6;

/// Which kind of matrix rotates the latents of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transform {
    /// None: latents stay as they are.
    None,
    /// A Hadamard matrix, or the nearest thing to one; no data needed. Where the latent's norm does nothing, it mixes directions
    /// that are scaled by what the weights read of them first.
    Hadamard,
    /// Principal directions of what each layer's scores and outputs read of its latents on calibration text.
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

/// The matrix `U` `[r, r]` of one layer, whose latents become `c U`. It is orthogonal, except for
/// [`LatentTransform::Scaled`].
#[derive(Debug, Clone, PartialEq)]
pub enum LatentTransform {
    /// The identity.
    Identity,
    /// A Hadamard matrix, applied by its factors.
    Spread(Arc<Spread>),
    /// Any orthogonal matrix; its columns are the new directions.
    Dense(Array2<f64>),
    /// Latents times `basis`, the rows that read them times `dual`, the inverse of its transpose. Only where the latent's norm
    /// does nothing.
    Scaled {
        /// `U` `[r, r]`.
        basis: Array2<f64>,
        /// `U^-T` `[r, r]`.
        dual: Array2<f64>,
    },
}

impl LatentTransform {
    /// The Hadamard matrix of order `r`, or the nearest thing to one.
    pub fn hadamard(r: usize) -> Self {
        Self::Spread(Arc::new(Spread::new(r)))
    }

    /// A Hadamard matrix over the principal directions of `energies` `[r, r]`, each scaled by the root of its energy:
    /// `U = s V diag(lambda^1/2) H`, with `lambda` at least 1e-6 of the largest. `energies` is what is read of a
    /// latent whose coordinates have the same size; `s` keeps the mean square of white latents.
    ///
    /// # Errors
    /// [`FactorError`] for energies that are not finite.
    pub fn spread_by(energies: &Array2<f64>) -> Result<Self, FactorError> {
        let (values, vectors) = eigh(energies, "energies of latent directions")?;
        let largest = values.iter().fold(0.0_f64, |m, v| m.max(*v));
        let r = vectors.ncols();
        if largest <= 0.0 {
            return Ok(Self::hadamard(r));
        }
        let size = values.mapv(|v| (v / largest).max(SCALE_FLOOR).sqrt());
        let size = &size / (size.mapv(|v| v * v).sum() / r as f64).sqrt();
        let (mut basis, mut dual) = (&vectors * &size, &vectors / &size);
        let spread = Self::hadamard(r);
        spread.apply(basis.view_mut());
        spread.apply(dual.view_mut());
        Ok(Self::Scaled { basis, dual })
    }

    /// Every row `y` `[.., r]` that reads latents becomes `y U^-T`: it reads of rotated latents what it read before.
    ///
    /// # Panics
    /// As [`LatentTransform::apply`].
    pub fn apply_dual(&self, mut rows: ArrayViewMut2<'_, f64>) {
        match self {
            Self::Scaled { dual, .. } => {
                let rotated = matmul(&rows, dual);
                rows.assign(&rotated);
            }
            _ => self.apply(rows),
        }
    }

    /// Every row `x` `[.., r]` of latents becomes `x U`.
    ///
    /// # Panics
    /// If the rows have another length than `U`.
    pub fn apply(&self, mut rows: ArrayViewMut2<'_, f64>) {
        match self {
            Self::Identity => {}
            Self::Spread(spread) => spread.apply(rows),
            Self::Dense(u) | Self::Scaled { basis: u, .. } => {
                let rotated = matmul(&rows, u);
                rows.assign(&rotated);
            }
        }
    }
}

/// The eigenvectors of what is read of a latent ([`super::LatentMoments::reads`], `[r, r]`), by falling eigenvalue, and the
/// eigenvalues. The first slice of a latent in these coordinates holds what scores and outputs depend on most.
///
/// # Errors
/// [`FactorError`] for moments that are not finite.
pub fn principal(moments: &Array2<f64>) -> Result<(LatentTransform, Vec<f64>), FactorError> {
    let (values, vectors) = eigh(moments, "energies of what is read of a latent")?;
    Ok((LatentTransform::Dense(vectors), values.iter().map(|v| v.max(0.0)).collect()))
}

/// The matrix of kind `transform` for one layer, from its tensors and, among them, the weights around the latent before they are
/// rotated. `None` where the kind needs moments and there are none.
///
/// # Errors
/// [`FactorError`] for energies that are not finite.
pub fn transform_of(
    transform: Transform,
    tensors: &LayerTensors,
    weights: &LatentWeights,
    shape: &MlaShape,
    moments: Option<&LatentMoments>,
) -> Result<Option<LatentTransform>, FactorError> {
    Ok(match (transform, moments, &tensors.attention) {
        (Transform::None, ..) => Some(LatentTransform::Identity),
        (Transform::Hadamard, _, AttentionTensors::Mla(t))
            if weights.is_neutral(&tensors.input_norm, shape.latent_eps) =>
        {
            Some(LatentTransform::spread_by(&weights.read_by_weights(shape, t.o.weight.mapv(f64::from).view()))?)
        }
        (Transform::Hadamard, ..) => Some(LatentTransform::hadamard(weights.rank())),
        (Transform::Pca, Some(moments), _) => Some(principal(&moments.reads)?.0),
        (Transform::Pca, None, _) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reads_latents_reads_the_same_of_scaled_ones() {
        let a = Array2::from_shape_fn((40, 8), |(i, j)| ((i * 31 + j * 17 + i * j) % 53) as f64 / (1 + j) as f64);
        let transform = LatentTransform::spread_by(&matmul(&a.t(), &a)).unwrap();
        assert!(matches!(transform, LatentTransform::Scaled { .. }));
        let x = Array2::from_shape_fn((5, 8), |(i, j)| ((i * 13 + j * 7) % 11) as f64 - 5.0);
        let y = Array2::from_shape_fn((3, 8), |(i, j)| ((i * 5 + j * 3) % 7) as f64 - 3.0);
        let want = matmul(&x, &y.t());
        let (mut tx, mut ty) = (x, y);
        transform.apply(tx.view_mut());
        transform.apply_dual(ty.view_mut());
        // Coordinates differ by at most a thousand in size, and so does the rounding.
        assert!((&matmul(&tx, &ty.t()) - &want).iter().all(|d| d.abs() < 1e-9));
        let white: f64 = match &transform {
            LatentTransform::Scaled { basis, .. } => basis.iter().map(|v| v * v).sum(),
            _ => 0.0,
        };
        assert!((white - 8.0).abs() < 1e-9, "the mean square of white latents stays");
    }

    #[test]
    fn principal_directions_diagonalise_the_moments() {
        let a = Array2::from_shape_fn((40, 8), |(i, j)| ((i * 31 + j * 17 + i * j) % 53) as f64 / (1 + j) as f64);
        let c = matmul(&a.t(), &a);
        let (LatentTransform::Dense(u), energies) = principal(&c).unwrap() else { panic!("dense") };
        let rotated = matmul(&u.t(), &matmul(&c, &u));
        for ((i, j), x) in rotated.indexed_iter() {
            let want = if i == j { energies[i] } else { 0.0 };
            assert!((x - want).abs() <= 1e-12 * c.diag().sum(), "{i} {j} {x}");
        }
    }
}
