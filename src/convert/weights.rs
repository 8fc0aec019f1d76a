//! Methods that factorise weights alone, `x-ecomla` and `mha2mla`: widths, what the survey settles, one layer.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::streams::{SourceLayer, Stream, first_windows};
use super::survey::{Survey, convert_on_trial, output_error, trial_layers, walk};
use super::widths::default_budget;
use super::{ConvertError, ConvertSettings, Job, LayerReport, Method, RopeGrid};
use crate::arch::{Architecture, AttentionSource, GqaShape, Rope, load_attention_source};
use crate::calibrate::{Moments, project};
use crate::factor::slots::share_slots;
use crate::methods::mha2mla::{self, SvdKind};
use crate::methods::partial_rope::{PartialRope, Slot, still_rows};
use crate::methods::x_ecomla::{self, Ranks};
use crate::methods::{MethodError, MlaLayer};
use crate::observe::Observer;
use crate::runtime::Device;

/// Windows on which methods without refits measure their error.
pub(super) const MEASURED_WINDOWS: usize = 8;
/// Share of energy that query ranks keep where nothing is asked for, the published class's own default.
const Q_ENERGY: f64 = 0.99;

/// What the survey settles for these methods.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Found {
    /// Pairs of the rotated key, by layer; empty for the published layout.
    pub slots: Vec<Vec<Slot>>,
    /// Radians per token of the rotated pairs of the published layout.
    pub frequencies: Vec<f64>,
    /// Ranks of keys and values and of queries, by layer.
    pub ranks: Vec<(usize, usize)>,
}

/// The rule for pairs that is used.
pub(super) fn rule(settings: &ConvertSettings) -> PartialRope {
    settings.weights.partial_rope.unwrap_or(match settings.method {
        Method::XEcomla => PartialRope::Uniform,
        _ => PartialRope::High,
    })
}

/// Largest rank of the joint keys and values.
fn most_kv(method: Method, kind: SvdKind, shape: &GqaShape, hidden: usize, rope: usize) -> usize {
    let all = shape.kv_heads * shape.head_dim;
    match (method, kind) {
        (Method::XEcomla, _) => (2 * all).min(hidden),
        (_, SvdKind::Joint) => (2 * all - rope).min(hidden),
        // Half each: the narrower of the two decides.
        (_, SvdKind::Split) => 2 * (all - rope).min(all).min(hidden) + 1,
    }
}

/// Refuse settings that contradict each other or lie outside their range.
pub(super) fn check(shape: &GqaShape, arch: &Architecture, settings: &ConvertSettings) -> Result<(), ConvertError> {
    let w = &settings.weights;
    for (name, energy, fixed, width) in [
        ("--q-energy", w.q_energy, settings.q_lora_rank.is_some(), "--q-lora-rank"),
        ("--kv-energy", w.kv_energy, settings.kv_lora_rank.is_some(), "--kv-lora-rank"),
        ("--kv-energy", w.kv_energy, settings.kv_budget.is_some(), "--kv-budget"),
    ] {
        let Some(energy) = energy else { continue };
        if !(energy > 0.0 && energy <= 1.0) {
            return Err(ConvertError::refused(
                format!("{name} {energy} is no share of energy: it has to be above 0 and at most 1"),
                "0.95 keeps 95% of the squared singular values",
            ));
        }
        if fixed {
            return Err(ConvertError::refused(
                format!("{name} finds the ranks, {width} fixes them"),
                "leave one of the two out",
            ));
        }
    }
    let foreign = [
        (settings.method != Method::XEcomla, w.q_energy.is_some(), "--q-energy"),
        (settings.method != Method::XEcomla, w.kv_energy.is_some(), "--kv-energy"),
        (settings.method != Method::XEcomla, w.published_layout, "--published-layout"),
        (settings.method != Method::Mha2mla, w.svd != SvdKind::Joint, "--svd"),
        (settings.method == Method::Mha2mla, settings.q_lora_rank.is_some(), "--q-lora-rank"),
        (w.published_layout, w.partial_rope.is_some(), "--partial-rope with --published-layout"),
    ];
    if let Some((_, _, option)) = foreign.iter().find(|f| f.0 && f.1) {
        return Err(ConvertError::refused(
            format!("--method {} takes no {option}", settings.method),
            "leave the option out",
        ));
    }
    if w.rank_divisor == 0 {
        return Err(ConvertError::refused("--rank-divisor 0 divides nothing", "8 is the default"));
    }
    let queries = (arch.heads * shape.head_dim).min(arch.hidden);
    if let Some(rank) = settings.q_lora_rank.filter(|r| *r > queries) {
        return Err(ConvertError::refused(
            format!("q_lora_rank {rank} is larger than the rank of the query projection ({queries})"),
            "queries are not cached: a wide latent costs no cache",
        ));
    }
    if w.published_layout && shape.rotary_dim != shape.head_dim {
        return Err(ConvertError::refused(
            format!(
                "the model rotates {} of each head's {} values, the published layout is defined for whole heads",
                shape.rotary_dim, shape.head_dim
            ),
            "leave `--published-layout` out",
        ));
    }
    Ok(())
}

