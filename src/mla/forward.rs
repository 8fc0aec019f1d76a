//! A converted layer's attention on calibration tokens, before it is written: pooled latents, head by head.

use faer::Accum;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix2, s};
use rayon::prelude::*;

use super::MlaLayer;
use crate::calibrate::{by_window, project, relative_error};
use crate::factor::linalg::{gemm, matmul_f32_into};
use crate::runtime::{Rotation, Scoring, Span, TileRoom, probability_tiles};

/// One converted layer on some windows of tokens: latents and rotated keys, from which each head's queries and keys are
/// made as they are needed.
pub struct LatentAttention<'a> {
    mla: &'a MlaLayer,
    windows: &'a [usize],
    rotation: Rotation,
    /// What queries are projected from, `[T, D]` or `[T, r_q]`.
    input: CowArray<'a, f32, Ix2>,
    /// `[T, r]`.
    latent: Array2<f32>,
    /// `[T, d_R]`, rotated.
    k_rope: Array2<f32>,
    /// Cap of the scores.
    cap: Option<f64>,
}

/// What makes queries and keys of one head, in f32.
struct Head {
    /// `[d_N + d_R, D]`, or as wide as the latent of queries.
    query: Array2<f32>,
    /// `[d_N + d_R]`.
    query_bias: Option<Array1<f32>>,
    /// `[d_N, r]`.
    key_up: Array2<f32>,
}

impl Head {
    fn new(mla: &MlaLayer, h: usize) -> Self {
        let (nope, rope) = (h * mla.nope_dim()..(h + 1) * mla.nope_dim(), h * mla.rope_dim()..(h + 1) * mla.rope_dim());
        let query = &mla.query;
        let rows = |m: &Array2<f64>, rows: &std::ops::Range<usize>| m.slice(s![rows.clone(), ..]).mapv(|v| v as f32);
        let (from, to) = (rows(&query.nope, &nope), rows(&query.rope, &rope));
        let bias = match (&query.nope_bias, &query.rope_bias) {
            (None, None) => None,
            (n, r) => {
                let part = |b: &Option<Array1<f64>>, range: std::ops::Range<usize>| match b {
                    Some(b) => b.slice(s![range]).mapv(|v| v as f32),
                    None => Array1::zeros(range.len()),
                };
                Some(ndarray::concatenate![Axis(0), part(n, nope.clone()), part(r, rope)])
            }
        };
        Self { query: ndarray::concatenate![Axis(0), from, to], query_bias: bias, key_up: rows(&mla.k_up, &nope) }
    }
}

impl<'a> LatentAttention<'a> {
    /// Project the normed inputs `x` `[T, D]`.
    pub fn new(mla: &'a MlaLayer, x: ArrayView2<'a, f32>, windows: &'a [usize]) -> Self {
        let rotation = mla.rotation(windows.iter().copied().max().unwrap_or(0));
        let mut k_rope = project(x, &mla.k_rope, mla.k_rope_bias.as_ref());
        rotation.turn_windows(&mut k_rope, windows);
        let input = match &mla.query.down {
            Some(down) => project(x, down, None).into(),
            None => x.into(),
        };
        Self { mla, windows, rotation, input, latent: project(x, &mla.latent, None), k_rope, cap: None }
    }

    /// With scores capped as the source's are.
    pub fn capped(self, cap: Option<f64>) -> Self {
        Self { cap, ..self }
    }

    /// What head `h` pools of the latents, into `out` `[T, r]`.
    pub fn pool(&self, h: usize, out: ArrayViewMut2<'_, f32>) {
        self.pool_from(h, self.latent.view(), out);
    }

    /// What head `h` pools of other values, `sum_n p_mn values_n` for every token, into `out` `[T, width]`.
    ///
    /// # Panics
    /// If `out` has another shape than `values`.
    pub fn pool_from(&self, h: usize, values: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) {
        assert_eq!(values.dim(), out.dim(), "shapes of values and what is pooled of them");
        let head = Head::new(self.mla, h);
        let scoring = Scoring { scale: self.mla.score_scale, sliding_window: None, cap: self.cap };
        let work = |room: &mut TileRoom, (mut out, span): (ArrayViewMut2<'_, f32>, Span)| {
            let rows = span.queries;
            let values = values.slice(s![rows.clone(), ..]);
            let (q, k) = self.queries_and_keys(&head, rows);
            probability_tiles((q.view(), k.view()), &scoring, room, |row0, p, _| {
                let out = out.slice_mut(s![row0..row0 + p.nrows(), ..]);
                gemm(out, Accum::Replace, p, values.slice(s![..p.ncols(), ..]), 1.0);
            });
        };
        let windows = by_window(out, self.windows).into_par_iter().zip(Span::of_windows(self.windows));
        windows.for_each_init(TileRoom::default, work);
    }

    /// Queries and keys of one head after RoPE for the rows of one window, `[length, d_N + d_R]`, on the calling thread.
    fn queries_and_keys(&self, head: &Head, rows: std::ops::Range<usize>) -> (Array2<f32>, Array2<f32>) {
        let (nope, width) = (head.key_up.nrows(), head.query.nrows());
        let mut q = Array2::zeros((rows.len(), width));
        gemm(q.view_mut(), Accum::Replace, self.input.slice(s![rows.clone(), ..]), head.query.t(), 1.0);
        if let Some(bias) = &head.query_bias {
            q += bias;
        }
        if width > nope {
            for (position, mut row) in q.rows_mut().into_iter().enumerate() {
                if let Some(row) = row.as_slice_mut() {
                    self.rotation.turn(&mut row[nope..], position);
                }
            }
        }
        let mut k = Array2::zeros((rows.len(), width));
        let latent = self.latent.slice(s![rows.clone(), ..]);
        gemm(k.slice_mut(s![.., ..nope]), Accum::Replace, latent, head.key_up.t(), 1.0);
        k.slice_mut(s![.., nope..]).assign(&self.k_rope.slice(s![rows, ..]));
        (q, k)
    }

    /// Output of head `h`, into `out` `[T, d_V]`, from what it pooled.
    pub fn head_output(&self, h: usize, pooled: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) {
        let value = self.mla.value_dim();
        let up = self.mla.v_up.slice(s![h * value..(h + 1) * value, ..]).mapv(|v| v as f32);
        matmul_f32_into(out, pooled, up.t());
    }

    /// All head outputs, `[T, H d_V]`.
    pub fn outputs(&self) -> Array2<f32> {
        let (heads, value) = (self.mla.heads, self.mla.value_dim());
        let mut out = Array2::zeros((self.latent.nrows(), heads * value));
        let mut pooled = Array2::zeros(self.latent.raw_dim());
        for h in 0..heads {
            self.pool(h, pooled.view_mut());
            self.head_output(h, pooled.view(), out.slice_mut(s![.., h * value..(h + 1) * value]));
        }
        out
    }
}

/// `heads W_o^T + b` for head outputs `[T, H d_V]`.
pub fn output_projection(mla: &MlaLayer, heads: &Array2<f32>) -> Array2<f32> {
    project(heads.view(), &mla.wo, mla.wo_bias.as_ref())
}

/// Relative error of a layer's attention output on normed inputs `x` `[T, D]`, against `want` `[T, D]`; `cap` is that of the
/// source's scores.
pub fn output_error(
    layer: &MlaLayer,
    cap: Option<f64>,
    x: ArrayView2<'_, f32>,
    windows: &[usize],
    want: ArrayView2<'_, f32>,
) -> f64 {
    let heads = LatentAttention::new(layer, x, windows).capped(cap).outputs();
    relative_error(output_projection(layer, &heads).view(), want)
}
