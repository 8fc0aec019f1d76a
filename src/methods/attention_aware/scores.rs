//! Refits of queries and keys on the source's scores: what the phases of `attention-aware` assume of distances and the
//! latent of covariances, measured on tokens instead, head by head.
//!
//! Keys fixed, scores are linear in the query projections; queries fixed, in the key up-projections and the rotated key.
//! Each is a linear least-squares problem ([`ScoreTarget`]), too large to be formed, but cheap to apply: a few conjugate
//! gradient steps solve it as far as calibration text can tell.

use std::ops::Range;

use faer::Accum;
use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};
use rayon::prelude::*;

use super::curvature::{Curvature, pair_means, regularised};
use super::{At, ScoreGradient, ScoreTarget, Step, Steps};
use crate::calibrate::{Moments, add_products};
use crate::factor::FactorError;
use crate::factor::conjugate::{System, conjugate_gradients};
use crate::factor::linalg::{gemm, matmul, matmul_f32, symmetrise};
use crate::mla::MlaLayer;
use crate::runtime::{HeadColumns, Qkv, Rotation, Span, query_tiles};
use crate::stream::pick_rows;

/// Queries that the refits look at, at most.
pub(super) const QUERIES: usize = 8192;
/// Queries of one window that they look at, about, so that a long one, where each has many keys, takes no more than its share.
const OF_WINDOW: usize = 512;
/// Tokens of the windows that they look at, at most.
const TOKENS: usize = 2 * QUERIES;
/// Conjugate gradient steps for the queries: a second gains nothing that would not drown in the noise of the text.
const QUERY_STEPS: usize = 1;
/// Conjugate gradient steps for the keys.
const KEY_STEPS: usize = 1;
/// Ridge towards the closed form, as a share of the preconditioner (the curvature that uniform attention would have).
const RIDGE: f64 = 0.01;
/// Rows of queries or keys per task.
const BLOCK: usize = 256;

/// What the refits of one layer share. Queries and keys of a head lie side by side, `n` values without rotation and `r` with:
/// `w = n + r` columns of activations, or rows of weights.
struct Scores<'a> {
    target: ScoreTarget<'a>,
    windows: &'a [usize],
    /// Normed inputs of the converted layer with a column of ones, `[T, D + 1]`.
    x: Array2<f32>,
    /// Rows of queries that are sampled, at most [`BLOCK`] side by side.
    looked_at: Vec<Range<usize>>,
    /// Those rows of `x`, where they are not all.
    of_queries: Option<Array2<f32>>,
    /// `E x^ x^T`, `[D + 1, D + 1]`.
    moment: Array2<f64>,
    /// Turns by the angles of each position.
    rotation: Rotation,
    /// Turns back.
    back: Rotation,
    heads: usize,
    /// `n`.
    nope: usize,
}

/// Refit queries and keys as `steps` ask. `source` are the source's queries and keys on its own stream of the rows that [`choose`] names, `x`
/// `[T, D]` the normed inputs of the converted layer for all tokens of `windows`.
///
/// # Errors
/// [`FactorError`] when a moment matrix cannot be factorised.
pub(super) fn refit_scores(
    layer: &mut MlaLayer,
    source: &Qkv,
    x: ArrayView2<'_, f32>,
    windows: &[usize],
    steps: &Steps,
) -> Result<(), FactorError> {
    if !(steps.has(Step::QueryRefit) || steps.has(Step::KeyRefit)) {
        return Ok(());
    }
    let chosen = choose(windows);
    let lengths: Vec<usize> = chosen.iter().map(Range::len).collect();
    let x = pick_rows(x, &chosen);
    let mut moments = Moments::new(x.ncols());
    moments.add(x.view());
    let x = concatenate![Axis(1), x, Array2::ones((x.nrows(), 1))];
    let looked_at = looked_at(&lengths);
    let all = looked_at.iter().map(Range::len).sum::<usize>() == x.nrows();
    let rotation = layer.rotation(lengths.iter().copied().max().unwrap_or(0));
    let scores = Scores {
        target: ScoreTarget::new(source, &lengths, layer.score_scale).of_queries(OF_WINDOW),
        windows: &lengths,
        of_queries: (!all).then(|| pick_rows(x.view(), &looked_at)),
        x,
        looked_at,
        moment: moments.augmented(),
        back: rotation.reversed(),
        rotation,
        heads: layer.heads,
        nope: layer.nope_dim(),
    };
    let c = scores.project(&layer.latent);
    let q = scores.queries(&scores.query_weight(layer));
    let q = if steps.has(Step::QueryRefit) { scores.refit_queries(layer, &c, q)? } else { q };
    if steps.has(Step::KeyRefit) {
        scores.refit_keys(layer, &c, &q)?;
    }
    Ok(())
}

