//! Attention in as few calls as kernels can see the rows of.

use std::ops::Range;

use super::kernels::{ATTENTION_ROWS, Kernel};
use super::{Gpu, GpuTensor, ROWS, whole};
use crate::runtime::accelerator::{RUN, Work, cut_into_runs, span_table, words};
use crate::runtime::{AttentionShape, Span};

pub(super) fn attention(
    gpu: &Gpu,
    q: &GpuTensor,
    k: &GpuTensor,
    v: &GpuTensor,
    shape: &AttentionShape,
    spans: &[Span],
) -> GpuTensor {
    let out = gpu.scratch(q.rows, shape.heads * shape.values.width);
    let mut first = 0;
    while first < spans.len() {
        // As many spans as kernels can see at once: all of them, but on the smallest devices.
        let mut last = first + 1;
        while last < spans.len() && fits(gpu, (q, k, v, &out), shape, &spans[first..last + 1]) {
            last += 1;
        }
        if last == first + 1 && !fits(gpu, (q, k, v, &out), shape, &spans[first..last]) {
            gpu.queue.refuse(format!("attention over {} tokens at once", spans[first].keys.len()));
            return out;
        }
        group(gpu, q, k, v, shape, &spans[first..last], &out);
        first = last;
    }
    out
}

/// Rows from the first to the last, the first being where a kernel's view may begin.
fn hull(rows: impl Iterator<Item = Range<usize>> + Clone) -> Range<usize> {
    let start = rows.clone().map(|r| r.start).min().unwrap_or(0) / ROWS * ROWS;
    start..rows.map(|r| r.end).max().unwrap_or(start)
}

fn fits(
    gpu: &Gpu,
    (q, k, v, out): (&GpuTensor, &GpuTensor, &GpuTensor, &GpuTensor),
    shape: &AttentionShape,
    spans: &[Span],
) -> bool {
    let (queries, keys) = (hull(spans.iter().map(|s| s.queries.clone())), hull(spans.iter().map(|s| s.keys.clone())));
    let bytes = |rows: &Range<usize>, t: &GpuTensor| rows.len() as u64 * t.row_bytes();
    // What `combine` reads, where spans are cut into runs.
    let group = shape.heads / shape.kv_heads;
    let items = |s: &Span| {
        let runs = if cut_into_runs(s, group, ATTENTION_ROWS) { s.keys.len().div_ceil(RUN) } else { 1 };
        (s.queries.len() * group).div_ceil(ATTENTION_ROWS) * runs
    };
    let cut = spans.iter().any(|s| cut_into_runs(s, group, ATTENTION_ROWS) && s.keys.len() > RUN);
    let items = if cut { spans.iter().map(items).sum() } else { 0 };
    let parts = (items * shape.kv_heads * ATTENTION_ROWS * shape.values.width * 4) as u64;
    let largest = [bytes(&queries, q), bytes(&queries, out), bytes(&keys, k), bytes(&keys, v), parts];
    largest.into_iter().all(|bytes| bytes <= gpu.queue.binding_bytes())
}

fn group(
    gpu: &Gpu,
    q: &GpuTensor,
    k: &GpuTensor,
    v: &GpuTensor,
    shape: &AttentionShape,
    spans: &[Span],
    out: &GpuTensor,
) {
    let heads_each = shape.heads / shape.kv_heads;
    let work = Work::new(spans, heads_each, ATTENTION_ROWS, RUN);
    if work.items.is_empty() {
        return;
    }
    let (queries, keys) = (hull(spans.iter().map(|s| s.queries.clone())), hull(spans.iter().map(|s| s.keys.clone())));
    let width = shape.values.width;
    let direct = work.is_direct();
    let table = gpu.queue.filled(bytemuck::cast_slice(span_table(spans).as_flattened()));
    let items = gpu.queue.filled(bytemuck::cast_slice(work.items.as_flattened()));
    let parts = work.items.len() * shape.kv_heads * ATTENTION_ROWS;
    let (result, heights) = match direct {
        true => (None, gpu.scratch(1, 2)),
        false => (Some(gpu.scratch(parts, width)), gpu.scratch(parts, 2)),
    };
    let ((across, down, _), first) = gpu.spread(work.items.len());
    let mut params = words(
        [
            [heads_each, shape.kv_heads, shape.keys.width, 0],
            [queries.start, keys.start, shape.sliding_window.unwrap_or(0), usize::from(direct)],
            [k.columns, shape.keys.start, shape.keys.stride, first as usize],
            [v.columns, shape.values.start, shape.values.stride, work.items.len()],
        ]
        .into_iter()
        .flatten(),
    );
    params[3] = (shape.scale as f32).to_bits();
    let buffers = [
        whole(&table),
        whole(&items),
        q.part(queries.clone()),
        k.part(keys.clone()),
        v.part(keys),
        result.as_ref().map_or_else(|| out.part(queries.clone()), GpuTensor::all),
        heights.all(),
    ];
    gpu.queue.dispatch(Kernel::Attention { width: width as u32 }, &buffers, &params, (across, down, shape.kv_heads));
    if let Some(result) = &result {
        let tiles = gpu.queue.filled(bytemuck::cast_slice(work.tiles.as_flattened()));
        let buffers = [whole(&table), whole(&tiles), result.all(), heights.all(), out.part(queries.clone())];
        let params = words([heads_each, shape.kv_heads, queries.start, work.tiles.len()].into_iter());
        let groups = (work.tiles.len(), ATTENTION_ROWS, shape.kv_heads);
        gpu.queue.dispatch(Kernel::Combine { width: width as u32 }, &buffers, &params, groups);
    }
}
