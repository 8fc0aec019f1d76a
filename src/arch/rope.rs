//! Rotary position embedding: one angular step per pair, whatever the scaling scheme.

use serde_json::Value;

use super::ArchError;
use super::config::Config;

/// Which coordinates of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Pair `j` is rows `(j, j + d/2)`: Llama, Mistral, Qwen in Hugging Face layout.
    Half,
    /// Pair `j` is rows `(2j, 2j + 1)`: DeepSeek.
    Interleaved,
}

/// Rotary embedding of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Angle in radians per token of each pair, `[d_R / 2]`. Rounded to f32 as stock runtimes hold it.
    pub inv_freq: Vec<f64>,
    /// Factor on cos and sin, so that every score carries its square (YaRN, LongRoPE `attention_factor`).
    pub amplitude: f64,
    /// Pairing of coordinates.
    pub layout: RopeLayout,
    /// `rope_theta` of the config.
    pub theta: f64,
    /// Scaling scheme of the config, `default` when there is none.
    pub kind: String,
    /// Other frequencies for sequences past a length.
    pub long: Option<LongRope>,
}

/// Frequencies that take over once a sequence is longer than `original` tokens (LongRoPE with two lists).
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// Longest sequence that [`Rope::inv_freq`] serves, in tokens.
    pub original: usize,
    /// As [`Rope::inv_freq`], beyond it.
    pub inv_freq: Vec<f64>,
}

/// `base^(2j/dim)` as stock runtimes compute it: the exponent rounded to f32, the power rounded to f32.
pub(crate) fn base_power(theta: f64, dim: usize, pair: usize) -> f32 {
    let exponent = (2 * pair) as f32 / dim as f32;
    (f64::from(theta as f32)).powf(f64::from(exponent)) as f32
}

