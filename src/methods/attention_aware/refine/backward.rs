//! Gradients of every tensor of one latent attention block, by hand.
//!
//! In the notation of [`super::forward`], with `dA` for the gradient of the loss by `A`:
//!
//! ```text
//! dwo = dy^T o             do = dy wo            dwo_bias = sum over tokens of dy
//! dv_h = P_h^T do_h        dP_h = do_h v_h^T
//! dS_h = scale P_h * (dP_h - rowsum(P_h * dP_h)),  and rowsum(P_h * dP_h) = <do_h, o_h> row by row
//! dq_h = dS_h k_h          dk_h = dS_h^T q_h
//! dqr_h = R^T dS_h kr      dkr = R^T sum_h dS_h^T qr_h
//! dk_up = dk^T c           dv_up = dv^T c        dc = dk k_up + dv v_up
//! dlatent = dc^T x         dq_nope = dq^T x      dq_rope = dqr^T x      dk_rope = dkr^T x
//! ```
//!
//! Probabilities are computed again tile by tile, so that memory does not grow with the square of the window.

use faer::Accum;
use ndarray::{Array1, Array2, ArrayViewMut2, s};
use rayon::prelude::*;

use super::forward::{Batch, Block, Trace, head_of, tiles};
use super::product::{Real, column_sums, product, product_into};
use super::tensors::Tensors;

/// Gradients of one head in one window, before the rotation is undone.
struct HeadGradients<'a, T> {
    q_nope: ArrayViewMut2<'a, T>,
    q_rope: ArrayViewMut2<'a, T>,
    k_nope: ArrayViewMut2<'a, T>,
    /// This head's part of a sum over heads.
    k_rope: ArrayViewMut2<'a, T>,
    values: ArrayViewMut2<'a, T>,
}

/// Gradients of the loss by every tensor, where `output` `[T, D]` is its gradient by the block's output.
pub(super) fn backward<T: Real>(
    block: &Block,
    tensors: &Tensors<T>,
    batch: &Batch<T>,
    trace: &Trace<T>,
    output: &Array2<T>,
) -> Tensors<T> {
    let d_heads = product(output.view(), tensors.wo.view());
    let mut d_q_nope = Array2::zeros(trace.q_nope.dim());
    let mut d_q_rope = Array2::zeros(trace.q_rope.dim());
    let mut d_k_nope = Array2::zeros(trace.k_nope.dim());
    let mut d_k_rope_parts = Array2::zeros(trace.q_rope.dim());
    let mut d_values = Array2::zeros(trace.values.dim());
    {
        let windows = &batch.windows;
        let blocks = block
            .blocks_mut(&mut d_q_nope, windows)
            .into_iter()
            .zip(block.blocks_mut(&mut d_q_rope, windows))
            .zip(block.blocks_mut(&mut d_k_nope, windows))
            .zip(block.blocks_mut(&mut d_k_rope_parts, windows))
            .zip(block.blocks_mut(&mut d_values, windows));
        let gradients: Vec<_> = blocks
            .map(|((((q_nope, q_rope), k_nope), k_rope), values)| HeadGradients {
                q_nope,
                q_rope,
                k_nope,
                k_rope,
                values,
            })
            .collect();
        let tasks = block.tasks(windows);
        gradients.into_par_iter().zip(tasks).for_each(|(out, task)| head(block, trace, &d_heads, task, out));
    }
    let mut d_k_rope = sum_heads(&d_k_rope_parts, block.heads, trace.k_rope.ncols());
    block.rotate(&mut d_q_rope, &batch.windows, true);
    block.rotate(&mut d_k_rope, &batch.windows, true);
    let mut d_latent = product(d_k_nope.view(), tensors.k_up.view());
    product_into(&mut d_latent, Accum::Add, d_values.view(), tensors.v_up.view());
    let query = batch.query_input().view();
    let bias = |of: &Array1<T>, d: &Array2<T>| if of.is_empty() { Array1::zeros(0) } else { column_sums(d) };
    Tensors {
        q_nope: product(d_q_nope.t(), query),
        q_rope: product(d_q_rope.t(), query),
        latent: product(d_latent.t(), batch.x.view()),
        k_rope: product(d_k_rope.t(), batch.x.view()),
        k_up: product(d_k_nope.t(), trace.latent.view()),
        v_up: product(d_values.t(), trace.latent.view()),
        wo: product(output.t(), trace.heads.view()),
        q_nope_bias: bias(&tensors.q_nope_bias, &d_q_nope),
        q_rope_bias: bias(&tensors.q_rope_bias, &d_q_rope),
        k_rope_bias: bias(&tensors.k_rope_bias, &d_k_rope),
        wo_bias: bias(&tensors.wo_bias, output),
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

fn head<T: Real>(
    block: &Block,
    trace: &Trace<T>,
    d_heads: &Array2<T>,
    task: (usize, usize, usize),
    mut out: HeadGradients<'_, T>,
) {
    let head = trace.head(block.heads, task);
    let d_out = head_of(d_heads, block.heads, task);
    let pooled = head_of(&trace.heads, block.heads, task);
    let (scale, one) = (T::from_f64(block.scale), T::one());
    for rows in tiles(task.1) {
        let keys = rows.end;
        let mut p = head.probabilities(rows.clone(), block.scale);
        let d_rows = d_out.slice(s![rows.clone(), ..]);
        T::gemm(out.values.slice_mut(s![..keys, ..]), Accum::Add, p.t(), d_rows, one);
        let mut d_p = Array2::zeros(p.dim());
        T::gemm(d_p.view_mut(), Accum::Replace, d_rows, head.values.slice(s![..keys, ..]).reversed_axes(), one);
        for (i, (mut p, d_p)) in p.rows_mut().into_iter().zip(d_p.rows()).enumerate() {
            let mean: T = d_rows.row(i).iter().zip(pooled.row(rows.start + i)).map(|(d, o)| *d * *o).sum();
            if let (Some(p), Some(d_p)) = (p.as_slice_mut(), d_p.as_slice()) {
                for (p, d) in p.iter_mut().zip(d_p) {
                    *p = scale * *p * (*d - mean);
                }
            }
        }
        // From here on `p` holds dS.
        let (k_nope, k_rope) = (head.k_nope.slice(s![..keys, ..]), head.k_rope.slice(s![..keys, ..]));
        T::gemm(out.q_nope.slice_mut(s![rows.clone(), ..]), Accum::Replace, p.view(), k_nope, one);
        T::gemm(out.q_rope.slice_mut(s![rows.clone(), ..]), Accum::Replace, p.view(), k_rope, one);
        let (q_nope, q_rope) = (head.q_nope.slice(s![rows.clone(), ..]), head.q_rope.slice(s![rows, ..]));
        T::gemm(out.k_nope.slice_mut(s![..keys, ..]), Accum::Add, p.t(), q_nope, one);
        T::gemm(out.k_rope.slice_mut(s![..keys, ..]), Accum::Add, p.t(), q_rope, one);
    }
}
