//! Which key components keep their rotation: complex principal components per frequency, and slots shared by all layers.
//!
//! Pair `j` of KV head `a` is the complex number `kappa = k_j + i k_{j + d/2}`; RoPE multiplies it by the same scalar in
//! every head, so any unitary mixing of heads at fixed `j` commutes with it (`docs/maths.md`, "RoPE slots and phases"). The
//! score of a pair is `Re(conj(q) kappa e^{-i theta D})` at distance `D`.

use faer::c64;
use ndarray::{Array1, Array2};

use super::FactorError;
use super::linalg::eigh_complex;

/// Query-weighted principal components of the keys of one layer, per frequency.
#[derive(Debug, Clone)]
pub struct PairComponents {
    /// `[d / 2, g]`, descending in `c`: second moment of component `c` of frequency `j`, in units of query-weighted key
    /// energy.
    pub energy: Array2<f64>,
    /// `[d / 2]` of unitary `[g, g]`: columns are components.
    pub basis: Vec<Array2<c64>>,
    /// `[d / 2, g]`: weight `w` of KV head `a` at frequency `j`.
    pub weight: Array2<f64>,
}

/// `S_j = diag(w) E[kappa kappa^H] diag(w) = U Lambda U^H`, `w_a^2 = sum of query energies of the heads that read a`.
///
/// `key_moment` is `E[k k^T]` `[g d, g d]`, half-split rows; `query_energy` is `E |q_{h,j}|^2` summed over the heads of
/// each KV head, `[g, d / 2]` (all ones for an unweighted analysis).
///
/// # Errors
/// [`FactorError`] of the eigenvalue problems.
pub fn pair_components(
    key_moment: &Array2<f64>,
    query_energy: &Array2<f64>,
    head_dim: usize,
) -> Result<PairComponents, FactorError> {
    let (g, half) = query_energy.dim();
    let mut energy = Array2::zeros((half, g));
    let mut weight = Array2::zeros((half, g));
    let mut basis = Vec::with_capacity(half);
    for j in 0..half {
        // A head with no query energy at this frequency still needs a weight that can be divided by.
        let total = query_energy.column(j).sum();
        let w =
            Array1::from_shape_fn(g, |a| if total > 0.0 { query_energy[[a, j]].max(total * 1e-9).sqrt() } else { 1.0 });
        let s = Array2::from_shape_fn((g, g), |(a, b)| {
            let (ar, ai, br, bi) =
                (a * head_dim + j, a * head_dim + j + half, b * head_dim + j, b * head_dim + j + half);
            let re = key_moment[[ar, br]] + key_moment[[ai, bi]];
            let im = key_moment[[ai, br]] - key_moment[[ar, bi]];
            c64::new(re, im) * w[a] * w[b]
        });
        let (values, u) = eigh_complex(&s, "query-weighted key moment")?;
        for c in 0..g {
            energy[[j, c]] = values[c].max(0.0);
            weight[[j, c]] = w[c];
        }
        basis.push(u);
    }
    Ok(PairComponents { energy, basis, weight })
}

/// What each component would lose without its rotation, `[d / 2, g]`: `Lambda_{j,c}` times the mean of
/// `1 - |alpha_{h,j}|^2` over query heads, weighted by their query energy.
///
/// `query_energy` is `E |q_{h,j}|^2` `[H, d / 2]`, `phases` the constants that would replace the rotation.
pub fn rotation_value(components: &PairComponents, query_energy: &Array2<f64>, phases: &Array2<c64>) -> Array2<f64> {
    let (half, g) = components.energy.dim();
    let (heads, n) = (query_energy.nrows(), query_energy.nrows() / g);
    Array2::from_shape_fn((half, g), |(j, c)| {
        let (mut lost, mut total) = (0.0, 0.0);
        for h in 0..heads {
            let a = h / n;
            // Share of this head's query that reads component c.
            let share =
                components.basis[j][[a, c]].norm_sqr() / components.weight[[j, a]].powi(2).max(f64::MIN_POSITIVE);
            let energy = share * query_energy[[h, j]];
            lost += energy * (1.0 - phases[[h, j]].norm_sqr()).max(0.0);
            total += energy;
        }
        if total > 0.0 { components.energy[[j, c]] * lost / total } else { 0.0 }
    })
}

