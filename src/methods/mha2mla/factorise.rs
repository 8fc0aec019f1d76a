//! MHA2MLA's initialisation (arXiv 2502.14837) as an MLA layer: partial RoPE, then a singular value decomposition of what lost
//! its rotation and the values.
//!
//! The published layer caches a rotated key per KV head, `g d_R` values, which is no MLA. Here these keys lie side by side in
//! the one shared rotated key of an MLA layer, `g d_R` wide; a query head is zero outside the slots of its own KV head. The
//! scores are the published ones, the cache has the published size `g d_R + r`, and any MLA class runs it. Kept pairs turn at
//! their own frequencies, so a list of frequencies (each `g` times where the rule is the same for all heads) goes with it.

use ndarray::{Array2, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

use crate::arch::AttentionSource;
use crate::error::MethodError;
use crate::factor::svd::svd;
use crate::methods::output_bias_with_values;
use crate::methods::partial_rope::{Slot, gather, gather_entries, rotate, still_queries, still_rows};
use crate::mla::{MlaLayer, Query};

/// What is decomposed together (section 3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SvdKind {
    /// Keys and values each by themselves, half the latent each.
    Split,
    /// `[W_kN; W_v]`.
    Joint,
}

impl SvdKind {
    /// Every kind.
    pub const ALL: [SvdKind; 2] = [SvdKind::Joint, SvdKind::Split];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            SvdKind::Split => "split",
            SvdKind::Joint => "joint",
        }
    }

    /// Ranks of keys and values in a latent of `rank`: half each for [`SvdKind::Split`], the odd one to the values.
    pub fn split(rank: usize) -> (usize, usize) {
        (rank / 2, rank - rank / 2)
    }
}

/// A converted layer and what its rank lost.
#[derive(Debug)]
pub struct Converted {
    /// The layer.
    pub layer: MlaLayer,
    /// Share of the energy of `W_kN` and `W_v` outside the latent.
    pub rank_loss: f64,
}

/// Convert one layer. `slots` name their KV heads; `nope_dim` rows per head do not turn (zeros where a head has fewer).
///
/// # Errors
/// Weights that are not finite.
pub fn convert(
    source: &AttentionSource,
    slots: &[Slot],
    rank: usize,
    nope_dim: usize,
    kind: SvdKind,
) -> Result<Converted, MethodError> {
    let (heads, d, n) = (source.heads, source.head_dim, source.group());
    let rotated = rotate(source, slots, source.wq.view());
    let still = still_rows(source, slots);
    let nope = still_queries(source, &still, nope_dim);
    // Rows of keys without rotation, and where each KV head's begin.
    let all: Vec<Option<usize>> =
        still.iter().enumerate().flat_map(|(a, rows)| rows.iter().map(move |i| Some(a * d + i))).collect();
    let first = |a: usize| still[..a].iter().map(Vec::len).sum::<usize>();
    let keys = gather(source.wk.view(), &all);
    let Factors { latent, up_k, up_v, rank_loss } = factors(&keys, &source.wv, rank, kind)?;
    let key = |i: usize| {
        let (a, row) = (i / nope_dim / n, i % nope_dim);
        (row < still[a].len()).then(|| first(a) + row)
    };
    let key_rows: Vec<_> = (0..heads * nope_dim).map(key).collect();
    let value_rows: Vec<_> = (0..heads * d).map(|i| Some(i / d / n * d + i % d)).collect();
    Ok(Converted {
        rank_loss,
        layer: MlaLayer {
            heads,
            query: Query {
                down: None,
                nope: gather(source.wq.view(), &nope),
                nope_bias: source.bq.as_ref().map(|b| gather_entries(b, &nope)),
                rope: rotated.q,
                rope_bias: rotated.q_bias,
            },
            latent,
            k_rope: rotated.k,
            k_rope_bias: rotated.k_bias,
            k_up: gather(up_k.view(), &key_rows),
            v_up: gather(up_v.view(), &value_rows),
            wo: source.wo.clone(),
            wo_bias: output_bias_with_values(source),
            rope_freq: rotated.frequencies,
            score_scale: source.score_scale,
        },
    })
}

/// Keys without rotation and values through one latent.
struct Factors {
    /// `V_r^T`, `[r, D]`.
    latent: Array2<f64>,
    /// `U_r S_r` of the keys, `[rows of keys, r]`.
    up_k: Array2<f64>,
    /// `U_r S_r` of the values, `[g d, r]`.
    up_v: Array2<f64>,
    /// Share of energy that is lost.
    rank_loss: f64,
}

fn factors(keys: &Array2<f64>, values: &Array2<f64>, rank: usize, kind: SvdKind) -> Result<Factors, MethodError> {
    let rows = keys.nrows();
    if kind == SvdKind::Joint {
        let joint = svd(&concatenate![Axis(0), *keys, *values], "joint keys and values")?;
        let up = joint.scaled_left(rank, rank);
        return Ok(Factors {
            latent: joint.right(rank, rank),
            up_k: up.slice(s![..rows, ..]).to_owned(),
            up_v: up.slice(s![rows.., ..]).to_owned(),
            rank_loss: joint.lost(rank),
        });
    }
    let (of_keys, of_values) = SvdKind::split(rank);
    let (k, v) = (svd(keys, "keys without rotation")?, svd(values, "values")?);
    let latent = concatenate![Axis(0), k.right(of_keys, of_keys), v.right(of_values, of_values)];
    let mut up_k = Array2::zeros((rows, rank));
    up_k.slice_mut(s![.., ..of_keys]).assign(&k.scaled_left(of_keys, of_keys));
    let mut up_v = Array2::zeros((values.nrows(), rank));
    up_v.slice_mut(s![.., of_keys..]).assign(&v.scaled_left(of_values, of_values));
    let energy = |s: &[f64]| s.iter().map(|x| x * x).sum::<f64>();
    let (a, b) = (energy(&k.s), energy(&v.s));
    let rank_loss = if a + b > 0.0 { (a * k.lost(of_keys) + b * v.lost(of_values)) / (a + b) } else { 0.0 };
    Ok(Factors { latent, up_k, up_v, rank_loss })
}