impl Rope {
    /// Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before), for a rotated width of `dim`.
    ///
    /// # Errors
    /// An odd `dim`, a scheme this tool does not know, or a missing parameter of a known one.
    pub(super) fn read(config: &Config<'_>, dim: usize) -> Result<Self, ArchError> {
        if dim == 0 || !dim.is_multiple_of(2) {
            return Err(ArchError::BadValue {
                key: "head_dim".into(),
                found: dim.to_string(),
                expected: "a positive even number, since RoPE rotates pairs".into(),
            });
        }
        if let Some(list) = config.list("rotary_frequencies")? {
            return Self::explicit(config, dim, list);
        }
        // transformers lets a `rope_scaling` that is not empty replace `rope_parameters` as a whole.
        let scaling = config.object("rope_scaling")?.filter(|m| !m.is_empty()).or(config.object("rope_parameters")?);
        let theta = scaling
            .and_then(|s| s.get("rope_theta"))
            .and_then(Value::as_f64)
            .or(config.number("rope_theta")?)
            .unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 0.0) {
            return Err(config.bad("rope_theta", "a positive number"));
        }
        let kind = match scaling.and_then(|s| s.get("rope_type").or_else(|| s.get("type"))) {
            None | Some(Value::Null) => "default".to_owned(),
            Some(Value::String(kind)) => kind.clone(),
            Some(other) => {
                return Err(ArchError::BadValue {
                    key: "rope_scaling.rope_type".into(),
                    found: other.to_string(),
                    expected: "a string".into(),
                });
            }
        };
        let plain: Vec<f32> = (0..dim / 2).map(|j| 1.0 / base_power(theta, dim, j)).collect();
        let params = Scaling { config, scaling, theta, dim, plain };
        // Older Phi-3 configs call LongRoPE `su` or `yarn`.
        let lists = scaling.is_some_and(|s| s.contains_key("short_factor"));
        let kind = if kind == "su" || kind == "yarn" && lists { "longrope".to_owned() } else { kind };
        // Dynamic NTK changes nothing within the model's positions; with text alone, the sections of `mrope` turn as one.
        let kind = if kind == "dynamic" || kind == "mrope" { "default".to_owned() } else { kind };
        let mut long = None;
        let (inv_freq, amplitude) = match kind.as_str() {
            "default" => (params.plain.clone(), 1.0),
            "linear" => {
                let factor = params.need("factor")? as f32;
                (params.plain.iter().map(|f| f / factor).collect(), 1.0)
            }
            "llama3" => (params.llama3()?, 1.0),
            "yarn" => params.yarn()?,
            "longrope" => {
                let (short, beyond, amplitude) = params.longrope()?;
                if short != beyond {
                    let inv_freq = beyond.into_iter().map(f64::from).collect();
                    long = Some(LongRope { original: params.original_max()? as usize, inv_freq });
                }
                (short, amplitude)
            }
            other => {
                return Err(ArchError::Unsupported {
                    what: format!("RoPE scaling `{other}`"),
                    hint: Some("known schemes are default, linear, llama3, yarn and longrope".into()),
                });
            }
        };
        let normal = inv_freq.iter().all(|f| f.is_normal() && *f > 0.0);
        if !(normal && amplitude.is_finite() && amplitude > 0.0) {
            return Err(ArchError::BadValue {
                key: "rope_scaling".into(),
                found: format!("rope_theta {theta:e} with `{kind}`"),
                expected: "values that give positive, finite frequencies and attention factor".into(),
            });
        }
        Ok(Self {
            inv_freq: inv_freq.into_iter().map(f64::from).collect(),
            amplitude,
            layout: RopeLayout::Half,
            theta,
            kind,
            long,
        })
    }

    /// Frequencies written out one by one, as the generic class of this tool has them.
    fn explicit(config: &Config<'_>, dim: usize, list: &[Value]) -> Result<Self, ArchError> {
        let frequencies = |key: &str, list: &[Value]| -> Result<Vec<f64>, ArchError> {
            let found: Vec<f64> = list.iter().filter_map(Value::as_f64).map(|f| f64::from(f as f32)).collect();
            match found.len() == dim / 2 && list.len() == dim / 2 && found.iter().all(|f| f.is_finite()) {
                true => Ok(found),
                false => Err(config.bad(key, &format!("{} numbers, one per rotated pair", dim / 2))),
            }
        };
        let long = match (config.list("rotary_frequencies_long")?, config.count("original_max_position_embeddings")?) {
            (Some(l), Some(original)) => {
                Some(LongRope { original, inv_freq: frequencies("rotary_frequencies_long", l)? })
            }
            _ => None,
        };
        Ok(Self {
            inv_freq: frequencies("rotary_frequencies", list)?,
            amplitude: 1.0,
            layout: RopeLayout::Half,
            theta: 10_000.0,
            kind: "explicit".into(),
            long,
        })
    }

    /// Frequencies for a sequence of `length` tokens.
    pub fn at_length(&self, length: usize) -> &[f64] {
        match &self.long {
            Some(long) if length > long.original => &long.inv_freq,
            _ => &self.inv_freq,
        }
    }

    /// The frequencies that a config (or any object with the RoPE keys) gives a rotated width of `dim`.
    ///
    /// # Errors
    /// As for a model's own config: unknown schemes, missing or impossible parameters.
    pub fn from_json(config: &Value, dim: usize) -> Result<Self, ArchError> {
        let empty = serde_json::Map::new();
        Self::read(&Config::new(config.as_object().unwrap_or(&empty), "any"), dim)
    }

    /// Rotated width `d_R`.
    pub fn dim(&self) -> usize {
        2 * self.inv_freq.len()
    }
}

struct Scaling<'a> {
    config: &'a Config<'a>,
    scaling: Option<&'a serde_json::Map<String, Value>>,
    theta: f64,
    dim: usize,
    plain: Vec<f32>,
}

