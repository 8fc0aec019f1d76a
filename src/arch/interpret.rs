//! A `config.json` as its family reads it.

use serde_json::Value;

use super::config::Config;
use super::family::{AttentionKind, QkNormRule};
use super::scale::evaluate;
use super::{
    Activation, ArchError, Architecture, Attention, Family, GqaShape, Hybrid, MlaShape, Multipliers, QkNormScope, Rope,
    RopeLayout, TensorNames, moe,
};
use crate::source::Dtype;

impl Architecture {
    /// Interpret a `config.json`.
    ///
    /// # Errors
    /// [`ArchError`]: an unknown family, a missing or impossible value, a feature that would change attention and that
    /// this tool does not carry.
    pub fn from_config(config: &Value) -> Result<Self, ArchError> {
        Self::from_config_with(config, &[])
    }

    /// Interpret a `config.json`, with descriptions of more families than the embedded ones. They come first.
    ///
    /// # Errors
    /// As [`Architecture::from_config`].
    pub fn from_config_with(config: &Value, more: &[Family]) -> Result<Self, ArchError> {
        let map = config.as_object().ok_or_else(|| ArchError::BadValue {
            key: "config.json".into(),
            found: "not an object".into(),
            expected: "a JSON object".into(),
        })?;
        let probe = Config::new(map, "any");
        let model_type = probe.text("model_type")?.ok_or_else(|| probe.missing("model_type"))?;
        let family = Family::for_model_type(model_type, more).map_err(|e| super::wrapper::explain(map, e))?;
        interpret(&Config::of_family(map, &family), &family, model_type)
    }
}

fn interpret(config: &Config<'_>, family: &Family, model_type: &str) -> Result<Architecture, ArchError> {
    let hidden = config.need_count("hidden_size")?;
    let heads = config.need_count("num_attention_heads")?;
    let layers = config.need_count("num_hidden_layers")?;
    let norm_eps = config.number("rms_norm_eps")?.unwrap_or(1e-6);
    if !(norm_eps > 0.0 && norm_eps < 1.0) {
        return Err(config.bad("rms_norm_eps", "a positive number below 1"));
    }
    config.must_be_neutral(&family.neutral)?;
    let windows = windows(config, family, layers)?;
    let (attention, rope) = match family.attention {
        AttentionKind::Gqa => read_gqa(config, family, hidden, heads, windows.iter().flatten().min().copied())?,
        AttentionKind::Mla => read_mla(config, family, heads)?,
    };
    let moe = match &family.moe {
        Some(keys) => moe::read(config, family, keys, layers)?,
        None => None,
    };
    let mtp_layers = match &family.mtp_layers {
        Some(key) => config.whole(key)?.unwrap_or(0),
        None => 0,
    };
    let mut names = TensorNames::new(family);
    for (role, key) in &family.optional {
        if !config.flag(key)?.unwrap_or(false) {
            names.remove(role);
        }
    }
    names.read_past_layers(layers..layers.saturating_add(mtp_layers));
    let hybrid = match &family.hybrid {
        Some(key) => Hybrid::read(config, key, layers, heads)?,
        None => None,
    };
    Ok(Architecture {
        hybrid,
        family: family.name.clone(),
        model_type: model_type.to_owned(),
        hidden,
        layers,
        heads,
        vocab: config.need_count("vocab_size")?,
        intermediate: config.need_count("intermediate_size")?,
        norm_eps,
        activation: activation(config, &family.activation)?,
        mlp: family.mlp,
        tied_head: config.flag("tie_word_embeddings")?.unwrap_or(false),
        mlp_bias: config.switch(&family.mlp_bias)?,
        max_position: config.need_count("max_position_embeddings")?,
        rope,
        attention,
        names,
        config_dtype: dtype(config)?,
        norm_offset: family.norm_offset,
        qk_norm: qk_norm(config, family.qk_norm.as_ref())?,
        multipliers: multipliers(config, family)?,
        score_softcap: config.positive(family.score_softcap.as_ref())?,
        logit_softcap: config.positive(family.logit_softcap.as_ref())?,
        windows,
        moe,
        mtp_layers,
    })
}

/// The number type the config names, if it is one that weights are written in.
fn dtype(config: &Config<'_>) -> Result<Option<Dtype>, ArchError> {
    Ok(match config.text("dtype")?.or(config.text("torch_dtype")?) {
        Some("bfloat16") => Some(Dtype::BF16),
        Some("float16") => Some(Dtype::F16),
        Some("float32") => Some(Dtype::F32),
        _ => None,
    })
}

