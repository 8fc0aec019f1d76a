//! Attention of a source layer as calibration needs it: outputs and distances, from the runtime's own probabilities.

use faer::Accum;
use ndarray::{Array2, ArrayViewMut2, Axis, s};

use super::DistanceProfile;
use crate::factor::linalg::gemm;
use crate::runtime::Qkv;

/// Head outputs `[T, H d_V]` before the output projection and, if asked, how far back each head looks.
pub fn attend(qkv: &Qkv, windows: &[usize], profile: bool) -> (Array2<f32>, Option<DistanceProfile>) {
    let longest = windows.iter().copied().max().unwrap_or(0);
    let width = qkv.v_dim;
    let mut out = Array2::zeros((windows.iter().sum(), qkv.heads * width));
    let places = by_window_and_head(&mut out, windows, qkv.heads);
    let states = places.into_iter().map(|out| (out, profile.then(|| DistanceProfile::new(1, longest)))).collect();
    let parts = qkv.fold_probabilities(windows, states, |(out, distances), tile| {
        let (rows, keys) = tile.probabilities.dim();
        let columns = qkv.kv_head(tile.head) * width..(qkv.kv_head(tile.head) + 1) * width;
        let values = qkv.v.slice(s![tile.window_start..tile.window_start + keys, columns]);
        let out = out.slice_mut(s![tile.row0..tile.row0 + rows, ..]);
        gemm(out, Accum::Replace, tile.probabilities, values, 1.0);
        if let Some(d) = distances {
            d.add(0, tile.row0, tile.probabilities);
        }
    });
    let mut total = profile.then(|| DistanceProfile::new(qkv.heads, longest));
    for (index, (_, distances)) in parts.iter().enumerate() {
        if let (Some(t), Some(d)) = (&mut total, distances) {
            t.add_head(index % qkv.heads, d);
        }
    }
    drop(parts);
    (out, total)
}

/// The part of every (window, head), `[length, width]`, of `[T, heads * width]`: heads of a window one after the other, as
/// [`Qkv::fold_probabilities`] wants them.
pub(crate) fn by_window_and_head<'a>(
    out: &'a mut Array2<f32>,
    windows: &[usize],
    heads: usize,
) -> Vec<ArrayViewMut2<'a, f32>> {
    let width = out.ncols() / heads.max(1);
    let mut places = Vec::with_capacity(windows.len() * heads);
    for mut rest in by_window(out.view_mut(), windows) {
        for _ in 0..heads {
            let (head, tail) = rest.split_at(Axis(1), width);
            places.push(head);
            rest = tail;
        }
    }
    places
}

/// The rows of every window.
pub(crate) fn by_window<'a>(out: ArrayViewMut2<'a, f32>, windows: &[usize]) -> Vec<ArrayViewMut2<'a, f32>> {
    let mut rest = out;
    let mut places = Vec::with_capacity(windows.len());
    for &length in windows {
        let (rows, tail) = rest.split_at(Axis(0), length);
        places.push(rows);
        rest = tail;
    }
    places
}
