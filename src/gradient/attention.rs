//! Causal attention of heads whose keys have a part of their own and a rotated part that all share, forwards and backwards.
//!
//! With `M` the mask and `c` the cap of the scores, where there is one, per window and head:
//!
//! ```text
//! S_h = scale (q_h k_h^T + qr_h kr^T)      S'_h = c tanh(S_h / c)     P_h = softmax(S'_h + M)     o_h = P_h v_h
//! dv_h = P_h^T do_h        dP_h = do_h v_h^T
//! dS'_h = P_h * (dP_h - rowsum(P_h * dP_h)),  and rowsum(P_h * dP_h) = <do_h, o_h> row by row
//! dS_h = scale dS'_h (1 - (S'_h / c)^2)
//! dq_h = dS_h k_h          dk_h = dS_h^T q_h      dqr_h = dS_h kr      dkr = sum_h dS_h^T qr_h
//! ```
//!
//! Probabilities are computed again tile by tile, so that memory does not grow with the square of the window.

use std::ops::Range;

use faer::Accum;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::product::Real;

/// Query rows per tile of scores; keys after the last row of a tile are skipped.
const TILE_ROWS: usize = 64;

/// What attention does with queries and keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// `H`.
    pub heads: usize,
    /// What multiplies a score.
    pub scale: f64,
    /// Keys that a query sees, the latest ones.
    pub window: Option<usize>,
    /// Cap of the scores.
    pub cap: Option<f64>,
}

/// Queries, keys and values of tokens in windows that lie under each other, rotated; or their gradients.
#[derive(Debug)]
pub(crate) struct Projected<T> {
    /// `[T, H d_N]`.
    pub q_nope: Array2<T>,
    /// `[T, H d_R]`.
    pub q_rope: Array2<T>,
    /// `[T, H d_N]`.
    pub k_nope: Array2<T>,
    /// `[T, d_R]`.
    pub k_rope: Array2<T>,
    /// `[T, H d_V]`.
    pub values: Array2<T>,
}

/// One head in one window: first row, rows, head.
type Task = (usize, usize, usize);

/// Columns of a head in the rows of a task.
fn head_of<T>(a: &Array2<T>, heads: usize, (start, length, h): Task) -> ArrayView2<'_, T> {
    let width = a.ncols() / heads;
    a.slice(s![start..start + length, h * width..(h + 1) * width])
}

/// Query rows of the tiles of a window, in order.
fn tiles(length: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length).step_by(TILE_ROWS).map(move |first| first..(first + TILE_ROWS).min(length))
}

/// Queries, keys and values of one head in one window.
struct HeadViews<'a, T> {
    q_nope: ArrayView2<'a, T>,
    q_rope: ArrayView2<'a, T>,
    k_nope: ArrayView2<'a, T>,
    k_rope: ArrayView2<'a, T>,
    values: ArrayView2<'a, T>,
}

/// Gradients of one head in one window.
struct HeadGradients<'a, T> {
    q_nope: ArrayViewMut2<'a, T>,
    q_rope: ArrayViewMut2<'a, T>,
    k_nope: ArrayViewMut2<'a, T>,
    /// This head's part of a sum over heads.
    k_rope: ArrayViewMut2<'a, T>,
    values: ArrayViewMut2<'a, T>,
}

impl<T: Real> Projected<T> {
    fn head(&self, heads: usize, task: Task) -> HeadViews<'_, T> {
        HeadViews {
            q_nope: head_of(&self.q_nope, heads, task),
            q_rope: head_of(&self.q_rope, heads, task),
            k_nope: head_of(&self.k_nope, heads, task),
            k_rope: self.k_rope.slice(s![task.0..task.0 + task.1, ..]),
            values: head_of(&self.values, heads, task),
        }
    }
}

/// A tile of probabilities.
struct Tile<T> {
    /// Keys that some row of it sees.
    keys: Range<usize>,
    /// `[rows, keys]`; what a query cannot see is zero.
    p: Array2<T>,
    /// Derivative of the capped scores by the plain ones, where there is a cap.
    slope: Option<Array2<T>>,
}

impl Heads {
    /// Head outputs `[T, H d_V]`.
    pub fn forward<T: Real>(&self, of: &Projected<T>, windows: &[usize]) -> Array2<T> {
        let mut out = Array2::zeros(of.values.dim());
        let tasks = self.tasks(windows);
        self.blocks_mut(&mut out, windows).into_par_iter().zip(tasks).for_each(|(mut out, task)| {
            let head = of.head(self.heads, task);
            for rows in tiles(task.1) {
                let tile = self.tile(&head, rows.clone());
                let values = head.values.slice(s![tile.keys, ..]);
                T::gemm(out.slice_mut(s![rows, ..]), Accum::Replace, tile.p.view(), values, T::one());
            }
        });
        out
    }

    /// Gradients by queries, keys and values, from `gradient` `[T, H d_V]` by the outputs; `outputs` are those of
    /// [`Heads::forward`].
    pub fn backward<T: Real>(
        &self,
        of: &Projected<T>,
        outputs: &Array2<T>,
        gradient: &Array2<T>,
        windows: &[usize],
    ) -> Projected<T> {
        let mut q_nope = Array2::zeros(of.q_nope.dim());
        let mut q_rope = Array2::zeros(of.q_rope.dim());
        let mut k_nope = Array2::zeros(of.k_nope.dim());
        let mut k_rope_parts = Array2::zeros(of.q_rope.dim());
        let mut values = Array2::zeros(of.values.dim());
        {
            let blocks = (self.blocks_mut(&mut q_nope, windows).into_iter())
                .zip(self.blocks_mut(&mut q_rope, windows))
                .zip(self.blocks_mut(&mut k_nope, windows))
                .zip(self.blocks_mut(&mut k_rope_parts, windows))
                .zip(self.blocks_mut(&mut values, windows));
            let gradients: Vec<_> = blocks
                .map(|((((q_nope, q_rope), k_nope), k_rope), values)| HeadGradients {
                    q_nope,
                    q_rope,
                    k_nope,
                    k_rope,
                    values,
                })
                .collect();
            gradients.into_par_iter().zip(self.tasks(windows)).for_each(|(out, task)| {
                let (outputs, gradient) = (head_of(outputs, self.heads, task), head_of(gradient, self.heads, task));
                self.head_backward(&of.head(self.heads, task), outputs, gradient, out);
            });
        }
        let k_rope = sum_heads(&k_rope_parts, self.heads, of.k_rope.ncols());
        Projected { q_nope, q_rope, k_nope, k_rope, values }
    }

