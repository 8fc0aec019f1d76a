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

use std::ops::Range;

use faer::Accum;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::calibrate::by_window_and_head;
use crate::factor::linalg::{gemm, matmul_f32_sequential, symmetrise};
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
    /// `J` summed over queries, `[H]`.
    pub errors: Array1<f64>,
}

impl ScoreGradient {
    /// `J` of all heads together.
    pub fn error(&self) -> f64 {
        self.errors.sum()
    }
}

/// Scores of a source layer on calibration tokens, to be approached.
#[derive(Debug)]
pub struct ScoreTarget<'a> {
    source: &'a Qkv,
    windows: &'a [usize],
    scale: f32,
    /// Queries of a window that are sampled, about.
    of_queries: usize,
}

impl<'a> ScoreTarget<'a> {
    /// `source` on `windows` that lie under each other; `scale` is the converted layer's.
    pub fn new(source: &'a Qkv, windows: &'a [usize], scale: f64) -> Self {
        Self { source, windows, scale: scale as f32, of_queries: usize::MAX }
    }

    /// Look at about `count` queries of each window at most, evenly spread: sums over queries are over those. Where a window is
    /// long its queries are much alike, and each costs a product with many keys.
    pub fn of_queries(self, count: usize) -> Self {
        Self { of_queries: count, ..self }
    }

    /// Error and gradient of converted scores `scale <q, k>`; `q`, `k` `[T, H w]` after rotation.
    pub fn residual(&self, q: &Array2<f32>, k: &Array2<f32>, at: At<'_>) -> ScoreGradient {
        self.gradient(q, k, at, true)
    }

    /// The same for a change of scores `scale <q, k>` alone, `t` left out: with one of the two a direction this is the
    /// quadratic form of `J` along it.
    pub fn curvature(&self, q: &Array2<f32>, k: &Array2<f32>, at: At<'_>) -> ScoreGradient {
        self.gradient(q, k, at, false)
    }

    /// `J` alone of such a change, per head, `[H]`.
    pub fn curvatures(&self, q: &Array2<f32>, k: &Array2<f32>) -> Array1<f64> {
        let states = vec![0.0_f64; self.windows.len() * self.source.heads];
        let parts = self.fold(states, |error, mut tile| {
            *error += self.weigh(q, k, &mut tile, false);
        });
        self.by_head(parts.into_iter())
    }

    /// [`ScoreTarget::residual`] at keys, and what `J` sees of them, per head:
    /// `sum_m sum_n w_mn (k_n - kbar_m)(k_n - kbar_m)^T`, `[w, w]`, with `kbar_m = sum_n w_mn k_n`. Times `scale^2` that is
    /// the curvature of `J` if queries were white.
    pub fn residual_with_key_covariances(&self, q: &Array2<f32>, k: &Array2<f32>) -> (ScoreGradient, Vec<Array2<f64>>) {
        let heads = self.source.heads;
        let width = k.ncols() / heads;
        let mut rows = Array2::zeros(q.raw_dim());
        let lengths = self.windows.iter().flat_map(|&length| std::iter::repeat_n(length, heads));
        let states = self.gradients(&mut rows).into_iter().zip(lengths);
        let states = states.map(|(gradient, length)| (gradient, KeyMoments::new(length, width))).collect();
        let parts = self.fold(states, |(gradient, moments), mut tile| {
            self.add(gradient, &mut tile, (q, k), At::Keys(k), true);
            moments.add(&mut tile, k);
        });
        let covariance = |head: usize| {
            let mut out = Array2::<f64>::zeros((width, width));
            for (window, span) in Span::of_windows(self.windows).into_iter().enumerate() {
                let keys = k.slice(s![span.keys, head * width..(head + 1) * width]);
                out += &parts[window * heads + head].1.covariance(keys);
            }
            symmetrise(&out)
        };
        let covariances = (0..heads).into_par_iter().map(covariance).collect();
        let errors = self.by_head(parts.iter().map(|(gradient, _)| gradient.error));
        drop(parts);
        (ScoreGradient { rows, errors }, covariances)
    }

