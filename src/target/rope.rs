//! Rotary frequencies as a stock config expresses them.

use serde_json::{Map, Value, json};

use crate::arch::base_power;

/// How the output's config names its frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// `rope_theta`.
    pub theta: f64,
    /// `rope_scaling`, `null` for the default grid.
    pub scaling: Value,
    /// Plain words: `default`, the source's own scheme, or `longrope` (one frequency per slot).
    pub kind: String,
}

/// The simplest config whose frequencies are bit for bit `frequencies` (f32 values, radians per token): the default grid,
/// the source's own scaling, or LongRoPE factors `1 / (f theta^(2p/d_R))`, which express any frequencies (T4).
///
/// `source` is the source's `rope_scaling` object, if it has one. An attention factor is never emitted: the source's is
/// folded into the queries.
pub fn rope_config(
    frequencies: &[f64],
    theta: f64,
    source: Option<&Map<String, Value>>,
    max_position: usize,
) -> RopeConfig {
    let dim = 2 * frequencies.len();
    let default = (0..frequencies.len()).all(|p| frequencies[p] == f64::from(1.0 / base_power(theta, dim, p)));
    if default {
        return RopeConfig { theta, scaling: Value::Null, kind: "default".into() };
    }
    if let Some(map) = source {
        let kind = map.get("rope_type").or_else(|| map.get("type")).and_then(Value::as_str).unwrap_or_default();
        // Schemes without an attention factor of their own.
        if matches!(kind, "llama3" | "linear") {
            let probe = json!({ "rope_theta": theta, "rope_scaling": map, "max_position_embeddings": max_position });
            let same = crate::arch::Rope::from_json(&probe, dim).is_ok_and(|r| r.inv_freq == frequencies);
            if same {
                return RopeConfig { theta, scaling: Value::Object(map.clone()), kind: kind.to_owned() };
            }
        }
    }
    let factors: Vec<f32> =
        frequencies.iter().enumerate().map(|(p, f)| factor(*f, base_power(theta, dim, p))).collect();
    let factors: Vec<f64> = factors.into_iter().map(f64::from).collect();
    let scaling = json!({
        "rope_type": "longrope",
        "type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_position,
    });
    RopeConfig { theta, scaling, kind: "longrope".into() }
}

/// The f32 factor for which `1 / (factor * power)`, in f32, is nearest `frequency`: the first guess or a neighbour of it,
/// since two roundings lie between.
fn factor(frequency: f64, power: f32) -> f32 {
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
        assert_eq!(rope_config(&f, 1e4, None, 512).scaling, Value::Null);
    }

    #[test]
    fn repeated_frequencies_survive_as_factors_to_one_ulp() {
        for theta in [1e4, 5e5, 1e6] {
            let grid: Vec<f64> = (0..32).map(|j| f64::from(1.0 / base_power(theta, 64, j))).collect();
            let f: Vec<f64> = grid.iter().chain(&grid).chain(&grid).copied().collect();
            let config = rope_config(&f, theta, None, 2048);
            let probe = json!({ "rope_theta": theta, "rope_scaling": config.scaling, "max_position_embeddings": 2048 });
            let back = crate::arch::Rope::from_json(&probe, 192).unwrap();
            assert_eq!(back.amplitude, 1.0);
            for (a, b) in back.inv_freq.iter().zip(&f) {
                assert!((a / b - 1.0).abs() <= f64::from(f32::EPSILON), "{a} {b}");
            }
        }
    }
}
