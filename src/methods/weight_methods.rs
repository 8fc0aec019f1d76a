//! What `x-ecomla` and `mha2mla` share: both decompose weights, keep RoPE in some pairs of a head, and only measure on text.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::options::{MethodOption, checked, not_taken};
use super::partial_rope::{PartialRope, Slot, still_rows};
use super::widths::{asked_budget, default_budget};
use super::{
    Case, Choice, ConvertSettings, Cost, LayerInput, LayerOutput, LayerReport, MEASURED_WINDOWS, Made, Method,
    SourceStream, Split, Streams, Survey, SurveyResult, TextNeed, Work, trial_layers,
};
use crate::arch::{AttentionSource, load_attention_source};
use crate::calibrate::{Moments, project};
use crate::error::{ConvertError, MethodError};
use crate::factor::slots::share_slots;
use crate::mla::{MlaLayer, output_error};
use crate::stream::{Keep, Visit, first_windows};
use crate::target::RopeGrid;

/// Group of the options in the help.
pub(super) const HEADING: &str = "Weight factorisation and hybrids";

/// `--partial-rope`.
pub(super) const PARTIAL_ROPE: MethodOption = MethodOption {
    name: "partial-rope",
    methods: &["x-ecomla", "mha2mla"],
    value_name: "RULE",
    values: &["high", "low", "uniform", "2-norm"],
    help: "pairs of a head that keep RoPE [default: uniform for x-ecomla, high for mha2mla]",
    heading: HEADING,
    check: |value| checked(rule(value)),
    ..MethodOption::PLAIN
};

/// A rule for pairs by its name.
pub(super) fn rule(value: &str) -> Result<PartialRope, String> {
    PartialRope::ALL.into_iter().find(|rule| rule.name() == value).ok_or_else(|| "unknown rule".to_owned())
}

/// What the survey settles for these methods.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Pairs {
    /// Pairs of the rotated key, by layer; empty for the published layout.
    pub slots: Vec<Vec<Slot>>,
    /// Radians per token of the rotated pairs of the published layout.
    pub frequencies: Vec<f64>,
    /// Ranks of keys and values and of queries, by layer.
    pub ranks: Vec<(usize, usize)>,
}

/// One layer, decomposed.
pub(super) struct Decomposed {
    pub layer: MlaLayer,
    pub rank_loss: f64,
}

/// Where the two methods differ.
pub(super) trait WeightMethod: Method {
    /// The rule for pairs that is used.
    fn rule(&self) -> PartialRope;

    /// Rows and frequencies as the published code has them, where that was asked for.
    fn published_layout(&self) -> bool {
        false
    }

    /// Whether one rotated key serves all KV heads; otherwise each has its own pairs.
    fn shares_key(&self) -> bool;

    /// The rotated width of a head where none is asked for, as one part in so many of the head.
    fn rope_part(&self) -> usize;

    /// Whether ranks of keys and values are found by energy.
    fn by_energy(&self) -> bool {
        false
    }