    fn gradient(&self, q: &Array2<f32>, k: &Array2<f32>, at: At<'_>, residual: bool) -> ScoreGradient {
        let mut rows = Array2::zeros(q.raw_dim());
        let states = self.gradients(&mut rows);
        let parts = self.fold(states, |gradient, mut tile| {
            self.add(gradient, &mut tile, (q, k), at, residual);
        });
        let errors = self.by_head(parts.iter().map(|part| part.error));
        drop(parts);
        ScoreGradient { rows, errors }
    }

    /// [`Qkv::fold_some_probabilities`] of what is sampled.
    fn fold<A: Send>(&self, states: Vec<A>, fold: impl Fn(&mut A, ProbabilityTile<'_>) + Sync) -> Vec<A> {
        self.source.fold_some_probabilities(self.windows, self.of_queries, states, fold)
    }

    /// Accumulators that add up to `rows` `[T, H w]`, which are zero.
    fn gradients<'r>(&self, rows: &'r mut Array2<f32>) -> Vec<Gradient<'r>> {
        let places = by_window_and_head(rows, self.windows, self.source.heads);
        places.into_iter().map(|rows| Gradient { rows, error: 0.0 }).collect()
    }

    /// Add a tile to the gradient of its window and head.
    fn add(
        &self,
        gradient: &mut Gradient<'_>,
        tile: &mut ProbabilityTile<'_>,
        (q, k): (&Array2<f32>, &Array2<f32>),
        at: At<'_>,
        residual: bool,
    ) {
        let Gradient { rows, error } = gradient;
        *error += self.weigh(q, k, tile, residual);
        let e = tile.scratch.view();
        let (queries, keys) = places(tile, rows.ncols());
        match at {
            At::Keys(k) => {
                let part = rows.slice_mut(s![tile.row0..tile.row0 + e.nrows(), ..]);
                gemm(part, Accum::Replace, e, k.slice(s![keys.0, keys.1]), self.scale);
            }
            At::Queries(q) => {
                let seen = rows.slice_mut(s![..e.ncols(), ..]);
                gemm(seen, Accum::Add, e.t(), q.slice(s![queries.0, queries.1]), self.scale);
            }
        }
    }

    /// Puts `w (e - ebar)` of a tile into its scratch, and returns its share of `J`.
    fn weigh(&self, q: &Array2<f32>, k: &Array2<f32>, tile: &mut ProbabilityTile<'_>, residual: bool) -> f64 {
        let (queries, keys) = places(tile, q.ncols() / self.source.heads);
        let (q, k) = (q.slice(s![queries.0, queries.1]), k.slice(s![keys.0, keys.1]));
        gemm(tile.scratch.view_mut(), Accum::Replace, q, k.t(), self.scale);
        if residual {
            let (q, k) = self.source_factors(tile);
            gemm(tile.scratch.view_mut(), Accum::Add, q, k.t(), -self.source.scale as f32);
        }
        weigh(tile)
    }

    /// Sums over windows, in order, of what [`ScoreTarget::fold`] gave.
    fn by_head(&self, parts: impl Iterator<Item = f64>) -> Array1<f64> {
        let heads = self.source.heads;
        let mut out = Array1::zeros(heads);
        parts.enumerate().for_each(|(i, part)| out[i % heads] += part);
        out
    }

    /// The source's queries and keys of a tile, `[rows, d]` and `[keys, d]`.
    fn source_factors(&self, tile: &ProbabilityTile<'_>) -> (ArrayView2<'_, f32>, ArrayView2<'_, f32>) {
        let (source, kv) = (self.source, self.source.kv_head(tile.head));
        let (queries, keys) = places(tile, source.qk_dim);
        let columns = kv * source.qk_dim..(kv + 1) * source.qk_dim;
        (source.q.slice(s![queries.0, queries.1]), source.k.slice(s![keys.0, columns]))
    }
}

