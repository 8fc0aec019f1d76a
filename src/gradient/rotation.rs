//! Rotary embedding of heads in windows that start at position 0.

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use super::product::Real;
use crate::arch::RopeLayout;
use crate::runtime::Rotation;

/// Turn every head of every token, `x` `[T, heads * width]` with the rotation's width; with `inverse` by the opposite angles,
/// which is the transpose.
///
/// # Panics
/// If a window is longer than the rotation's table.
pub(crate) fn turn_windows<T: Real>(rotation: &Rotation, x: &mut Array2<T>, windows: &[usize], inverse: bool) {
    let width = rotation.width();
    if width == 0 {
        return;
    }
    let pairs = width / 2;
    let positions: Vec<usize> = windows.iter().flat_map(|&n| 0..n).collect();
    x.axis_iter_mut(Axis(0)).into_par_iter().zip(positions).for_each(|(mut row, position)| {
        let Some(row) = row.as_slice_mut() else { return };
        for head in row.chunks_exact_mut(width) {
            for (p, &(cos, sin)) in rotation.at(position).iter().enumerate() {
                let sin = if inverse { -sin } else { sin };
                let (cos, sin) = (T::from_f64(f64::from(cos)), T::from_f64(f64::from(sin)));
                let (i, j) = match rotation.layout() {
                    RopeLayout::Interleaved => (2 * p, 2 * p + 1),
                    RopeLayout::Half => (p, p + pairs),
                };
                (head[i], head[j]) = (head[i] * cos - head[j] * sin, head[j] * cos + head[i] * sin);
            }
        }
    });
}