/// Whether ranks wait for the survey.
pub(super) fn ranks_open(settings: &ConvertSettings) -> bool {
    settings.method == Method::XEcomla && (settings.weights.kv_energy.is_some() || settings.q_lora_rank.is_none())
}

/// `(d_R, r)`; for ranks by energy, the largest `r` that is possible.
pub(super) fn widths(
    arch: &Architecture,
    shape: &GqaShape,
    settings: &ConvertSettings,
    budget: Option<usize>,
    decisions: &mut Vec<String>,
) -> Result<(usize, usize), ConvertError> {
    check(shape, arch, settings)?;
    let (g, d, method) = (shape.kv_heads, shape.head_dim, settings.method);
    // Blocks of rotated values that have to be of the same width: one, or one per KV head.
    let blocks = if method == Method::XEcomla { 1 } else { g };
    let most_block = shape.rotary_dim.min(d - 2) / 2 * 2;
    let by_energy = settings.weights.kv_energy.is_some();
    let total = match (budget, settings.qk_rope_head_dim, settings.kv_lora_rank) {
        _ if by_energy => usize::MAX,
        (_, Some(rope), Some(rank)) => rope + rank,
        (Some(budget), _, _) => budget,
        (None, None, Some(rank)) => rank + default_rope(method, d, blocks, most_block, usize::MAX),
        (None, _, None) => default_budget(arch.cache_values(), decisions),
    };
    let rope = match (settings.qk_rope_head_dim, settings.kv_lora_rank) {
        (Some(rope), _) => rope,
        (None, Some(rank)) if budget.is_some() => total.saturating_sub(rank),
        _ => default_rope(method, d, blocks, most_block, total),
    };
    let rule = if blocks == 1 {
        format!("an even number from 2 to {most_block}")
    } else {
        format!("a multiple of {} (an even number for each of {g} KV heads) up to {}", 2 * g, g * most_block)
    };
    if rope == 0 || !rope.is_multiple_of(2 * blocks) || rope / blocks > most_block {
        return Err(ConvertError::refused(
            format!("qk_rope_head_dim {rope} cannot be made from {g} KV heads of size {d} by --method {method}"),
            format!("it has to be {rule}"),
        ));
    }
    let most = most_kv(method, settings.weights.svd, shape, arch.hidden, rope);
    if by_energy {
        return Ok((rope, most));
    }
    let rank = settings.kv_lora_rank.unwrap_or(total.saturating_sub(rope));
    if rank == 0 || rank > most {
        return Err(ConvertError::refused(
            format!(
                "kv_lora_rank {rank} is not possible: the weights that {method} decomposes have rank {most} at most"
            ),
            format!("beside a rotated width of {rope}, the latent can have from 1 to {most} values"),
        ));
    }
    Ok((rope, rank))
}

/// The rotated width where none is asked for: half a head for x-ecomla, as its published configs, a quarter of each head
/// for mha2mla; less where the budget is small.
fn default_rope(method: Method, d: usize, blocks: usize, most: usize, total: usize) -> usize {
    let share = if method == Method::XEcomla { 2 } else { 4 };
    let mut block = (d / share / 2 * 2).clamp(2, most.max(2));
    while block > 2 && block * blocks * 2 > total {
        block -= 2;
    }
    block * blocks
}

/// Width of the query latent: asked for, or the largest possible while the survey has not found it.
pub(super) fn query_rank(arch: &Architecture, shape: &GqaShape, settings: &ConvertSettings) -> Option<usize> {
    match settings.method {
        Method::XEcomla => Some(settings.q_lora_rank.unwrap_or((arch.heads * shape.head_dim).min(arch.hidden))),
        method if method.from_weights() => None,
        _ => settings.q_lora_rank,
    }
}

