//! Joint low rank of keys and values in a given metric (`docs/maths.md`, "Joint low rank").

use ndarray::{Array1, Array2, Axis, s};

use super::FactorError;
use super::linalg::{eigh, matmul, sqrt_and_inverse, symmetrise, trace_product};

/// Eigenvalues of a metric below this share of its largest are raised to it, so that its root can be inverted: a direction
/// that no query and no output reads costs nothing to keep at a millionth of the weight.
const METRIC_FLOOR: f64 = 1e-6;

/// Rank-`r` factorisation of `z`: `c = down z`, `z ~ up c`, latents uncorrelated, of unit variance, in order of energy.
#[derive(Debug, Clone)]
pub struct JointLowRank {
    /// `[r, m]`.
    pub down: Array2<f64>,
    /// `[m, r]`.
    pub up: Array2<f64>,
    /// Energy of every direction in the metric, descending, `[m]`.
    pub spectrum: Array1<f64>,
}

impl JointLowRank {
    /// Share of the energy outside the latent.
    pub fn loss(&self) -> f64 {
        let total: f64 = self.spectrum.iter().map(|v| v.max(0.0)).sum();
        let lost: f64 = self.spectrum.iter().skip(self.down.nrows()).map(|v| v.max(0.0)).sum();
        if total > 0.0 { lost / total } else { 0.0 }
    }
}

