//! How a converted layer's scores differ from its source's on calibration tokens, and which way to move its queries and
//! keys.
//!
//! With `t_mn` the source's score of key `n` for query `m`, `p_mn` its probability and `s_mn = scale <q_m, k_n>` the
//! converted score, the error of a head is a weighted variance per query row, since softmax ignores a constant of a row:
//!
//! ```text
//! J = sum_m sum_{n <= m} w_mn (e_mn - ebar_m)^2,   e = s - t,   ebar_m = sum_n w_mn e_mn
//! w_mn = (1 - u) p_mn + u / (m + 1)
//! ```
//!
//! With `u = 0` this is twice the second-order term of `KL(p || softmax(s))`. The share `u` of uniform weight keeps keys
//! down that get no attention, which that term alone does not see.

use ndarray::{Array2, ArrayView1, Axis, s};

use super::attend::side_by_side;
use crate::factor::linalg::{matmul_f32_sequential, symmetrise};
use crate::runtime::{ProbabilityTile, Qkv, Span};

/// Share `u` of uniform weight (measured flat between 0.1 and 0.6, docs/methods.md).
const UNIFORM: f32 = 0.3;

/// The factor that a gradient is taken at: the other one of `<q, k>`.
#[derive(Debug, Clone, Copy)]
pub enum At<'a> {
    /// Keys `[T, H w]`: the gradient is that of the queries.
    Keys(&'a Array2<f32>),
    /// Queries `[T, H w]`: the gradient is that of the keys.
    Queries(&'a Array2<f32>),
}

/// Half the gradient of `J`, and `J` itself, for all heads.
#[derive(Debug, Clone)]
pub struct ScoreGradient {
    /// `[T, H w]`: per token of queries `scale sum_n w_mn (e_mn - ebar_m) k_n`, of keys `scale sum_m ... q_m`.
    pub rows: Array2<f32>,
    /// `J` summed over heads and queries.
    pub error: f64,
}

/// Scores of a source layer on calibration tokens, to be approached.
#[derive(Debug)]
pub struct ScoreTarget<'a> {
    source: &'a Qkv,
    windows: &'a [usize],
    scale: f32,
}

impl<'a> ScoreTarget<'a> {
    /// `source` on `windows` that lie under each other; `scale` is the converted layer's.
    pub fn new(source: &'a Qkv, windows: &'a [usize], scale: f64) -> Self {
        Self { source, windows, scale: scale as f32 }
    }

    /// Error and gradient of converted scores `scale <q, k>`; `q`, `k` `[T, H w]` after rotation.
    pub fn residual(&self, q: &Array2<f32>, k: &Array2<f32>, at: At<'_>) -> ScoreGradient {
        self.pass(q, k, at, true)
    }

    /// The same for a change of scores `scale <q, k>` alone, `t` left out: with one of the two a direction this is the
    /// quadratic form of `J` along it.
    pub fn curvature(&self, q: &Array2<f32>, k: &Array2<f32>, at: At<'_>) -> ScoreGradient {
        self.pass(q, k, at, false)
    }

