//! Method `exact`: grouped-query attention in an MLA container, nothing lost and nothing compressed.
//!
//! The rotated part is all KV heads side by side (`d_R = g d`, each pair at its own frequency), the latent is the values
//! (`r = g d`), and a query head is zero outside its own group's block (algorithms.md 1.2: every head attends, MQA style,
//! to one key of width `g d`). The cache is as large as the source's: this method proves the container, not a saving.

use ndarray::{Array1, Array2, s};

use super::{MlaLayer, Query, output_bias_with_values};
use crate::arch::AttentionSource;

/// Convert one layer. `nope_dim` zero rows pad each head's unrotated part: with `d_N + d_R = 4^k d` the target's score
/// scale is the source's times a power of two, which no binary float rounds.
pub fn convert(source: &AttentionSource, nope_dim: usize) -> MlaLayer {
    let (heads, g, d, n) = (source.heads, source.kv_heads, source.head_dim, source.group());
    let (hidden, half) = (source.hidden(), d / 2);
    let rope = g * d;
    // Pair (a, j) of the source becomes slot p = a d/2 + j: rows (a d + j, a d + j + d/2) -> (2p, 2p + 1).
    let slot_row = |a: usize, i: usize| 2 * (a * half + i % half) + i / half;
    let mut q_rope = Array2::zeros((heads * rope, hidden));
    let mut q_bias = source.bq.as_ref().map(|_| Array1::zeros(heads * rope));
    for h in 0..heads {
        for i in 0..d {
            let to = h * rope + slot_row(h / n, i);
            q_rope.row_mut(to).assign(&source.wq.row(h * d + i));
            if let (Some(out), Some(bq)) = (&mut q_bias, &source.bq) {
                out[to] = bq[h * d + i];
            }
        }
    }
    let mut k_rope = Array2::zeros((rope, hidden));
    let mut k_bias = source.bk.as_ref().map(|_| Array1::zeros(rope));
    for a in 0..g {
        for i in 0..d {
            k_rope.row_mut(slot_row(a, i)).assign(&source.wk.row(a * d + i));
            if let (Some(out), Some(bk)) = (&mut k_bias, &source.bk) {
                out[slot_row(a, i)] = bk[a * d + i];
            }
        }
    }
    let mut v_up = Array2::zeros((heads * d, rope));
    for h in 0..heads {
        v_up.slice_mut(s![h * d..(h + 1) * d, (h / n) * d..(h / n + 1) * d]).assign(&Array2::<f64>::eye(d));
    }
    let has_bias = source.bq.is_some();
    MlaLayer {
        heads,
        query: Query {
            down: None,
            nope: Array2::zeros((heads * nope_dim, hidden)),
            nope_bias: has_bias.then(|| Array1::zeros(heads * nope_dim)),
            rope: q_rope,
            rope_bias: q_bias,
        },
        latent: source.wv.clone(),
        k_rope,
        k_rope_bias: k_bias,
        k_up: Array2::zeros((heads * nope_dim, rope)),
        v_up,
        wo: source.wo.clone(),
        wo_bias: output_bias_with_values(source),
        rope_freq: (0..g).flat_map(|_| source.inv_freq.iter().copied()).collect(),
        score_scale: source.score_scale,
    }
}

/// Zero rows that make `d_N + d_R` the next `4^k d` above `g d`.
pub fn lossless_nope_dim(kv_heads: usize, head_dim: usize) -> usize {
    let mut width = head_dim;
    while width < kv_heads * head_dim {
        width *= 4;
    }
    width - kv_heads * head_dim
}
