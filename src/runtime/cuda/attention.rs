//! Attention in one call, or in two where keys are cut into runs.

use super::kernels::{BLOCK_THREADS, Kernel};
use super::stream::Arg;
use super::{Cuda, CudaTensor};
use crate::runtime::accelerator::{Work, span_table};
use crate::runtime::{AttentionShape, Span};

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
    let work = Work::new(spans, group, tile);
    if work.items.is_empty() || width == 0 {
        return out;
    }
    let stream = &cuda.stream;
    let table = stream.filled(&span_table(spans));
    let items = stream.filled(&work.items);
    let direct = work.is_direct();
    // Results and heights of the runs.
    let part_rows = if direct { 0 } else { work.items.len() * shape.kv_heads * tile };
    let (parts, heights) = (cuda.scratch(part_rows, width), cuda.scratch(part_rows, 2));
    let constants = (width as u32, rows as u32);
    let (heads, kv_heads) = (Arg::Word(group as u32), Arg::Word(shape.kv_heads as u32));
    stream.launch(
        Kernel::Attention { width: constants.0, rows: constants.1 },
        (work.items.len(), shape.kv_heads, 1),
        BLOCK_THREADS,
        &[
            Arg::Memory(&table),
            Arg::Memory(&items),
            Arg::Memory(&q.memory),
            Arg::Memory(&k.memory),
            Arg::Memory(&v.memory),
            Arg::Memory(if direct { &out.memory } else { &parts.memory }),
            Arg::Memory(&heights.memory),
            heads,
            kv_heads,
            Arg::Word(shape.keys.width as u32),
            Arg::Float(shape.scale as f32),
            Arg::Float(cap.unwrap_or(0.0) as f32),
            Arg::Word(shape.sliding_window.unwrap_or(0) as u32),
            Arg::Word(direct.into()),
            Arg::Size(k.columns),
            Arg::Size(shape.keys.start),
            Arg::Size(shape.keys.stride),
            Arg::Size(v.columns),
            Arg::Size(shape.values.start),
            Arg::Size(shape.values.stride),
        ],
    );
    if !direct {
        let tiles = stream.filled(&work.tiles);
        stream.launch(
            Kernel::Combine { width: constants.0, rows: constants.1 },
            (work.tiles.len(), tile, shape.kv_heads),
            BLOCK_THREADS,
            &[
                Arg::Memory(&table),
                Arg::Memory(&tiles),
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
}