    /// What `J` sees of keys `k` `[T, H w]`, per head: `sum_m sum_n w_mn (k_n - kbar_m)(k_n - kbar_m)^T`, `[w, w]`, with
    /// `kbar_m = sum_n w_mn k_n`. Times `scale^2` it is the curvature of `J` if queries were white.
    pub fn key_covariances(&self, k: &Array2<f32>) -> Vec<Array2<f64>> {
        let heads = self.source.heads;
        let width = k.ncols() / heads;
        let parts = self.source.fold_probabilities(
            self.windows,
            |window, _| (vec![0.0_f32; self.windows[window]], Array2::<f32>::zeros((width, width))),
            |(received, pooled), tile| {
                let mut w = tile.probabilities.to_owned();
                for (i, mut row) in w.rows_mut().into_iter().enumerate() {
                    let seen = tile.row0 + i + 1;
                    for (w, r) in row.iter_mut().zip(received.iter_mut()).take(seen) {
                        *w = weight(*w, seen);
                        *r += *w;
                    }
                }
                let columns = tile.head * width..(tile.head + 1) * width;
                let keys = k.slice(s![tile.window_start..tile.window_start + w.ncols(), columns]);
                let mean = matmul_f32_sequential(w.view(), keys);
                *pooled += &matmul_f32_sequential(mean.t(), mean.view());
            },
        );
        let mut out = vec![Array2::<f64>::zeros((width, width)); heads];
        for (window, span) in Span::of_windows(self.windows).into_iter().enumerate() {
            for (head, out) in out.iter_mut().enumerate() {
                let (received, pooled) = &parts[window * heads + head];
                let keys = k.slice(s![span.keys.clone(), head * width..(head + 1) * width]);
                let weighted = &keys * &ArrayView1::from(received).insert_axis(Axis(1));
                let moment = matmul_f32_sequential(weighted.t(), keys) - pooled;
                *out += &moment.mapv(f64::from);
            }
        }
        out.iter().map(symmetrise).collect()
    }

    fn pass(&self, q: &Array2<f32>, k: &Array2<f32>, at: At<'_>, residual: bool) -> ScoreGradient {
        let heads = self.source.heads;
        let width = q.ncols() / heads;
        let parts = self.source.fold_probabilities(
            self.windows,
            |window, _| (Array2::<f32>::zeros((self.windows[window], width)), 0.0_f64),
            |(rows, error), tile| {
                let columns = tile.head * width..(tile.head + 1) * width;
                let first = tile.window_start;
                let (from, to) = (first + tile.row0, first + tile.probabilities.ncols());
                let (queries, keys) = (s![from..to, columns.clone()], s![first..to, columns]);
                let mut e = matmul_f32_sequential(q.slice(queries), k.slice(keys).t());
                e *= self.scale;
                if residual {
                    e -= &self.source_scores(&tile);
                }
                *error += weigh(&mut e, &tile);
                e *= self.scale;
                match at {
                    At::Keys(k) => {
                        let part = matmul_f32_sequential(e.view(), k.slice(keys));
                        rows.slice_mut(s![tile.row0.., ..]).slice_mut(s![..part.nrows(), ..]).assign(&part);
                    }
                    At::Queries(q) => {
                        let part = matmul_f32_sequential(e.t(), q.slice(queries));
                        let mut seen = rows.slice_mut(s![..part.nrows(), ..]);
                        seen += &part;
                    }
                }
            },
        );
        let rows = side_by_side(parts.iter().map(|(rows, _)| rows), self.windows, heads, width);
        ScoreGradient { rows, error: parts.iter().map(|(_, error)| error).sum() }
    }

    fn source_scores(&self, tile: &ProbabilityTile<'_>) -> Array2<f32> {
        let (rows, keys) = tile.probabilities.dim();
        let d = self.source.qk_dim;
        let (first, kv) = (tile.window_start, self.source.kv_head(tile.head));
        let q =
            self.source.q.slice(s![first + tile.row0..first + tile.row0 + rows, self.source.query_columns(tile.head)]);
        let k = self.source.k.slice(s![first..first + keys, kv * d..(kv + 1) * d]);
        matmul_f32_sequential(q, k.t()) * self.source.scale as f32
    }
}

/// `w_mn` of a query that sees `seen` keys.
fn weight(p: f32, seen: usize) -> f32 {
    (1.0 - UNIFORM) * p + UNIFORM / seen as f32
}

