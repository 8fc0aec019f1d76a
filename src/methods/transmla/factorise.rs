//! TransMLA as published (arXiv 2502.07864): RoRoPE with FreqFold and collapse, balanced keys and values, joint PCA.
//!
//! Differences that do not change the approximation: constants in the latent (from q/k/v biases) are carried exactly,
//! keys' dropped (softmax ignores them) and values' in the output bias; and the latent norm is neutralised by the target,
//! so that a stock class runs the result.

use std::str::FromStr;

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};
use serde::Serialize;

use crate::arch::AttentionSource;
use crate::calibrate::Moments;
use crate::error::MethodError;
use crate::factor::linalg::{eigh, matmul};
use crate::factor::rotate::{is_valid_fold, rorope};
use crate::methods::output_bias_with_values;
use crate::mla::{MlaLayer, Query};

/// TransMLA's FreqFold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FreqFold {
    /// Double from the collapse factor while the predicted loss falls.
    Auto,
    /// That many neighbouring frequencies share one rotation.
    Fixed(usize),
}

impl FromStr for FreqFold {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s == "auto" {
            return Ok(FreqFold::Auto);
        }
        s.parse()
            .ok()
            .filter(|n| *n > 0)
            .map(FreqFold::Fixed)
            .ok_or_else(|| format!("`{s}` is neither `auto` nor a positive integer"))
    }
}

/// Settings of one conversion.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// `d_R`.
    pub rope_dim: usize,
    /// `r`.
    pub rank: usize,
    /// `r_q`.
    pub q_rank: Option<usize>,
    /// FreqFold `F`.
    pub fold: usize,
    /// Target ratio of mean key norm to mean value norm; `None`: no balancing.
    pub balance: Option<f64>,
}

/// A converted layer and what was lost.
pub struct Converted {
    /// The layer.
    pub layer: MlaLayer,
    /// Share of the joint PCA's energy outside the latent.
    pub rank_loss: f64,
    /// Share of key energy that lost its rotation.
    pub rope_loss: f64,
    /// The layer between the two steps: rotations gone, nothing compressed. Its latent is the keys without rotation, and
    /// its values are the source's own (`v_up` is empty). The published tool's second calibration runs after such layers.
    pub rotated: MlaLayer,
}

/// Which weighting the joint low-rank step uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Plain L2 of `[k_N / rho, v]` (TransMLA, appendix D; docs/maths.md, section 6).
    Plain,
    /// CARE (docs/maths.md, section 9): the covariance shrunk towards its mean diagonal; no balancing factor.
    Care,
}

/// FreqFolds to try for `auto`: the collapse factor, doubled while it is valid.
pub fn candidate_folds(head_dim: usize, rope_dim: usize) -> Vec<usize> {
    let collapse = head_dim / rope_dim.max(1);
    let mut fold = collapse;
    let mut out = Vec::new();
    while is_valid_fold(head_dim, collapse, fold) {
        out.push(fold);
        fold *= 2;
    }
    out
}

/// Bias of `[k_N; v]`; `None` where neither keys nor values have one.
fn stacked_bias(source: &AttentionSource, b_nope: &ArrayView2<'_, f64>) -> Option<Array1<f64>> {
    if source.bk.is_none() && source.bv.is_none() {
        return None;
    }
    let all = source.kv_heads * source.head_dim;
    let bk = source.bk.clone().unwrap_or_else(|| Array1::zeros(all));
    let bv = source.bv.clone().unwrap_or_else(|| Array1::zeros(all));
    Some(concatenate![Axis(0), b_nope.t().dot(&bk), bv])
}

/// `rho`: mean column norm of keys over that of values (docs/maths.md, section 6), from the moment of `[k_N; v]` with `width` rows of
/// keys; one where nothing is to be balanced.
fn key_balance(cz: &Array2<f64>, width: usize, ratio: Option<f64>) -> f64 {
    let column = |range: std::ops::Range<usize>| -> f64 {
        let n = range.len().max(1) as f64;
        range.map(|i| cz[[i, i]].max(0.0).sqrt()).sum::<f64>() / n
    };
    let values = column(width..cz.nrows());
    let rho = match ratio {
        Some(ratio) if width > 0 && values > 0.0 => column(0..width) / (values * ratio),
        _ => 1.0,
    };
    if rho.is_finite() && rho > 0.0 { rho } else { 1.0 }
}

/// Rotated queries `[H d_R, D]` and their bias: each head's own rows of the rotated basis, `b_rope` `[g d, d_R]`.
fn rotated_queries(source: &AttentionSource, b_rope: &ArrayView2<'_, f64>) -> (Array2<f64>, Option<Array1<f64>>) {
    let (heads, d, n, rope_dim) = (source.heads, source.head_dim, source.group(), b_rope.ncols());
    let mut q_rope = Array2::zeros((heads * rope_dim, source.hidden()));
    let mut q_rope_bias = source.bq.as_ref().map(|_| Array1::zeros(heads * rope_dim));
    for h in 0..heads {
        let (group, rows) = (h / n, h * d..(h + 1) * d);
        let to_rope = b_rope.slice(s![group * d..(group + 1) * d, ..]);
        let q = source.wq.slice(s![rows.clone(), ..]);
        let out = h * rope_dim..(h + 1) * rope_dim;
        q_rope.slice_mut(s![out.clone(), ..]).assign(&matmul(&to_rope.t(), &q));
        if let (Some(b), Some(bq)) = (&mut q_rope_bias, &source.bq) {
            b.slice_mut(s![out]).assign(&to_rope.t().dot(&bq.slice(s![rows])));
        }
    }
    (q_rope, q_rope_bias)
}

