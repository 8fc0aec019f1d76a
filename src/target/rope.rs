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
    /// How far engines that know YaRN only are from these frequencies, in words.
    pub note: Option<String>,
}

/// Amplitude keys under which YaRN multiplies nothing, in every engine that has YaRN.
fn no_amplitude(map: &mut Map<String, Value>) {
    for (key, value) in [("mscale", json!(0.0)), ("mscale_all_dim", json!(0.0)), ("attention_factor", json!(1.0))] {
        map.insert(key.to_owned(), value);
    }
    map.insert("apply_yarn_scaling".to_owned(), json!(false));
}

/// YaRN's ramp fitted to other frequencies (docs/targets.md, section 5).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnFit {
    /// `beta_fast`, rotations over the original context above which a pair is kept.
    pub beta_fast: f64,
    /// `beta_slow`, rotations below which a pair is divided by the factor.
    pub beta_slow: f64,
    /// Largest relative error of a frequency.
    pub worst_relative: f64,
    /// Largest absolute error of a frequency, radians per token.
    pub worst_absolute: f64,
}

/// The ramp whose largest absolute error against `wanted` (radians per token, one per pair) is least.
///
/// `None` where the scheme has no factor or no original context.
pub fn fit_yarn(wanted: &[f64], theta: f64, factor: f64, original: f64) -> Option<YarnFit> {
    let pairs = wanted.len();
    let dim = 2 * pairs;
    if pairs < 2 || !(factor > 1.0 && original > 1.0 && theta > 1.0) {
        return None;
    }
    let plain: Vec<f64> = (0..pairs).map(|p| f64::from(1.0 / base_power(theta, dim, p))).collect();
    // Rotations over the original context of a pair at a place between two.
    let rotations = |at: f64| original / (2.0 * std::f64::consts::PI * theta.powf(2.0 * at / dim as f64));
    let mut best: Option<YarnFit> = None;
    for low in 0..pairs {
        for high in low + 1..=pairs {
            let (mut absolute, mut relative) = (0.0_f64, 0.0_f64);
            for (j, (want, f)) in wanted.iter().zip(&plain).enumerate() {
                let ramp = ((j as f64 - low as f64) / (high - low) as f64).clamp(0.0, 1.0);
                let got = f / factor * ramp + f * (1.0 - ramp);
                absolute = absolute.max((got - want).abs());
                relative = relative.max((got / want - 1.0).abs());
            }
            if best.is_none_or(|b| absolute < b.worst_absolute) {
                // Engines round the ends of the ramp outwards to whole pairs: from the middle, both ways are safe.
                best = Some(YarnFit {
                    beta_fast: rotations(low as f64 + 0.5),
                    beta_slow: rotations(high as f64 - 0.5),
                    worst_relative: relative,
                    worst_absolute: absolute,
                });
            }
        }
    }
    best
}

impl YarnFit {
    fn words(&self) -> String {
        format!(
            "off by {:.0}% in the worst pair, by a radian after {:.0} tokens",
            100.0 * self.worst_relative,
            1.0 / self.worst_absolute.max(f64::MIN_POSITIVE)
        )
    }
}

