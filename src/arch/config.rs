//! Typed access to `config.json`, and its interpretation by a family.

use serde_json::{Map, Value};

use super::family::{AttentionKind, Switch};
use super::{
    Activation, ArchError, Architecture, Attention, Family, GqaShape, MlaShape, Rope, RopeLayout, TensorNames,
};
use crate::source::Dtype;

/// `config.json` with the family that reads it.
pub(super) struct Config<'a> {
    map: &'a Map<String, Value>,
    family: &'a str,
}

impl<'a> Config<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, family: &'a str) -> Self {
        Self { map, family }
    }

    fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn bad(&self, key: &str, expected: &str) -> ArchError {
        let found = self.map.get(key).map_or("absent".to_owned(), Value::to_string);
        ArchError::BadValue { key: key.to_owned(), found, expected: expected.to_owned() }
    }

    fn missing(&self, key: &str) -> ArchError {
        ArchError::MissingKey { key: key.to_owned(), family: self.family.to_owned() }
    }

    /// A count: a positive integer no larger than any model's, so that what is made from it fits memory.
    fn count(&self, key: &str) -> Result<Option<usize>, ArchError> {
        let most: u64 = match key {
            "num_hidden_layers" | "first_k_dense_replace" => 10_000,
            "num_attention_heads" | "num_key_value_heads" | "head_dim" => 1 << 16,
            _ => 1 << 30,
        };
        match self.present(key) {
            None => Ok(None),
            Some(v) => match v.as_u64() {
                Some(n) if n > 0 && n <= most => Ok(Some(n as usize)),
                _ => Err(self.bad(key, &format!("an integer from 1 to {most}"))),
            },
        }
    }

    fn need_count(&self, key: &str) -> Result<usize, ArchError> {
        self.count(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ArchError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => v.as_f64().map(Some).ok_or_else(|| self.bad(key, "a number")),
        }
    }

    pub(super) fn need_number(&self, key: &str) -> Result<f64, ArchError> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ArchError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => v.as_bool().map(Some).ok_or_else(|| self.bad(key, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ArchError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => v.as_str().map(Some).ok_or_else(|| self.bad(key, "a string")),
        }
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, ArchError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => v.as_object().map(Some).ok_or_else(|| self.bad(key, "an object or null")),
        }
    }

    fn switch(&self, switch: &Switch) -> Result<bool, ArchError> {
        match switch {
            Switch::Fixed(value) => Ok(*value),
            Switch::Key(key) => Ok(self.flag(key)?.unwrap_or(false)),
        }
    }
}

impl Architecture {
    /// Interpret a `config.json`.
    ///
    /// # Errors
    /// [`ArchError`]: an unknown family, a missing or impossible value, a feature that would change attention and that
    /// this tool does not carry.
    pub fn from_config(config: &Value) -> Result<Self, ArchError> {
        let map = config.as_object().ok_or_else(|| ArchError::BadValue {
            key: "config.json".into(),
            found: "not an object".into(),
            expected: "a JSON object".into(),
        })?;
        let probe = Config::new(map, "any");
        let model_type = probe.text("model_type")?.ok_or_else(|| probe.missing("model_type"))?;
        let family = Family::for_model_type(model_type)?;
        let config = Config::new(map, &family.name);
        interpret(&config, &family, model_type)
    }
}

fn interpret(config: &Config<'_>, family: &Family, model_type: &str) -> Result<Architecture, ArchError> {
    let hidden = config.need_count("hidden_size")?;
    let heads = config.need_count("num_attention_heads")?;
    let activation = match config.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Activation::Silu,
        _ => return Err(config.bad("hidden_act", "\"silu\"")),
    };
    let norm_eps = config.number("rms_norm_eps")?.unwrap_or(1e-6);
    if !(norm_eps > 0.0 && norm_eps < 1.0) {
        return Err(config.bad("rms_norm_eps", "a positive number below 1"));
    }
    let (attention, rope) = match family.attention {
        AttentionKind::Gqa => read_gqa(config, family, hidden, heads)?,
        AttentionKind::Mla => read_mla(config, family, heads)?,
    };
    let dtype = match config.text("dtype")?.or(config.text("torch_dtype")?) {
        Some("bfloat16") => Some(Dtype::Bf16),
        Some("float16") => Some(Dtype::F16),
        Some("float32") => Some(Dtype::F32),
        _ => None,
    };
    Ok(Architecture {
        family: family.name.clone(),
        model_type: model_type.to_owned(),
        hidden,
        layers: config.need_count("num_hidden_layers")?,
        heads,
        vocab: config.need_count("vocab_size")?,
        intermediate: config.need_count("intermediate_size")?,
        norm_eps,
        activation,
        tied_head: config.flag("tie_word_embeddings")?.unwrap_or(family.default_tie),
        mlp_bias: config.switch(&family.mlp_bias)?,
        max_position: config.count("max_position_embeddings")?.unwrap_or(family.default_max_position),
        rope,
        attention,
        names: TensorNames::new(family),
        config_dtype: dtype,
    })
}

