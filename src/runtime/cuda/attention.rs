//! Attention in one call, or in two where keys are cut into runs.

use std::sync::{Arc, PoisonError};

use super::kernels::{AttentionConstants, BLOCK_THREADS, Kernel};
use super::stream::{Arg, Memory};
use super::{Cuda, CudaTensor};
use crate::runtime::accelerator::{Work, span_table};
use crate::runtime::{AttentionShape, HeadColumns, Span};

/// Rows of a block for each row of a thread.
const BLOCK_ROWS: usize = 16;

/// Rows per thread: as many as there are, unless that takes more registers than a thread has. Depends on shapes alone.
fn thread_rows(spans: &[Span], group: usize, width: usize) -> usize {
    let most = spans.iter().map(|s| s.queries.len() * group).max().unwrap_or(0);
    let fit = match width {
        0..=128 => 4,
        129..=512 => 2,
        _ => 1,
    };
    most.div_ceil(BLOCK_ROWS).next_power_of_two().min(fit)
}

/// Blocks that fill a large card, with others to go on while one waits for memory. Fixed, and not asked of the card: sums
/// do not depend on it.
const BLOCKS: usize = 400;
/// Keys of the shortest and longest run, and what a run is a multiple of.
const RUNS: (usize, usize, usize) = (32, 512, 32);

/// Keys per run where there are few rows: short enough to fill a card, long enough to spare adding up.
fn run_length(spans: &[Span], shape: &AttentionShape, tile: usize) -> usize {
    let group = shape.heads / shape.kv_heads;
    let keys: usize = spans.iter().map(|s| s.keys.len() * (s.queries.len() * group).div_ceil(tile)).sum();
    (keys * shape.kv_heads / BLOCKS).next_multiple_of(RUNS.2).clamp(RUNS.0, RUNS.1)
}

/// The tables of one call. The layers of a model share them.
#[derive(Debug)]
pub(super) struct Plan {
    spans: Vec<Span>,
    shape: (usize, usize, usize),
    spans_there: Memory,
    items: (Memory, usize),
    tiles: (Memory, usize),
    direct: bool,
}

impl Plan {
    fn new(cuda: &Cuda, spans: &[Span], shape: &AttentionShape, tile: usize) -> Self {
        let group = shape.heads / shape.kv_heads;
        let work = Work::new(spans, group, tile, run_length(spans, shape, tile));
        let stream = &cuda.stream;
        Self {
            spans: spans.to_vec(),
            shape: (shape.heads, shape.kv_heads, tile),
            spans_there: stream.filled(&span_table(spans)),
            items: (stream.filled(&work.items), work.items.len()),
            tiles: (stream.filled(&work.tiles), work.tiles.len()),
            direct: work.is_direct(),
        }
    }

    /// That of the last call, if it would be the same.
    fn of(cuda: &Cuda, spans: &[Span], shape: &AttentionShape, tile: usize) -> Arc<Self> {
        let mut last = cuda.plan.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(same) if same.spans == spans && same.shape == (shape.heads, shape.kv_heads, tile) => Arc::clone(same),
            _ => Arc::clone(last.insert(Arc::new(Self::new(cuda, spans, shape, tile)))),
        }
    }
}

pub(super) fn attention(
    cuda: &Cuda,
    (q, k, v): (&CudaTensor, &CudaTensor, &CudaTensor),
    shape: &AttentionShape,
    cap: Option<f64>,
    spans: &[Span],
) -> CudaTensor {
    let width = shape.values.width;
    let out = cuda.scratch(q.rows, shape.heads * width);
    let group = shape.heads / shape.kv_heads;
    let rows = thread_rows(spans, group, width);
    let tile = rows * BLOCK_ROWS;
    let plan = Plan::of(cuda, spans, shape, tile);
    if plan.items.1 == 0 || width == 0 {
        return out;
    }
    let stream = &cuda.stream;
    // Results and heights of the runs.
    let part_rows = if plan.direct { 0 } else { plan.items.1 * shape.kv_heads * tile };
    let (parts, heights) = (cuda.scratch(part_rows, width), cuda.scratch(part_rows, 2));
    let by_four = |columns: HeadColumns| (columns.start | columns.stride | columns.width) % 4 == 0;
    let fours = by_four(shape.keys) && by_four(shape.values) && (k.columns | v.columns) % 4 == 0;
    let constants = AttentionConstants { width: width as u32, rows: rows as u32, fours };
    let (heads, kv_heads) = (Arg::Word(group as u32), Arg::Word(shape.kv_heads as u32));
    stream.launch(
        Kernel::Attention(constants),
        (plan.items.1, shape.kv_heads, 1),
        BLOCK_THREADS,
        &[
            Arg::Memory(&plan.spans_there),
            Arg::Memory(&plan.items.0),
            Arg::Memory(&q.memory),
            Arg::Memory(&k.memory),
            Arg::Memory(&v.memory),
            Arg::Memory(if plan.direct { &out.memory } else { &parts.memory }),
            Arg::Memory(&heights.memory),
            heads,
            kv_heads,
            Arg::Word(shape.keys.width as u32),
            Arg::Float(shape.scale as f32),
            Arg::Float(cap.unwrap_or(0.0) as f32),
            Arg::Word(shape.sliding_window.unwrap_or(0) as u32),
            Arg::Word(plan.direct.into()),
            Arg::Size(k.columns),
            Arg::Size(shape.keys.start),
            Arg::Size(shape.keys.stride),
            Arg::Size(v.columns),
            Arg::Size(shape.values.start),
            Arg::Size(shape.values.stride),
        ],
    );
    if !plan.direct {
        stream.launch(
            Kernel::Combine(constants),
            (plan.tiles.1, tile, shape.kv_heads),
            BLOCK_THREADS,
            &[
                Arg::Memory(&plan.spans_there),
                Arg::Memory(&plan.tiles.0),
                Arg::Memory(&parts.memory),
                Arg::Memory(&heights.memory),
                Arg::Memory(&out.memory),
                heads,
                kv_heads,
            ],
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_take_more_rows_where_there_are_more_and_registers_allow_it() {
        let prefill = Span::of_windows(&[3, 100]);
        let decode = [Span { queries: 0..1, keys: 0..900 }];
        assert_eq!(thread_rows(&prefill, 1, 64), 4);
        assert_eq!(thread_rows(&prefill, 1, 512), 2);
        assert_eq!(thread_rows(&prefill, 1, 576), 1);
        assert_eq!(thread_rows(&decode, 9, 512), 1);
        assert_eq!(thread_rows(&decode, 32, 512), 2);
        assert_eq!(thread_rows(&[], 3, 8), 1);
    }

    #[test]
    fn runs_are_as_long_as_leaves_enough_of_them() {
        let dense = HeadColumns::dense(64);
        let shape = |heads, kv_heads| AttentionShape {
            heads,
            kv_heads,
            keys: dense,
            values: dense,
            scale: 1.0,
            sliding_window: None,
        };
        let decode = |n: usize, keys: usize| -> Vec<Span> {
            (0..n).map(|i| Span { queries: i..i + 1, keys: i * keys..(i + 1) * keys }).collect()
        };
        assert_eq!(run_length(&decode(1, 1000), &shape(32, 1), 32), 32);
        assert_eq!(run_length(&decode(1, 32_768), &shape(32, 1), 32), 96);
        assert_eq!(run_length(&decode(1, 32_768), &shape(32, 8), 16), 512);
        assert_eq!(run_length(&decode(16, 8192), &shape(32, 1), 32), 352);
        assert_eq!(run_length(&[], &shape(32, 1), 32), 32);
    }
}