/// Rows of the queries that are sampled in windows that lie under each other, at most [`BLOCK`] side by side.
fn looked_at(windows: &[usize]) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    for span in Span::of_windows(windows) {
        for tile in query_tiles(span.queries.len(), OF_WINDOW) {
            let tile = span.queries.start + tile.start..span.queries.start + tile.end;
            match out.last_mut() {
                Some(last) if last.end == tile.start && tile.end - last.start <= BLOCK => last.end = tile.end,
                _ => out.push(tile),
            }
        }
    }
    out
}

/// Tokens of the windows that are used, at most, where the longest window has `longest`.
pub(super) fn tokens(longest: usize) -> usize {
    if longest > OF_WINDOW { TOKENS } else { QUERIES }
}

/// Queries that are sampled in a window of `length` tokens.
pub(super) fn queries(length: usize) -> usize {
    length.min(OF_WINDOW)
}

/// Rows of the first windows that have [`QUERIES`] queries and [`TOKENS`] tokens together, at most, one window at least: who
/// orders them spreads them.
pub(super) fn choose(windows: &[usize]) -> Vec<Range<usize>> {
    let mut seen = 0;
    let spans = Span::of_windows(windows).into_iter().map(|span| span.queries).enumerate();
    let fits = |(i, rows): &(usize, Range<usize>)| {
        seen += queries(rows.len());
        *i == 0 || seen <= QUERIES && rows.end <= TOKENS
    };
    spans.take_while(fits).map(|(_, rows)| rows).collect()
}

/// `[W, b]`, `[rows, D + 1]`, or `W` alone where there is no bias to refit.
fn augmented(weight: &Array2<f64>, bias: Option<&Array1<f64>>) -> Array2<f64> {
    match bias {
        Some(b) => concatenate![Axis(1), weight.view(), b.view().insert_axis(Axis(1))],
        None => weight.clone(),
    }
}

/// The projection of the rotated key with its bias, `[r, D]` or a column more.
fn rotated_key(layer: &MlaLayer) -> Array2<f64> {
    augmented(&layer.k_rope, layer.k_rope_bias.as_ref())
}

/// Add a solution of [`augmented`] shape to a weight and its bias.
fn add(weight: &mut Array2<f64>, bias: Option<&mut Array1<f64>>, change: &Array2<f64>) {
    let columns = weight.ncols();
    *weight += &change.slice(s![.., ..columns]);
    if let Some(b) = bias {
        *b += &change.column(columns);
    }
}

/// Both parts of every head under each other, `[H (n + r), C]`, from `[H n, C]` and `[H r, C]`.
fn join(nope: &Array2<f64>, rope: &Array2<f64>, heads: usize) -> Array2<f64> {
    let (n, r) = (nope.nrows() / heads, rope.nrows() / heads);
    let mut out = Array2::zeros((heads * (n + r), nope.ncols()));
    for (h, mut rows) in out.axis_chunks_iter_mut(Axis(0), (n + r).max(1)).enumerate() {
        rows.slice_mut(s![..n, ..]).assign(&nope.slice(s![h * n..(h + 1) * n, ..]));
        rows.slice_mut(s![n.., ..]).assign(&rope.slice(s![h * r..(h + 1) * r, ..]));
    }
    out
}

/// The rows `part` of every head, `[H part, C]`.
fn part(joined: &Array2<f64>, heads: usize, part: Range<usize>) -> Array2<f64> {
    let width = joined.nrows() / heads;
    let mut out = Array2::zeros((heads * part.len(), joined.ncols()));
    for (h, mut rows) in out.axis_chunks_iter_mut(Axis(0), part.len().max(1)).enumerate() {
        rows.assign(&joined.slice(s![h * width + part.start..h * width + part.end, ..]));
    }
    out
}

