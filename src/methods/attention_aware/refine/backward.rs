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
use ndarray::{Array1, Array2};

use super::forward::{Batch, Block, Trace};
use super::tensors::Tensors;
use crate::gradient::{Projected, Real, column_sums, product, product_into};

/// Gradients of the loss by every tensor, where `output` `[T, D]` is its gradient by the block's output.
pub(super) fn backward<T: Real>(
    block: &Block,
    tensors: &Tensors<T>,
    batch: &Batch<T>,
    trace: &Trace<T>,
    output: &Array2<T>,
) -> Tensors<T> {
    let d_heads = product(output.view(), tensors.wo.view());
    let mut d: Projected<T> = block.heads.backward(&trace.projected, &trace.heads, &d_heads, &batch.windows);
    block.rotate(&mut d.q_rope, &batch.windows, true);
    block.rotate(&mut d.k_rope, &batch.windows, true);
    let mut d_latent = product(d.k_nope.view(), tensors.k_up.view());
    product_into(&mut d_latent, Accum::Add, d.values.view(), tensors.v_up.view());
    let query = batch.query_input().view();
    let bias = |of: &Array1<T>, d: &Array2<T>| if of.is_empty() { Array1::zeros(0) } else { column_sums(d) };
    Tensors {
        q_nope: product(d.q_nope.t(), query),
        q_rope: product(d.q_rope.t(), query),
        latent: product(d_latent.t(), batch.x.view()),
        k_rope: product(d.k_rope.t(), batch.x.view()),
        k_up: product(d.k_nope.t(), trace.latent.view()),
        v_up: product(d.values.t(), trace.latent.view()),
        wo: product(output.t(), trace.heads.view()),
        q_nope_bias: bias(&tensors.q_nope_bias, &d.q_nope),
        q_rope_bias: bias(&tensors.q_rope_bias, &d.q_rope),
        k_rope_bias: bias(&tensors.k_rope_bias, &d.k_rope),
        wo_bias: bias(&tensors.wo_bias, output),
    }
}
