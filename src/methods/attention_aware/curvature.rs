//! The preconditioner of the score refits (docs/maths.md, section 4).

use ndarray::{Array1, Array2, Axis, s};

use crate::factor::FactorError;
use crate::factor::linalg::{matmul, solve_right_spd};

/// Ridge of the preconditioner's two factors, as a share of their mean diagonal.
const PRECONDITIONER_RIDGE: f64 = 1e-3;

/// A moment matrix with its diagonal held above zero.
pub(super) fn regularised(mut m: Array2<f64>) -> Array2<f64> {
    let level = PRECONDITIONER_RIDGE * m.diag().mean().unwrap_or(0.0).max(f64::MIN_POSITIVE);
    m.diag_mut().mapv_inplace(|v| v + level);
    m
}

/// Mean of the two rows of each pair, for both, held above zero.
pub(super) fn pair_means(rows: &Array1<f64>) -> Array1<f64> {
    let level = PRECONDITIONER_RIDGE * rows.mean().unwrap_or(0.0).max(f64::MIN_POSITIVE);
    Array1::from_shape_fn(rows.len(), |i| (rows[i / 2 * 2] + rows[i / 2 * 2 + 1]) / 2.0 + level)
}

/// Curvature that uniform, independent queries and keys would have: `blkdiag(K_h) X C` for the rows of each head in
/// `X [H w, C]`, with `K_h` a full matrix where nothing turns and, since rotation mixes the two rows of a pair and hardly any
/// pair with another, one number per row where pairs turn.
pub(super) struct Curvature {
    /// `[n, n]` per head, none where only one shared rotated key is meant.
    pub nope: Vec<Array2<f64>>,
    /// `[r]` per head.
    pub rope: Vec<Array1<f64>>,
    /// `C`, moments of what the weight meets.
    pub moment: Array2<f64>,
}

impl Curvature {
    /// `blkdiag(K_h) X C`.
    pub fn apply(&self, x: &Array2<f64>) -> Array2<f64> {
        let mut out = matmul(x, &self.moment);
        for (h, mut rows) in out.axis_chunks_iter_mut(Axis(0), self.width()).enumerate() {
            let n = self.nope.get(h).map_or(0, Array2::nrows);
            if let Some(k) = self.nope.get(h) {
                let product = matmul(k, &rows.slice(s![..n, ..]));
                rows.slice_mut(s![..n, ..]).assign(&product);
            }
            let mut turned = rows.slice_mut(s![n.., ..]);
            turned *= &self.rope[h].view().insert_axis(Axis(1));
        }
        out
    }

    /// `blkdiag(K_h)^-1 R C^-1`.
    pub fn divide(&self, r: &Array2<f64>) -> Result<Array2<f64>, FactorError> {
        let (mut out, _) = solve_right_spd(&self.moment, r, 0.0, "moments of the layer's input")?;
        for (h, mut rows) in out.axis_chunks_iter_mut(Axis(0), self.width()).enumerate() {
            let n = self.nope.get(h).map_or(0, Array2::nrows);
            if let Some(k) = self.nope.get(h) {
                let right = rows.slice(s![..n, ..]).t().to_owned();
                let (left, _) = solve_right_spd(k, &right, 0.0, "moments of queries and keys")?;
                rows.slice_mut(s![..n, ..]).assign(&left.t());
            }
            let mut turned = rows.slice_mut(s![n.., ..]);
            turned /= &self.rope[h].view().insert_axis(Axis(1));
        }
        Ok(out)
    }

    /// `w`.
    fn width(&self) -> usize {
        (self.nope.first().map_or(0, Array2::nrows) + self.rope.first().map_or(0, Array1::len)).max(1)
    }
}
