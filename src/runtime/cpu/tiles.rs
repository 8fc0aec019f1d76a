//! Attention over keys that come tile by tile, such as those that are reconstructed when they are needed.

use faer::Accum;
use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

use super::elementwise::{self, softcap};
use super::gemm;
use crate::factor::linalg;
use crate::runtime::AttentionShape;

/// What one query head has made of the tiles so far.
struct Running {
    /// Largest score of each query row.
    max: Vec<f32>,
    /// Sum of `exp(score - max)`.
    sum: Vec<f32>,
    /// Values weighted by it, `[rows, d_V]`.
    mixed: Array2<f32>,
}

/// Causal softmax attention of query rows at consecutive positions, fed with tiles of keys in order of their positions.
///
/// The softmax is taken with running maxima and sums. Each head is one task per tile, so results do not depend on the number
/// of threads.
pub(in crate::runtime) struct TiledAttention<'a> {
    /// `[rows, heads d]`.
    q: ArrayView2<'a, f32>,
    shape: &'a AttentionShape,
    cap: Option<f64>,
    /// Position of the first query row.
    first: usize,
    heads: Vec<Running>,
}

impl<'a> TiledAttention<'a> {
    /// Nothing seen yet.
    pub(in crate::runtime) fn new(
        q: ArrayView2<'a, f32>,
        shape: &'a AttentionShape,
        cap: Option<f64>,
        first: usize,
    ) -> Self {
        let rows = q.nrows();
        let running = |_| Running {
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
            mixed: Array2::zeros((rows, shape.values.width)),
        };
        Self { q, shape, cap, first, heads: (0..shape.heads).map(running).collect() }
    }

    /// Attend to keys and values of the positions from `first` on, `[keys, columns]` as the shape says.
    pub(in crate::runtime) fn add(&mut self, first: usize, k: ArrayView2<'_, f32>, v: ArrayView2<'_, f32>) {
        let (shape, q, cap) = (self.shape, self.q, self.cap);
        let (rows, keys, d) = (q.nrows(), k.nrows(), shape.keys.width);
        if rows == 0 || keys == 0 {
            return;
        }
        let query = self.first;
        let seen = |row: usize| {
            let position = query + row;
            let end = (position + 1).saturating_sub(first).min(keys);
            let start = shape.sliding_window.map_or(0, |w| (position + 1).saturating_sub(w + first));
            start.min(end)..end
        };
        self.heads.par_iter_mut().enumerate().for_each(|(head, running)| {
            let kv_head = head / (shape.heads / shape.kv_heads);
            let mut scores = Array2::zeros((rows, keys));
            gemm::serial(
                scores.view_mut(),
                q.slice(s![.., head * d..(head + 1) * d]),
                k.slice(s![.., shape.keys.of(kv_head)]).reversed_axes(),
                shape.scale as f32,
            );
            for (i, mut row) in scores.axis_iter_mut(Axis(0)).enumerate() {
                let Some(row) = row.as_slice_mut() else { continue };
                let range = seen(i);
                row[..range.start].fill(0.0);
                row[range.end..].fill(0.0);
                let row = &mut row[range];
                if row.is_empty() {
                    continue;
                }
                if let Some(cap) = cap {
                    softcap(row, cap);
                }
                let (max, sum) = elementwise::exponentials(row);
                let top = running.max[i].max(max);
                let (old, new) = (elementwise::exp(running.max[i] - top), elementwise::exp(max - top));
                row.iter_mut().for_each(|x| *x *= new);
                running.max[i] = top;
                // NaN scores give a NaN sum, whatever the largest is.
                running.sum[i] = running.sum[i] * old + sum * new;
                running.mixed.row_mut(i).mapv_inplace(|x| x * old);
            }
            let v = v.slice(s![.., shape.values.of(kv_head)]);
            linalg::gemm(running.mixed.view_mut(), Accum::Add, scores.view(), v, 1.0);
        });
    }

    /// Head outputs, `[rows, heads d_V]`. Every row has seen a key.
    pub(in crate::runtime) fn finish(self) -> Array2<f32> {
        let width = self.shape.values.width;
        let mut out = Array2::zeros((self.q.nrows(), self.shape.heads * width));
        for (head, running) in self.heads.into_iter().enumerate() {
            let mut to = out.slice_mut(s![.., head * width..(head + 1) * width]);
            for ((mut to, from), sum) in to.rows_mut().into_iter().zip(running.mixed.rows()).zip(running.sum) {
                to.assign(&from.mapv(|x| x / sum));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Backend, Cpu, HeadColumns, Span};

    fn sample(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, cols), || (crate::random::uniform(&mut state) * 4.0 - 2.0) as f32)
    }

    #[test]
    fn tiles_of_any_size_give_what_one_call_gives() {
        let (keys, rows) = (37, 9);
        for (window, cap) in [(None, None), (Some(5), None), (None, Some(1.5))] {
            let shape = AttentionShape {
                heads: 4,
                kv_heads: 2,
                keys: HeadColumns::dense(6),
                values: HeadColumns { start: 1, stride: 4, width: 3 },
                scale: 0.4,
                sliding_window: window,
            };
            let (q, k, v) = (sample(rows, 24, 1), sample(keys, 12, 2), sample(keys, 9, 3));
            let spans = [Span { queries: 0..rows, keys: 0..keys }];
            let want = match cap {
                None => Cpu.attention(&q, &k, &v, &shape, &spans),
                Some(cap) => Cpu.capped_attention(&q, &k, &v, &shape, cap, &spans).unwrap(),
            };
            for tile in [1, 4, 16, 64] {
                let mut tiled = TiledAttention::new(q.view(), &shape, cap, keys - rows);
                for first in (0..keys).step_by(tile) {
                    let end = keys.min(first + tile);
                    tiled.add(first, k.slice(s![first..end, ..]), v.slice(s![first..end, ..]));
                }
                let error = (&tiled.finish() - &want).iter().fold(0f32, |m, x| m.max(x.abs()));
                // Values up to 2 in magnitude; exponentials of scores up to 10 differ by their argument's rounding.
                assert!(error < 1e-5, "tile {tile}, window {window:?}, cap {cap:?}: {error}");
            }
        }
    }
}
