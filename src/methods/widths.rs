//! How wide the latent and the rotated key may be: the budget, and the rotated widths that fit it.

use super::{Budget, Case, Split};
use crate::error::ConvertError;

/// Values per token and layer that were asked for.
///
/// # Errors
/// Widths that are not the budget's.
pub fn asked_budget(case: &Case<'_>) -> Result<Option<usize>, ConvertError> {
    let settings = case.settings;
    let source = case.arch.cache_values();
    let budget = match settings.kv_budget {
        Some(Budget::Values(n)) => Some(n),
        Some(Budget::Percent(p)) => Some(((source as f64 * p / 100.0).round() as usize).max(1)),
        None => None,
    };
    if let (Some(b), Some(rope), Some(rank)) = (budget, settings.qk_rope_head_dim, settings.kv_lora_rank)
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
    Ok(budget)
}

/// Values per token and layer where none are asked for.
pub fn default_budget(source: usize, decisions: &mut Vec<String>) -> usize {
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

/// Rotated widths that a method can make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotatedWidths {
    /// Any even width up to that of all rotated values of the KV heads.
    Even,
    /// Divisors of the rotated width of one head.
    Divisors,
}

/// Splits of the cache that were asked for, or are possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Splits {
    /// The user fixed it.
    Fixed(Split),
    /// Rotated widths to choose from, ascending, at least one.
    Open {
        /// Values of the whole cache.
        budget: usize,
        /// `d_R`.
        ropes: Vec<usize>,
    },
}

/// The splits of the cache that fit the settings and the model.
///
/// # Errors
/// Widths that cannot be made from the source's heads.
pub fn splits(case: &Case<'_>, widths: RotatedWidths, decisions: &mut Vec<String>) -> Result<Splits, ConvertError> {
    let (g, d, rotated) = (case.shape.kv_heads, case.shape.head_dim, case.shape.rotary_dim);
    let source = case.arch.cache_values();
    let (rope, rank) = (case.settings.qk_rope_head_dim, case.settings.kv_lora_rank);
    let budget = match (asked_budget(case)?, rope, rank) {
        (_, Some(rope), Some(rank)) => rope + rank,
        (Some(b), _, _) => b,
        (None, Some(rope), None) => default_budget(source, decisions).max(rope + 2),
        (None, None, Some(rank)) => rank + d.min(64),
        (None, None, None) => default_budget(source, decisions),
    };
    let even = widths == RotatedWidths::Even;
    let most = if even { g * rotated } else { rotated };
    let valid = |rope: usize| -> bool {
        rope >= 2
            && rope.is_multiple_of(2)
            && rope < budget
            && rope <= most
            && budget - rope <= 2 * g * d - rope
            && (even || rotated.is_multiple_of(rope))
    };
    let fixed = match (rope, rank) {
        (Some(rope), _) => Some(rope),
        // RoPE rotates pairs: an odd remainder leaves one value of the budget unused.
        (None, Some(rank)) => Some(budget.saturating_sub(rank) / 2 * 2),
        (None, None) => None,
    };
    if let Some(rope) = fixed {
        if valid(rope) {
            return Ok(Splits::Fixed(Split { rope, rank: rank.unwrap_or(budget - rope) }));
        }
        let divisor = if even { String::new() } else { format!(" and a divisor of {rotated}") };
        return Err(ConvertError::refused(
            format!(
                "qk_rope_head_dim {rope} with kv_lora_rank {} cannot be made from {g} KV heads of size {d}",
                budget.saturating_sub(rope)
            ),
            format!(
                "qk_rope_head_dim has to be even, at most {most}{divisor}, and kv_lora_rank at most {} - qk_rope_head_dim",
                2 * g * d
            ),
        ));
    }
    let ropes: Vec<usize> = (1..=most / 2).map(|p| 2 * p).filter(|&r| valid(r)).collect();
    if ropes.is_empty() {
        return Err(ConvertError::refused(
            format!("no split of {budget} values per token and layer fits {g} KV heads of size {d}"),
            format!("the cache can have from 3 to {} values; the source's has {source}", 2 * g * d),
        ));
    }
    Ok(Splits::Open { budget, ropes })
}