/// Half the gradient of one head in one window, `[length, w]`, and its share of `J`.
struct Gradient<'a> {
    rows: ArrayViewMut2<'a, f32>,
    error: f64,
}

/// What one head's weights make of the keys of one window.
struct KeyMoments {
    /// `sum_m w_mn`, `[length]`.
    received: Array1<f32>,
    /// `sum_m kbar_m kbar_m^T`, `[w, w]`.
    pooled: Array2<f32>,
}

impl KeyMoments {
    fn new(length: usize, width: usize) -> Self {
        Self { received: Array1::zeros(length), pooled: Array2::zeros((width, width)) }
    }

    fn add(&mut self, tile: &mut ProbabilityTile<'_>, k: &Array2<f32>) {
        for (i, (mut w, p)) in tile.scratch.rows_mut().into_iter().zip(tile.probabilities.rows()).enumerate() {
            let seen = tile.row0 + i + 1;
            let (share, uniform) = weights(seen);
            let (mut w, hidden) = w.view_mut().split_at(Axis(0), seen);
            let received = self.received.slice_mut(s![..seen]);
            ndarray::Zip::from(&mut w).and(p.slice(s![..seen])).and(received).for_each(|w, p, r| {
                *w = share * *p + uniform;
                *r += *w;
            });
            { hidden }.fill(0.0);
        }
        let keys = k.slice({
            let (rows, columns) = places(tile, self.pooled.ncols()).1;
            s![rows, columns]
        });
        let mean = matmul_f32_sequential(tile.scratch.view(), keys);
        gemm(self.pooled.view_mut(), Accum::Add, mean.t(), mean.view(), 1.0);
    }

    /// `sum_n received_n k_n k_n^T - pooled` for the window's keys `[length, w]`.
    fn covariance(&self, keys: ArrayView2<'_, f32>) -> Array2<f64> {
        let weighted = &keys * &self.received.view().insert_axis(Axis(1));
        (matmul_f32_sequential(weighted.t(), keys) - &self.pooled).mapv(f64::from)
    }
}

/// Rows and columns of a region of `[T, H w]`.
type Place = (Range<usize>, Range<usize>);

/// Where the queries and the keys of a tile are.
fn places(tile: &ProbabilityTile<'_>, width: usize) -> (Place, Place) {
    let columns = tile.head * width..(tile.head + 1) * width;
    let first = tile.window_start;
    let to = first + tile.probabilities.ncols();
    ((first + tile.row0..to, columns.clone()), (first..to, columns))
}

/// Factor of `p_mn` and constant of `w_mn`, for a query that sees `seen` keys.
fn weights(seen: usize) -> (f32, f32) {
    (1.0 - UNIFORM, UNIFORM / seen as f32)
}

/// `e` in a tile's scratch to `w (e - ebar)`, zero where a query does not see; returns the tile's share of `J`.
fn weigh(tile: &mut ProbabilityTile<'_>) -> f64 {
    let mut total = 0.0;
    for (i, (mut e, p)) in tile.scratch.rows_mut().into_iter().zip(tile.probabilities.rows()).enumerate() {
        let seen = tile.row0 + i + 1;
        if let (Some(e), Some(p)) = (e.as_slice_mut(), p.as_slice()) {
            e[seen..].fill(0.0);
            total += f64::from(Arch::new().dispatch(Weigh { e: &mut e[..seen], p: &p[..seen] }));
        }
    }
    total
}

/// One query's row of [`weigh`]; a type, since a closure would not be compiled for the wider vectors.
struct Weigh<'a> {
    e: &'a mut [f32],
    p: &'a [f32],
}

impl WithSimd for Weigh<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        let (share, uniform) = weights(self.e.len());
        let weight = |p: f32| share * p + uniform;
        let mean = sum(self.e, self.p, |e, p| weight(p) * e);
        for e in self.e.iter_mut() {
            *e -= mean;
        }
        let error = sum(self.e, self.p, |e, p| weight(p) * e * e);
        for (e, p) in self.e.iter_mut().zip(self.p) {
            *e *= weight(*p);
        }
        error
    }
}

