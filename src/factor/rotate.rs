//! TransMLA's RoRoPE with FreqFold and collapse (arXiv 2502.07864, section 4; `docs/maths.md`, "TransMLA"): one real rotation
//! per block of neighbouring frequencies, acting across KV heads, that gathers key energy in the first pseudo-head.

use ndarray::Array2;

use super::FactorError;
use super::linalg::eigh;

/// Orthogonal change of key coordinates, `k = basis k'`.
pub struct RoRope {
    /// `[g d, g d]`. Rows of `k'` come in DeepSeek order: its first `d / collapse` rows are the rotated key, pair `p` at rows
    /// `(2p, 2p + 1)` with the angle of source pair `p * collapse`; the other rows lose their rotation.
    pub basis: Array2<f64>,
    /// Source pair whose frequency each rotated slot takes, `[d / collapse / 2]`.
    pub slot_pair: Vec<usize>,
}

/// Widths that FreqFold and collapse admit for a head size `d`: `collapse` divides `fold`, `2 fold` divides `d`.
pub fn is_valid_fold(head_dim: usize, collapse: usize, fold: usize) -> bool {
    collapse > 0 && fold > 0 && fold.is_multiple_of(collapse) && head_dim.is_multiple_of(2 * fold)
}

/// PCA across heads and folded frequencies of the key moment `[g d, g d]` (uncentred, half-split rows).
///
/// # Errors
/// [`FactorError`] of the eigenvalue problem.
///
/// # Panics
/// If [`is_valid_fold`] does not hold.
pub fn rorope(
    key_moment: &Array2<f64>,
    kv_heads: usize,
    head_dim: usize,
    collapse: usize,
    fold: usize,
) -> Result<RoRope, FactorError> {
    assert!(is_valid_fold(head_dim, collapse, fold));
    let (g, d, c) = (kv_heads, head_dim, collapse);
    let (half, per_slot, blocks) = (d / 2, fold / c, d / (2 * fold));
    let n = g * fold;
    let mut basis = Array2::zeros((g * d, g * d));
    for block in 0..blocks {
        // Pseudo-head a' = (s g + a) (F/c) + m holds frequency j = block F + m c + s of head a.
        let rows: Vec<usize> = (0..n)
            .map(|i| {
                let (m, a, s) = (i % per_slot, (i / per_slot) % g, i / per_slot / g);
                a * d + block * fold + m * c + s
            })
            .collect();
        let mut moment = Array2::from_shape_fn((n, n), |(i, j)| {
            key_moment[[rows[i], rows[j]]] + key_moment[[rows[i] + half, rows[j] + half]]
        });
        let damping = 0.01 * moment.diag().mean().unwrap_or(0.0);
        moment.diag_mut().mapv_inplace(|x| x + damping);
        let (_, u) = eigh(&moment, "rotated key moment")?;
        for (out, column) in u.columns().into_iter().enumerate() {
            let (m, head) = (out % per_slot, out / per_slot);
            for part in 0..2 {
                let to = ((head * blocks + block) * per_slot + m) * 2 + part;
                for (i, &row) in rows.iter().enumerate() {
                    basis[[row + part * half, to]] = column[i];
                }
            }
        }
    }
    Ok(RoRope { basis, slot_pair: (0..half / c).map(|p| p * c).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(n: usize) -> Array2<f64> {
        let a = Array2::from_shape_fn((2 * n, n), |(i, j)| ((i * 31 + j * 17 + i * j) % 23) as f64 / 11.0 - 1.0);
        a.t().dot(&a)
    }

    #[test]
    fn the_basis_is_orthogonal_for_every_fold() {
        for (g, d, c, f) in [(3, 8, 1, 1), (3, 8, 1, 2), (2, 16, 2, 4), (4, 8, 2, 2), (1, 8, 1, 4)] {
            let r = rorope(&moment(g * d), g, d, c, f).unwrap();
            let eye = r.basis.t().dot(&r.basis);
            assert!((&eye - &Array2::<f64>::eye(g * d)).iter().all(|x| x.abs() < 1e-12), "{g} {d} {c} {f}");
            assert_eq!(r.slot_pair.len(), d / c / 2);
        }
    }

    #[test]
    fn without_folding_rope_commutes_with_the_rotation() {
        // A pair rotated by theta_j in every head is rotated by theta_j in every pseudo-head.
        let (g, d) = (3, 8);
        let r = rorope(&moment(g * d), g, d, 1, 1).unwrap();
        let half = d / 2;
        let theta = |j: usize| 0.3 + 0.7 * j as f64;
        let k = Array2::from_shape_fn((g * d, 1), |(i, _)| ((i * i) as f64 * 0.37).sin());
        let mut rotated = k.clone();
        for a in 0..g {
            for j in 0..half {
                let (re, im) = (k[[a * d + j, 0]], k[[a * d + j + half, 0]]);
                let (s, c) = theta(j).sin_cos();
                rotated[[a * d + j, 0]] = re * c - im * s;
                rotated[[a * d + j + half, 0]] = im * c + re * s;
            }
        }
        let (k1, t1) = (r.basis.t().dot(&k), r.basis.t().dot(&rotated));
        for p in 0..g * half {
            let (s, c) = theta(p % half).sin_cos();
            let (re, im) = (k1[[2 * p, 0]], k1[[2 * p + 1, 0]]);
            assert!((t1[[2 * p, 0]] - (re * c - im * s)).abs() < 1e-12);
            assert!((t1[[2 * p + 1, 0]] - (im * c + re * s)).abs() < 1e-12);
        }
    }
}