/// Values per head without rotation.
pub(super) fn nope_dim(shape: &GqaShape, settings: &ConvertSettings, rope: usize) -> usize {
    let d = shape.head_dim;
    match settings.method {
        Method::XEcomla => d - rope,
        // Heads may keep different numbers of pairs.
        _ if rule(settings) == PartialRope::TwoNorm => d,
        _ => d - rope / shape.kv_heads,
    }
}

/// The grid that the kept pairs lie on.
pub(super) fn grid(shape: &GqaShape, settings: &ConvertSettings, rope: usize) -> RopeGrid {
    let one_key = settings.method == Method::XEcomla || shape.kv_heads == 1;
    let whole = shape.rotary_dim == shape.head_dim && shape.head_dim.is_multiple_of(rope);
    let even = one_key && rule(settings) == PartialRope::Uniform && whole;
    if settings.weights.published_layout || even { RopeGrid::Stock } else { RopeGrid::Free }
}

/// Settle pairs and ranks; with `measure`, predict the error on trial layers.
pub(super) fn survey_weights(
    job: &mut Job<'_>,
    backend: &Device,
    windows: &[Vec<u32>],
    measure: bool,
    observer: &dyn Observer,
) -> Result<Survey, ConvertError> {
    let (w, method) = (job.settings.weights, job.settings.method);
    let rule = rule(job.settings);
    let (half, g, turned) = (job.shape.head_dim / 2, job.shape.kv_heads, job.shape.rotary_dim / 2);
    let pairs = job.spec.geometry.qk_rope_head_dim / 2;
    let mut ranks = Vec::new();
    let mut norms = Vec::new();
    let look = |attention: &AttentionSource| -> Result<(usize, usize), MethodError> {
        if method != Method::XEcomla {
            return Ok((job.spec.geometry.kv_lora_rank, 0));
        }
        let kv = match w.kv_energy {
            Some(energy) => x_ecomla::kv_rank(attention, energy, w.rank_divisor)?,
            None => job.spec.geometry.kv_lora_rank,
        };
        let q = match job.settings.q_lora_rank {
            Some(q) => q,
            None => x_ecomla::q_rank(attention, w.q_energy.unwrap_or(Q_ENERGY), w.rank_divisor)?,
        };
        Ok((kv, q))
    };
    let by_norm = rule == PartialRope::TwoNorm && !w.published_layout;
    if by_norm || job.arch.qk_norm.is_some() {
        walk(job, backend, windows, observer, false, |index, layer, pass, _| {
            ranks.push(look(&layer.attention).map_err(ConvertError::layer(index))?);
            if by_norm {
                norms.push(pair_norms(&layer.attention, pass.x.view()));
            }
            Ok(())
        })?;
    } else {
        for index in 0..job.arch.layers {
            let attention = load_attention_source(job.source, job.arch, index)?;
            ranks.push(look(&attention).map_err(ConvertError::layer(index))?);
        }
    }
    let mut found = Found { ranks, ..Found::default() };
    if w.published_layout {
        found.frequencies = Rope::from_json(&job.source.config, 2 * pairs)?.inv_freq;
    } else if method == Method::XEcomla {
        let scores = by_norm.then(|| shared(&norms).sum_axis(ndarray::Axis(0)).to_vec());
        let kept = rule.choose(turned, pairs, scores.as_deref().unwrap_or_default());
        let slots: Vec<Slot> = kept.into_iter().map(|pair| Slot { pair, head: None }).collect();
        found.slots = vec![slots; job.arch.layers];
    } else if by_norm {
        found.slots = by_layer(&norms, half, pairs);
    } else {
        let slots = |a: usize| {
            let pairs = rule.choose(turned, pairs / g, &[]);
            pairs.into_iter().map(move |pair| Slot { pair, head: Some(a) })
        };
        found.slots = vec![(0..g).flat_map(slots).collect(); job.arch.layers];
    }
    explain(job, &found);
    if ranks_open(job.settings) {
        let widest = |f: fn(&(usize, usize)) -> usize| found.ranks.iter().map(f).max().unwrap_or(1);
        job.set_ranks(widest(|r| r.0), Some(widest(|r| r.1)))?;
    }
    let mut survey = Survey { weights: Some(found), ..Survey::default() };
    if measure {
        let trial = trial_layers(job.arch.layers);
        let mut total = 0.0;
        walk(job, backend, windows, observer, false, |index, layer, pass, stream| {
            if trial.contains(&index) {
                total += convert_on_trial(job, &survey, index, layer, pass, &stream.windows)?;
            }
            Ok(())
        })?;
        survey.predicted_error = Some(total / trial.len().max(1) as f64);
    }
    Ok(survey)
}

