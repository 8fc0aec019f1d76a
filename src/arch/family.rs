//! Family descriptions: the TOML schema and the embedded set.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::ArchError;

const EMBEDDED: [(&str, &str); 4] = [
    ("deepseek_v3", include_str!("families/deepseek_v3.toml")),
    ("llama", include_str!("families/llama.toml")),
    ("mistral", include_str!("families/mistral.toml")),
    ("qwen2", include_str!("families/qwen2.toml")),
];

/// A family of checkpoints that share tensor names and config keys. See `families/llama.toml` for the format.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Family {
    /// Name: the stem of the file.
    #[serde(skip)]
    pub name: String,
    /// `model_type` values of `config.json` that belong to the family.
    pub model_types: Vec<String>,
    /// Attention variant.
    pub attention: AttentionKind,
    /// Whether q, k, v (MLA: q_a, kv_a) carry biases.
    pub qkv_bias: Switch,
    /// Whether the output projection carries a bias.
    pub out_bias: Switch,
    /// Whether the MLP's linear layers carry biases.
    pub mlp_bias: Switch,
    /// Config key of the sliding window, if the family has one.
    #[serde(default)]
    pub sliding_window: Option<String>,
    /// Config key that turns the window on; absent: the window counts whenever it is not null.
    #[serde(default)]
    pub sliding_window_switch: Option<String>,
    /// The window where the config does not name the key at all.
    #[serde(default)]
    pub default_sliding_window: Option<usize>,
    /// `num_key_value_heads` where the config does not name it; absent: as many as query heads.
    #[serde(default)]
    pub default_kv_heads: Option<usize>,
    /// `max_position_embeddings` where the config is silent.
    pub default_max_position: usize,
    /// `tie_word_embeddings` where the config is silent.
    pub default_tie: bool,
    /// `rope_theta` where the config is silent.
    pub default_rope_theta: f64,
    /// MLA: epsilon of the latent norms where the stock class fixes it.
    #[serde(default)]
    pub latent_eps: Option<f64>,
    /// Names of the tensors outside layers, by role: `embed`, `final_norm`, `head`.
    pub tensors: BTreeMap<String, String>,
    /// Names of the tensors of a layer, by role, with `{layer}` for the index.
    pub layer: BTreeMap<String, String>,
    /// Tensors to read past.
    pub ignore: Ignore,
}

/// Attention variant of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionKind {
    /// Grouped-query attention.
    Gqa,
    /// Multi-head latent attention.
    Mla,
}

/// A yes/no that is fixed for the family or read from a config key.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Switch {
    /// The same in every checkpoint.
    Fixed(bool),
    /// Read from this config key; absent means no.
    Key(String),
}

/// Tensors that carry no information of their own.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ignore {
    /// Name endings.
    pub suffixes: Vec<String>,
}

impl Family {
    /// Parse one description.
    ///
    /// # Errors
    /// [`ArchError::BadFamily`] with the position of the fault.
    pub fn parse(name: &str, text: &str) -> Result<Self, ArchError> {
        let bad = |message: String| ArchError::BadFamily { name: name.to_owned(), message };
        let mut family: Family = toml::from_str(text).map_err(|e| bad(e.to_string()))?;
        family.name = name.to_owned();
        let roles: &[&str] = match family.attention {
            AttentionKind::Gqa => &["input_norm", "post_norm", "q", "k", "v", "o", "gate", "up", "down"],
            AttentionKind::Mla => &[
                "input_norm",
                "post_norm",
                "q",
                "q_a",
                "q_a_norm",
                "q_b",
                "kv_a",
                "kv_a_norm",
                "kv_b",
                "o",
                "gate",
                "up",
                "down",
            ],
        };
        for role in roles {
            match family.layer.get(*role) {
                None => return Err(bad(format!("`[layer]` has no `{role}`"))),
                Some(t) if !t.contains("{layer}") => {
                    return Err(bad(format!("`layer.{role}` is `{t}`, which has no `{{layer}}`")));
                }
                Some(_) => {}
            }
        }
        for role in ["embed", "final_norm", "head"] {
            if !family.tensors.contains_key(role) {
                return Err(bad(format!("`[tensors]` has no `{role}`")));
            }
        }
        Ok(family)
    }

    /// The family of a `model_type`.
    ///
    /// # Errors
    /// [`ArchError::UnknownFamily`] with the list of known types.
    pub fn for_model_type(model_type: &str) -> Result<Self, ArchError> {
        let families = known_families()?;
        let known = families.iter().flat_map(|f| f.model_types.clone()).collect();
        families
            .into_iter()
            .find(|f| f.model_types.iter().any(|t| t == model_type))
            .ok_or_else(|| ArchError::UnknownFamily { model_type: model_type.to_owned(), known })
    }
}

/// Every embedded family, sorted by name.
///
/// # Errors
/// [`ArchError::BadFamily`] if an embedded description is wrong (a test keeps that from happening).
pub fn known_families() -> Result<Vec<Family>, ArchError> {
    EMBEDDED.iter().map(|(name, text)| Family::parse(name, text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_embedded_family_parses() {
        let families = known_families().unwrap();
        assert_eq!(families.len(), EMBEDDED.len());
        let mut types: Vec<_> = families.iter().flat_map(|f| f.model_types.clone()).collect();
        types.sort();
        let n = types.len();
        types.dedup();
        assert_eq!(types.len(), n, "a model type belongs to two families");
    }

    #[test]
    fn a_missing_role_is_named() {
        let text = include_str!("families/llama.toml").replace("\nk = ", "\n#k = ");
        let error = Family::parse("broken", &text).unwrap_err().to_string();
        assert!(error.contains("`[layer]` has no `k`"), "{error}");
    }
}
