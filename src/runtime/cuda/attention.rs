//! Attention in one call, or in two where keys are cut into runs.

use std::sync::{Arc, PoisonError};

use super::kernels::{AttentionConstants, BLOCK_THREADS, Kernel};
use super::stream::{Arg, Memory};
use super::{Cuda, CudaTensor};
use crate::runtime::accelerator::{Work, cut_into_runs, span_table};
use crate::runtime::{AttentionShape, HeadColumns, Span};

/// What to run. Depends on shapes alone.
///
/// Rows per thread are as many as there are, unless that takes more registers than a thread has. With few rows every warp
/// has its own: up to four, which pay for what it reads.
fn choose(spans: &[Span], shape: &AttentionShape, fours: bool) -> AttentionConstants {
    let (group, width) = (shape.heads / shape.kv_heads, shape.values.width);
    let rows = |s: &Span| s.queries.len() * group;
    let most = spans.iter().map(rows).max().unwrap_or(0);
    let few = spans.iter().all(|s| cut_into_runs(s, group, 32));
    let rows = match (few, width) {
        (true, 0..=512) if most > 16 => 8,
        // As few for each as serve all in as many warps.
        (true, 0..=1024) if most < 16 => most.div_ceil(most.div_ceil(4)),
        (true, 0..=1024) => 4,
        (true, 1025..=2048) => 2,
        (true, _) => 1,
        (false, 0..=128) => most.div_ceil(16).next_power_of_two().min(4),
        (false, 129..=512) => 2,
        (false, _) => 1,
    };
    AttentionConstants { few, width: width as u32, rows: rows as u32, fours }
}

/// Blocks that fill a large card, with others to go on while one waits for memory. Fixed, and not asked of the card: sums
/// do not depend on it.
const BLOCKS: usize = 400;
/// Keys of the shortest and longest run, and what a run is a multiple of.
const RUNS: (usize, usize, usize) = (128, 512, 128);

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
    let by_four = |columns: HeadColumns| (columns.start | columns.stride | columns.width).is_multiple_of(4);
    let fours = by_four(shape.keys) && by_four(shape.values) && (k.columns | v.columns).is_multiple_of(4);
    let constants = choose(spans, shape, fours);
    let tile = constants.tile() as usize;
    let plan = Plan::of(cuda, spans, shape, tile);
    if plan.items.1 == 0 || width == 0 {
        return out;
    }
    let stream = &cuda.stream;
    // Results and heights of the runs.
    let part_rows = if plan.direct { 0 } else { plan.items.1 * shape.kv_heads * tile };
    let (parts, heights) = (cuda.scratch(part_rows, width), cuda.scratch(part_rows, 2));
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

    fn decode(n: usize, keys: usize) -> Vec<Span> {
        (0..n).map(|i| Span { queries: i..i + 1, keys: i * keys..(i + 1) * keys }).collect()
    }

    fn shape(heads: usize, kv_heads: usize, width: usize) -> AttentionShape {
        let dense = HeadColumns::dense(width);
        AttentionShape { heads, kv_heads, keys: dense, values: dense, scale: 1.0, sliding_window: None }
    }

    #[test]
    fn threads_take_more_rows_where_there_are_more_and_registers_allow_it() {
        let of = |spans: &[Span], group, width| {
            let chosen = choose(spans, &shape(group, 1, width), true);
            (chosen.few, chosen.rows)
        };
        let prefill = Span::of_windows(&[3, 100]);
        assert_eq!(of(&prefill, 1, 64), (false, 4));
        assert_eq!(of(&prefill, 1, 512), (false, 2));
        assert_eq!(of(&prefill, 1, 576), (false, 1));
        assert_eq!(of(&decode(2, 900), 3, 64), (true, 3));
        assert_eq!(of(&decode(2, 900), 9, 512), (true, 3));
        assert_eq!(of(&decode(2, 900), 16, 512), (true, 4));
        assert_eq!(of(&decode(2, 900), 32, 512), (true, 8));
        assert_eq!(of(&decode(2, 900), 128, 576), (true, 4));
        assert_eq!(of(&decode(2, 900), 128, 2048), (true, 2));
    }

    #[test]
    fn runs_are_as_long_as_leaves_enough_of_them() {
        assert_eq!(run_length(&decode(1, 1000), &shape(32, 1, 64), 32), 128);
        assert_eq!(run_length(&decode(1, 100_000), &shape(32, 1, 64), 32), 256);
        assert_eq!(run_length(&decode(1, 32_768), &shape(32, 8, 64), 16), 512);
        assert_eq!(run_length(&decode(16, 8192), &shape(32, 1, 64), 32), 384);
        assert_eq!(run_length(&[], &shape(32, 1, 64), 32), 128);
    }
}
