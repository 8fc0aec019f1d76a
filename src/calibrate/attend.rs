//! Attention as calibration needs it: outputs, pooled inputs and distances, from the runtime's own probabilities.

use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

use super::DistanceProfile;
use crate::factor::linalg::matmul_f32_sequential;
use crate::runtime::Qkv;

/// Head outputs `[T, H d_V]` before the output projection and, if asked, how far back each head looks.
pub fn attend(qkv: &Qkv, windows: &[usize], profile: bool) -> (Array2<f32>, Option<DistanceProfile>) {
    let longest = windows.iter().copied().max().unwrap_or(0);
    let width = qkv.v_dim;
    let parts = qkv.fold_probabilities(
        windows,
        |window, _| (Array2::<f32>::zeros((windows[window], width)), profile.then(|| DistanceProfile::new(1, longest))),
        |(out, distances), tile| {
            let (rows, keys) = tile.probabilities.dim();
            let columns = qkv.kv_head(tile.head) * width..(qkv.kv_head(tile.head) + 1) * width;
            let values = qkv.v.slice(s![tile.window_start..tile.window_start + keys, columns]);
            out.slice_mut(s![tile.row0..tile.row0 + rows, ..])
                .assign(&matmul_f32_sequential(tile.probabilities, values));
            if let Some(d) = distances {
                d.add(0, tile.row0, tile.probabilities);
            }
        },
    );
    let mut total = profile.then(|| DistanceProfile::new(qkv.heads, longest));
    for (index, (_, distances)) in parts.iter().enumerate() {
        if let (Some(t), Some(d)) = (&mut total, distances) {
            t.add_head(index % qkv.heads, d);
        }
    }
    (side_by_side(parts.iter().map(|(out, _)| out), windows, qkv.heads, width), total)
}

/// Parts `[length, width]` of every (window, head), heads of a window one after the other as
/// [`Qkv::fold_probabilities`] gives them, as `[T, heads * width]`.
pub(super) fn side_by_side<'a>(
    parts: impl IntoIterator<Item = &'a Array2<f32>>,
    windows: &[usize],
    heads: usize,
    width: usize,
) -> Array2<f32> {
    let parts: Vec<&Array2<f32>> = parts.into_iter().collect();
    let mut out = Array2::zeros((windows.iter().sum(), heads * width));
    let mut places = Vec::with_capacity(windows.len());
    let mut rest = out.view_mut();
    for (of_window, &length) in parts.chunks(heads.max(1)).zip(windows) {
        let (rows, tail) = rest.split_at(Axis(0), length);
        places.push((rows, of_window));
        rest = tail;
    }
    places.into_par_iter().for_each(|(mut rows, of_window)| {
        for (head, part) in of_window.iter().enumerate() {
            rows.slice_mut(s![.., head * width..(head + 1) * width]).assign(part);
        }
    });
    out
}

/// What one head pools: `sum_n p_mn values_n` for every token, `[T, width]`. `q` and `k` are that head's, after RoPE.
/// Scores are capped where there is a `cap`.
pub fn pool(
    q: Array2<f32>,
    k: Array2<f32>,
    scale: f64,
    cap: Option<f64>,
    windows: &[usize],
    values: ArrayView2<'_, f32>,
) -> Array2<f32> {
    let (qk_dim, v_dim) = (q.ncols(), values.ncols());
    let v = values.to_owned();
    let qkv = Qkv { q, k, v, heads: 1, kv_heads: 1, qk_dim, v_dim, scale, sliding_window: None, score_softcap: cap };
    attend(&qkv, windows, false).0
}