fn multipliers(config: &Config<'_>, family: &Family) -> Result<Multipliers, ArchError> {
    let factor = |expression: &Option<String>| match expression {
        None => Ok(1.0),
        Some(e) => evaluate(config, e).map(|v| v.unwrap_or(1.0)),
    };
    Ok(Multipliers {
        embedding: factor(&family.embedding_scale)?,
        residual: factor(&family.residual_scale)?,
        logits: factor(&family.logit_scale)?,
    })
}

/// What the norms of queries and keys span, where there are any.
fn qk_norm(config: &Config<'_>, rule: Option<&QkNormRule>) -> Result<Option<QkNormScope>, ArchError> {
    Ok(match rule {
        None => None,
        Some(QkNormRule::Fixed(scope)) => Some(*scope),
        Some(QkNormRule::Key { key }) => match config.text(key)? {
            None => None,
            Some("head") => Some(QkNormScope::Head),
            Some("all") => Some(QkNormScope::All),
            Some(_) => return Err(config.bad(key, "\"head\", \"all\" or null")),
        },
    })
}

fn activation(config: &Config<'_>, key: &str) -> Result<Activation, ArchError> {
    let name = config.text(key)?.unwrap_or("silu");
    let found = Activation::NAMES.iter().find(|(_, names)| names.contains(&name));
    found.map(|(a, _)| *a).ok_or_else(|| {
        let known: Vec<String> = Activation::NAMES.iter().map(|(a, _)| format!("\"{}\"", a.name())).collect();
        config.bad(key, &format!("one of {}", known.join(", ")))
    })
}

/// The sliding window of each layer.
fn windows(config: &Config<'_>, family: &Family, layers: usize) -> Result<Vec<Option<usize>>, ArchError> {
    let none = vec![None; layers];
    let Some(key) = &family.sliding_window else { return Ok(none) };
    let has = windowed(config, family, layers)?;
    if !has.contains(&true) {
        // Some configs say 0 where the window is switched off.
        return Ok(none);
    }
    // An explicit null means no window.
    let window = config.count(key)?;
    Ok(has.into_iter().map(|on| if on { window } else { None }).collect())
}

/// Which layers have the window, if there is one.
fn windowed(config: &Config<'_>, family: &Family, layers: usize) -> Result<Vec<bool>, ArchError> {
    let pattern = family.sliding_window_layers.as_deref().unwrap_or("all");
    if pattern != "all"
        && let Some(types) = config.list("layer_types")?
    {
        if types.len() < layers {
            return Err(config.bad("layer_types", &format!("a list of {layers} layer types")));
        }
        let sliding = |t: &Value| match t.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(ArchError::Unsupported { what: format!("`layer_types` with {t}"), hint: None }),
        };
        return types.iter().take(layers).map(sliding).collect();
    }
    let on = match &family.sliding_window_switch {
        Some(switch) => config.flag(switch)?.unwrap_or(false),
        None => true,
    };
    if !on {
        return Ok(vec![false; layers]);
    }
    let limit = |key: &str| config.number(key).map(|n| n.map_or(layers, |n| n.max(0.0) as usize));
    let has: Box<dyn Fn(usize) -> bool> = match pattern.split_once(':') {
        None if pattern == "all" => Box::new(|_| true),
        None if pattern == "even" => Box::new(|i| i.is_multiple_of(2)),
        Some(("from", key)) => {
            let first = limit(key)?;
            Box::new(move |i| i >= first)
        }
        Some(("list", key)) => {
            let list: Vec<bool> = config.list(key)?.into_iter().flatten().map(|v| v.as_bool() == Some(true)).collect();
            Box::new(move |i| list.get(i) == Some(&true))
        }
        Some(("even-before", key)) => {
            let end = limit(key)?;
            Box::new(move |i| i.is_multiple_of(2) && i < end)
        }
        _ => {
            return Err(ArchError::BadFamily {
                name: family.name.clone(),
                message: format!(
                    "`sliding_window_layers = \"{pattern}\"`: expected all, even, from:KEY, even-before:KEY or list:KEY"
                ),
            });
        }
    };
    Ok((0..layers).map(has).collect())
}