/// `sum_{h in a} mean_t |q_{h,j}| mean_t |k_{a,j}|`, `[g, d / 2]` (MHA2MLA, section 3.1).
fn pair_norms(attention: &AttentionSource, x: ArrayView2<'_, f32>) -> Array2<f64> {
    let (d, half, n) = (attention.head_dim, attention.head_dim / 2, attention.group());
    let means = |y: Array2<f32>, heads: usize| {
        Array2::from_shape_fn((heads, half), |(h, j)| {
            let (re, im) = (y.column(h * d + j), y.column(h * d + half + j));
            let sum: f64 = re.iter().zip(im).map(|(a, b)| f64::from(*a).hypot(f64::from(*b))).sum();
            sum / y.nrows().max(1) as f64
        })
    };
    let q = means(project(x, &attention.wq, attention.bq.as_ref()), attention.heads);
    let k = means(project(x, &attention.wk, attention.bk.as_ref()), attention.kv_heads);
    Array2::from_shape_fn(k.dim(), |(a, j)| (a * n..(a + 1) * n).map(|h| q[[h, j]]).sum::<f64>() * k[[a, j]])
}

/// Mean over the layers, each scaled to a sum of one.
fn shared(norms: &[Array2<f64>]) -> Array2<f64> {
    let mut out = norms.first().map_or_else(|| Array2::zeros((0, 0)), |n| Array2::zeros(n.dim()));
    for n in norms {
        out += &scaled(n);
    }
    out
}

fn scaled(norms: &Array2<f64>) -> Array2<f64> {
    let sum = norms.sum();
    if sum > 0.0 { norms / sum } else { norms.clone() }
}

/// Pairs by norm where all layers have one list of frequencies: how often each frequency occurs is shared by the layers,
/// which KV heads have it is each layer's own.
fn by_layer(norms: &[Array2<f64>], half: usize, pairs: usize) -> Vec<Vec<Slot>> {
    let values: Vec<Array2<f64>> = norms.iter().map(|n| scaled(n).t().to_owned()).collect();
    let counts = share_slots(&values, pairs);
    let of_layer = |n: &Array2<f64>| {
        let of_pair = |j: usize| {
            let mut heads: Vec<usize> = (0..n.nrows()).collect();
            heads.sort_by(|a, b| n[[*b, j]].total_cmp(&n[[*a, j]]).then(a.cmp(b)));
            heads.truncate(counts[j]);
            heads.sort_unstable();
            heads.into_iter().map(move |a| Slot { pair: j, head: Some(a) })
        };
        (0..half).flat_map(of_pair).collect()
    };
    norms.iter().map(of_layer).collect()
}

/// Say what was settled.
fn explain(job: &mut Job<'_>, found: &Found) {
    let w = job.settings.weights;
    if w.published_layout {
        job.decisions.push(
            "rows and frequencies as the published code has them: positions mean something else than in the source, for \
             comparison only"
                .into(),
        );
        if job.shape.qkv_bias || job.shape.out_bias {
            job.decisions.push("the source's attention biases are dropped, as the published code drops them".into());
        }
    } else if rule(job.settings) == PartialRope::TwoNorm && job.shape.kv_heads > 1 && job.arch.layers > 1 {
        job.decisions.push(
            "pairs by 2-norm: all layers share one list of frequencies, as stock classes have it; which KV heads keep a \
             frequency is each layer's own"
                .into(),
        );
    }
    let list = |name: &str, ranks: Vec<usize>| {
        let (least, most) = (ranks.iter().min().copied(), ranks.iter().max().copied());
        let mean = ranks.iter().sum::<usize>() as f64 / ranks.len().max(1) as f64;
        format!(
            "{name} ranks by layer from {} to {}, {mean:.1} in the mean: all layers are padded with zeros to the largest",
            least.unwrap_or(0),
            most.unwrap_or(0)
        )
    };
    if w.kv_energy.is_some() {
        job.decisions.push(list("key and value", found.ranks.iter().map(|r| r.0).collect()));
    }
    if job.settings.method == Method::XEcomla && job.settings.q_lora_rank.is_none() {
        if w.q_energy.is_none() {
            job.decisions.push(format!("queries keep {}% of their energy, as published", 100.0 * Q_ENERGY));
        }
        job.decisions.push(list("query", found.ranks.iter().map(|r| r.1).collect()));
    }
}