impl Scaling<'_> {
    fn get(&self, key: &str) -> Option<f64> {
        self.scaling.and_then(|s| s.get(key)).and_then(Value::as_f64)
    }

    fn need(&self, key: &str) -> Result<f64, ArchError> {
        match self.scaling.and_then(|s| s.get(key)) {
            None => Err(ArchError::MissingKey { key: format!("rope_scaling.{key}"), family: "RoPE scaling".into() }),
            Some(v) => v.as_f64().filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| ArchError::BadValue {
                key: format!("rope_scaling.{key}"),
                found: v.to_string(),
                expected: "a positive number".into(),
            }),
        }
    }

    fn original_max(&self) -> Result<f64, ArchError> {
        match self.get("original_max_position_embeddings").or(self.config.number("original_max_position_embeddings")?) {
            Some(v) if v > 0.0 => Ok(v),
            _ => self.config.need_number("max_position_embeddings"),
        }
    }

    /// Llama 3.1: keep fast pairs, divide slow ones by `factor`, interpolate between (Meta's reference, as restated in
    /// transformers' `modeling_rope_utils`).
    fn llama3(&self) -> Result<Vec<f32>, ArchError> {
        let factor = self.need("factor")?;
        let (low, high) = (self.need("low_freq_factor")?, self.need("high_freq_factor")?);
        let original = self.need("original_max_position_embeddings")?;
        Ok(self
            .plain
            .iter()
            .map(|&f| {
                let f = f64::from(f);
                let wavelength = 2.0 * std::f64::consts::PI / f;
                let scaled = if wavelength > original / low {
                    f / factor
                } else if wavelength < original / high {
                    f
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                };
                scaled as f32
            })
            .collect())
    }

    /// YaRN (arXiv 2309.00071, section 3.2) with the attention factor of its section 3.4.
    fn yarn(&self) -> Result<(Vec<f32>, f64), ArchError> {
        let factor = self.need("factor")?;
        let original = self.original_max()?;
        let (fast, slow) = (self.get("beta_fast").unwrap_or(32.0), self.get("beta_slow").unwrap_or(1.0));
        let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let amplitude = match (self.get("attention_factor"), self.get("mscale"), self.get("mscale_all_dim")) {
            (Some(a), _, _) => a,
            (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
            _ => mscale(1.0),
        };
        let dim = self.dim as f64;
        let correction =
            |rotations: f64| dim * (original / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * self.theta.ln());
        let truncate = self.scaling.and_then(|s| s.get("truncate")).and_then(Value::as_bool).unwrap_or(true);
        let (mut low, mut high) = (correction(fast), correction(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let freqs = self.plain.iter().enumerate().map(|(j, &f)| {
            let ramp = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
            let f = f64::from(f);
            (f / factor * ramp + f * (1.0 - ramp)) as f32
        });
        Ok((freqs.collect(), amplitude))
    }

    /// LongRoPE (arXiv 2402.13753): one factor per pair, in one list for sequences up to the original context and another
    /// beyond it. Both lists of frequencies, and the amplitude they share.
    fn longrope(&self) -> Result<(Vec<f32>, Vec<f32>, f64), ArchError> {
        let list = |key: &str| -> Result<Vec<f64>, ArchError> {
            let values = self.scaling.and_then(|s| s.get(key)).and_then(Value::as_array);
            let values: Option<Vec<f64>> = values.map(|v| v.iter().filter_map(Value::as_f64).collect());
            match values {
                Some(v) if v.len() == self.dim / 2 && v.iter().all(|x| x.is_finite() && *x > 0.0) => Ok(v),
                Some(v) => Err(ArchError::BadValue {
                    key: format!("rope_scaling.{key}"),
                    found: format!("{} usable numbers", v.len()),
                    expected: format!("{} positive numbers, one per rotated pair", self.dim / 2),
                }),
                None => Err(ArchError::MissingKey {
                    key: format!("rope_scaling.{key}"),
                    family: "RoPE scaling longrope".into(),
                }),
            }
        };
        let (short, long) = (list("short_factor")?, list("long_factor")?);
        let original = self.original_max()?;
        let max = self.config.need_number("max_position_embeddings")?;
        let factor = self.get("factor").unwrap_or(max / original);
        let amplitude = match self.get("attention_factor") {
            Some(a) => a,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        let frequencies = |factors: &[f64]| -> Vec<f32> {
            let one = |(j, f): (usize, &f64)| 1.0 / (*f as f32 * base_power(self.theta, self.dim, j));
            factors.iter().enumerate().map(one).collect()
        };
        Ok((frequencies(&short), frequencies(&long), amplitude))
    }
}