    fn head_backward<T: Real>(
        &self,
        head: &HeadViews<'_, T>,
        outputs: ArrayView2<'_, T>,
        gradient: ArrayView2<'_, T>,
        mut out: HeadGradients<'_, T>,
    ) {
        let (scale, one) = (T::from_f64(self.scale), T::one());
        for rows in tiles(outputs.nrows()) {
            let Tile { keys, mut p, slope } = self.tile(head, rows.clone());
            let keys = s![keys, ..];
            let d_rows = gradient.slice(s![rows.clone(), ..]);
            T::gemm(out.values.slice_mut(keys), Accum::Add, p.t(), d_rows, one);
            let mut d_p = Array2::zeros(p.dim());
            T::gemm(d_p.view_mut(), Accum::Replace, d_rows, head.values.slice(keys).reversed_axes(), one);
            for (i, (mut p, d_p)) in p.rows_mut().into_iter().zip(d_p.rows()).enumerate() {
                let mean: T = d_rows.row(i).iter().zip(outputs.row(rows.start + i)).map(|(d, o)| *d * *o).sum();
                if let (Some(p), Some(d_p)) = (p.as_slice_mut(), d_p.as_slice()) {
                    for (p, d) in p.iter_mut().zip(d_p) {
                        *p = scale * *p * (*d - mean);
                    }
                }
            }
            if let Some(slope) = slope {
                p.zip_mut_with(&slope, |p, slope| *p = *p * *slope);
            }
            // From here on `p` holds dS.
            let (k_nope, k_rope) = (head.k_nope.slice(keys), head.k_rope.slice(keys));
            T::gemm(out.q_nope.slice_mut(s![rows.clone(), ..]), Accum::Replace, p.view(), k_nope, one);
            T::gemm(out.q_rope.slice_mut(s![rows.clone(), ..]), Accum::Replace, p.view(), k_rope, one);
            let (q_nope, q_rope) = (head.q_nope.slice(s![rows.clone(), ..]), head.q_rope.slice(s![rows, ..]));
            T::gemm(out.k_nope.slice_mut(keys), Accum::Add, p.t(), q_nope, one);
            T::gemm(out.k_rope.slice_mut(keys), Accum::Add, p.t(), q_rope, one);
        }
    }

    /// Probabilities of some query rows.
    fn tile<T: Real>(&self, head: &HeadViews<'_, T>, rows: Range<usize>) -> Tile<T> {
        let first = self.window.map_or(0, |w| (rows.start + 1).saturating_sub(w));
        let keys = first..rows.end;
        let scale = T::from_f64(self.scale);
        let mut p = Array2::zeros((rows.len(), keys.len()));
        let (q, k) = (head.q_nope.slice(s![rows.clone(), ..]), head.k_nope.slice(s![keys.clone(), ..]));
        T::gemm(p.view_mut(), Accum::Replace, q, k.reversed_axes(), scale);
        let (q, k) = (head.q_rope.slice(s![rows.clone(), ..]), head.k_rope.slice(s![keys.clone(), ..]));
        T::gemm(p.view_mut(), Accum::Add, q, k.reversed_axes(), scale);
        let slope = self.cap.map(|cap| {
            let mut slope = Array2::zeros(p.dim());
            ndarray::Zip::from(&mut p).and(&mut slope).for_each(|s, slope| {
                let t = (s.to_f64() / cap).tanh();
                (*s, *slope) = (T::from_f64(cap * t), T::from_f64(1.0 - t * t));
            });
            slope
        });
        for (i, mut row) in p.rows_mut().into_iter().enumerate() {
            let Some(row) = row.as_slice_mut() else { continue };
            let position = rows.start + i;
            let begin = self.window.map_or(0, |w| (position + 1).saturating_sub(w)) - first;
            let end = position + 1 - first;
            T::softmax(&mut row[begin..end]);
            row[..begin].fill(T::zero());
            row[end..].fill(T::zero());
        }
        Tile { keys, p, slope }
    }

    /// (window, head) tasks in a fixed order.
    fn tasks(&self, windows: &[usize]) -> Vec<Task> {
        let mut start = 0;
        let mut tasks = Vec::with_capacity(windows.len() * self.heads);
        for &length in windows {
            tasks.extend((0..self.heads).map(|h| (start, length, h)));
            start += length;
        }
        tasks
    }

    /// Cut `a` `[T, H w]` into `[length, w]` blocks in the order of [`Heads::tasks`].
    fn blocks_mut<'a, T>(&self, a: &'a mut Array2<T>, windows: &[usize]) -> Vec<ArrayViewMut2<'a, T>> {
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

/// `[T, H w]` to `[T, w]`, head after head.
fn sum_heads<T: Real>(parts: &Array2<T>, heads: usize, width: usize) -> Array2<T> {
    let mut sum = Array2::zeros((parts.nrows(), width));
    for h in 0..heads {
        sum += &parts.slice(s![.., h * width..(h + 1) * width]);
    }
    sum
}