/// `e` to `w (e - ebar)` in place, zero where a query does not see; returns the tile's share of `J`.
fn weigh(e: &mut Array2<f32>, tile: &ProbabilityTile<'_>) -> f64 {
    let mut total = 0.0;
    for (i, (mut e, p)) in e.rows_mut().into_iter().zip(tile.probabilities.rows()).enumerate() {
        let seen = tile.row0 + i + 1;
        let mean: f32 = e.iter().zip(p).take(seen).map(|(e, p)| weight(*p, seen) * e).sum();
        let mut error = 0.0_f32;
        for (n, (e, p)) in e.iter_mut().zip(p).enumerate() {
            let distance = *e - mean;
            *e = if n < seen { weight(*p, seen) * distance } else { 0.0 };
            error += *e * distance;
        }
        total += f64::from(error);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(rows: usize, columns: usize, seed: f32) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 5 + j * 11 + i * j) as f32 * 0.29 + seed).sin())
    }

    fn source() -> Qkv {
        Qkv {
            q: data(14, 8, 0.3),
            k: data(14, 4, 0.7),
            v: Array2::zeros((14, 4)),
            heads: 2,
            kv_heads: 1,
            qk_dim: 4,
            v_dim: 4,
            scale: 0.5,
            sliding_window: None,
            score_softcap: None,
        }
    }

    #[test]
    fn the_sources_own_scores_have_no_error_whatever_constant_a_row_gets() {
        let source = source();
        let target = ScoreTarget::new(&source, &[9, 5], 0.5);
        let k = ndarray::concatenate![ndarray::Axis(1), source.k, source.k];
        let found = target.residual(&source.q, &k, At::Keys(&k));
        // Rounding of sums of at most 14 scores of size 2 in f32.
        assert!(found.error.abs() < 1e-8 && found.rows.iter().all(|g| g.abs() < 1e-5), "{}", found.error);
        // The same vector added to every key moves all scores of a row alike.
        let moved = target.residual(&source.q, &(&k + 0.7), At::Keys(&k));
        assert!(moved.error.abs() < 1e-8, "{}", moved.error);
    }

    #[test]
    fn gradients_are_those_of_the_error() {
        let source = source();
        let target = ScoreTarget::new(&source, &[9, 5], 0.4);
        let (q, k) = (data(14, 6, 1.1), data(14, 6, 2.3));
        let (dq, dk) = (data(14, 6, 3.1), data(14, 6, 4.2));
        let by_query = target.residual(&q, &k, At::Keys(&k));
        let by_key = target.residual(&q, &k, At::Queries(&q));
        // J is quadratic in q and in k: J(x + d) = J(x) + 2 <g, d> + curvature(d), exactly.
        let dot = |a: &Array2<f32>, b: &Array2<f32>| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let moved = target.residual(&(&q + &dq), &k, At::Keys(&k)).error;
        let predicted = by_query.error + 2.0 * dot(&by_query.rows, &dq) + target.curvature(&dq, &k, At::Keys(&k)).error;
        assert!((moved / predicted - 1.0).abs() < 1e-4, "{moved} {predicted}");
        let moved = target.residual(&q, &(&k + &dk), At::Queries(&q)).error;
        let predicted = by_key.error + 2.0 * dot(&by_key.rows, &dk) + target.curvature(&q, &dk, At::Queries(&q)).error;
        assert!((moved / predicted - 1.0).abs() < 1e-4, "{moved} {predicted}");
    }

    #[test]
    fn key_covariances_are_the_curvature_along_a_common_query() {
        let source = source();
        let target = ScoreTarget::new(&source, &[9, 5], 0.4);
        let k = data(14, 6, 2.3);
        let covariances = target.key_covariances(&k);
        for (head, covariance) in covariances.iter().enumerate() {
            // The same query u in every row of one head: J = scale^2 u^T K u.
            let u = [0.8, -0.3, 1.1];
            let mut q = Array2::zeros((14, 6));
            for mut row in q.rows_mut() {
                for (i, u) in u.iter().enumerate() {
                    row[head * 3 + i] = *u as f32;
                }
            }
            let u = ndarray::arr1(&u);
            let want = 0.4 * 0.4 * u.dot(&covariance.dot(&u));
            let got = target.curvature(&q, &k, At::Keys(&k)).error;
            assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
        }
    }
}
