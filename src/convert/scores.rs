//! Refits of queries and keys on the source's scores: what the phases of `attention-aware` assume of distances and the
//! latent of covariances, measured on tokens instead, head by head.
//!
//! Keys fixed, scores are linear in the query projections; queries fixed, in the key up-projections and the rotated key.
//! Each is a linear least-squares problem ([`ScoreTarget`]), too large to be formed, but cheap to apply: a few conjugate
//! gradient steps solve it as far as calibration text can tell.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};

use super::Steps;
use crate::calibrate::{At, Moments, ScoreGradient, ScoreTarget, add_products};
use crate::factor::FactorError;
use crate::factor::conjugate::conjugate_gradients;
use crate::factor::linalg::{matmul, matmul_f32, solve_right_spd, symmetrise};
use crate::methods::MlaLayer;
use crate::runtime::{Qkv, Rotation, Span};

/// Tokens that the refits look at, at most.
pub(super) const TOKENS: usize = 12288;
/// Conjugate gradient steps for the queries: the first brings most of the gain.
const QUERY_STEPS: usize = 2;
/// Conjugate gradient steps for the keys.
const KEY_STEPS: usize = 1;
/// Ridge towards the closed form, as a share of the preconditioner (the curvature that uniform attention would have).
const RIDGE: f64 = 0.01;
/// Ridge of the preconditioner's two factors, as a share of their mean diagonal.
const PRECONDITIONER_RIDGE: f64 = 1e-3;

/// What the refits of one layer share.
struct Scores<'a> {
    target: ScoreTarget<'a>,
    windows: &'a [usize],
    /// Normed inputs of the converted layer with a column of ones, `[T, D + 1]`.
    x: Array2<f32>,
    /// `E x^ x^T`, `[D + 1, D + 1]`.
    moment: Array2<f64>,
    rotation: Rotation,
}

/// Refit queries and keys as `steps` ask. `source` are the source's queries and keys on its own stream ([`of_chosen`]), `x`
/// `[T, D]` the normed inputs of the converted layer for all tokens of `windows`.
///
/// # Errors
/// [`FactorError`] when a moment matrix cannot be factorised.
pub(super) fn refit_scores(
    layer: &mut MlaLayer,
    source: &Qkv,
    x: &Array2<f32>,
    windows: &[usize],
    steps: &Steps,
) -> Result<(), FactorError> {
    if !(steps.query_refit || steps.key_refit) {
        return Ok(());
    }
    let chosen = choose(windows);
    let lengths: Vec<usize> = chosen.iter().map(Range::len).collect();
    let x = pick(x, &chosen);
    let mut moments = Moments::new(x.ncols());
    moments.add(x.view());
    let ones = Array2::ones((x.nrows(), 1));
    let scores = Scores {
        target: ScoreTarget::new(source, &lengths, layer.score_scale),
        windows: &lengths,
        x: concatenate![Axis(1), x, ones],
        moment: moments.augmented(),
        rotation: layer.rotation(lengths.iter().copied().max().unwrap_or(0)),
    };
    if steps.query_refit {
        scores.refit_queries(layer)?;
    }
    if steps.key_refit {
        scores.refit_keys(layer)?;
    }
    Ok(())
}

/// Some rows, in order.
fn pick(a: &Array2<f32>, rows: &[Range<usize>]) -> Array2<f32> {
    let parts: Vec<_> = rows.iter().map(|rows| a.slice(s![rows.clone(), ..])).collect();
    concatenate(Axis(0), &parts).unwrap_or_else(|_| Array2::zeros((0, a.ncols())))
}

/// Queries and keys of the windows that the refits look at.
pub(super) fn of_chosen(qkv: &Qkv, windows: &[usize]) -> Qkv {
    let chosen = choose(windows);
    let (q, k) = (pick(&qkv.q, &chosen), pick(&qkv.k, &chosen));
    Qkv { v: Array2::zeros((q.nrows(), 0)), q, k, v_dim: 0, ..*qkv }
}