impl Scores<'_> {
    /// Columns of a head that turn.
    fn turned(&self) -> HeadColumns {
        let r = self.rotation.width();
        HeadColumns { start: self.nope, stride: self.nope + r, width: r }
    }

    /// `x^ W^T`, `[T, rows]`, for a weight with or without bias column.
    fn project(&self, weight: &Array2<f64>) -> Array2<f32> {
        matmul_f32(&self.x.slice(s![.., ..weight.ncols()]), &weight.mapv(|v| v as f32).t())
    }

    /// Queries of every head, `[T, H w]`, zero where they are not sampled, from their projection `[H w, D]` or a column more.
    fn queries(&self, weight: &Array2<f64>) -> Array2<f32> {
        let x = self.x.slice(s![.., ..weight.ncols()]);
        let weight = weight.mapv(|v| v as f32);
        let mut out = Array2::zeros((x.nrows(), weight.nrows()));
        let (mut blocks, mut rest, mut row) = (Vec::with_capacity(self.looked_at.len()), out.view_mut(), 0);
        for rows in &self.looked_at {
            let (block, tail) = rest.split_at(Axis(0), rows.start - row).1.split_at(Axis(0), rows.len());
            (rest, row) = (tail, rows.end);
            blocks.push((block, x.slice(s![rows.clone(), ..])));
        }
        blocks.into_par_iter().for_each(|(block, x)| gemm(block, Accum::Replace, x, weight.t(), 1.0));
        self.rotation.turn_columns(&mut out, self.windows, self.turned());
        out
    }

    /// Keys of every head, `[T, H w]`, from latents `c` `[T, r_kv]`, their up-projection `[H n, r_kv]` and the projection of
    /// the rotated key.
    fn keys(&self, c: &Array2<f32>, up: &Array2<f64>, rope: &Array2<f64>) -> Array2<f32> {
        let mut shared = self.project(rope);
        self.rotation.turn_windows(&mut shared, self.windows);
        let (up, n, width) = (up.mapv(|v| v as f32), self.nope, self.nope + shared.ncols());
        let mut out = Array2::zeros((c.nrows(), self.heads * width));
        let blocks = out.axis_chunks_iter_mut(Axis(0), BLOCK).into_par_iter();
        blocks.zip(c.axis_chunks_iter(Axis(0), BLOCK)).zip(shared.axis_chunks_iter(Axis(0), BLOCK)).for_each(
            |((mut out, c), shared)| {
                for h in 0..self.heads {
                    let first = h * width;
                    let up = up.slice(s![h * n..(h + 1) * n, ..]);
                    gemm(out.slice_mut(s![.., first..first + n]), Accum::Replace, c, up.t(), 1.0);
                    out.slice_mut(s![.., first + n..first + width]).assign(&shared);
                }
            },
        );
        out
    }

    /// `sum g^T x^` over tokens, `[G, columns]`.
    fn against(&self, g: &Array2<f32>, features: ArrayView2<'_, f32>) -> Array2<f64> {
        let mut out = Array2::<f64>::zeros((g.ncols(), features.ncols()));
        add_products(out.view_mut(), g.view(), features);
        out
    }

    /// The block of `E x^ x^T` that a weight of `columns` columns meets, regularised and times the number of tokens.
    fn moment(&self, columns: usize) -> Array2<f64> {
        regularised(self.moment.slice(s![..columns, ..columns]).to_owned()) * self.x.nrows() as f64
    }

    /// `E y y^T` of `y = W x^`, for some rows of a weight.
    fn output_moment(&self, weight: ArrayView2<'_, f64>) -> Array2<f64> {
        let columns = weight.ncols();
        matmul(&matmul(&weight, &self.moment.slice(s![..columns, ..columns])), &weight.t())
    }

    /// Query projections of every head, `[H w, D]` or a column more.
    fn query_weight(&self, layer: &MlaLayer) -> Array2<f64> {
        let query = &layer.query;
        join(
            &augmented(&query.nope, query.nope_bias.as_ref()),
            &augmented(&query.rope, query.rope_bias.as_ref()),
            self.heads,
        )
    }

    /// Refit the query projections at latents `c`, with `q` the present queries. Returns the new queries.
    fn refit_queries(&self, layer: &mut MlaLayer, c: &Array2<f32>, q: Array2<f32>) -> Result<Array2<f32>, FactorError> {
        let (heads, n) = (self.heads, self.nope);
        let weight = self.query_weight(layer);
        let k = self.keys(c, &layer.k_up, &rotated_key(layer));
        let scale = layer.score_scale.powi(2) / self.x.nrows() as f64;
        let (residual, seen) = self.target.residual_with_key_covariances(&q, &k);
        let curvature = Curvature {
            nope: seen.iter().map(|k| regularised(k.slice(s![..n, ..n]).to_owned()) * scale).collect(),
            rope: seen.iter().map(|k| pair_means(&k.diag().slice(s![n..]).to_owned()) * scale).collect(),
            moment: self.moment(weight.ncols()),
        };
        let mut system = OfQueries { scores: self, k: &k, q, along: Array2::zeros((0, 0)), curvature };
        let b = system.against(residual);
        let found = conjugate_gradients(vec![-b], heads, &mut system, QUERY_STEPS)?;
        let query = &mut layer.query;
        let width = weight.nrows() / heads;
        add(&mut query.nope, query.nope_bias.as_mut(), &part(&found.x[0], heads, 0..n));
        add(&mut query.rope, query.rope_bias.as_mut(), &part(&found.x[0], heads, n..width));
        Ok(system.q)
    }

    /// Refit the key up-projections and the rotated key at queries `q` and latents `c`.
    fn refit_keys(&self, layer: &mut MlaLayer, c: &Array2<f32>, q: &Array2<f32>) -> Result<(), FactorError> {
        let (heads, n) = (self.heads, self.nope);
        let query = &layer.query;
        let (nope, rope) =
            (augmented(&query.nope, query.nope_bias.as_ref()), augmented(&query.rope, query.rope_bias.as_ref()));
        let k_rope = rotated_key(layer);
        let scale = layer.score_scale.powi(2);
        let of_head = |w: ArrayView2<'_, f64>| self.output_moment(w);
        let mut pairs = Array1::zeros(k_rope.nrows());
        for w in rope.axis_chunks_iter(Axis(0), k_rope.nrows().max(1)) {
            pairs += &pair_means(&of_head(w).diag().to_owned());
        }
        let mut system = OfKeys {
            scores: self,
            q,
            c,
            up: Curvature {
                nope: nope.axis_chunks_iter(Axis(0), n.max(1)).map(|w| regularised(of_head(w)) * scale).collect(),
                rope: vec![Array1::zeros(0); heads],
                moment: regularised(self.covariance(&layer.latent)) * self.x.nrows() as f64,
            },
            shared: Curvature { nope: Vec::new(), rope: vec![pairs * scale], moment: self.moment(k_rope.ncols()) },
        };
        let k = self.keys(c, &layer.k_up, &k_rope);
        let b = system.against(self.target.residual(q, &k, At::Queries(q))).into_iter().map(|g| -g).collect();
        let found = conjugate_gradients(b, 1, &mut system, KEY_STEPS)?;
        layer.k_up += &found.x[0];
        add(&mut layer.k_rope, layer.k_rope_bias.as_mut(), &found.x[1]);
        Ok(())
    }

    /// Covariance of the latent, `[r, r]`.
    fn covariance(&self, latent: &Array2<f64>) -> Array2<f64> {
        let d = latent.ncols();
        let mean = self.moment.slice(s![..d, d..]).to_owned();
        let centred = self.moment.slice(s![..d, ..d]).to_owned() - matmul(&mean, &mean.t());
        symmetrise(&matmul(&matmul(latent, &centred), &latent.t()))
    }
}

