//! The forward pass of one latent attention block, with what the backward pass needs of it.
//!
//! With `R` the rotation of a token's position and `M` the causal mask, per window and head:
//!
//! ```text
//! c = x latent^T        k_h = c k_up_h^T       v_h = c v_up_h^T
//! q_h = x q_nope_h^T    qr_h = R (x q_rope_h^T)    kr = R (x k_rope^T), shared by all heads
//! P_h = softmax(scale (q_h k_h^T + qr_h kr^T) + M)     o_h = P_h v_h     y = [o_1, ..., o_H] wo^T
//! ```
//!
//! Values are expanded before they are pooled (`P v` rather than `(P c) v_up^T`): the same function, and cheaper where
//! `d_V < r`.

use faer::Accum;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::product::{Real, product};
use super::tensors::Tensors;
use crate::mla::MlaLayer;
use crate::runtime::Rotation;

/// Query rows per tile of scores; keys after the last row of a tile are skipped.
const TILE_ROWS: usize = 64;

/// What is not trained.
#[derive(Debug)]
pub(super) struct Block {
    pub heads: usize,
    pub scale: f64,
    pub rotation: Rotation,
}

impl Block {
    /// Of `layer`, for windows of up to `longest` tokens.
    pub fn new(layer: &MlaLayer, longest: usize) -> Self {
        Self { heads: layer.heads, scale: layer.score_scale, rotation: layer.rotation(longest) }
    }

    /// Turn interleaved pairs of every head of every token, backwards with `inverse`: that is the transpose.
    pub fn rotate<T: Real>(&self, x: &mut Array2<T>, windows: &[usize], inverse: bool) {
        let width = self.rotation.width();
        if width == 0 {
            return;
        }
        let positions: Vec<usize> = windows.iter().flat_map(|&n| 0..n).collect();
        x.axis_iter_mut(Axis(0)).into_par_iter().zip(positions).for_each(|(mut row, position)| {
            let Some(row) = row.as_slice_mut() else { return };
            for head in row.chunks_exact_mut(width) {
                for (pair, &(cos, sin)) in head.chunks_exact_mut(2).zip(self.rotation.at(position)) {
                    let sin = if inverse { -sin } else { sin };
                    let (cos, sin) = (T::from_f64(f64::from(cos)), T::from_f64(f64::from(sin)));
                    (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
                }
            }
        });
    }

    /// (window, head) tasks in a fixed order: `(first row, rows, head)`.
    pub fn tasks(&self, windows: &[usize]) -> Vec<(usize, usize, usize)> {
        let mut start = 0;
        let mut tasks = Vec::with_capacity(windows.len() * self.heads);
        for &length in windows {
            tasks.extend((0..self.heads).map(|h| (start, length, h)));
            start += length;
        }
        tasks
    }

    /// Cut `a` `[T, H w]` into `[length, w]` blocks in the order of [`Block::tasks`].
    pub fn blocks_mut<'a, T>(&self, a: &'a mut Array2<T>, windows: &[usize]) -> Vec<ArrayViewMut2<'a, T>> {
        let width = a.ncols() / self.heads.max(1);
        let mut blocks = Vec::with_capacity(windows.len() * self.heads);
        let mut rest = a.view_mut();
        for &length in windows {
            let (mut window, below) = rest.split_at(Axis(0), length);
            rest = below;
            for _ in 0..self.heads {
                let (block, right) = window.split_at(Axis(1), width);
                window = right;
                blocks.push(block);
            }
        }
        blocks
    }
}

/// Some windows of tokens, one under the other.
#[derive(Debug)]
pub(super) struct Batch<T> {
    /// `[T, D]`.
    pub x: Array2<T>,
    /// What queries are projected from where that is not `x`: the query latent, `[T, r_q]`.
    pub query: Option<Array2<T>>,
    pub windows: Vec<usize>,
}

impl<T> Batch<T> {
    pub fn query_input(&self) -> &Array2<T> {
        self.query.as_ref().unwrap_or(&self.x)
    }
}

/// Intermediate results, named as in the module's formulas.
#[derive(Debug)]
pub(super) struct Trace<T> {
    pub latent: Array2<T>,
    pub q_nope: Array2<T>,
    pub q_rope: Array2<T>,
    pub k_nope: Array2<T>,
    pub k_rope: Array2<T>,
    pub values: Array2<T>,
    /// Head outputs `[T, H d_V]`.
    pub heads: Array2<T>,
    /// `[T, D]`.
    pub output: Array2<T>,
}