/// From the latent to keys and values of every head, `[H d, rank]` each, from the directions `top` of `[k_N; v]`, the keys of which
/// are divided by `rho`.
fn up_projections(
    source: &AttentionSource,
    b_nope: &ArrayView2<'_, f64>,
    top: &Array2<f64>,
    rho: f64,
    rank: usize,
) -> (Array2<f64>, Array2<f64>) {
    let (heads, d, n) = (source.heads, source.head_dim, source.group());
    let (width, used) = (b_nope.ncols(), top.ncols());
    let (top_k, top_v) = (top.slice(s![..width, ..]), top.slice(s![width.., ..]));
    let mut k_up = Array2::zeros((heads * d, rank));
    let mut v_up = Array2::zeros((heads * d, rank));
    for h in 0..heads {
        let (group, rows) = (h / n, h * d..(h + 1) * d);
        let own = group * d..(group + 1) * d;
        // k_h = E_h basis k'; the N columns meet the latent, times rho.
        let mut up = matmul(&b_nope.slice(s![own.clone(), ..]), &top_k);
        up *= rho;
        k_up.slice_mut(s![rows.clone(), ..used]).assign(&up);
        v_up.slice_mut(s![rows, ..used]).assign(&top_v.slice(s![own, ..]));
    }
    (k_up, v_up)
}

/// Each query head's own rows of the basis without rotation, `b_nope` `[g d, width]`: `[H d, width]`.
fn own_rows(source: &AttentionSource, b_nope: &ArrayView2<'_, f64>) -> Array2<f64> {
    let (heads, d, n) = (source.heads, source.head_dim, source.group());
    let mut own_keys = Array2::zeros((heads * d, b_nope.ncols()));
    for h in 0..heads {
        let own = (h / n) * d..(h / n + 1) * d;
        own_keys.slice_mut(s![h * d..(h + 1) * d, ..]).assign(&b_nope.slice(s![own, ..]));
    }
    own_keys
}

/// Convert one layer from the second moments of its input.
///
/// # Errors
/// [`MethodError::Setting`] for widths the method cannot meet; [`MethodError::Factor`] from an eigenvalue problem.
pub fn convert(
    source: &AttentionSource,
    moments: &Moments,
    settings: &Settings,
    metric: Metric,
) -> Result<Converted, MethodError> {
    let (heads, g, d) = (source.heads, source.kv_heads, source.head_dim);
    let limits = Limits { kv_heads: g, head_dim: d, queries: (heads * d).min(source.hidden()) };
    check(&limits, settings.rope_dim, settings.rank, settings.q_rank, settings.fold)
        .map_err(|e| MethodError::Setting { message: e.message, hint: e.hint })?;
    let collapse = d / settings.rope_dim;
    let ck = moments.output_moment(&source.wk, source.bk.as_ref());
    let rotation = rorope(&ck, g, d, collapse, settings.fold)?;
    let (rope_dim, all) = (settings.rope_dim, g * d);
    let (b_rope, b_nope) = rotation.basis.view().split_at(Axis(1), rope_dim);
    let k_rope = matmul(&b_rope.t(), &source.wk);
    let k_nope = matmul(&b_nope.t(), &source.wk);

    // Second moments of [k_N; v], biases included as published.
    let stacked = concatenate![Axis(0), k_nope, source.wv];
    let bias = stacked_bias(source, &b_nope);
    let cz = moments.output_moment(&stacked, bias.as_ref());
    let width = all - rope_dim;
    let total_key = ck.diag().sum();
    let lost_key: f64 = cz.diag().slice(s![..width]).sum();

    let rho = key_balance(&cz, width, settings.balance.filter(|_| metric == Metric::Plain));
    let scale = Array1::from_shape_fn(width + all, |i| if i < width { 1.0 / rho } else { 1.0 });
    let weighted = &(&stacked * &scale.view().insert_axis(Axis(1)));
    let r = match metric {
        Metric::Plain => {
            let m = &cz * &scale.view().insert_axis(Axis(1)) * &scale;
            eigh(&m, "joint key/value moment")?
        }
        Metric::Care => eigh(&moments.shrunk_output_moment(&stacked, 0.01), "shrunk joint key/value moment")?,
    };
    let rank = settings.rank.min(width + all);
    let energy: f64 = r.0.iter().map(|v| v.max(0.0)).sum();
    let kept: f64 = r.0.iter().take(rank).map(|v| v.max(0.0)).sum();
    let top = r.1.slice(s![.., ..rank]).to_owned();
    let mut latent = Array2::zeros((settings.rank, source.hidden()));
    latent.slice_mut(s![..rank, ..]).assign(&matmul(&top.t(), weighted));
    let (k_up, v_up) = up_projections(source, &b_nope, &top, rho, settings.rank);
    let (q_rope, q_rope_bias) = rotated_queries(source, &b_rope);
    let query = Query {
        down: None,
        nope: source.wq.clone(),
        nope_bias: source.bq.clone(),
        rope: q_rope,
        rope_bias: q_rope_bias,
    };
    let k_rope_bias = source.bk.as_ref().map(|b| b_rope.t().dot(b));
    let rope_freq: Vec<f64> = rotation.slot_pair.iter().map(|&j| source.inv_freq[j]).collect();
    let rotated = MlaLayer {
        heads,
        query: query.clone(),
        latent: k_nope.clone(),
        k_rope: k_rope.clone(),
        k_rope_bias: k_rope_bias.clone(),
        k_up: own_rows(source, &b_nope),
        v_up: Array2::zeros((0, width)),
        wo: source.wo.clone(),
        wo_bias: source.bo.clone(),
        rope_freq: rope_freq.clone(),
        score_scale: source.score_scale,
    };
    let query = match settings.q_rank {
        None => query,
        Some(q_rank) => low_rank_query(source, moments, query, b_rope, q_rank)?,
    };
    let layer = MlaLayer {
        heads,
        query,
        latent,
        k_rope,
        k_rope_bias,
        k_up,
        v_up,
        wo: source.wo.clone(),
        wo_bias: output_bias_with_values(source),
        rope_freq,
        score_scale: source.score_scale,
    };
    Ok(Converted {
        layer,
        rotated,
        rank_loss: if energy > 0.0 { (1.0 - kept / energy).max(0.0) } else { 0.0 },
        rope_loss: if total_key > 0.0 { lost_key / total_key } else { 0.0 },
    })
}

