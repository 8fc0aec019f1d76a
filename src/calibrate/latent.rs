//! A converted layer's attention on calibration tokens, before it is written: pooled latents, head by head.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};
use rayon::prelude::*;

use super::pool;
use crate::factor::linalg::matmul_f32;
use crate::methods::MlaLayer;

/// Rows per task of sums over tokens.
const ROWS: usize = 512;

/// Latents, queries and rotated keys of one converted layer for some windows of tokens.
pub struct LatentAttention<'a> {
    mla: &'a MlaLayer,
    windows: &'a [usize],
    /// `[T, r]`.
    latent: Array2<f32>,
    /// `[T, d_R]`, rotated.
    k_rope: Array2<f32>,
    /// `[T, H d_N]`.
    q_nope: Array2<f32>,
    /// `[T, H d_R]`, rotated.
    q_rope: Array2<f32>,
    /// Cap of the scores.
    cap: Option<f64>,
}

/// `x W^T + b` in f32, `x` `[T, D]`, `weight` `[out, D]`.
pub(crate) fn project(x: ArrayView2<'_, f32>, weight: &Array2<f64>, bias: Option<&Array1<f64>>) -> Array2<f32> {
    let w = weight.mapv(|v| v as f32);
    let mut out = matmul_f32(&x, &w.t());
    if let Some(b) = bias {
        out += &b.mapv(|v| v as f32);
    }
    out
}

impl<'a> LatentAttention<'a> {
    /// Project and rotate the normed inputs `x` `[T, D]`.
    pub fn new(mla: &'a MlaLayer, x: ArrayView2<'_, f32>, windows: &'a [usize]) -> Self {
        let rotation = mla.rotation(windows.iter().copied().max().unwrap_or(0));
        let query = &mla.query;
        let through = query.down.as_ref().map(|down| project(x, down, None));
        let inner = through.as_ref().map_or(x, |t| t.view());
        let q_nope = project(inner, &query.nope, query.nope_bias.as_ref());
        let mut q_rope = project(inner, &query.rope, query.rope_bias.as_ref());
        let mut k_rope = project(x, &mla.k_rope, mla.k_rope_bias.as_ref());
        rotation.turn_windows(&mut q_rope, windows);
        rotation.turn_windows(&mut k_rope, windows);
        Self { mla, windows, latent: project(x, &mla.latent, None), k_rope, q_nope, q_rope, cap: None }
    }

    /// With scores capped as the source's are.
    pub fn capped(self, cap: Option<f64>) -> Self {
        Self { cap, ..self }
    }

    /// What head `h` pools of the latents, `[T, r]`.
    pub fn pooled(&self, h: usize) -> Array2<f32> {
        self.pooled_from(h, self.latent.view())
    }

    /// What head `h` pools of other values, one row per token.
    pub fn pooled_from(&self, h: usize, values: ArrayView2<'_, f32>) -> Array2<f32> {
        let (nope, rope) = (self.mla.nope_dim(), self.mla.rope_dim());
        let tokens = self.latent.nrows();
        let mut q = Array2::zeros((tokens, nope + rope));
        q.slice_mut(s![.., ..nope]).assign(&self.q_nope.slice(s![.., h * nope..(h + 1) * nope]));
        q.slice_mut(s![.., nope..]).assign(&self.q_rope.slice(s![.., h * rope..(h + 1) * rope]));
        let up = self.mla.k_up.slice(s![h * nope..(h + 1) * nope, ..]).mapv(|v| v as f32);
        let mut k = Array2::zeros((tokens, nope + rope));
        k.slice_mut(s![.., ..nope]).assign(&matmul_f32(&self.latent, &up.t()));
        k.slice_mut(s![.., nope..]).assign(&self.k_rope);
        pool(q, k, self.mla.score_scale, self.cap, self.windows, values)
    }

    /// Output of head `h`, `[T, d_V]`, from what it pooled.
    pub fn head_output(&self, h: usize, pooled: &Array2<f32>) -> Array2<f32> {
        let value = self.mla.value_dim();
        let up = self.mla.v_up.slice(s![h * value..(h + 1) * value, ..]).mapv(|v| v as f32);
        matmul_f32(pooled, &up.t())
    }

    /// All head outputs, `[T, H d_V]`.
    pub fn outputs(&self) -> Array2<f32> {
        let (heads, value) = (self.mla.heads, self.mla.value_dim());
        let mut out = Array2::zeros((self.latent.nrows(), heads * value));
        for h in 0..heads {
            let head = self.head_output(h, &self.pooled(h));
            out.slice_mut(s![.., h * value..(h + 1) * value]).assign(&head);
        }
        out
    }
}

/// `heads W_o^T + b` for head outputs `[T, H d_V]`.
pub fn output_projection(mla: &MlaLayer, heads: &Array2<f32>) -> Array2<f32> {
    project(heads.view(), &mla.wo, mla.wo_bias.as_ref())
}

/// `E |a - b|^2 / E |b - mean b|^2`, in f64, for activations `[T, D]`.
pub fn relative_error(a: &Array2<f32>, b: &Array2<f32>) -> f64 {
    let n = b.nrows().max(1) as f64;
    // Blocks are summed side by side and added up in order: the sums do not depend on the number of threads.
    let sums: Vec<Array1<f64>> = b
        .axis_chunks_iter(Axis(0), ROWS)
        .into_par_iter()
        .map(|b| b.fold_axis(Axis(0), 0.0_f64, |s, v| s + f64::from(*v)))
        .collect();
    let mean = sums.iter().fold(Array1::<f64>::zeros(b.ncols()), |mean, sum| mean + sum) / n;
    let energy = |rows: ArrayView1<'_, f32>, other: ArrayView1<'_, f32>| -> (f64, f64) {
        let mut out = (0.0, 0.0);
        for ((x, y), mean) in rows.iter().zip(other).zip(&mean) {
            out.0 += f64::from(x - y).powi(2);
            out.1 += (f64::from(*y) - mean).powi(2);
        }
        out
    };
    let blocks = a.axis_chunks_iter(Axis(0), ROWS).into_par_iter().zip(b.axis_chunks_iter(Axis(0), ROWS));
    let parts: Vec<(f64, f64)> = blocks
        .map(|(a, b)| {
            let rows = a.rows().into_iter().zip(b.rows());
            rows.map(|(x, y)| energy(x, y)).fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
        })
        .collect();
    let (error, total) = parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
    if total > 0.0 { error / total } else { 0.0 }
}