/// Rows of evenly spread windows of [`TOKENS`] tokens together, one window at least.
fn choose(windows: &[usize]) -> Vec<Range<usize>> {
    let total: usize = windows.iter().sum();
    let every = total.div_ceil(TOKENS).max(1);
    Span::of_windows(windows).into_iter().map(|span| span.queries).step_by(every).collect()
}

/// `[W, b]`, `[rows, D + 1]`, or `W` alone where there is no bias to refit.
fn augmented(weight: &Array2<f64>, bias: Option<&Array1<f64>>) -> Array2<f64> {
    match bias {
        Some(b) => concatenate![Axis(1), weight.view(), b.view().insert_axis(Axis(1))],
        None => weight.clone(),
    }
}

/// Both query projections with their biases, `[H n, D]` and `[H r, D]`, or a column more.
fn query_weights(layer: &MlaLayer) -> (Array2<f64>, Array2<f64>) {
    let q = &layer.query;
    (augmented(&q.nope, q.nope_bias.as_ref()), augmented(&q.rope, q.rope_bias.as_ref()))
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

fn regularised(mut m: Array2<f64>) -> Array2<f64> {
    let level = PRECONDITIONER_RIDGE * m.diag().mean().unwrap_or(0.0).max(f64::MIN_POSITIVE);
    m.diag_mut().mapv_inplace(|v| v + level);
    m
}

/// Energy of rotated pairs, each half for both of its rows: rotation mixes the two.
fn pair_energies(weight: &Array2<f64>, moment: &Array2<f64>) -> Array1<f64> {
    pair_means(&(matmul(weight, moment) * weight).sum_axis(Axis(1)))
}

/// Mean of the two rows of each pair, for both, held above zero.
fn pair_means(rows: &Array1<f64>) -> Array1<f64> {
    let level = PRECONDITIONER_RIDGE * rows.mean().unwrap_or(0.0).max(f64::MIN_POSITIVE);
    Array1::from_shape_fn(rows.len(), |i| (rows[i / 2 * 2] + rows[i / 2 * 2 + 1]) / 2.0 + level)
}

/// `blkdiag(K_h) X C`, the curvature that uniform, independent queries and keys would have: rows of `x` belong to heads.
fn curvature(k: &[Array2<f64>], x: &Array2<f64>, c: &Array2<f64>) -> Array2<f64> {
    let mut out = matmul(x, c);
    for (mut rows, k) in out.axis_chunks_iter_mut(Axis(0), x.nrows() / k.len().max(1)).zip(k) {
        let product = matmul(k, &rows);
        rows.assign(&product);
    }
    out
}

/// `blkdiag(K_h)^-1 R C^-1`.
fn divided(k: &[Array2<f64>], r: &Array2<f64>, c: &Array2<f64>) -> Result<Array2<f64>, FactorError> {
    let (mut out, _) = solve_right_spd(c, r, 0.0, "moments of the layer's input")?;
    for (mut rows, k) in out.axis_chunks_iter_mut(Axis(0), r.nrows() / k.len().max(1)).zip(k) {
        let (left, _) = solve_right_spd(k, &rows.t().to_owned(), 0.0, "moments of queries and keys")?;
        rows.assign(&left.t());
    }
    Ok(out)
}

/// Each row times its own factor.
fn scale_rows(x: Array2<f64>, factors: &Array1<f64>) -> Array2<f64> {
    x * factors.view().insert_axis(Axis(1))
}

impl Scores<'_> {
    /// `x^ W^T`, `[T, rows]`, for a weight with or without bias column.
    fn project(&self, weight: &Array2<f64>) -> Array2<f32> {
        matmul_f32(&self.x.slice(s![.., ..weight.ncols()]), &weight.mapv(|v| v as f32).t())
    }

    /// The same for rotated pairs, turned.
    fn rotated(&self, weight: &Array2<f64>) -> Array2<f32> {
        let mut out = self.project(weight);
        self.rotation.turn_windows(&mut out, self.windows, false);
        out
    }

    /// Queries of every head, `[T, H (n + r)]`, from their projections.
    fn queries(&self, nope: &Array2<f64>, rope: &Array2<f64>, heads: usize) -> Array2<f32> {
        join(&self.project(nope), &self.rotated(rope), heads, rope.nrows() / heads)
    }

    /// Keys of every head, `[T, H (n + r)]`, from latents `c` `[T, r]`, their up-projection and the projection of the rotated
    /// key.
    fn keys(&self, c: &Array2<f32>, up: &Array2<f64>, rope: &Array2<f64>, heads: usize) -> Array2<f32> {
        join(&matmul_f32(c, &up.mapv(|v| v as f32).t()), &self.rotated(rope), heads, rope.nrows())
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

    fn refit_queries(&self, layer: &mut MlaLayer) -> Result<(), FactorError> {
        let (heads, n) = (layer.heads, layer.nope_dim());
        let (nope, rope) = query_weights(layer);
        let q = self.queries(&nope, &rope, heads);
        let k = self.keys(&self.project(&layer.latent), &layer.k_up, &rotated_key(layer), heads);
        let collect = |gradient: ScoreGradient| -> Vec<Array2<f64>> {
            let (g_nope, mut g_rope) = split(&gradient.rows, heads, n);
            self.rotation.turn_windows(&mut g_rope, self.windows, true);
            let x = self.x.slice(s![.., ..nope.ncols()]);
            vec![self.against(&g_nope, x), self.against(&g_rope, x)]
        };
        let c = self.moment(nope.ncols());
        // Curvature if queries were independent of what they meet: key covariances by inputs. Rotation mixes the two rows
        // of a pair, and hardly any pair with another.
        let scale = layer.score_scale.powi(2) / self.x.nrows() as f64;
        let seen = self.target.key_covariances(&k);
        let by_head: Vec<Array2<f64>> =
            seen.iter().map(|k| regularised(k.slice(s![..n, ..n]).to_owned()) * scale).collect();
        let pairs = seen.iter().flat_map(|k| pair_means(&k.diag().slice(s![n..]).to_owned()).to_vec());
        let pairs = Array1::from_iter(pairs) * scale;

        let b = collect(self.target.residual(&q, &k, At::Keys(&k))).into_iter().map(|g| -g).collect();
        let apply = |p: &[Array2<f64>]| {
            let q = self.queries(&p[0], &p[1], heads);
            let mut out = collect(self.target.curvature(&q, &k, At::Keys(&k)));
            out[0].scaled_add(RIDGE, &curvature(&by_head, &p[0], &c));
            out[1].scaled_add(RIDGE, &scale_rows(matmul(&p[1], &c), &pairs));
            Ok(out)
        };
        let precondition = |r: &[Array2<f64>]| {
            let (right, _) = solve_right_spd(&c, &r[1], 0.0, "moments of the layer's input")?;
            Ok(vec![divided(&by_head, &r[0], &c)?, scale_rows(right, &pairs.mapv(|v| 1.0 / v))])
        };
        let found = conjugate_gradients(b, heads, apply, precondition, QUERY_STEPS)?;
        let query = &mut layer.query;
        add(&mut query.nope, query.nope_bias.as_mut(), &found.x[0]);
        add(&mut query.rope, query.rope_bias.as_mut(), &found.x[1]);
        Ok(())
    }

    fn refit_keys(&self, layer: &mut MlaLayer) -> Result<(), FactorError> {
        let (heads, n) = (layer.heads, layer.nope_dim());
        let (nope, rope) = query_weights(layer);
        let k_rope = rotated_key(layer);
        let c = self.project(&layer.latent);
        let q = self.queries(&nope, &rope, heads);
        let k = self.keys(&c, &layer.k_up, &k_rope, heads);
        let collect = |gradient: ScoreGradient| -> Vec<Array2<f64>> {
            let (g_nope, g_rope) = split(&gradient.rows, heads, n);
            // One rotated key serves all heads.
            let mut shared = Array2::<f32>::zeros((g_rope.nrows(), k_rope.nrows()));
            for part in g_rope.axis_chunks_iter(Axis(1), k_rope.nrows().max(1)) {
                shared += &part;
            }
            self.rotation.turn_windows(&mut shared, self.windows, true);
            let all = self.against(&g_nope, c.view());
            vec![all, self.against(&shared, self.x.slice(s![.., ..k_rope.ncols()]))]
        };
        let scale = layer.score_scale.powi(2);
        let latent_moment = regularised(self.covariance(&layer.latent)) * self.x.nrows() as f64;
        let query_moment = self.moment.slice(s![..nope.ncols(), ..nope.ncols()]).to_owned();
        let by_head: Vec<Array2<f64>> = nope
            .axis_chunks_iter(Axis(0), n)
            .map(|w| regularised(matmul(&matmul(&w, &query_moment), &w.t())) * scale)
            .collect();
        let by_row = pair_energies(&rope, &self.moment.slice(s![..rope.ncols(), ..rope.ncols()]).to_owned()) * scale;
        let mut pairs = Array1::zeros(k_rope.nrows());
        for part in by_row.axis_chunks_iter(Axis(0), k_rope.nrows().max(1)) {
            pairs += &part;
        }
        let moment = self.moment(k_rope.ncols());

        let b = collect(self.target.residual(&q, &k, At::Queries(&q))).into_iter().map(|g| -g).collect();
        let apply = |p: &[Array2<f64>]| {
            let k = self.keys(&c, &p[0], &p[1], heads);
            let mut out = collect(self.target.curvature(&q, &k, At::Queries(&q)));
            out[0].scaled_add(RIDGE, &curvature(&by_head, &p[0], &latent_moment));
            out[1].scaled_add(RIDGE, &scale_rows(matmul(&p[1], &moment), &pairs));
            Ok(out)
        };
        let precondition = |r: &[Array2<f64>]| {
            let (right, _) = solve_right_spd(&moment, &r[1], 0.0, "moments of the layer's input")?;
            Ok(vec![divided(&by_head, &r[0], &latent_moment)?, scale_rows(right, &pairs.mapv(|v| 1.0 / v))])
        };
        let found = conjugate_gradients(b, 1, apply, precondition, KEY_STEPS)?;
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

/// Heads of both parts side by side, `[T, H (n + r)]`: `nope [T, H n]`, `rope [T, H r]`, or `[T, r]` for all heads.
fn join(nope: &Array2<f32>, rope: &Array2<f32>, heads: usize, r: usize) -> Array2<f32> {
    let n = nope.ncols() / heads;
    let stride = if rope.ncols() == r { 0 } else { r };
    let mut out = Array2::zeros((nope.nrows(), heads * (n + r)));
    for h in 0..heads {
        let first = h * (n + r);
        out.slice_mut(s![.., first..first + n]).assign(&nope.slice(s![.., h * n..(h + 1) * n]));
        out.slice_mut(s![.., first + n..first + n + r]).assign(&rope.slice(s![.., h * stride..h * stride + r]));
    }
    out
}

/// [`join`] undone: `[T, H n]` and `[T, H r]`.
fn split(rows: &Array2<f32>, heads: usize, n: usize) -> (Array2<f32>, Array2<f32>) {
    let width = rows.ncols() / heads;
    let part = |columns: Range<usize>| {
        let parts: Vec<_> =
            (0..heads).map(|h| rows.slice(s![.., h * width + columns.start..h * width + columns.end])).collect();
        let out = concatenate(Axis(1), &parts).unwrap_or_else(|_| Array2::zeros((rows.nrows(), 0)));
        out.as_standard_layout().into_owned()
    };
    (part(0..n), part(n..width))
}