/// What a source's shape allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `g`.
    pub kv_heads: usize,
    /// `d`.
    pub head_dim: usize,
    /// Largest rank of the query projection, `min(H d, D)`.
    pub queries: usize,
}

/// Why widths cannot be met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Impossible {
    /// What was asked and what is possible.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Check widths and FreqFold against a shape.
///
/// # Errors
/// [`Impossible`], naming the width.
pub fn check(
    limits: &Limits,
    rope_dim: usize,
    rank: usize,
    q_rank: Option<usize>,
    fold: usize,
) -> Result<(), Impossible> {
    let (g, d) = (limits.kv_heads, limits.head_dim);
    let setting = |message: String, hint: String| Err(Impossible { message, hint: Some(hint) });
    if rope_dim == 0 || d % rope_dim != 0 || !rope_dim.is_multiple_of(2) {
        return setting(
            format!("qk_rope_head_dim {rope_dim} does not divide the head size {d} into even parts"),
            "RoRoPE collapses whole frequencies; `--method attention-aware` takes any even width".into(),
        );
    }
    let collapse = d / rope_dim;
    if !is_valid_fold(d, collapse, fold) {
        let valid: Vec<String> =
            (1..=d / 2).filter(|f| is_valid_fold(d, collapse, *f)).map(|f| f.to_string()).collect();
        return setting(
            format!("freqfold {fold} does not fit head size {d} with collapse {collapse}"),
            format!("possible values are {}", valid.join(", ")),
        );
    }
    let most = 2 * g * d - rope_dim;
    if rank > most {
        return setting(
            format!("kv_lora_rank {rank} is larger than the {most} values there are to compress"),
            "the latent holds keys without RoPE and values: 2 g d - d_R of them".into(),
        );
    }
    match q_rank {
        Some(q) if q > limits.queries => setting(
            format!("q_lora_rank {q} is larger than the rank of the query projection ({})", limits.queries),
            "queries are not cached: leaving the option out costs no cache".into(),
        ),
        _ => Ok(()),
    }
}

/// PCA of the stacked query outputs (biases included in the samples, kept whole on `q_b`; docs/maths.md, section 6).
fn low_rank_query(
    source: &AttentionSource,
    moments: &Moments,
    query: Query,
    to_rope: ArrayView2<'_, f64>,
    q_rank: usize,
) -> Result<Query, MethodError> {
    let cq = moments.output_moment(&source.wq, source.bq.as_ref());
    let (_, u) = eigh(&cq, "query moment")?;
    let top = u.slice(s![.., ..q_rank]).to_owned();
    let down = matmul(&top.t(), &source.wq);
    let (rope_dim, d, n) = (to_rope.ncols(), source.head_dim, source.group());
    let mut rope = Array2::zeros((source.heads * rope_dim, q_rank));
    for h in 0..source.heads {
        let own = to_rope.slice(s![(h / n) * d..(h / n + 1) * d, ..]);
        let rows = top.slice(s![h * d..(h + 1) * d, ..]);
        rope.slice_mut(s![h * rope_dim..(h + 1) * rope_dim, ..]).assign(&matmul(&own.t(), &rows));
    }
    Ok(Query { down: Some(down), nope: top, nope_bias: query.nope_bias, rope, rope_bias: query.rope_bias })
}