fn read_gqa(config: &Config<'_>, family: &Family, hidden: usize, heads: usize) -> Result<(Attention, Rope), ArchError> {
    let kv_heads = match config.map.get("num_key_value_heads") {
        None => family.default_kv_heads.unwrap_or(heads),
        Some(_) => config.count("num_key_value_heads")?.unwrap_or(heads),
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(config.bad("num_key_value_heads", &format!("a divisor of num_attention_heads ({heads})")));
    }
    let head_dim = match config.count("head_dim")? {
        Some(d) => d,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(config.bad("num_attention_heads", &format!("a divisor of hidden_size ({hidden})"))),
    };
    if let Some(partial) = config.number("partial_rotary_factor")?
        && partial != 1.0
    {
        return Err(ArchError::Unsupported { what: format!("`partial_rotary_factor` {partial}"), hint: None });
    }
    let windowed = match &family.sliding_window_switch {
        Some(key) => config.flag(key)?.unwrap_or(false),
        None => true,
    };
    // An absent key means the class's default, an explicit null means no window.
    let window = |key: &str| match config.map.get(key) {
        None => Ok(family.default_sliding_window),
        Some(_) => config.count(key),
    };
    let layered = config.map.get("layer_types").and_then(Value::as_array);
    let layered = layered.is_some_and(|l| l.iter().any(|t| t == "sliding_attention"));
    let sliding_window = match &family.sliding_window {
        Some(key) if windowed || layered => window(key)?,
        _ => None,
    };
    let shape = GqaShape {
        kv_heads,
        head_dim,
        qkv_bias: config.switch(&family.qkv_bias)?,
        out_bias: config.switch(&family.out_bias)?,
        sliding_window,
    };
    Ok((Attention::Gqa(shape), Rope::read(config, head_dim, family.default_rope_theta)?))
}

fn read_mla(config: &Config<'_>, family: &Family, heads: usize) -> Result<(Attention, Rope), ArchError> {
    let layers = config.need_count("num_hidden_layers")?;
    let dense = config.count("first_k_dense_replace")?.unwrap_or(0);
    if dense < layers {
        return Err(ArchError::Unsupported {
            what: format!("mixture of experts (`first_k_dense_replace` {dense} of {layers} layers)"),
            hint: None,
        });
    }
    let kv_heads = config.count("num_key_value_heads")?.unwrap_or(heads);
    if kv_heads != heads {
        return Err(config.bad("num_key_value_heads", &format!("{heads}, as num_attention_heads")));
    }
    let nope = match config.present("qk_nope_head_dim").map(Value::as_u64) {
        Some(Some(n)) => n as usize,
        _ => config.need_count("qk_nope_head_dim")?,
    };
    let rope_dim = config.need_count("qk_rope_head_dim")?;
    let mut rope = Rope::read(config, rope_dim, family.default_rope_theta)?;
    if config.flag("rope_interleave")?.unwrap_or(true) {
        rope.layout = RopeLayout::Interleaved;
    }
    let mut score_scale = ((nope + rope_dim) as f64).powf(-0.5);
    let scaling = config.object("rope_scaling")?.filter(|m| !m.is_empty()).or(config.object("rope_parameters")?);
    let number = |key: &str| scaling.and_then(|s| s.get(key)).and_then(Value::as_f64);
    // DeepSeek's YaRN multiplies the score by mscale(mscale_all_dim)^2; transformers does so for any non-default type.
    if rope.kind != "default"
        && let (Some(all), Some(factor)) = (number("mscale_all_dim").filter(|m| *m != 0.0), number("factor"))
        && factor > 1.0
    {
        score_scale *= (0.1 * all * factor.ln() + 1.0).powi(2);
    }
    let shape = MlaShape {
        kv_lora_rank: config.need_count("kv_lora_rank")?,
        q_lora_rank: config.count("q_lora_rank")?,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rope_dim,
        v_head_dim: config.need_count("v_head_dim")?,
        bias: config.switch(&family.qkv_bias)?,
        latent_eps: family.latent_eps.map_or_else(|| config.need_number("rms_norm_eps"), Ok)?,
        score_scale,
    };
    Ok((Attention::Mla(shape), rope))
}