    /// Largest rank of the joint keys and values.
    fn largest_rank(&self, case: &Case<'_>, rope: usize) -> usize;

    /// Ranks of keys and values and of queries of one layer.
    fn ranks(&self, survey: &Survey<'_>, attention: &AttentionSource) -> Result<(usize, usize), MethodError>;

    /// Convert one layer.
    fn decompose(
        &self,
        made: &Made<'_>,
        pairs: &Pairs,
        index: usize,
        attention: &AttentionSource,
    ) -> Result<Decomposed, MethodError>;
}

/// Refuse what neither of the two methods takes.
pub(super) fn validate(method: &str, settings: &ConvertSettings) -> Result<(), ConvertError> {
    if settings.rope_grid.is_some() {
        return Err(not_taken(method, "--rope-grid", "--partial-rope uniform for the stock grid"));
    }
    Ok(())
}

/// What pairs by norm mean where layers share a list of frequencies.
pub(super) fn explain_norms(method: &impl WeightMethod, case: &Case<'_>) -> Vec<String> {
    if method.rule() != PartialRope::TwoNorm || case.shape.kv_heads == 1 || case.arch.layers == 1 {
        return Vec::new();
    }
    vec![
        "pairs by 2-norm: all layers share one list of frequencies, as stock classes have it; which KV heads keep a \
         frequency is each layer's own"
            .to_owned(),
    ]
}

/// The split; for ranks by energy, with the largest `r` that is possible.
pub(super) fn widths(
    method: &impl WeightMethod,
    case: &Case<'_>,
    decisions: &mut Vec<String>,
) -> Result<Split, ConvertError> {
    let (g, d, name) = (case.shape.kv_heads, case.shape.head_dim, method.name());
    let (asked_rope, asked_rank) = (case.settings.qk_rope_head_dim, case.settings.kv_lora_rank);
    // Blocks of rotated values that have to be of the same width: one, or one per KV head.
    let blocks = if method.shares_key() { 1 } else { g };
    let most_block = case.shape.rotary_dim.min(d - 2) / 2 * 2;
    let budget = asked_budget(case)?;
    let default_rope = |total: usize| {
        // Half a head for x-ecomla, as its published configs, a quarter of each for mha2mla; less in a small budget.
        let mut block = (d / method.rope_part() / 2 * 2).clamp(2, most_block.max(2));
        while block > 2 && block * blocks * 2 > total {
            block -= 2;
        }
        block * blocks
    };
    let total = match (budget, asked_rope, asked_rank) {
        _ if method.by_energy() => usize::MAX,
        (_, Some(rope), Some(rank)) => rope + rank,
        (Some(budget), _, _) => budget,
        (None, None, Some(rank)) => rank + default_rope(usize::MAX),
        (None, _, None) => default_budget(case.arch.cache_values(), decisions),
    };
    let rope = match (asked_rope, asked_rank) {
        (Some(rope), _) => rope,
        (None, Some(rank)) if budget.is_some() => total.saturating_sub(rank),
        _ => default_rope(total),
    };
    let rule = if blocks == 1 {
        format!("an even number from 2 to {most_block}")
    } else {
        format!("a multiple of {} (an even number for each of {g} KV heads) up to {}", 2 * g, g * most_block)
    };
    if rope == 0 || !rope.is_multiple_of(2 * blocks) || rope / blocks > most_block {
        return Err(ConvertError::refused(
            format!("qk_rope_head_dim {rope} cannot be made from {g} KV heads of size {d} by --method {name}"),
            format!("it has to be {rule}"),
        ));
    }
    let most = method.largest_rank(case, rope);
    if method.by_energy() {
        return Ok(Split { rope, rank: most });
    }
    let rank = asked_rank.unwrap_or(total.saturating_sub(rope));
    if rank == 0 || rank > most {
        return Err(ConvertError::refused(
            format!("kv_lora_rank {rank} is not possible: the weights that {name} decomposes have rank {most} at most"),
            format!("beside a rotated width of {rope}, the latent can have from 1 to {most} values"),
        ));
    }
    Ok(Split { rope, rank })
}

/// The grid that the kept pairs lie on.
pub(super) fn grid(method: &impl WeightMethod, case: &Case<'_>, rope: usize) -> RopeGrid {
    let shape = &case.shape;
    let one_key = method.shares_key() || shape.kv_heads == 1;
    let whole = shape.rotary_dim == shape.head_dim && shape.head_dim.is_multiple_of(rope);
    let even = one_key && method.rule() == PartialRope::Uniform && whole;
    if method.published_layout() || even { RopeGrid::Stock } else { RopeGrid::Free }
}

/// Text to measure on, and to fit norms of queries and keys where there are some.
pub(super) fn text(case: &Case<'_>, split: Split) -> TextNeed {
    let calibration = &case.settings.calibration;
    let measures = case.arch.qk_norm.is_none();
    TextNeed {
        longest: calibration.seq_len.min(case.arch.max_position),
        samples: if measures { calibration.samples.min(MEASURED_WINDOWS) } else { calibration.samples },
        longer: None,
        least: if measures { 0 } else { 4 * (split.rope + split.rank) },
        measures,
    }
}

/// The source's own stream, whose output goes on.
pub(super) const STREAMS: Streams =
    Streams { source: SourceStream::Pass(Keep { phases: false, queries_keys: None }), converted: false };

/// Settle pairs and ranks; with `predict`, measure the error on trial layers.
pub(super) fn survey(
    method: &impl WeightMethod,
    survey: &Survey<'_>,
    predict: bool,
    explain: impl FnOnce(&Pairs) -> Vec<String>,
) -> Result<Choice, ConvertError> {
    let (case, layers) = (&survey.case, survey.case.arch.layers);
    let (half, g, rotated) = (case.shape.head_dim / 2, case.shape.kv_heads, case.shape.rotary_dim / 2);
    let pairs = survey.geometry.qk_rope_head_dim / 2;
    let rule = method.rule();
    let (mut ranks, mut norms) = (Vec::new(), Vec::new());
    let by_norm = rule == PartialRope::TwoNorm && !method.published_layout();
    if by_norm || case.arch.qk_norm.is_some() {
        survey.walk.layers(Keep::default(), |visit| {
            let attention = &visit.layer.attention;
            ranks.push(method.ranks(survey, attention).map_err(ConvertError::layer(visit.index))?);
            if by_norm {
                norms.push(pair_norms(attention, visit.pass.x.view()));
            }
            Ok(())
        })?;
    } else {
        for index in 0..layers {
            let attention = load_attention_source(case.source, case.arch, index)?;
            ranks.push(method.ranks(survey, &attention).map_err(ConvertError::layer(index))?);
        }
    }
    let mut found = Pairs { ranks, ..Pairs::default() };
    if method.published_layout() {
        found.frequencies = crate::arch::Rope::from_json(&case.source.config, 2 * pairs)?.inv_freq;
    } else if method.shares_key() {
        let scores = by_norm.then(|| shared(&norms).sum_axis(ndarray::Axis(0)).to_vec());
        let kept = rule.choose(rotated, pairs, scores.as_deref().unwrap_or_default());
        let slots: Vec<Slot> = kept.into_iter().map(|pair| Slot { pair, head: None }).collect();
        found.slots = vec![slots; layers];
    } else if by_norm {
        found.slots = by_layer(&norms, half, pairs);
    } else {
        let slots = |a: usize| {
            let pairs = rule.choose(rotated, pairs / g, &[]);
            pairs.into_iter().map(move |pair| Slot { pair, head: Some(a) })
        };
        found.slots = vec![(0..g).flat_map(slots).collect(); layers];
    }
    let decisions = explain(&found);
    let (mut split, mut q_rank) = (survey.candidates.splits[0], None);
    if survey.candidates.ranks_open() {
        let widest = |f: fn(&(usize, usize)) -> usize| found.ranks.iter().map(f).max().unwrap_or(1);
        (split.rank, q_rank) = (widest(|r| r.0), Some(widest(|r| r.1)));
    }
    let mut choice = Choice { split, q_rank, result: SurveyResult::new(&found)?, predicted_error: None, decisions };
    if predict {
        let mut geometry = survey.geometry;
        geometry.kv_lora_rank = split.rank;
        let made = Made { case: *case, geometry, bias: survey.candidates.bias, result: &choice.result };
        let trial_layers = trial_layers(layers);
        let mut total = 0.0;
        survey.walk.layers(Keep::default(), |visit| {
            if trial_layers.contains(&visit.index) {
                total += trial(method, &made, &visit)?;
            }
            Ok(())
        })?;
        choice.predicted_error = Some(total / trial_layers.len().max(1) as f64);
    }
    Ok(choice)
}

/// Relative error of one layer on a survey's windows.
pub(super) fn trial(method: &impl WeightMethod, made: &Made<'_>, visit: &Visit<'_, '_>) -> Result<f64, ConvertError> {
    let (attention, pass) = (&visit.layer.attention, visit.pass);
    let pairs: Pairs = made.result.read()?;
    let layer = method.decompose(made, &pairs, visit.index, attention);
    let layer = layer.map_err(ConvertError::layer(visit.index))?.layer;
    let windows = &visit.stream.windows;
    Ok(output_error(&layer, attention.score_softcap, pass.x.view(), windows, pass.output.view()))
}

/// Convert one layer and measure it on the first windows of the source's stream.
pub(super) fn layer(
    method: &impl WeightMethod,
    made: &Made<'_>,
    input: &LayerInput<'_, '_>,
) -> Result<LayerOutput, ConvertError> {
    let (index, attention, tokens) = (input.index, input.attention, input.tokens()?);
    let pairs: Pairs = made.result.read()?;
    let out = method.decompose(made, &pairs, index, attention).map_err(ConvertError::layer(index))?;
    let (x, windows) = first_windows(tokens.x, tokens.windows, MEASURED_WINDOWS);
    let want = tokens.pass()?.output.slice(ndarray::s![..x.nrows(), ..]);
    let mut moments = Moments::new(attention.hidden());
    moments.add(x);
    let ranks = pairs.ranks.get(index).copied();
    let figures = LayerReport {
        layer: index,
        calibration_error: output_error(&out.layer, attention.score_softcap, x, windows, want),
        rope_loss: pairs.slots.get(index).map_or(1.0, |slots| rope_loss(slots, attention, &moments)),
        rank_loss: out.rank_loss,
        kv_rank: ranks.map(|r| r.0),
        q_rank: ranks.map(|r| r.1).filter(|q| *q > 0),
        ..LayerReport::default()
    };
    Ok(LayerOutput { layer: out.layer, figures, next: None, converted: None })
}

/// Share of the keys' energy in pairs that the source rotates and the output does not.
fn rope_loss(slots: &[Slot], attention: &AttentionSource, moments: &Moments) -> f64 {
    let (d, half) = (attention.head_dim, attention.head_dim / 2);
    let energy = moments.output_moment(&attention.wk, attention.bk.as_ref()).diag().to_owned();
    let unrotated = still_rows(attention, slots);
    let lost: f64 = (0..attention.kv_heads)
        .flat_map(|a| unrotated[a].iter().filter(|i| attention.inv_freq[*i % half] != 0.0).map(move |i| a * d + i))
        .map(|i| energy[i])
        .sum();
    let total = energy.sum();
    if total > 0.0 { lost / total } else { 0.0 }
}

/// What a method takes that factorises a layer beside the source's forward pass, one after the other.
pub(super) fn cost(work: &Work<'_>, flops: f64) -> Cost {
    let (t, d, q, kv) = (work.tokens, work.hidden(), work.queries(), work.keys());
    let (attention, mlp) = (work.attention_weights(), work.mlp_weights());
    let weights = 43 * attention + 4 * mlp + 28 * d * d + t * (6 * d + 6 * kv) + 24 * work.query_latent() * d;
    let states = 12 * attention + 4 * mlp + t * (16 * d + 8 * q + 6 * kv);
    let working = weights.max(states).max(work.forward_bytes);
    Cost { flops, streamed_tokens: t, working_bytes: working, overlapped_bytes: working }
}

/// Cost of a method that decomposes the queries and the joint keys and values, once for the ranks and once for the factors.
pub(super) fn decomposition_cost(work: &Work<'_>) -> Cost {
    let (q, d) = (work.queries() as f64, work.hidden() as f64);
    let solves = 2.0 * work.solve_flops() + 30.0 * q.min(d).powi(2) * q.max(d);
    cost(work, work.forward_flops() + work.moment_flops() + solves)
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
