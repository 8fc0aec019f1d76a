//! What calibration reads of an attention layer.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
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
    /// Room for what is worked out of them, of the same shape, in standard layout. What it holds at first means nothing.
    pub scratch: ArrayViewMut2<'a, f32>,
}

/// What makes scores of products of queries and keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scoring {
    /// What multiplies `<q, k>`.
    pub scale: f64,
    /// Sliding window in tokens.
    pub sliding_window: Option<usize>,
    /// Cap of the scores.
    pub cap: Option<f64>,
}

/// Memory of a tile and its scratch, kept from one tile to the next.
#[derive(Debug, Default)]
pub(crate) struct TileRoom(Vec<f32>);

/// Causal attention probabilities of one head in one window, tile by tile in order of query rows: `each` gets the first
/// query of a tile, its probabilities and its scratch, as [`ProbabilityTile`] has them. `q`, `k` `[length, d]`.
pub(crate) fn probability_tiles(
    (q, k): (ArrayView2<'_, f32>, ArrayView2<'_, f32>),
    scoring: &Scoring,
    room: &mut TileRoom,
    each: impl FnMut(usize, ArrayView2<'_, f32>, ArrayViewMut2<'_, f32>),
) {
    some_probability_tiles((q, k), scoring, usize::MAX, room, each);
}

/// Rows of each tile that about `queries` queries of a window of `length` make, at most: every so many tiles, the last among
/// them.
pub(crate) fn query_tiles(length: usize, queries: usize) -> impl Iterator<Item = Range<usize>> {
    let of_tile = tile_rows(length);
    let tiles = length.div_ceil(of_tile);
    let every = tiles.div_ceil((queries / of_tile).max(1)).max(1);
    let chosen = (tiles.saturating_sub(1) % every..tiles).step_by(every);
    chosen.map(move |tile| tile * of_tile..length.min((tile + 1) * of_tile))
}

/// As [`probability_tiles`], of the tiles that [`query_tiles`] has.
fn some_probability_tiles(
    (q, k): (ArrayView2<'_, f32>, ArrayView2<'_, f32>),
    scoring: &Scoring,
    queries: usize,
    room: &mut TileRoom,
    mut each: impl FnMut(usize, ArrayView2<'_, f32>, ArrayViewMut2<'_, f32>),
) {
    for tile in query_tiles(q.nrows(), queries) {
        let (row0, rows, keys) = (tile.start, tile.len(), tile.end);
        let size = rows * keys;
        if room.0.len() < 2 * size {
            room.0.resize(2 * size, 0.0);
        }
        let (tile, scratch) = room.0.split_at_mut(size);
        let tile = ArrayViewMut2::from_shape((rows, keys), tile);
        let scratch = ArrayViewMut2::from_shape((rows, keys), &mut scratch[..size]);
        let (Ok(mut tile), Ok(scratch)) = (tile, scratch) else { unreachable!("both slices are of that size") };
        let (q, k) = (q.slice(s![row0..keys, ..]), k.slice(s![..keys, ..]));
        probability_tile(&mut tile, q, k, scoring.scale, row0, scoring.sliding_window, scoring.cap);
        each(row0, tile.view(), scratch);
    }
}

impl Qkv {
    /// Fold the attention probabilities of every (window, head), tile by tile in order of query rows.
    ///
    /// `states` are accumulators in the order `window * heads + head`, `fold` adds a tile to one. Runs in parallel over
    /// (window, head), each alone, and returns them in that order whatever the number of threads, so that the caller can
    /// add them up in a fixed order. Memory beyond the accumulators is one tile and its scratch per thread.
    ///
    /// # Panics
    /// If there is not one accumulator for each.
    pub fn fold_probabilities<A: Send>(
        &self,
        windows: &[usize],
        states: Vec<A>,
        fold: impl Fn(&mut A, ProbabilityTile<'_>) + Sync,
    ) -> Vec<A> {
        self.fold_some_probabilities(windows, usize::MAX, states, fold)
    }

    /// As [`Qkv::fold_probabilities`], of about `queries` queries of each window at most, evenly spread in tiles.
    ///
    /// # Panics
    /// If there is not one accumulator for each.
    pub fn fold_some_probabilities<A: Send>(
        &self,
        windows: &[usize],
        queries: usize,
        states: Vec<A>,
        fold: impl Fn(&mut A, ProbabilityTile<'_>) + Sync,
    ) -> Vec<A> {
        assert_eq!(states.len(), windows.len() * self.heads, "accumulators of windows and heads");
        let spans = Span::of_windows(windows);
        let scoring = Scoring { scale: self.scale, sliding_window: self.sliding_window, cap: self.score_softcap };
        let columns = HeadColumns::dense(self.qk_dim);
        let work = |room: &mut TileRoom, (index, mut state): (usize, A)| {
            let (window, head) = (index / self.heads, index % self.heads);
            let rows = spans[window].queries.clone();
            let window_start = rows.start;
            let q = self.q.slice(s![rows.clone(), columns.of(head)]);
            let k = self.k.slice(s![rows, columns.of(self.kv_head(head))]);
            some_probability_tiles((q, k), &scoring, queries, room, |row0, probabilities, scratch| {
                fold(&mut state, ProbabilityTile { window, head, row0, window_start, probabilities, scratch });
            });
            state
        };
        states.into_par_iter().enumerate().map_init(TileRoom::default, work).collect()
    }

    /// Columns of query head `h` in `q`.
    pub fn query_columns(&self, h: usize) -> Range<usize> {
        HeadColumns::dense(self.qk_dim).of(h)
    }

    /// KV head that query head `h` reads.
    pub fn kv_head(&self, h: usize) -> usize {
        h / (self.heads / self.kv_heads)
    }
}
