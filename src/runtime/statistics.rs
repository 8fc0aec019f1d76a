//! What calibration reads of an attention layer.

use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

use super::cpu::{probability_tile, tile_rows};
use super::{HeadColumns, Span};

/// Queries, keys and values of a layer after RoPE, on the host. Heads lie side by side.
///
/// For MLA the keys are the expanded ones, so `kv_heads` equals `heads` and `v_dim` may differ from `qk_dim`.
#[derive(Debug, Clone, PartialEq)]
pub struct Qkv {
    /// `[T, heads * qk_dim]`.
    pub q: Array2<f32>,
    /// `[T, kv_heads * qk_dim]`.
    pub k: Array2<f32>,
    /// `[T, kv_heads * v_dim]`.
    pub v: Array2<f32>,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Query and key width per head.
    pub qk_dim: usize,
    /// Value width per head.
    pub v_dim: usize,
    /// What multiplies `<q, k>` before the softmax (RoPE's amplitude is already in q and k).
    pub scale: f64,
    /// Sliding window in tokens, where one limits attention.
    pub sliding_window: Option<usize>,
    /// Cap of the scores, where there is one.
    pub score_softcap: Option<f64>,
}

/// Attention probabilities of some query rows of one head in one window.
#[derive(Debug)]
pub struct ProbabilityTile<'a> {
    /// Index of the window.
    pub window: usize,
    /// Query head.
    pub head: usize,
    /// First query of the tile, counted within the window.
    pub row0: usize,
    /// First row of the window in `[T, ..]` activations.
    pub window_start: usize,
    /// `[rows, keys]`: row `i` is query `row0 + i`, column `j` is key `j` of the window; `keys = row0 + rows`, and what
    /// a query cannot see is zero.
    pub probabilities: ArrayView2<'a, f32>,
}

impl Qkv {
    /// Fold the attention probabilities of every (window, head), tile by tile in order of query rows.
    ///
    /// `init(window, head)` makes an accumulator, `fold` adds a tile to it. Runs in parallel over (window, head); the
    /// result holds the accumulators in the order `window * heads + head`, whatever the number of threads, so that the
    /// caller can add them up in a fixed order. Memory beyond the accumulators is one tile per thread.
    pub fn fold_probabilities<A: Send>(
        &self,
        windows: &[usize],
        init: impl Fn(usize, usize) -> A + Sync,
        fold: impl Fn(&mut A, ProbabilityTile<'_>) + Sync,
    ) -> Vec<A> {
        let spans = Span::of_windows(windows);
        let work = |index: usize| {
            let (window, head) = (index / self.heads, index % self.heads);
            let span = &spans[window];
            let kv_head = head / (self.heads / self.kv_heads);
            let columns = HeadColumns::dense(self.qk_dim);
            let length = span.queries.len();
            let mut state = init(window, head);
            let mut row0 = 0;
            while row0 < length {
                let rows = tile_rows(length).min(length - row0);
                let keys = row0 + rows;
                let first = span.queries.start;
                let q = self.q.slice(s![first + row0..first + keys, columns.of(head)]);
                let k = self.k.slice(s![first..first + keys, columns.of(kv_head)]);
                let mut tile = Array2::zeros((rows, keys));
                probability_tile(&mut tile.view_mut(), q, k, self.scale, row0, self.sliding_window, self.score_softcap);
                let probabilities = tile.view();
                fold(&mut state, ProbabilityTile { window, head, row0, window_start: first, probabilities });
                row0 = keys;
            }
            state
        };
        (0..windows.len() * self.heads).into_par_iter().map(work).collect()
    }

    /// Columns of query head `h` in `q`.
    pub fn query_columns(&self, h: usize) -> std::ops::Range<usize> {
        HeadColumns::dense(self.qk_dim).of(h)
    }

    /// KV head that query head `h` reads.
    pub fn kv_head(&self, h: usize) -> usize {
        h / (self.heads / self.kv_heads)
    }
}