/// Queries, keys and values of one head in one window.
pub(super) struct HeadViews<'a, T> {
    pub q_nope: ArrayView2<'a, T>,
    pub q_rope: ArrayView2<'a, T>,
    pub k_nope: ArrayView2<'a, T>,
    pub k_rope: ArrayView2<'a, T>,
    pub values: ArrayView2<'a, T>,
}

/// Columns of head `h` of `heads` in rows `start..start + length`.
pub(super) fn head_of<T>(a: &Array2<T>, heads: usize, task: (usize, usize, usize)) -> ArrayView2<'_, T> {
    let (start, length, h) = task;
    let width = a.ncols() / heads;
    a.slice(s![start..start + length, h * width..(h + 1) * width])
}

impl<T: Real> Trace<T> {
    pub fn head(&self, heads: usize, task: (usize, usize, usize)) -> HeadViews<'_, T> {
        HeadViews {
            q_nope: head_of(&self.q_nope, heads, task),
            q_rope: head_of(&self.q_rope, heads, task),
            k_nope: head_of(&self.k_nope, heads, task),
            k_rope: self.k_rope.slice(s![task.0..task.0 + task.1, ..]),
            values: head_of(&self.values, heads, task),
        }
    }
}

/// Query rows of the tiles of a window, in order.
pub(super) fn tiles(length: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..length).step_by(TILE_ROWS).map(move |first| first..(first + TILE_ROWS).min(length))
}

impl<T: Real> HeadViews<'_, T> {
    /// Probabilities of some query rows over keys `0..rows.end`, `[rows, keys]`; what a query cannot see is zero.
    pub fn probabilities(&self, rows: std::ops::Range<usize>, scale: f64) -> Array2<T> {
        let (first, keys) = (rows.start, rows.end);
        let scale = T::from_f64(scale);
        let mut out = Array2::zeros((rows.len(), keys));
        let (q, k) = (self.q_nope.slice(s![rows.clone(), ..]), self.k_nope.slice(s![..keys, ..]));
        T::gemm(out.view_mut(), Accum::Replace, q, k.reversed_axes(), scale);
        let (q, k) = (self.q_rope.slice(s![rows, ..]), self.k_rope.slice(s![..keys, ..]));
        T::gemm(out.view_mut(), Accum::Add, q, k.reversed_axes(), scale);
        for (i, mut row) in out.rows_mut().into_iter().enumerate() {
            let Some(row) = row.as_slice_mut() else { continue };
            let (seen, hidden) = row.split_at_mut(first + i + 1);
            T::softmax(seen);
            hidden.fill(T::zero());
        }
        out
    }
}

fn project<T: Real>(x: &Array2<T>, weight: &Array2<T>, bias: &Array1<T>) -> Array2<T> {
    let mut out = product(x.view(), weight.t());
    if !bias.is_empty() {
        out += bias;
    }
    out
}

/// Run the block on a batch.
pub(super) fn forward<T: Real>(block: &Block, tensors: &Tensors<T>, batch: &Batch<T>) -> Trace<T> {
    let none = Array1::zeros(0);
    let query = batch.query_input();
    let latent = project(&batch.x, &tensors.latent, &none);
    let mut q_rope = project(query, &tensors.q_rope, &tensors.q_rope_bias);
    let mut k_rope = project(&batch.x, &tensors.k_rope, &tensors.k_rope_bias);
    block.rotate(&mut q_rope, &batch.windows, false);
    block.rotate(&mut k_rope, &batch.windows, false);
    let values = project(&latent, &tensors.v_up, &none);
    let mut heads = Array2::zeros(values.dim());
    let mut trace = Trace {
        q_nope: project(query, &tensors.q_nope, &tensors.q_nope_bias),
        k_nope: project(&latent, &tensors.k_up, &none),
        q_rope,
        k_rope,
        latent,
        values,
        heads: Array2::zeros((0, 0)),
        output: Array2::zeros((0, 0)),
    };
    let tasks = block.tasks(&batch.windows);
    block.blocks_mut(&mut heads, &batch.windows).into_par_iter().zip(tasks).for_each(|(mut out, task)| {
        let head = trace.head(block.heads, task);
        for rows in tiles(task.1) {
            let p = head.probabilities(rows.clone(), block.scale);
            let values = head.values.slice(s![..rows.end, ..]);
            T::gemm(out.slice_mut(s![rows, ..]), Accum::Replace, p.view(), values, T::one());
        }
    });
    trace.output = project(&heads, &tensors.wo, &tensors.wo_bias);
    trace.heads = heads;
    trace
}
