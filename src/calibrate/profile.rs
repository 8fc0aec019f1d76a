//! How far back each head looks: attention mass by distance, and the phases that follow.

use faer::c64;
use ndarray::{Array2, ArrayView2, s};

/// Mean attention mass of each query head at each distance, `[H, max distance]`.
#[derive(Debug, Clone)]
pub struct DistanceProfile {
    mass: Array2<f64>,
}

impl DistanceProfile {
    /// No attention seen yet.
    pub fn new(heads: usize, max_distance: usize) -> Self {
        Self { mass: Array2::zeros((heads, max_distance)) }
    }

    /// Add rows of one head's probabilities: `probs[i, n]` is the weight of key `n` for the query at position
    /// `first_row + i`.
    ///
    /// # Panics
    /// If a query has a later position than the profile has distances, or fewer keys than its position.
    pub fn add(&mut self, head: usize, first_row: usize, probs: ArrayView2<'_, f32>) {
        let mut mass = self.mass.row_mut(head);
        for (i, row) in probs.rows().into_iter().enumerate() {
            let m = first_row + i;
            // Key `n` is at distance `m - n`.
            let (slots, row) = (mass.slice_mut(s![..=m; -1]), row.slice(s![..=m]));
            ndarray::Zip::from(slots).and(row).for_each(|slot, p| *slot += f64::from(*p));
        }
    }

    /// Add a one-head profile to head `head`.
    pub fn add_head(&mut self, head: usize, other: &Self) {
        let mut mass = self.mass.row_mut(head);
        mass += &other.mass.row(0);
    }

    /// `alpha[h, j] = sum_D P_h(D) exp(-i theta_j D)`, `[H, d / 2]`: the best constant in place of the rotation of a pair
    /// of head `h` that loses its RoPE. `|alpha| <= 1`; 1 where the pair never turns within the head's reach.
    pub fn phases(&self, inv_freq: &[f64]) -> Array2<c64> {
        let heads = self.mass.nrows();
        let mut out = Array2::from_elem((heads, inv_freq.len()), c64::new(1.0, 0.0));
        for h in 0..heads {
            let row = self.mass.row(h);
            let total: f64 = row.sum();
            if total <= 0.0 {
                continue;
            }
            for (j, theta) in inv_freq.iter().enumerate() {
                let sum: c64 =
                    row.iter().enumerate().map(|(distance, p)| c64::cis(-theta * distance as f64) * *p).sum();
                out[[h, j]] = sum / total;
            }
        }
        out
    }
}
