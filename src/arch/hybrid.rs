//! MLA models some of whose layers keep the grouped-query attention of their source.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::config::Config;
use super::{ArchError, Architecture, Attention, GqaShape, QkNormScope, Rope};

/// The layers of an MLA model that are not MLA.
#[derive(Debug, Clone)]
pub struct Hybrid {
    /// Which layers have grouped-query attention, `[layers]`.
    pub layers: Vec<bool>,
    /// Its geometry.
    pub shape: GqaShape,
    /// Its rotary embedding.
    pub rope: Rope,
    /// Its norm of queries and keys.
    pub qk_norm: Option<QkNormScope>,
}

impl Hybrid {
    /// Read the object under `key`; `None` where there is none.
    pub(super) fn read(config: &Config<'_>, key: &str, layers: usize, heads: usize) -> Result<Option<Self>, ArchError> {
        let Some(map) = config.object(key)? else { return Ok(None) };
        let inner = Config::new(map, key);
        let mut kept = vec![false; layers];
        for index in inner.list("layers")?.ok_or_else(|| inner.missing("layers"))? {
            match index.as_u64().and_then(|i| kept.get_mut(usize::try_from(i).ok()?)) {
                Some(slot) => *slot = true,
                None => return Err(inner.bad("layers", &format!("layer indices below {layers}"))),
            }
        }
        let (kv_heads, head_dim) = (inner.need_count("num_key_value_heads")?, inner.need_count("head_dim")?);
        if !heads.is_multiple_of(kv_heads) {
            return Err(inner.bad("num_key_value_heads", &format!("a divisor of num_attention_heads ({heads})")));
        }
        let rotary_dim = inner.need_count("rotary_dim")?;
        if rotary_dim > head_dim {
            return Err(inner.bad("rotary_dim", &format!("at most head_dim ({head_dim})")));
        }
        if inner.list("rotary_frequencies")?.is_none() {
            return Err(inner.missing("rotary_frequencies"));
        }
        let mut rope = Rope::read(&inner, rotary_dim)?;
        rope.amplitude = inner.number("rotary_amplitude")?.unwrap_or(1.0);
        let shape = GqaShape {
            kv_heads,
            head_dim,
            qkv_bias: inner.flag("qkv_bias")?.unwrap_or(false),
            out_bias: inner.flag("out_bias")?.unwrap_or(false),
            sliding_window: None,
            rotary_dim,
            score_scale: inner.need_number("attention_scale")?,
        };
        let qk_norm = match inner.text("qk_norm")? {
            None => None,
            Some("head") => Some(QkNormScope::Head),
            Some("all") => Some(QkNormScope::All),
            Some(_) => return Err(inner.bad("qk_norm", "\"head\", \"all\" or null")),
        };
        Ok(Some(Self { layers: kept, shape, rope, qk_norm }))
    }

    /// The object that `Hybrid::read` reads, for a GQA source whose layers `kept` stay as they are.
    pub fn config(source: &Architecture, kept: &[bool]) -> Option<Value> {
        let shape = source.gqa()?;
        let layers: Vec<usize> = (0..kept.len()).filter(|i| kept[*i]).collect();
        let mut map: Map<String, Value> = match json!({
            "layers": layers,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "rotary_dim": shape.rotary_dim,
            "rotary_frequencies": source.rope.inv_freq,
            "rotary_amplitude": source.rope.amplitude,
            "attention_scale": shape.score_scale,
            "qkv_bias": shape.qkv_bias,
            "out_bias": shape.out_bias,
        }) {
            Value::Object(map) => map,
            _ => return None,
        };
        if let Some(long) = &source.rope.long {
            map.insert("rotary_frequencies_long".into(), json!(long.inv_freq));
            map.insert("original_max_position_embeddings".into(), json!(long.original));
        }
        if let Some(scope) = source.qk_norm {
            map.insert("qk_norm".into(), json!(if scope == QkNormScope::All { "all" } else { "head" }));
        }
        Some(Value::Object(map))
    }
}

impl Architecture {
    /// Whether layer `layer` of an MLA model has grouped-query attention.
    pub fn keeps_gqa(&self, layer: usize) -> bool {
        self.hybrid.as_ref().is_some_and(|h| h.layers.get(layer) == Some(&true))
    }

    /// The architecture as layer `layer` has it: of a hybrid, one whose attention is that layer's.
    pub fn at_layer(&self, layer: usize) -> Cow<'_, Architecture> {
        match &self.hybrid {
            Some(hybrid) if self.keeps_gqa(layer) => Cow::Owned(Architecture {
                attention: Attention::Gqa(hybrid.shape),
                rope: hybrid.rope.clone(),
                qk_norm: hybrid.qk_norm,
                hybrid: None,
                ..self.clone()
            }),
            _ => Cow::Borrowed(self),
        }
    }

    /// Cached values per token of all layers.
    pub fn cache_values_per_token(&self) -> usize {
        let kept = self.hybrid.as_ref().map_or(0, |h| h.layers.iter().filter(|k| **k).count());
        let wide = self.hybrid.as_ref().map_or(0, |h| 2 * h.shape.kv_heads * h.shape.head_dim);
        (self.layers - kept) * self.cache_values() + kept * wide
    }
}