/// `<a, b>` of the rows of each of `systems`.
fn inner(a: &Array2<f64>, b: &Array2<f64>, systems: usize) -> Array1<f64> {
    let rows = (a.nrows() / systems).max(1);
    let parts = a.axis_chunks_iter(Axis(0), rows).zip(b.axis_chunks_iter(Axis(0), rows));
    parts.map(|(a, b)| (&a * &b).sum()).collect()
}

/// The query projections of every head, `[H w, D]` or a column more, each head on its own, at fixed keys.
struct OfQueries<'a> {
    scores: &'a Scores<'a>,
    /// `[T, H w]`.
    k: &'a Array2<f32>,
    /// Queries of the solution so far, `[T, H w]`.
    q: Array2<f32>,
    /// Queries of the last direction.
    along: Array2<f32>,
    curvature: Curvature,
}

impl OfQueries<'_> {
    /// A gradient by queries as one by their projection.
    fn against(&self, gradient: ScoreGradient) -> Array2<f64> {
        let scores = self.scores;
        let mut rows = gradient.rows;
        scores.back.turn_columns(&mut rows, scores.windows, scores.turned());
        let columns = self.curvature.moment.ncols();
        match &scores.of_queries {
            None => scores.against(&rows, scores.x.slice(s![.., ..columns])),
            Some(x) => scores.against(&pick_rows(rows.view(), &scores.looked_at), x.slice(s![.., ..columns])),
        }
    }
}

