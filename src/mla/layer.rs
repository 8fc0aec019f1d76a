//! One MLA layer in f64, before any target's conventions.

use ndarray::{Array1, Array2};

use crate::arch::{Rope, RopeLayout};
use crate::runtime::Rotation;

/// One layer of multi-head latent attention, before a target's conventions.
///
/// For query head `h`, with `x` the normed input of a token and `c = latent x` its cached latent:
///
/// ```text
/// score(m, n) = score_scale ( <q_nope_h(x_m), k_up_h c_n> + <R_m q_rope_h(x_m), R_n k_rope(x_n)> )
/// output_h(m) = v_up_h sum_n p_mn c_n,      attention output = wo [output_1; ...; output_H] + wo_bias
/// ```
///
/// Rotated pair `p` is rows `(2p, 2p + 1)` and turns by `rope_freq[p]` radians per token.
#[derive(Debug, Clone)]
pub struct MlaLayer {
    /// Query heads `H`.
    pub heads: usize,
    /// Query path.
    pub query: Query,
    /// Latent down-projection `[r, D]`, without bias: a constant in the keys cancels in the softmax, a constant in the
    /// values passes through it and belongs to `wo_bias`.
    pub latent: Array2<f64>,
    /// Shared rotated key `[d_R, D]`.
    pub k_rope: Array2<f64>,
    /// `[d_R]`.
    pub k_rope_bias: Option<Array1<f64>>,
    /// Key up-projection `[H d_N, r]`.
    pub k_up: Array2<f64>,
    /// Value up-projection `[H d_V, r]`.
    pub v_up: Array2<f64>,
    /// Output projection `[D, H d_V]`.
    pub wo: Array2<f64>,
    /// `[D]`.
    pub wo_bias: Option<Array1<f64>>,
    /// Radians per token of each rotated pair, `[d_R / 2]`.
    pub rope_freq: Vec<f64>,
    /// What multiplies a score before the softmax.
    pub score_scale: f64,
}

/// Query projection of an [`MlaLayer`].
#[derive(Debug, Clone)]
pub struct Query {
    /// Shared query latent `[r_q, D]`, or `None` for a direct projection.
    pub down: Option<Array2<f64>>,
    /// `[H d_N, D]`, or `[H d_N, r_q]` after a latent.
    pub nope: Array2<f64>,
    /// `[H d_N]`.
    pub nope_bias: Option<Array1<f64>>,
    /// `[H d_R, D]`, or `[H d_R, r_q]` after a latent.
    pub rope: Array2<f64>,
    /// `[H d_R]`.
    pub rope_bias: Option<Array1<f64>>,
}

impl MlaLayer {
    /// Hidden size `D`.
    pub fn hidden(&self) -> usize {
        self.wo.nrows()
    }

    /// Latent width `r`.
    pub fn rank(&self) -> usize {
        self.latent.nrows()
    }

    /// `d_N`.
    pub fn nope_dim(&self) -> usize {
        self.k_up.nrows() / self.heads
    }

    /// `d_R`.
    pub fn rope_dim(&self) -> usize {
        self.k_rope.nrows()
    }

    /// `d_V`.
    pub fn value_dim(&self) -> usize {
        self.v_up.nrows() / self.heads
    }

    /// Rotations of the rotated pairs at positions `0..positions`.
    pub fn rotation(&self, positions: usize) -> Rotation {
        let rope = Rope {
            inv_freq: self.rope_freq.clone(),
            amplitude: 1.0,
            layout: RopeLayout::Interleaved,
            theta: 0.0,
            kind: String::new(),
            long: None,
        };
        Rotation::new(&rope, 0..positions)
    }

    /// Whether any projection needs a bias.
    pub fn has_bias(&self) -> bool {
        self.query.nope_bias.is_some()
            || self.query.rope_bias.is_some()
            || self.k_rope_bias.is_some()
            || self.wo_bias.is_some()
    }
}