/// Best rank-`rank` approximation of `z` with second moment `moment` `[m, m]` in the block-diagonal metric
/// `blkdiag(key_metric, value_metric)`: minimises `E |M^(1/2) (z - up down z)|^2`.
///
/// ```text
/// S = M^(1/2) C M^(1/2) = R Lam R^T,   down = Lam_r^(-1/2) R_r^T M^(1/2),   up = M^(-1/2) R_r Lam_r^(1/2)
/// ```
///
/// The two blocks are first scaled to equal energy `tr(M C)`, keys times `key_weight`.
///
/// # Errors
/// [`FactorError::Rank`] for a rank above `m`; errors of the eigenvalue problems.
pub fn joint_low_rank(
    moment: &Array2<f64>,
    key_metric: &Array2<f64>,
    value_metric: &Array2<f64>,
    key_weight: f64,
    rank: usize,
) -> Result<JointLowRank, FactorError> {
    let (keys, m) = (key_metric.nrows(), moment.nrows());
    if rank > m {
        return Err(FactorError::Rank { what: "kv_lora_rank", rank, max: m });
    }
    let key_energy = trace_product(key_metric, &moment.slice(s![..keys, ..keys]).to_owned());
    let value_energy = trace_product(value_metric, &moment.slice(s![keys.., keys..]).to_owned());
    let key_scale = if key_energy > 0.0 && value_energy > 0.0 { key_weight * value_energy / key_energy } else { 1.0 };
    let (key_root, key_inverse) = sqrt_and_inverse(&(key_metric * key_scale), METRIC_FLOOR, "query metric")?;
    let (value_root, value_inverse) = sqrt_and_inverse(value_metric, METRIC_FLOOR, "output metric")?;
    // M^(1/2) C block by block: the metric is block-diagonal, the moment is not.
    let apply = |left: &Array2<f64>, right: &Array2<f64>, by: &Array2<f64>| -> Array2<f64> {
        let mut out = Array2::zeros(by.raw_dim());
        out.slice_mut(s![..keys, ..]).assign(&matmul(left, &by.slice(s![..keys, ..])));
        out.slice_mut(s![keys.., ..]).assign(&matmul(right, &by.slice(s![keys.., ..])));
        out
    };
    let half = apply(&key_root, &value_root, moment);
    let weighted = symmetrise(&apply(&key_root, &value_root, &half.t().to_owned()));
    let (spectrum, r) = eigh(&weighted, "weighted joint key/value moment")?;
    let top = r.slice(s![.., ..rank]).to_owned();
    // Directions without energy get a zero row instead of a division by nothing.
    let least = spectrum.first().copied().unwrap_or(0.0).max(0.0) * 1e-14;
    let sigma = Array1::from_shape_fn(rank, |i| if spectrum[i] > least { spectrum[i].sqrt() } else { 0.0 });
    let inverse = sigma.mapv(|s| if s > 0.0 { 1.0 / s } else { 0.0 });
    let down = apply(&key_root, &value_root, &top).reversed_axes().as_standard_layout().into_owned()
        * inverse.insert_axis(Axis(1));
    let up = apply(&key_inverse, &value_inverse, &top) * &sigma;
    Ok(JointLowRank { down, up, spectrum })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(rows: usize, cols: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, cols), |(i, j)| ((i * 41 + j * 23 + i * j * 5) % 89) as f64 / 44.0 - 1.0)
    }

    fn spd(n: usize) -> Array2<f64> {
        let a = data(3 * n, n);
        matmul(&a.t(), &a) + Array2::<f64>::eye(n)
    }

    #[test]
    fn full_rank_is_exact() {
        let c = spd(9);
        let f = joint_low_rank(&c, &spd(4), &spd(5), 1.5, 9).unwrap();
        let product = matmul(&f.up, &f.down);
        assert!((&product - &Array2::<f64>::eye(9)).iter().all(|x| x.abs() < 1e-9));
        assert!(f.loss() < 1e-12);
    }

    #[test]
    fn the_error_is_the_predicted_one_and_latents_are_white() {
        let z = data(200, 9);
        let c = matmul(&z.t(), &z) / 200.0;
        let (mk, mv) = (spd(4), spd(5));
        let f = joint_low_rank(&c, &mk, &mv, 1.0, 5).unwrap();
        let latents = matmul(&z, &f.down.t());
        let white = matmul(&latents.t(), &latents) / 200.0;
        assert!((&white - &Array2::<f64>::eye(5)).iter().all(|x| x.abs() < 1e-9));
        let ck = c.slice(s![..4, ..4]).to_owned();
        let cv = c.slice(s![4.., 4..]).to_owned();
        let scale = trace_product(&mv, &cv) / trace_product(&mk, &ck);
        let error = &z - &matmul(&latents, &f.up.t());
        let (ek, ev) = (error.slice(s![.., ..4]).to_owned(), error.slice(s![.., 4..]).to_owned());
        let measured =
            (trace_product(&(&mk * scale), &matmul(&ek.t(), &ek)) + trace_product(&mv, &matmul(&ev.t(), &ev))) / 200.0;
        let predicted: f64 = f.spectrum.iter().skip(5).sum();
        assert!((measured / predicted - 1.0).abs() < 1e-6, "{measured} {predicted}");
    }

    #[test]
    fn no_other_basis_does_better() {
        // Perturbing the optimum in any direction never lowers the error (first-order optimality, checked numerically).
        let z = data(300, 6);
        let c = matmul(&z.t(), &z) / 300.0;
        let (mk, mv) = (Array2::<f64>::eye(3), Array2::<f64>::eye(3));
        let f = joint_low_rank(&c, &mk, &mv, 1.0, 2).unwrap();
        let best: f64 = f.spectrum.iter().skip(2).sum();
        for k in 0..20 {
            let a = &f.down + &(data(20 + k, 6).slice(s![k..k + 2, ..]).to_owned() * 0.05);
            // Best up-projection for this latent: regression.
            let cross = matmul(&c, &a.t());
            let (up, _) = super::super::linalg::solve_right_spd(&matmul(&a, &cross), &cross, 0.0, "t").unwrap();
            let left = &c - &matmul(&up, &cross.t());
            let scale = trace_product(&mv, &c.slice(s![3.., 3..]).to_owned())
                / trace_product(&mk, &c.slice(s![..3, ..3]).to_owned());
            let error: f64 = left.diag().iter().enumerate().map(|(i, x)| if i < 3 { x * scale } else { *x }).sum();
            assert!(error >= best * (1.0 - 1e-9), "{error} {best}");
        }
    }

    #[test]
    fn a_rank_above_the_space_is_refused() {
        assert!(matches!(joint_low_rank(&spd(4), &spd(2), &spd(2), 1.0, 5), Err(FactorError::Rank { max: 4, .. })));
    }
}
