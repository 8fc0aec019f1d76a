//! Causal softmax attention in tiles of query rows.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::elementwise::{softcap, softmax};
use super::{decode, gemm};
use crate::runtime::{AttentionShape, Span};

/// Scores per tile, at most, unless that leaves fewer than [`MIN_ROWS`] rows: 1 MiB, to stay in a core's cache.
const TILE_SCORES: usize = 1 << 18;
const MIN_ROWS: usize = 16;
const MAX_ROWS: usize = 64;

/// Query rows per tile for spans of up to `keys` keys.
pub(in crate::runtime) fn tile_rows(keys: usize) -> usize {
    (TILE_SCORES / keys.max(1)).clamp(MIN_ROWS, MAX_ROWS)
}

/// The probabilities of a tile of query rows of one head: `q [rows, d]`, `k [keys, d]`, to `[rows, keys]`.
///
/// Row `i` sees keys up to `last + i`, of which the `window` latest where there is one; the rest is zero. Scores are capped
/// where there is a `cap`.
pub(in crate::runtime) fn probability_tile(
    out: &mut ArrayViewMut2<'_, f32>,
    q: ArrayView2<'_, f32>,
    k: ArrayView2<'_, f32>,
    scale: f64,
    last: usize,
    window: Option<usize>,
    cap: Option<f64>,
) {
    gemm::serial(out.view_mut(), q, k.reversed_axes(), scale as f32);
    for (i, mut row) in out.rows_mut().into_iter().enumerate() {
        let Some(row) = row.as_slice_mut() else { continue };
        let end = last + i + 1;
        let start = window.map_or(0, |w| end.saturating_sub(w));
        if let Some(cap) = cap {
            softcap(&mut row[start..end], cap);
        }
        softmax(&mut row[start..end]);
        row[..start].fill(0.0);
        row[end..].fill(0.0);
    }
}

/// One unit of work: some query rows of one query head.
struct Task<'a> {
    /// `[rows, d_V]` of the result.
    out: ArrayViewMut2<'a, f32>,
    span: &'a Span,
    /// First query row within the span.
    row: usize,
    /// Query head.
    head: usize,
}

pub(super) fn attention(
    q: ArrayView2<'_, f32>,
    k: ArrayView2<'_, f32>,
    v: ArrayView2<'_, f32>,
    shape: &AttentionShape,
    cap: Option<f64>,
    spans: &[Span],
) -> Array2<f32> {
    if !spans.is_empty() && spans.iter().all(|span| span.queries.len() == 1) {
        return decode::attention(q, k, v, shape, cap, spans);
    }
    let (d, width) = (shape.keys.width, shape.values.width);
    let mut out = Array2::zeros((q.nrows(), shape.heads * width));
    let mut tasks = Vec::new();
    let mut rest = out.view_mut();
    let mut row = 0;
    for span in spans {
        debug_assert_eq!(span.queries.start, row);
        let (of_span, tail) = rest.split_at(Axis(0), span.queries.len());
        (rest, row) = (tail, span.queries.end);
        push_tasks(&mut tasks, of_span, span, shape);
    }
    tasks.into_par_iter().for_each(|task| {
        let rows = task.out.nrows();
        let kv_head = task.head / (shape.heads / shape.kv_heads);
        let last = task.span.keys.len() - task.span.queries.len() + task.row;
        // Keys that some row of the tile sees.
        let end = last + rows;
        let start = shape.sliding_window.map_or(0, |w| (last + 1).saturating_sub(w));
        let keys = task.span.keys.start + start..task.span.keys.start + end;
        let first = task.span.queries.start + task.row;
        let k = k.slice(s![keys.clone(), shape.keys.of(kv_head)]);
        let v = v.slice(s![keys, shape.values.of(kv_head)]);
        let q = q.slice(s![first..first + rows, task.head * d..(task.head + 1) * d]);
        let mut probabilities = Array2::zeros((rows, end - start));
        probability_tile(&mut probabilities.view_mut(), q, k, shape.scale, last - start, shape.sliding_window, cap);
        gemm::serial(task.out, probabilities.view(), v, 1.0);
    });
    out
}

fn push_tasks<'a>(tasks: &mut Vec<Task<'a>>, out: ArrayViewMut2<'a, f32>, span: &'a Span, shape: &AttentionShape) {
    let width = shape.values.width;
    let rows = tile_rows(span.keys.len());
    let mut rest = out;
    let mut row = 0;
    while row < span.queries.len() {
        let count = rows.min(span.queries.len() - row);
        let (tile, tail) = rest.split_at(Axis(0), count);
        rest = tail;
        let mut heads = tile;
        for head in 0..shape.heads {
            let (part, tail) = heads.split_at(Axis(1), width);
            heads = tail;
            tasks.push(Task { out: part, span, row, head });
        }
        row += count;
    }
}
