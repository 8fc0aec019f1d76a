//! Method `exact`: grouped-query attention in an MLA container, nothing lost and nothing compressed.
//!
//! The rotated part is all KV heads side by side (`d_R = g d`, each pair at its own frequency), the latent is the values
//! (`r = g d`), and a query head is zero outside its own group's block. Pairs that a model does not turn go to the latent
//! too, as keys without rotation (docs/maths.md, section 1: every head attends, MQA style,
//! to one key of width `g d`). The cache is as large as the source's: this method proves the container, not a saving.

use ndarray::{Array1, Array2, s};

use crate::arch::AttentionSource;
use crate::methods::output_bias_with_values;
use crate::mla::{MlaLayer, Query};

/// Convert one layer. `nope_dim` zero rows pad each head's unrotated part: with `d_N + d_R = 4^k d` the target's score
/// scale is the source's times a power of two, which no binary float rounds.
pub fn convert(source: &AttentionSource, nope_dim: usize) -> MlaLayer {
    let (heads, g, d, n) = (source.heads, source.kv_heads, source.head_dim, source.group());
    let (hidden, half) = (source.hidden(), d / 2);
    let turned = half - still_pairs(source);
    let (rope, still) = (g * 2 * turned, d - 2 * turned);
    // Pair (a, j) of the source becomes slot p = a turned + j: rows (a d + j, a d + j + d/2) -> (2p, 2p + 1). Pairs that do
    // not turn come last in normal form.
    let slot_row = |a: usize, i: usize| (i % half < turned).then(|| 2 * (a * turned + i % half) + i / half);
    let still_row = |i: usize| (i % half).checked_sub(turned).map(|j| j + i / half * (still / 2));
    let mut q_rope = Array2::zeros((heads * rope, hidden));
    let mut q_nope = Array2::zeros((heads * nope_dim, hidden));
    let mut q_bias = source.bq.as_ref().map(|_| Array1::zeros(heads * rope));
    let mut nope_bias = source.bq.as_ref().map(|_| Array1::zeros(heads * nope_dim));
    for h in 0..heads {
        for i in 0..d {
            let (rows, bias, to) = match (slot_row(h / n, i), still_row(i)) {
                (Some(row), _) => (&mut q_rope, &mut q_bias, h * rope + row),
                (None, Some(row)) => (&mut q_nope, &mut nope_bias, h * nope_dim + row),
                (None, None) => continue,
            };
            rows.row_mut(to).assign(&source.wq.row(h * d + i));
            if let (Some(out), Some(bq)) = (bias, &source.bq) {
                out[to] = bq[h * d + i];
            }
        }
    }
    let mut k_rope = Array2::zeros((rope, hidden));
    let mut k_bias = source.bk.as_ref().map(|_| Array1::zeros(rope));
    // Latent: keys that do not turn, then values. A key bias that does not turn cancels in the softmax.
    let mut latent = Array2::zeros((g * (still + d), hidden));
    latent.slice_mut(s![g * still.., ..]).assign(&source.wv);
    for a in 0..g {
        for i in 0..d {
            let key = source.wk.row(a * d + i);
            if let Some(row) = slot_row(a, i) {
                k_rope.row_mut(row).assign(&key);
                if let (Some(out), Some(bk)) = (&mut k_bias, &source.bk) {
                    out[row] = bk[a * d + i];
                }
            } else if let Some(row) = still_row(i) {
                latent.row_mut(a * still + row).assign(&key);
            }
        }
    }
    let rank = latent.nrows();
    let mut k_up = Array2::zeros((heads * nope_dim, rank));
    let mut v_up = Array2::zeros((heads * d, rank));
    for h in 0..heads {
        let a = h / n;
        let keys = s![h * nope_dim..h * nope_dim + still, a * still..(a + 1) * still];
        k_up.slice_mut(keys).assign(&Array2::<f64>::eye(still));
        let first = g * still + a * d;
        v_up.slice_mut(s![h * d..(h + 1) * d, first..first + d]).assign(&Array2::<f64>::eye(d));
    }
    MlaLayer {
        heads,
        query: Query { down: None, nope: q_nope, nope_bias, rope: q_rope, rope_bias: q_bias },
        latent,
        k_rope,
        k_rope_bias: k_bias,
        k_up,
        v_up,
        wo: source.wo.clone(),
        wo_bias: output_bias_with_values(source),
        rope_freq: (0..g).flat_map(|_| source.inv_freq[..turned].iter().copied()).collect(),
        score_scale: source.score_scale,
    }
}

/// Pairs of a head that do not turn.
fn still_pairs(source: &AttentionSource) -> usize {
    source.inv_freq.iter().filter(|f| **f == 0.0).count()
}

/// Width of the unrotated part, at least `still`, that makes `d_N + d_R` a `4^k d`, with `rotated` values in all.
pub fn lossless_nope_dim(rotated: usize, still: usize, head_dim: usize) -> usize {
    let mut width = head_dim;
    while width < rotated + still {
        width *= 4;
    }
    width - rotated
}