/// The simplest config whose frequencies are bit for bit `frequencies` (f32 values, radians per token): the default grid,
/// the source's own scaling, or LongRoPE factors `1 / (f theta^(2p/d_R))`, which express any frequencies (docs/targets.md,
/// section 5).
///
/// `source` is the source's `rope_scaling` object, if it has one. An attention factor is never emitted: the source's is
/// folded into the queries. `portable` prefers a scheme that every engine has to exact frequencies. `long`: frequencies of the
/// slots past the original context, where those differ.
pub fn rope_config(
    frequencies: &[f64],
    long: Option<LongRope>,
    theta: f64,
    source: Option<&Map<String, Value>>,
    max_position: usize,
    portable: bool,
) -> RopeConfig {
    let dim = 2 * frequencies.len();
    let made = |scaling: Value, kind: &str| RopeConfig {
        theta,
        scaling,
        kind: kind.to_owned(),
        frequencies: frequencies.to_vec(),
        long: long.clone(),
        note: None,
    };
    let default = (0..frequencies.len()).all(|p| frequencies[p] == f64::from(1.0 / base_power(theta, dim, p)));
    if default && long.is_none() {
        return made(Value::Null, "default");
    }
    if let Some(map) = source {
        let kind = map.get("rope_type").or_else(|| map.get("type")).and_then(Value::as_str).unwrap_or_default();
        let mut map = map.clone();
        if kind == "yarn" {
            no_amplitude(&mut map);
        }
        if matches!(kind, "llama3" | "linear" | "yarn") {
            let probe = json!({ "rope_theta": theta, "rope_scaling": map, "max_position_embeddings": max_position });
            let same = crate::arch::Rope::from_json(&probe, dim)
                .is_ok_and(|r| r.inv_freq == frequencies && r.amplitude == 1.0);
            if same && long.is_none() {
                let fit = if kind == "llama3" { fit_of(&map, frequencies, theta) } else { None };
                let Some(fit) = fit else { return made(Value::Object(map), kind) };
                if portable {
                    let mut yarn = Map::new();
                    for key in ["factor", "original_max_position_embeddings"] {
                        yarn.extend(map.get(key).map(|v| (key.to_owned(), v.clone())));
                    }
                    yarn.insert("rope_type".into(), json!("yarn"));
                    yarn.insert("type".into(), json!("yarn"));
                    with_betas(&mut yarn, &fit);
                    let note =
                        format!("llama3 frequencies become YaRN's nearest, which every engine has: {}", fit.words());
                    return RopeConfig { note: Some(note), ..made(Value::Object(yarn), "yarn") };
                }
                // transformers takes llama3 at its word; vLLM's own class makes it YaRN, with these betas.
                with_betas(&mut map, &fit);
                let note = format!(
                    "llama3 frequencies are exact in transformers' code; for vLLM's own class, which makes them YaRN, the \
                     config has fitted betas: {}",
                    fit.words()
                );
                return RopeConfig { note: Some(note), ..made(Value::Object(map), kind) };
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

fn fit_of(map: &Map<String, Value>, frequencies: &[f64], theta: f64) -> Option<YarnFit> {
    let number = |key: &str| map.get(key).and_then(Value::as_f64);
    fit_yarn(frequencies, theta, number("factor")?, number("original_max_position_embeddings")?)
}

fn with_betas(map: &mut Map<String, Value>, fit: &YarnFit) {
    map.insert("beta_fast".into(), json!(fit.beta_fast));
    map.insert("beta_slow".into(), json!(fit.beta_slow));
    no_amplitude(map);
}

/// The f32 factor for which `1 / (factor * power)`, in f32, is nearest `frequency`: the first guess or a neighbour of it,
/// since two roundings lie between.
fn factor(frequency: f64, power: f32) -> f32 {
    if frequency < 1e-30 {
        // A pair that does not rotate: this one does so slowly that no context is long enough to tell.
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
        assert_eq!(rope_config(&f, None, 1e4, None, 512, false).scaling, Value::Null);
    }

    /// Llama 3.1's scheme, on a rotated part of 64 values.
    fn llama3() -> (Value, Vec<f64>) {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        });
        let config = json!({ "rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 131_072 });
        let rope = crate::arch::Rope::from_json(&config, 64).unwrap();
        (scaling, rope.inv_freq)
    }

    #[test]
    fn the_fitted_ramp_is_the_known_one() {
        let (_, wanted) = llama3();
        let fit = fit_yarn(&wanted, 5e5, 8.0, 8192.0).unwrap();
        // Ramp 14..17, 34% in the worst pair, 7265 tokens to a radian (docs/targets.md, section 5).
        assert!((fit.worst_relative - 0.34).abs() < 0.01, "{fit:?}");
        assert!((1.0 / fit.worst_absolute / 7265.0 - 1.0).abs() < 0.01, "{fit:?}");
        // What an engine makes of the betas is what was fitted.
        let scaling = json!({
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 1.0,
            "beta_fast": fit.beta_fast, "beta_slow": fit.beta_slow
        });
        let config = json!({ "rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 65_536 });
        let yarn = crate::arch::Rope::from_json(&config, 64).unwrap();
        let worst = yarn.inv_freq.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!((worst / fit.worst_absolute - 1.0).abs() < 1e-3, "{worst} {fit:?}");
    }

    #[test]
    fn llama3_stays_exact_where_it_can_and_becomes_yarn_where_it_has_to() {
        let (scaling, wanted) = llama3();
        let at = |portable| rope_config(&wanted, None, 5e5, scaling.as_object(), 131_072, portable);
        let faithful = at(false);
        assert_eq!(faithful.kind, "llama3");
        assert!(faithful.scaling["beta_fast"].is_number() && faithful.note.is_some());
        let portable = at(true);
        assert_eq!((portable.kind.as_str(), &portable.scaling["rope_type"]), ("yarn", &json!("yarn")));
        for (made, exact) in [(faithful, true), (portable, false)] {
            let config = json!({ "rope_theta": 5e5, "rope_scaling": made.scaling, "max_position_embeddings": 131_072 });
            let back = crate::arch::Rope::from_json(&config, 64).unwrap();
            assert_eq!(back.amplitude, 1.0);
            assert_eq!(back.inv_freq == wanted, exact);
        }
    }

    #[test]
    fn repeated_frequencies_survive_as_factors_to_one_ulp() {
        for theta in [1e4, 5e5, 1e6] {
            let grid: Vec<f64> = (0..32).map(|j| f64::from(1.0 / base_power(theta, 64, j))).collect();
            let f: Vec<f64> = grid.iter().chain(&grid).chain(&grid).copied().collect();
            let config = rope_config(&f, None, theta, None, 2048, false);
            let probe = json!({ "rope_theta": theta, "rope_scaling": config.scaling, "max_position_embeddings": 2048 });
            let back = crate::arch::Rope::from_json(&probe, 192).unwrap();
            assert_eq!(back.amplitude, 1.0);
            for (a, b) in back.inv_freq.iter().zip(&f) {
                assert!((a / b - 1.0).abs() <= f64::from(f32::EPSILON), "{a} {b}");
            }
        }
    }
}