impl System for OfQueries<'_> {
    type Error = FactorError;

    fn apply(&mut self, p: &[Array2<f64>]) -> Result<Vec<Array2<f64>>, FactorError> {
        self.along = self.scores.queries(&p[0]);
        let mut out = self.against(self.scores.target.curvature(&self.along, self.k, At::Keys(self.k)));
        out.scaled_add(RIDGE, &self.curvature.apply(&p[0]));
        Ok(vec![out])
    }

    fn form(&mut self, p: &[Array2<f64>]) -> Result<Array1<f64>, FactorError> {
        self.along = self.scores.queries(&p[0]);
        let found = self.scores.target.curvatures(&self.along, self.k);
        Ok(found + inner(&p[0], &self.curvature.apply(&p[0]), self.scores.heads) * RIDGE)
    }

    fn moved(&mut self, step: &Array1<f64>) {
        let width = self.q.ncols() / step.len();
        let rows = self.q.axis_iter_mut(Axis(0)).into_par_iter().zip(self.along.axis_iter(Axis(0)));
        rows.for_each(|(mut q, along)| {
            let heads = q.axis_chunks_iter_mut(Axis(0), width).zip(along.axis_chunks_iter(Axis(0), width));
            for ((mut q, along), step) in heads.zip(step) {
                q.scaled_add(*step as f32, &along);
            }
        });
    }

    fn precondition(&mut self, r: &[Array2<f64>]) -> Result<Vec<Array2<f64>>, FactorError> {
        Ok(vec![self.curvature.divide(&r[0])?])
    }
}

/// The key up-projections `[H n, r_kv]` and the projection of the rotated key, at fixed queries.
struct OfKeys<'a> {
    scores: &'a Scores<'a>,
    /// `[T, H w]`.
    q: &'a Array2<f32>,
    /// Latents, `[T, r_kv]`.
    c: &'a Array2<f32>,
    up: Curvature,
    shared: Curvature,
}

impl OfKeys<'_> {
    /// A gradient by keys as one by what makes them.
    fn against(&self, gradient: ScoreGradient) -> Vec<Array2<f64>> {
        let (scores, rows) = (self.scores, gradient.rows);
        let turned = scores.turned();
        // One rotated key serves all heads.
        let mut shared = Array2::<f32>::zeros((rows.nrows(), turned.width));
        let mut up = Array2::zeros((scores.heads * scores.nope, self.c.ncols()));
        for h in 0..scores.heads {
            let first = h * turned.stride;
            let of_head = up.slice_mut(s![h * scores.nope..(h + 1) * scores.nope, ..]);
            add_products(of_head, rows.slice(s![.., first..first + scores.nope]), self.c.view());
            shared += &rows.slice(s![.., turned.of(h)]);
        }
        scores.back.turn_windows(&mut shared, scores.windows);
        vec![up, scores.against(&shared, scores.x.slice(s![.., ..self.shared.moment.ncols()]))]
    }
}