/// `sum f(e_i, p_i)` in sixteen sums side by side.
#[inline(always)]
fn sum(e: &[f32], p: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0_f32; LANES];
    let (es, ps) = (e.chunks_exact(LANES), p.chunks_exact(LANES));
    let rest: f32 = es.remainder().iter().zip(ps.remainder()).map(|(e, p)| f(*e, *p)).sum();
    for (e, p) in es.zip(ps) {
        for ((sum, e), p) in sums.iter_mut().zip(e).zip(p) {
            *sum += f(*e, *p);
        }
    }
    sums.iter().sum::<f32>() + rest
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
        assert!(found.error().abs() < 1e-8 && found.rows.iter().all(|g| g.abs() < 1e-5), "{}", found.error());
        // The same vector added to every key moves all scores of a row alike.
        let moved = target.residual(&source.q, &(&k + 0.7), At::Keys(&k));
        assert!(moved.error().abs() < 1e-8, "{}", moved.error());
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
        let moved = target.residual(&(&q + &dq), &k, At::Keys(&k)).error();
        let predicted =
            by_query.error() + 2.0 * dot(&by_query.rows, &dq) + target.curvature(&dq, &k, At::Keys(&k)).error();
        assert!((moved / predicted - 1.0).abs() < 1e-4, "{moved} {predicted}");
        let alone = target.curvatures(&dq, &k);
        assert_eq!(alone, target.curvature(&dq, &k, At::Keys(&k)).errors);
        let moved = target.residual(&q, &(&k + &dk), At::Queries(&q)).error();
        let predicted =
            by_key.error() + 2.0 * dot(&by_key.rows, &dk) + target.curvature(&q, &dk, At::Queries(&q)).error();
        assert!((moved / predicted - 1.0).abs() < 1e-4, "{moved} {predicted}");
    }

    #[test]
    fn of_a_long_window_some_queries_are_looked_at() {
        // Tiles have 64 queries here; one of four, the last, is asked for.
        let (rows, seen) = (250, 192..250);
        let source = Qkv { q: data(rows, 8, 0.3), k: data(rows, 4, 0.7), v: Array2::zeros((rows, 4)), ..source() };
        let target = ScoreTarget::new(&source, &[250], 0.4).of_queries(64);
        let (q, k, mut dq) = (data(rows, 6, 1.1), data(rows, 6, 2.3), data(rows, 6, 3.1));
        let before = target.residual(&q, &k, At::Keys(&k));
        for (row, gradient) in before.rows.rows().into_iter().enumerate() {
            assert_eq!(seen.contains(&row), gradient.iter().any(|g| *g != 0.0), "{row}");
        }
        // Queries that are not sampled may be what they like.
        dq.slice_mut(s![seen.clone(), ..]).fill(0.0);
        assert_eq!(target.residual(&(&q + &dq), &k, At::Keys(&k)).errors, before.errors);
        let all = ScoreTarget::new(&source, &[250], 0.4).residual(&q, &k, At::Keys(&k));
        assert_eq!(all.rows.slice(s![seen.clone(), ..]), before.rows.slice(s![seen, ..]));
        assert!(before.error() < all.error());
    }

    #[test]
    fn key_covariances_are_the_curvature_along_a_common_query() {
        let source = source();
        let target = ScoreTarget::new(&source, &[9, 5], 0.4);
        let k = data(14, 6, 2.3);
        let (gradient, covariances) = target.residual_with_key_covariances(&data(14, 6, 1.1), &k);
        assert_eq!(gradient.rows, target.residual(&data(14, 6, 1.1), &k, At::Keys(&k)).rows);
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
            let got = target.curvature(&q, &k, At::Keys(&k)).error();
            assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
        }
    }
}