/// How many slots each frequency gets, `[d / 2]`, summing to `slots`.
///
/// Every stock class has one list of frequencies for all layers, so the multiplicity of a frequency is shared: slots go,
/// one at a time, to the frequency whose next component is worth most over all layers. `values[l]` is layer `l`'s
/// [`rotation_value`]; only its best components count, in order. Ties go to the faster frequency.
pub fn share_slots(values: &[Array2<f64>], slots: usize) -> Vec<usize> {
    let (half, g) = values.first().map_or((0, 0), |v| v.dim());
    let mut total = Array2::<f64>::zeros((half, g));
    for v in values {
        for j in 0..half {
            let mut row: Vec<f64> = v.row(j).to_vec();
            row.sort_by(|a, b| b.total_cmp(a));
            for (c, x) in row.iter().enumerate() {
                total[[j, c]] += x;
            }
        }
    }
    let mut counts = vec![0; half];
    for _ in 0..slots.min(half * g) {
        let best = (0..half).filter(|&j| counts[j] < g).fold(None, |best: Option<usize>, j| match best {
            Some(b) if total[[b, counts[b]]] >= total[[j, counts[j]]] => Some(b),
            _ => Some(j),
        });
        if let Some(j) = best {
            counts[j] += 1;
        }
    }
    counts
}

/// One slot per frequency of the stock grid `theta^(-2p / d_R)`: every `(d / d_R)`-th source frequency.
///
/// Returns `None` when `d_R` does not divide `d`: the grid then has frequencies that the source does not have.
pub fn stock_grid(head_dim: usize, rope_dim: usize) -> Option<Vec<usize>> {
    if rope_dim == 0 || !rope_dim.is_multiple_of(2) || !head_dim.is_multiple_of(rope_dim) {
        return None;
    }
    let step = head_dim / rope_dim;
    Some((0..head_dim / 2).map(|j| usize::from(j % step == 0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_leave_every_score_unchanged() {
        // conj(q) kappa_a summed over components equals the source's, for any query head.
        let (g, d) = (3, 8);
        let half = d / 2;
        let z = Array2::from_shape_fn((40, g * d), |(i, j)| (((i * 29 + j * 13 + i * j) % 31) as f64 - 15.0) / 10.0);
        let moment = z.t().dot(&z);
        let energy = Array2::from_shape_fn((g, half), |(a, j)| 0.5 + ((a * 3 + j * 5) % 7) as f64);
        let p = pair_components(&moment, &energy, d).unwrap();
        let k = z.row(7);
        for j in 0..half {
            for a in 0..g {
                let q = c64::new(0.3 + j as f64, -0.8 * a as f64);
                let want = q.conj() * c64::new(k[a * d + j], k[a * d + j + half]);
                let mut got = c64::new(0.0, 0.0);
                for c in 0..g {
                    let u = &p.basis[j];
                    let q_c = u[[a, c]].conj() * q / p.weight[[j, a]];
                    let k_c: c64 = (0..g)
                        .map(|b| u[[b, c]].conj() * p.weight[[j, b]] * c64::new(k[b * d + j], k[b * d + j + half]))
                        .sum();
                    got += q_c.conj() * k_c;
                }
                assert!((got - want).norm() < 1e-12 * (1.0 + want.norm()), "{got} {want}");
            }
        }
    }

    #[test]
    fn complex_components_hold_at_least_the_real_ones_energy() {
        let (g, d) = (4, 4);
        let z = Array2::from_shape_fn((60, g * d), |(i, j)| ((i * j + 3 * i + j) as f64 * 0.61).sin());
        let moment = z.t().dot(&z);
        let p = pair_components(&moment, &Array2::ones((g, 2)), d).unwrap();
        for j in 0..2 {
            let real = Array2::from_shape_fn((g, g), |(a, b)| {
                moment[[a * d + j, b * d + j]] + moment[[a * d + j + 2, b * d + j + 2]]
            });
            let (values, _) = super::super::linalg::eigh(&real, "real").unwrap();
            assert!(p.energy[[j, 0]] >= values[0] * (1.0 - 1e-12));
        }
    }

    #[test]
    fn slots_go_where_they_are_worth_most() {
        let a = Array2::from_shape_vec((3, 2), vec![5.0, 4.0, 3.0, 0.0, 1.0, 0.5]).unwrap();
        assert_eq!(share_slots(std::slice::from_ref(&a), 3), vec![2, 1, 0]);
        let b = Array2::from_shape_vec((3, 2), vec![0.0, 0.0, 0.0, 0.0, 9.0, 8.0]).unwrap();
        assert_eq!(share_slots(&[a, b], 4), vec![2, 0, 2]);
        assert_eq!(stock_grid(8, 4), Some(vec![1, 0, 1, 0]));
        assert_eq!(stock_grid(8, 6), None);
    }
}
