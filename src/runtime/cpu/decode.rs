//! Attention of single query rows over long caches.
//!
//! The keys are cut into runs, each of which gives a part of the answer that knows its own softmax (largest score, sum);
//! the parts are put together in order. All query heads of a KV head work on a run at once, so the cache is read once.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::elementwise;
use super::simd::{self, Rows};
use crate::runtime::{AttentionShape, HeadColumns, Span};

/// Keys per run. Fixed, so that sums are cut the same way for any number of threads.
const RUN: usize = 512;

/// What some query heads make of one run of keys.
struct Part {
    /// Largest score of each head.
    max: Vec<f32>,
    /// Sum of `exp(score - max)` of each head.
    sum: Vec<f32>,
    /// `[heads, d_V]`: values weighted by `exp(score - max)`.
    mixed: Vec<f32>,
}

/// As [`super::attention::attention`], every span having one query row. `q`, `k` and `v` are in standard layout.
pub(super) fn attention(
    q: ArrayView2<'_, f32>,
    k: ArrayView2<'_, f32>,
    v: ArrayView2<'_, f32>,
    shape: &AttentionShape,
    cap: Option<f64>,
    spans: &[Span],
) -> Array2<f32> {
    let (d, width) = (shape.keys.width, shape.values.width);
    let group = shape.heads / shape.kv_heads;
    let mut out = Array2::zeros((q.nrows(), shape.heads * width));
    let (Some(q), Some(k_data), Some(v_data)) = (q.as_slice(), k.as_slice(), v.as_slice()) else { return out };
    let mut tasks = Vec::new();
    for span in spans {
        let seen = shape.sliding_window.map_or(0, |w| span.keys.len().saturating_sub(w));
        for kv_head in 0..shape.kv_heads {
            let first = span.keys.start + seen;
            tasks.extend(
                (first..span.keys.end)
                    .step_by(RUN)
                    .map(|key| (span.queries.start, kv_head, key..span.keys.end.min(key + RUN))),
            );
        }
    }
    let part = |(row, kv_head, keys): &(usize, usize, std::ops::Range<usize>)| {
        let rows = |data, columns: usize, of: HeadColumns| part_of(data, columns, of, *kv_head, keys);
        let q = &q[(row * shape.heads + kv_head * group) * d..][..group * d];
        let q = Rows { data: q, stride: d, width: d, count: group };
        run(q, rows(k_data, k.ncols(), shape.keys), rows(v_data, v.ncols(), shape.values), shape.scale, cap)
    };
    let parts: Vec<Part> = tasks.par_iter().map(part).collect();
    if let Some(out) = out.as_slice_mut() {
        let same = |a: &(usize, usize, _), b: &(usize, usize, _)| (a.0, a.1) == (b.0, b.1);
        let mut parts = parts.as_slice();
        for of_head in tasks.chunk_by(same) {
            let (own, rest) = parts.split_at(of_head.len());
            parts = rest;
            let (row, kv_head, _) = &of_head[0];
            let to = &mut out[(row * shape.heads + kv_head * group) * width..][..group * width];
            for (h, to) in to.chunks_exact_mut(width).enumerate() {
                join(to, own, h);
            }
        }
    }
    out
}

/// Some keys of one KV head.
fn part_of<'a>(
    data: &'a [f32],
    columns: usize,
    of: HeadColumns,
    head: usize,
    keys: &std::ops::Range<usize>,
) -> Rows<'a> {
    let first = keys.start * columns + of.of(head).start;
    Rows { data: &data[first..], stride: columns, width: of.width, count: keys.len() }
}

fn run(q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, scale: f64, cap: Option<f64>) -> Part {
    let (heads, keys) = (q.count, k.count);
    let mut scores = vec![0.0; heads * keys];
    simd::dots(&mut scores, keys, q, k, scale as f32);
    let (mut max, mut sum) = (Vec::with_capacity(heads), Vec::with_capacity(heads));
    for row in scores.chunks_exact_mut(keys) {
        if let Some(cap) = cap {
            elementwise::softcap(row, cap);
        }
        let (m, s) = elementwise::exponentials(row);
        max.push(m);
        sum.push(s);
    }
    let mut mixed = vec![0.0; heads * v.width];
    if v.width > 0 {
        simd::mix(&mut mixed, &scores, keys, v);
    }
    Part { max, sum, mixed }
}

/// Put the parts of head `h` together.
fn join(out: &mut [f32], parts: &[Part], h: usize) {
    let max = parts.iter().map(|p| p.max[h]).fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for part in parts {
        // NaN scores give a NaN sum, whatever the largest is.
        let weight = elementwise::exp(part.max[h] - max);
        total += weight * part.sum[h];
        let width = out.len();
        for (to, from) in out.iter_mut().zip(&part.mixed[h * width..]) {
            *to += weight * from;
        }
    }
    let inverse = 1.0 / total;
    out.iter_mut().for_each(|x| *x *= inverse);
}
