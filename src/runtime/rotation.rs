//! Cosines and sines of a range of positions.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use super::HeadColumns;
use crate::arch::{Rope, RopeLayout};

/// Number of the next table; 0 is the empty one.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Rotary embedding tabulated for a range of positions.
#[derive(Debug, Clone)]
pub struct Rotation {
    id: u64,
    first: usize,
    pairs: usize,
    layout: RopeLayout,
    /// `(cos, sin)`, each times the amplitude, `[positions, pairs]`.
    table: Vec<(f32, f32)>,
}

impl Rotation {
    /// Tabulate `rope` at `positions`, with the frequencies of a sequence that ends there.
    ///
    /// The angle is the f32 product of position and frequency, as every stock runtime computes it: at position 8000 its
    /// rounding turns the fastest pair by up to 2^-12 radians, so a more accurate angle would be a different model.
    pub fn new(rope: &Rope, positions: Range<usize>) -> Self {
        let length = positions.end;
        Self::for_length(rope, positions, length)
    }

    /// As [`Rotation::new`], with the frequencies of a sequence of `length` tokens.
    pub fn for_length(rope: &Rope, positions: Range<usize>, length: usize) -> Self {
        let amplitude = rope.amplitude as f32;
        let (first, pairs) = (positions.start, rope.inv_freq.len());
        let mut table = Vec::with_capacity(positions.len() * pairs);
        let frequencies = rope.at_length(length);
        for position in positions {
            for &frequency in frequencies {
                let angle = position as f32 * frequency as f32;
                let (sin, cos) = f64::from(angle).sin_cos();
                table.push((cos as f32 * amplitude, sin as f32 * amplitude));
            }
        }
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), first, pairs, layout: rope.layout, table }
    }

    /// Tables of one process with equal numbers are equal: devices know by it what they have already.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Which coordinates form a pair.
    pub fn layout(&self) -> RopeLayout {
        self.layout
    }

    /// Rotated width, twice the number of pairs.
    pub fn width(&self) -> usize {
        2 * self.pairs
    }

    /// First position of the table.
    pub fn first(&self) -> usize {
        self.first
    }

    /// `(cos, sin)` of all pairs, position after position from [`Rotation::first`].
    pub fn table(&self) -> &[(f32, f32)] {
        &self.table
    }

    /// `(cos, sin)` of each pair at a position of the table.
    pub fn at(&self, position: usize) -> &[(f32, f32)] {
        let row = position - self.first;
        &self.table[row * self.pairs..(row + 1) * self.pairs]
    }

    /// Turn `head`, `[width]`, by the angles of one position.
    pub fn turn(&self, head: &mut [f32], position: usize) {
        let angles = self.at(position);
        match self.layout {
            RopeLayout::Half => {
                let (left, right) = head.split_at_mut(self.pairs);
                for ((a, b), (cos, sin)) in left.iter_mut().zip(right).zip(angles) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
            RopeLayout::Interleaved => {
                for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(angles) {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * cos - b * sin;
                    pair[1] = b * cos + a * sin;
                }
            }
        }
    }

    /// Turn every head of every token of windows that lie under each other, `x [T, heads * width]`, each window from
    /// position 0.
    ///
    /// # Panics
    /// If the table does not start at position 0 or a window is longer than it.
    pub fn turn_windows(&self, x: &mut Array2<f32>, windows: &[usize]) {
        self.turn_columns(x, windows, HeadColumns::dense(self.width()));
    }

    /// The same where heads are `columns.stride` wide and only `columns.width` of them, the rotation's own width, turn.
    ///
    /// # Panics
    /// As [`Rotation::turn_windows`].
    pub fn turn_columns(&self, x: &mut Array2<f32>, windows: &[usize], columns: HeadColumns) {
        if columns.width == 0 {
            return;
        }
        assert_eq!((self.first, columns.width), (0, self.width()), "windows start at position 0, and all pairs turn");
        let positions: Vec<usize> = windows.iter().flat_map(|&n| 0..n).collect();
        x.axis_iter_mut(Axis(0)).into_par_iter().zip(positions).for_each(|(mut row, position)| {
            if let Some(row) = row.as_slice_mut() {
                for head in row.chunks_exact_mut(columns.stride) {
                    self.turn(&mut head[columns.start..columns.start + columns.width], position);
                }
            }
        });
    }

    /// Rotation by the opposite angles: the transpose, and where the amplitude is 1 the inverse.
    #[must_use]
    pub fn reversed(&self) -> Self {
        let table = self.table.iter().map(|&(cos, sin)| (cos, -sin)).collect();
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), table, ..*self }
    }
}
