//! Cutting attention into blocks of threads: tiles of query rows, and runs of keys where there are too few rows to fill a
//! GPU.

use crate::runtime::Span;

/// Keys per run when a span has few rows, as in decoding. Fixed: sums do not depend on the device.
#[cfg(any(test, feature = "gpu"))]
pub(in crate::runtime) const RUN: usize = 256;

/// Whether the keys of a span are cut into runs: single queries, however many heads share the keys, and all that fit
/// into one tile of rows.
pub(in crate::runtime) fn cut_into_runs(span: &Span, group: usize, tile: usize) -> bool {
    span.queries.len() == 1 || span.queries.len() * group <= tile
}

/// What the blocks of one call do. A row is one query of one of the `group` heads that share a KV head.
#[derive(Debug, Default)]
pub(in crate::runtime) struct Work {
    /// Span, first row, first key, end of its keys.
    pub(in crate::runtime) items: Vec<[u32; 4]>,
    /// Span, first row, first item, items.
    pub(in crate::runtime) tiles: Vec<[u32; 4]>,
}

impl Work {
    /// Tiles of `tile` rows, and runs of `run` keys where there are runs.
    pub(in crate::runtime) fn new(spans: &[Span], group: usize, tile: usize, run: usize) -> Self {
        let mut work = Self::default();
        for (index, span) in spans.iter().enumerate() {
            let (rows, keys) = (span.queries.len() * group, span.keys.len());
            let run = if cut_into_runs(span, group, tile) { run } else { keys.max(1) };
            for row in (0..rows).step_by(tile) {
                let first = work.items.len();
                for key in (0..keys).step_by(run) {
                    work.items.push([index, row, key, keys.min(key + run)].map(|x| x as u32));
                }
                let items = work.items.len() - first;
                work.tiles.push([index, row, first, items].map(|x| x as u32));
            }
        }
        work
    }

    /// Whether every tile is one item, whose result is the tile's.
    pub(in crate::runtime) fn is_direct(&self) -> bool {
        self.items.len() == self.tiles.len()
    }
}

/// First query row, queries, first key row and keys of every span.
pub(in crate::runtime) fn span_table(spans: &[Span]) -> Vec<[u32; 4]> {
    let row = |s: &Span| [s.queries.start, s.queries.len(), s.keys.start, s.keys.len()].map(|x| x as u32);
    spans.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_meets_every_key_once() {
        let spans = [
            Span { queries: 0..1, keys: 0..700 },
            Span { queries: 1..5, keys: 700..1300 },
            Span { queries: 5..75, keys: 1300..1370 },
        ];
        for group in [1, 3, 40] {
            let work = Work::new(&spans, group, 16, RUN);
            for (index, span) in spans.iter().enumerate() {
                let mut seen = vec![0; span.queries.len() * group * span.keys.len()];
                for tile in work.tiles.iter().filter(|t| t[0] as usize == index) {
                    for item in &work.items[tile[2] as usize..][..tile[3] as usize] {
                        assert_eq!(item[..2], tile[..2]);
                        for row in tile[1] as usize..(tile[1] as usize + 16).min(span.queries.len() * group) {
                            (item[2]..item[3]).for_each(|key| seen[row * span.keys.len() + key as usize] += 1);
                        }
                    }
                }
                assert!(seen.iter().all(|n| *n == 1), "group {group}, span {index}");
            }
            assert!(!work.is_direct());
            assert!(work.items.iter().all(|i| i[0] != 0 || (i[3] - i[2]) as usize <= RUN));
        }
        assert!(Work::new(&Span::of_windows(&[30, 7]), 4, 16, RUN).is_direct());
    }
}