/// A converted layer, with its figures.
pub(super) struct Converted {
    pub layer: MlaLayer,
    pub rank_loss: f64,
}

/// Convert one layer.
pub(super) fn convert(
    job: &Job<'_>,
    found: &Survey,
    index: usize,
    attention: &AttentionSource,
) -> Result<Converted, MethodError> {
    let geometry = job.spec.geometry;
    let Some(found) = &found.weights else {
        return Err(MethodError::Setting { message: "the survey settled no ranks".into(), hint: None });
    };
    let slots = found.slots.get(index).map(Vec::as_slice).unwrap_or_default();
    let (kv, q) = found.ranks.get(index).copied().unwrap_or_default();
    let nope = geometry.qk_nope_head_dim;
    if job.settings.method == Method::Mha2mla {
        let made = mha2mla::convert(attention, slots, geometry.kv_lora_rank, nope, job.settings.weights.svd)?;
        return Ok(Converted { layer: made.layer, rank_loss: made.rank_loss });
    }
    let q_width = found.ranks.iter().map(|r| r.1).max().unwrap_or(q);
    let ranks = Ranks { kv, kv_width: geometry.kv_lora_rank, q, q_width };
    let made = match job.settings.weights.published_layout {
        true => x_ecomla::convert_published(attention, &found.frequencies, &ranks, nope)?,
        false => x_ecomla::convert(attention, slots, &ranks, nope)?,
    };
    Ok(Converted { layer: made.layer, rank_loss: made.rank_loss })
}

/// Convert one layer and measure it on the source's stream; the source's attention output goes with it, to move the
/// stream on.
pub(super) fn convert_on_stream(
    job: &Job<'_>,
    found: &Survey,
    index: usize,
    source: &mut SourceLayer<'_>,
    stream: &Stream,
) -> Result<(MlaLayer, LayerReport, Array2<f32>), ConvertError> {
    let pass = source.attend(stream, false)?;
    let explained = source.linearise(index, pass.x.view())?;
    let made = convert(job, found, index, &source.attention).map_err(ConvertError::layer(index))?;
    let (x, lengths) = first_windows(&pass.x, &stream.windows, MEASURED_WINDOWS);
    let rows = x.nrows();
    let want = pass.output.slice(ndarray::s![..rows, ..]).to_owned();
    let predicted_error = output_error(&made.layer, source.attention.score_softcap, x, lengths, &want);
    let mut moments = Moments::new(job.arch.hidden);
    moments.add(x);
    let ranks = found.weights.as_ref().and_then(|w| w.ranks.get(index)).copied();
    let report = LayerReport {
        layer: index,
        predicted_error,
        rope_loss: rope_loss(job, found, index, &source.attention, &moments),
        rank_loss: made.rank_loss,
        kv_rank: ranks.map(|r| r.0),
        q_rank: ranks.map(|r| r.1).filter(|q| *q > 0),
        notes: explained.map(|e| e.note()).into_iter().collect(),
        ..LayerReport::default()
    };
    Ok((made.layer, report, pass.output))
}

/// Share of the keys' energy in pairs that turn in the source and do not any more.
fn rope_loss(job: &Job<'_>, found: &Survey, index: usize, attention: &AttentionSource, moments: &Moments) -> f64 {
    let Some(slots) = found.weights.as_ref().and_then(|w| w.slots.get(index)) else { return 1.0 };
    let (d, half) = (job.shape.head_dim, job.shape.head_dim / 2);
    let energy = moments.output_moment(&attention.wk, attention.bk.as_ref()).diag().to_owned();
    let still = still_rows(attention, slots);
    let lost: f64 = (0..job.shape.kv_heads)
        .flat_map(|a| still[a].iter().filter(|i| attention.inv_freq[*i % half] != 0.0).map(move |i| a * d + i))
        .map(|i| energy[i])
        .sum();
    let total = energy.sum();
    if total > 0.0 { lost / total } else { 0.0 }
}