fn read_gqa(
    config: &Config<'_>,
    family: &Family,
    hidden: usize,
    heads: usize,
    sliding_window: Option<usize>,
) -> Result<(Attention, Rope), ArchError> {
    let kv_heads = config.count("num_key_value_heads")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(config.bad("num_key_value_heads", &format!("a divisor of num_attention_heads ({heads})")));
    }
    let head_dim = match config.count("head_dim")? {
        Some(d) => d,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(config.bad("num_attention_heads", &format!("a divisor of hidden_size ({hidden})"))),
    };
    let rotary_dim = rotary_dim(config, family, head_dim)?;
    let score_scale = match &family.score_scale {
        Some(expression) => evaluate(config, expression)?,
        None => None,
    };
    let shape = GqaShape {
        kv_heads,
        head_dim,
        qkv_bias: config.switch(&family.qkv_bias)?,
        out_bias: config.switch(&family.out_bias)?,
        sliding_window,
        rotary_dim,
        score_scale: score_scale.unwrap_or_else(|| (head_dim as f64).powf(-0.5)),
    };
    Ok((Attention::Gqa(shape), Rope::read(config, rotary_dim)?))
}

/// `partial_rotary_factor`, in `rope_parameters` or beside it.
fn rotary_dim(config: &Config<'_>, family: &Family, head_dim: usize) -> Result<usize, ArchError> {
    let inner = config.object("rope_parameters")?.and_then(|p| p.get("partial_rotary_factor")).and_then(Value::as_f64);
    let Some(factor) = inner.or(config.number("partial_rotary_factor")?).filter(|f| *f != 1.0) else {
        return Ok(head_dim);
    };
    if !family.partial_rotary {
        return Err(ArchError::Unsupported {
            what: format!("`partial_rotary_factor` {factor}"),
            hint: Some(format!("the family `{}` rotates whole heads", family.name)),
        });
    }
    let dim = (head_dim as f64 * factor) as usize;
    if !(factor > 0.0 && factor < 1.0 && dim >= 2) {
        return Err(config.bad("partial_rotary_factor", "a number between 0 and 1"));
    }
    Ok(dim)
}

fn read_mla(config: &Config<'_>, family: &Family, heads: usize) -> Result<(Attention, Rope), ArchError> {
    let kv_heads = config.count("num_key_value_heads")?.unwrap_or(heads);
    if kv_heads != heads {
        return Err(config.bad("num_key_value_heads", &format!("{heads}, as num_attention_heads")));
    }
    let nope = match config.present("qk_nope_head_dim").map(Value::as_u64) {
        Some(Some(n)) if n < 1 << 30 => n as usize,
        _ => config.need_count("qk_nope_head_dim")?,
    };
    let rope_dim = config.need_count("qk_rope_head_dim")?;
    let mut rope = Rope::read(config, rope_dim)?;
    if config.flag("rope_interleave")?.unwrap_or(false) {
        rope.layout = RopeLayout::Interleaved;
    }
    let mut score_scale = match &family.score_scale {
        Some(expression) => evaluate(config, expression)?,
        None => None,
    }
    .unwrap_or_else(|| ((nope + rope_dim) as f64).powf(-0.5));
    let scaling = config.object("rope_scaling")?.filter(|m| !m.is_empty()).or(config.object("rope_parameters")?);
    let number = |key: &str| scaling.and_then(|s| s.get(key)).and_then(Value::as_f64);
    // DeepSeek's YaRN multiplies the score by mscale(mscale_all_dim)^2; transformers does so for any non-default type.
    if rope.kind != "default"
        && let (Some(all), Some(factor)) = (number("mscale_all_dim").filter(|m| *m != 0.0), number("factor"))
        && factor > 1.0
    {
        score_scale *= (0.1 * all * factor.ln() + 1.0).powi(2);
    }
    if let Some(width) = config.count("qk_norm_width")?
        && (!rope_dim.is_multiple_of(width) || nope != 0)
    {
        return Err(
            config.bad("qk_norm_width", &format!("a divisor of qk_rope_head_dim ({rope_dim}), with no other width"))
        );
    }
    let shape = MlaShape {
        kv_lora_rank: config.need_count("kv_lora_rank")?,
        q_lora_rank: config.count("q_lora_rank")?,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rope_dim,
        v_head_dim: config.need_count("v_head_dim")?,
        bias: config.switch(&family.qkv_bias)?,
        query_bias: config.switch(&family.query_bias)?,
        latent_norm: match &family.latent_norm {
            Some(key) => config.flag(key)?.unwrap_or(true),
            None => true,
        },
        latent_eps: family.latent_eps.map_or_else(|| config.need_number("rms_norm_eps"), Ok)?,
        norm_width: config.count("qk_norm_width")?.unwrap_or(rope_dim),
        score_scale,
    };
    Ok((Attention::Mla(shape), rope))
}