impl System for OfKeys<'_> {
    type Error = FactorError;

    fn apply(&mut self, p: &[Array2<f64>]) -> Result<Vec<Array2<f64>>, FactorError> {
        let k = self.scores.keys(self.c, &p[0], &p[1]);
        let mut out = self.against(self.scores.target.curvature(self.q, &k, At::Queries(self.q)));
        out[0].scaled_add(RIDGE, &self.up.apply(&p[0]));
        out[1].scaled_add(RIDGE, &self.shared.apply(&p[1]));
        Ok(out)
    }

    fn form(&mut self, p: &[Array2<f64>]) -> Result<Array1<f64>, FactorError> {
        let found = self.scores.target.curvatures(self.q, &self.scores.keys(self.c, &p[0], &p[1])).sum();
        let ridge = inner(&p[0], &self.up.apply(&p[0]), 1) + inner(&p[1], &self.shared.apply(&p[1]), 1);
        Ok(ridge * RIDGE + found)
    }

    fn precondition(&mut self, r: &[Array2<f64>]) -> Result<Vec<Array2<f64>>, FactorError> {
        Ok(vec![self.up.divide(&r[0])?, self.shared.divide(&r[1])?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mla::{LatentAttention, Query};

    /// Queries and keys as the refits make them give the attention that the layer has on the host.
    #[test]
    fn queries_and_keys_are_the_layers_own() {
        let (hidden, heads, n, r, rank, windows) = (10, 3, 4, 6, 7, [9, 5]);
        let mut state = 3;
        let mut matrix = |rows: usize, columns: usize| {
            Array2::from_shape_simple_fn((rows, columns), || 2.0 * crate::random::uniform(&mut state) - 1.0)
        };
        let layer = MlaLayer {
            heads,
            query: Query {
                down: None,
                nope: matrix(heads * n, hidden),
                nope_bias: Some(matrix(heads * n, 1).column(0).to_owned()),
                rope: matrix(heads * r, hidden),
                rope_bias: Some(matrix(heads * r, 1).column(0).to_owned()),
            },
            latent: matrix(rank, hidden),
            k_rope: matrix(r, hidden),
            k_rope_bias: Some(matrix(r, 1).column(0).to_owned()),
            k_up: matrix(heads * n, rank),
            v_up: matrix(heads * 5, rank),
            wo: matrix(hidden, heads * 5),
            wo_bias: None,
            rope_freq: vec![0.7, 0.2, 0.05],
            score_scale: 0.4,
        };
        let tokens: usize = windows.iter().sum();
        let x = matrix(tokens, hidden).mapv(|v| v as f32);
        let source = Qkv {
            q: Array2::zeros((tokens, heads * 2)),
            k: Array2::zeros((tokens, heads * 2)),
            v: Array2::zeros((tokens, 0)),
            heads,
            kv_heads: heads,
            qk_dim: 2,
            v_dim: 0,
            scale: 1.0,
            sliding_window: None,
            score_softcap: None,
        };
        let rotation = layer.rotation(9);
        let scores = Scores {
            target: ScoreTarget::new(&source, &windows, layer.score_scale),
            windows: &windows,
            x: concatenate![Axis(1), x, Array2::ones((tokens, 1))],
            looked_at: looked_at(&windows),
            of_queries: None,
            moment: Array2::zeros((hidden + 1, hidden + 1)),
            back: rotation.reversed(),
            rotation,
            heads,
            nope: n,
        };
        let c = scores.project(&layer.latent);
        let q = scores.queries(&scores.query_weight(&layer));
        let k = scores.keys(&c, &layer.k_up, &rotated_key(&layer));
        let attention = LatentAttention::new(&layer, x.view(), &windows);
        for h in 0..heads {
            let mut pooled = Array2::zeros((tokens, rank));
            attention.pool(h, pooled.view_mut());
            for span in Span::of_windows(&windows) {
                for m in span.queries.clone() {
                    let columns = s![h * (n + r)..(h + 1) * (n + r)];
                    let score = |t: usize| {
                        let product = q.row(m).slice(columns).dot(&k.row(t).slice(columns));
                        (layer.score_scale * f64::from(product)).exp()
                    };
                    let weights: Vec<f64> = (span.queries.start..=m).map(score).collect();
                    let total: f64 = weights.iter().sum();
                    for j in 0..rank {
                        let of = |(i, w): (usize, &f64)| w * f64::from(c[[span.queries.start + i, j]]);
                        let expected = weights.iter().enumerate().map(of).sum::<f64>() / total;
                        // Sums of some ten terms of order one, in f32.
                        assert!((f64::from(pooled[[m, j]]) - expected).abs() < 1e-5, "head {h}, token {m}");
                    }
                }
            }
        }
    }

    #[test]
    fn queries_that_are_looked_at_are_some_of_long_windows_and_all_of_others() {
        let windows = [2048, 256, 16];
        let found = looked_at(&windows);
        assert!(found.iter().all(|rows| rows.len() <= BLOCK) && found.windows(2).all(|two| two[0].end <= two[1].start));
        let of = |from: usize, to: usize| {
            let parts = found.iter().map(|rows| rows.start.max(from)..rows.end.min(to));
            parts.map(|rows| rows.len()).sum::<usize>()
        };
        assert_eq!((of(0, 2048), of(2048, 2304), of(2304, 2320)), (OF_WINDOW, 256, 16));
        // The last query, which sees all keys, is among them.
        assert!(found.iter().any(|rows| rows.contains(&2047)));
    }
}
