//! Rotary frequencies as a stock config expresses them.

use serde_json::{Map, Value, json};

use crate::arch::{LongRope, base_power};

/// How the output's config names its frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// `rope_theta`.
    pub theta: f64,
    /// `rope_scaling`, `null` for the default grid.
    pub scaling: Value,
    /// Plain words: `default`, the source's own scheme, or `longrope` (one frequency per slot).
    pub kind: String,
    /// Radians per token of each slot.
    pub frequencies: Vec<f64>,
    /// As `frequencies`, for sequences past the original context.
    pub long: Option<LongRope>,
}

/// The simplest config whose frequencies are bit for bit `frequencies` (f32 values, radians per token): the default grid,
/// the source's own scaling, or LongRoPE factors `1 / (f theta^(2p/d_R))`, which express any frequencies (T4).
///
/// `source` is the source's `rope_scaling` object, if it has one. An attention factor is never emitted: the source's is
/// folded into the queries. `long` is what the slots turn by past the original context, where that differs.
pub fn rope_config(
    frequencies: &[f64],
    long: Option<LongRope>,
    theta: f64,
    source: Option<&Map<String, Value>>,
    max_position: usize,
) -> RopeConfig {
    let dim = 2 * frequencies.len();
    let made = |scaling: Value, kind: &str| RopeConfig {
        theta,
        scaling,
        kind: kind.to_owned(),
        frequencies: frequencies.to_vec(),
        long: long.clone(),
    };
    let default = (0..frequencies.len()).all(|p| frequencies[p] == f64::from(1.0 / base_power(theta, dim, p)));
    if default && long.is_none() {
        return made(Value::Null, "default");
    }
    if let Some(map) = source {
        let kind = map.get("rope_type").or_else(|| map.get("type")).and_then(Value::as_str).unwrap_or_default();
        // Schemes without an attention factor of their own.
        if matches!(kind, "llama3" | "linear") {
            let probe = json!({ "rope_theta": theta, "rope_scaling": map, "max_position_embeddings": max_position });
            let same = crate::arch::Rope::from_json(&probe, dim).is_ok_and(|r| r.inv_freq == frequencies);
            if same && long.is_none() {
                return made(Value::Object(map.clone()), kind);
            }
        }
    }
    let factors = |list: &[f64]| -> Vec<f64> {
        let one = |(p, f): (usize, &f64)| f64::from(factor(*f, base_power(theta, dim, p)));
        list.iter().enumerate().map(one).collect()
    };
    let beyond = long.as_ref().map_or(frequencies, |l| &l.inv_freq);
    let scaling = json!({
        "rope_type": "longrope",
        "type": "longrope",
        "short_factor": factors(frequencies),
        "long_factor": factors(beyond),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": long.as_ref().map_or(max_position, |l| l.original),
    });
    made(scaling, "longrope")
}

/// The f32 factor for which `1 / (factor * power)`, in f32, is nearest `frequency`: the first guess or a neighbour of it,
/// since two roundings lie between.
fn factor(frequency: f64, power: f32) -> f32 {
    if frequency < 1e-30 {
        // A pair that does not turn: so slowly that no context is long enough to tell.
        return 1e30 / power.max(1.0);
    }
    let guess = (1.0 / (frequency * f64::from(power))) as f32;
    let mut best = (guess, f64::INFINITY);
    for step in [0_i32, -1, 1, -2, 2] {
        let candidate = f32::from_bits(guess.to_bits().wrapping_add_signed(step));
        let error = (f64::from(1.0 / (candidate * power)) - frequency).abs();
        if error < best.1 {
            best = (candidate, error);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stock_grid_stays_default() {
        let f: Vec<f64> = (0..16).map(|p| f64::from(1.0 / base_power(1e4, 32, p))).collect();
        assert_eq!(rope_config(&f, None, 1e4, None, 512).scaling, Value::Null);
    }

    #[test]
    fn repeated_frequencies_survive_as_factors_to_one_ulp() {
        for theta in [1e4, 5e5, 1e6] {
            let grid: Vec<f64> = (0..32).map(|j| f64::from(1.0 / base_power(theta, 64, j))).collect();
            let f: Vec<f64> = grid.iter().chain(&grid).chain(&grid).copied().collect();
            let config = rope_config(&f, None, theta, None, 2048);
            let probe = json!({ "rope_theta": theta, "rope_scaling": config.scaling, "max_position_embeddings": 2048 });
            let back = crate::arch::Rope::from_json(&probe, 192).unwrap();
            assert_eq!(back.amplitude, 1.0);
            for (a, b) in back.inv_freq.iter().zip(&f) {
                assert!((a / b - 1.0).abs() <= f64::from(f32::EPSILON), "{a} {b}");
            }
        }
    }
}
