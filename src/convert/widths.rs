//! How wide the latent and the rotated key may be: the budget, and the splits of it to look at.

use super::{Budget, ConvertError, ConvertSettings, FreqFold, Job, Method, RopeGrid, weights};
use crate::arch::{Architecture, GqaShape};
use crate::methods::transmla;

/// Candidate `(d_R, r)`: one where the user fixed them, several where the split is to be searched.
pub(super) fn widths(
    arch: &Architecture,
    shape: &GqaShape,
    settings: &ConvertSettings,
    grid: RopeGrid,
    decisions: &mut Vec<String>,
) -> Result<Vec<(usize, usize)>, ConvertError> {
    let (g, d) = (shape.kv_heads, shape.head_dim);
    let source = arch.cache_values();
    if settings.method == Method::Exact {
        if settings.kv_lora_rank.is_some() || settings.qk_rope_head_dim.is_some() || settings.kv_budget.is_some() {
            return Err(ConvertError::refused(
                "`--method exact` keeps every value of the cache: it takes no rank and no budget",
                "use `--method attention-aware` to compress",
            ));
        }
        // Keys that do not turn go to the latent.
        return Ok(vec![(g * shape.rotary_dim, g * (2 * d - shape.rotary_dim))]);
    }
    let budget = match settings.kv_budget {
        Some(Budget::Values(n)) => Some(n),
        Some(Budget::Percent(p)) => Some(((source as f64 * p / 100.0).round() as usize).max(1)),
        None => None,
    };
    let (rope, rank) = (settings.qk_rope_head_dim, settings.kv_lora_rank);
    if let (Some(b), Some(rope), Some(rank)) = (budget, rope, rank)
        && rope + rank != b
    {
        return Err(ConvertError::refused(
            format!(
                "--qk-rope-head-dim {rope} and --kv-lora-rank {rank} make {}, --kv-budget asks for {b}",
                rope + rank
            ),
            "leave one of the three out",
        ));
    }
    if settings.method.from_weights() {
        return weights::widths(arch, shape, settings, budget, decisions).map(|split| vec![split]);
    }
    let budget = match (budget, rope, rank) {
        (_, Some(rope), Some(rank)) => rope + rank,
        (Some(b), _, _) => b,
        (None, Some(rope), None) => default_budget(source, decisions).max(rope + 2),
        (None, None, Some(rank)) => rank + d.min(64),
        (None, None, None) => default_budget(source, decisions),
    };
    let turned = shape.rotary_dim;
    let most_rope =
        if grid == RopeGrid::Stock || settings.method != Method::AttentionAware { turned } else { g * turned };
    let valid = |rope: usize| -> bool {
        rope >= 2
            && rope.is_multiple_of(2)
            && rope < budget
            && rope <= most_rope
            && budget - rope <= 2 * g * d - rope
            && (most_rope == g * turned && grid == RopeGrid::Free || turned.is_multiple_of(rope))
    };
    let fixed = match (rope, rank) {
        (Some(rope), _) => Some(rope),
        // Pairs turn: an odd remainder leaves one value of the budget unused.
        (None, Some(rank)) => Some(budget.saturating_sub(rank) / 2 * 2),
        (None, None) => None,
    };
    if let Some(rope) = fixed {
        if valid(rope) {
            return Ok(vec![(rope, rank.unwrap_or(budget - rope))]);
        }
        return Err(ConvertError::refused(
            format!(
                "qk_rope_head_dim {rope} with kv_lora_rank {} cannot be made from {g} KV heads of size {d}",
                budget.saturating_sub(rope)
            ),
            format!(
                "qk_rope_head_dim has to be even, at most {most_rope}{}, and kv_lora_rank at most {} - qk_rope_head_dim",
                if most_rope == g * turned && grid == RopeGrid::Free {
                    String::new()
                } else {
                    format!(" and a divisor of {turned}")
                },
                2 * g * d
            ),
        ));
    }
    let mut ropes: Vec<usize> = (1..=most_rope / 2).map(|p| 2 * p).filter(|&r| valid(r)).collect();
    if ropes.is_empty() {
        return Err(ConvertError::refused(
            format!("no split of {budget} values per token and layer fits {g} KV heads of size {d}"),
            format!("the cache can have from 3 to {} values; the source's has {source}", 2 * g * d),
        ));
    }
    if settings.method != Method::AttentionAware {
        // As published: 64 rotated dimensions, or what fits.
        let want = 64.min(d).min((budget / 2).max(2));
        let rope = ropes.iter().copied().filter(|&r| r <= want).max().unwrap_or(ropes[0]);
        return Ok(vec![(rope, budget - rope)]);
    }
    if grid == RopeGrid::Free {
        // A coarse ladder around a sixth to a half of the budget: the optimum is flat (docs/methods.md).
        let ladder: Vec<usize> = [1.0 / 6.0, 0.21, 0.25, 0.29, 1.0 / 3.0, 0.38]
            .iter()
            .map(|f| ((budget as f64 * f / 8.0).round() as usize * 8).max(2))
            .filter(|r| ropes.contains(r))
            .collect();
        if !ladder.is_empty() {
            ropes = ladder;
            ropes.dedup();
        }
    }
    ropes.retain(|&r| r * 2 <= budget || budget < 8);
    if ropes.is_empty() {
        ropes.push(2);
    }
    Ok(ropes.into_iter().map(|r| (r, budget - r)).collect())
}

/// Values per token and layer where none are asked for.
pub(super) fn default_budget(source: usize, decisions: &mut Vec<String>) -> usize {
    // Widths that serving kernels are built for, if one saves at least a third.
    for kernel in [576, 320] {
        if kernel * 3 <= source * 2 {
            decisions.push(format!(
                "cache of {kernel} values per token and layer: the width serving kernels are built for, {:.0}% of the source's {source}",
                100.0 * kernel as f64 / source as f64
            ));
            return kernel;
        }
    }
    decisions
        .push(format!("cache of half the source's {source} values: no kernel width (576, 320) saves a third of it"));
    source / 2
}

/// FreqFolds to try for TransMLA's rope step.
pub(super) fn folds(job: &Job<'_>) -> Vec<usize> {
    match job.settings.freqfold {
        FreqFold::Fixed(f) => vec![f],
        FreqFold::Auto => transmla::candidate_folds(job.shape.head_dim, job.spec.geometry.qk_rope_head_dim),
    }
}
