//! Pure maths on matrices: no files, no configs, no progress.

pub mod conjugate;
pub mod decompose;
pub mod hadamard;
pub mod joint;
pub mod linalg;
pub mod norm;
pub mod refit;
pub mod rotate;
pub mod shared;
pub mod slots;
pub mod svd;

/// Errors of a factorisation.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FactorError {
    /// An input holds NaN or infinity.
    #[error(
        "{what}: not finite\n\nhint: weights or activations of this layer overflow f32; does the source model itself run on this text?"
    )]
    NotFinite {
        /// Which matrix.
        what: &'static str,
    },
    /// An eigenvalue iteration did not converge.
    #[error("{what}: the eigenvalue iteration did not converge ({n} x {n})")]
    NoConvergence {
        /// Which matrix.
        what: &'static str,
        /// Order of the matrix.
        n: usize,
    },
    /// A matrix that must be positive definite is not, even after regularisation.
    #[error("{what}: not positive definite, even after regularisation\n\nhint: calibrate on more varied text")]
    Singular {
        /// Which matrix.
        what: &'static str,
    },
    /// A rank larger than the space it is taken from.
    #[error("{what}: rank {rank} asked, at most {max} possible")]
    Rank {
        /// Which rank.
        what: &'static str,
        /// Rank asked.
        rank: usize,
        /// Largest possible.
        max: usize,
    },
}
