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

use ndarray::{Array1, Array2};

use super::tensors::Tensors;
use crate::gradient::{Heads, Projected, Real, product, turn_windows};
use crate::mla::MlaLayer;
use crate::runtime::Rotation;

/// What is not trained.
#[derive(Debug)]
pub(super) struct Block {
    pub heads: Heads,
    rotation: Rotation,
}

impl Block {
    /// Of `layer`, for windows of up to `longest` tokens.
    pub fn new(layer: &MlaLayer, longest: usize) -> Self {
        let heads = Heads { heads: layer.heads, scale: layer.score_scale, window: None, cap: None };
        Self { heads, rotation: layer.rotation(longest) }
    }

    /// Turn interleaved pairs of every head of every token, backwards with `inverse`: that is the transpose.
    pub fn rotate<T: Real>(&self, x: &mut Array2<T>, windows: &[usize], inverse: bool) {
        turn_windows(&self.rotation, x, windows, inverse);
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
    pub projected: Projected<T>,
    /// Head outputs `[T, H d_V]`.
    pub heads: Array2<T>,
    /// `[T, D]`.
    pub output: Array2<T>,
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
    let projected = Projected {
        q_nope: project(query, &tensors.q_nope, &tensors.q_nope_bias),
        k_nope: project(&latent, &tensors.k_up, &none),
        values: project(&latent, &tensors.v_up, &none),
        q_rope,
        k_rope,
    };
    let heads = block.heads.forward(&projected, &batch.windows);
    Trace { latent, output: project(&heads, &tensors.wo, &tensors.wo_bias), projected, heads }
}
