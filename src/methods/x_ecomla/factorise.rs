//! X-EcoMLA's initialisation (arXiv 2503.11132): singular value decompositions of the weights, no calibration.
//!
//! ```text
//! W_q = U S V^T:                  q_a = S_r V_r^T,      q_b = rows of U_r
//! [W_k; W_v] = U S V^T:           latent = S_r V_r^T,   kv_b = [rows of U_K,r ; U_V,r]
//! shared rotated key:             mean of the KV heads' W_k, some rows
//! ```
//!
//! Keys and values are repeated to the query heads before the decomposition as published; that scales every singular value
//! by `sqrt(H/g)` and changes neither vectors nor shares of energy, so it is left out.
//!
//! The published code feeds the last `d_R` rows of a head (in half-split order the imaginary parts of all pairs) to an
//! interleaved rotary with frequencies of its own, and the first `d_N` to the part without RoPE: positions mean nothing until
//! they are trained again ([`convert_published`]). [`convert`] has the same ranks and factors, but chooses pairs, lets them turn
//! as they turned in the source, and keeps the rows of all other pairs.

use ndarray::{Array2, Axis, concatenate, s};

use crate::arch::AttentionSource;
use crate::error::MethodError;
use crate::factor::svd::{energy_rank, singular_values, svd};
use crate::methods::output_bias_with_values;
use crate::methods::partial_rope::{Slot, gather, gather_entries, rotate, still_queries, still_rows};
use crate::mla::{MlaLayer, Query};

/// Ranks of one layer, and the widths they are padded to with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranks {
    /// Rank of keys and values.
    pub kv: usize,
    /// Width of the latent, at least `kv`.
    pub kv_width: usize,
    /// Rank of the queries.
    pub q: usize,
    /// Width of the query latent, at least `q`.
    pub q_width: usize,
}

/// A converted layer and what its ranks lost.
#[derive(Debug)]
pub struct Converted {
    /// The layer.
    pub layer: MlaLayer,
    /// Share of the energy of `[W_k; W_v]` outside the latent.
    pub rank_loss: f64,
}

/// `[W_k; W_v]`, `[2 g d, D]`.
pub fn stacked(source: &AttentionSource) -> Array2<f64> {
    concatenate![Axis(0), source.wk, source.wv]
}

/// Rank of the joint keys and values that keeps a share of their energy ([`energy_rank`]).
///
/// # Errors
/// Weights that are not finite.
pub fn kv_rank(source: &AttentionSource, energy: f64, divisor: usize) -> Result<usize, MethodError> {
    Ok(energy_rank(&singular_values(&stacked(source), "joint keys and values")?, energy, divisor))
}

/// Rank of the queries that keeps a share of their energy.
///
/// # Errors
/// As [`kv_rank`].
pub fn q_rank(source: &AttentionSource, energy: f64, divisor: usize) -> Result<usize, MethodError> {
    Ok(energy_rank(&singular_values(&source.wq, "queries")?, energy, divisor))
}

/// Convert one layer: pairs in `slots` turn as in the source, the others meet through the latent, `nope_dim` rows per head.
///
/// # Errors
/// Weights that are not finite.
pub fn convert(
    source: &AttentionSource,
    slots: &[Slot],
    ranks: &Ranks,
    nope_dim: usize,
) -> Result<Converted, MethodError> {
    let (g, d, n) = (source.kv_heads, source.head_dim, source.group());
    let queries = svd(&source.wq, "queries")?;
    let from_latent = queries.left(ranks.q, ranks.q_width);
    let rotated = rotate(source, slots, from_latent.view());
    let still = still_rows(source, slots);
    let nope = still_queries(source, &still, nope_dim);

    let joint = svd(&stacked(source), "joint keys and values")?;
    let up = joint.left(ranks.kv, ranks.kv_width);
    let key = |i: usize| still[i / nope_dim / n].get(i % nope_dim).map(|row| i / nope_dim / n * d + row);
    let key_rows: Vec<_> = (0..source.heads * nope_dim).map(key).collect();
    let value_rows: Vec<_> = (0..source.heads * d).map(|i| Some(g * d + i / d / n * d + i % d)).collect();
    Ok(Converted {
        rank_loss: joint.lost(ranks.kv),
        layer: MlaLayer {
            heads: source.heads,
            query: Query {
                down: Some(queries.scaled_right(ranks.q, ranks.q_width)),
                nope: gather(from_latent.view(), &nope),
                nope_bias: source.bq.as_ref().map(|b| gather_entries(b, &nope)),
                rope: rotated.q,
                rope_bias: rotated.q_bias,
            },
            latent: joint.scaled_right(ranks.kv, ranks.kv_width),
            k_rope: rotated.k,
            k_rope_bias: rotated.k_bias,
            k_up: gather(up.view(), &key_rows),
            v_up: gather(up.view(), &value_rows),
            wo: source.wo.clone(),
            wo_bias: output_bias_with_values(source),
            rope_freq: rotated.frequencies,
            score_scale: source.score_scale,
        },
    })
}

/// Convert one layer as the published code does: the last `d_R = 2 frequencies.len()` rows of each head turn, as
/// neighbouring pairs, at `frequencies` (radians per token), the first `nope_dim` do not, biases are dropped.
///
/// # Errors
/// Weights that are not finite.
pub fn convert_published(
    source: &AttentionSource,
    frequencies: &[f64],
    ranks: &Ranks,
    nope_dim: usize,
) -> Result<Converted, MethodError> {
    let (heads, g, d, n) = (source.heads, source.kv_heads, source.head_dim, source.group());
    let rope_dim = 2 * frequencies.len();
    let queries = svd(&source.wq, "queries")?;
    let joint = svd(&stacked(source), "joint keys and values")?;
    let (from_latent, up) = (queries.left(ranks.q, ranks.q_width), joint.left(ranks.kv, ranks.kv_width));
    // Row `first + i` of the KV head (or, with one query per head, of the query head) of query head `h`.
    let rows = |width: usize, first: usize, per_head: usize| -> Vec<Option<usize>> {
        (0..heads * width).map(|i| Some(i / width / per_head * d + first + i % width)).collect()
    };
    let mut k_rope = Array2::zeros((rope_dim, source.hidden()));
    for a in 0..g {
        k_rope.scaled_add(1.0 / g as f64, &source.wk.slice(s![(a + 1) * d - rope_dim..(a + 1) * d, ..]));
    }
    let value_rows: Vec<_> = rows(d, 0, n).into_iter().map(|r| r.map(|r| g * d + r)).collect();
    Ok(Converted {
        rank_loss: joint.lost(ranks.kv),
        layer: MlaLayer {
            heads,
            query: Query {
                down: Some(queries.scaled_right(ranks.q, ranks.q_width)),
                nope: gather(from_latent.view(), &rows(nope_dim, 0, 1)),
                nope_bias: None,
                rope: gather(from_latent.view(), &rows(rope_dim, d - rope_dim, 1)),
                rope_bias: None,
            },
            latent: joint.scaled_right(ranks.kv, ranks.kv_width),
            k_rope,
            k_rope_bias: None,
            k_up: gather(up.view(), &rows(nope_dim, 0, n)),
            v_up: gather(up.view(), &value_rows),
            wo: source.wo.clone(),
            wo_bias: None,
            rope_freq: frequencies.to_vec(),
            score_scale: source.score_scale,
        },
    })
}
