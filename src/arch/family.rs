//! Family descriptions: the TOML schema and the embedded set.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::ArchError;

const EMBEDDED: [(&str, &str); 17] = [
    ("deepseek_v2", include_str!("families/deepseek_v2.toml")),
    ("deepseek_v3", include_str!("families/deepseek_v3.toml")),
    ("gemma2", include_str!("families/gemma2.toml")),
    ("gqa2mla", include_str!("families/gqa2mla.toml")),
    ("granite", include_str!("families/granite.toml")),
    ("llama", include_str!("families/llama.toml")),
    ("minicpm3", include_str!("families/minicpm3.toml")),
    ("mistral", include_str!("families/mistral.toml")),
    ("mixtral", include_str!("families/mixtral.toml")),
    ("olmo2", include_str!("families/olmo2.toml")),
    ("phi3", include_str!("families/phi3.toml")),
    ("plm", include_str!("families/plm.toml")),
    ("qwen2", include_str!("families/qwen2.toml")),
    ("qwen2_moe", include_str!("families/qwen2_moe.toml")),
    ("qwen3", include_str!("families/qwen3.toml")),
    ("qwen3_moe", include_str!("families/qwen3_moe.toml")),
    ("youtu", include_str!("families/youtu.toml")),
];

/// A family of checkpoints that share tensor names and config keys. `docs/families.md` describes the format.
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
    #[serde(default)]
    pub qkv_bias: Switch,
    /// Whether the output projection carries a bias.
    #[serde(default)]
    pub out_bias: Switch,
    /// Whether the MLP's linear layers carry biases.
    #[serde(default)]
    pub mlp_bias: Switch,
    /// Config key of the activation.
    #[serde(default = "hidden_act")]
    pub activation: String,
    /// Whether the MLP has a gate.
    #[serde(default)]
    pub mlp: MlpKind,
    /// Added to every stored norm weight (Gemma stores the weight minus one).
    #[serde(default)]
    pub norm_offset: f64,
    /// Norm of queries and keys before RoPE, if there is one.
    #[serde(default)]
    pub qk_norm: Option<QkNormRule>,
    /// MLA: whether the queries' own projection carries a bias.
    #[serde(default)]
    pub query_bias: Switch,
    /// MLA: config key that switches the norms of the latents off.
    #[serde(default)]
    pub latent_norm: Option<String>,
    /// MLA: config key of the object that describes layers with grouped-query attention ([`super::Hybrid`]).
    #[serde(default)]
    pub hybrid: Option<String>,
    /// Roles that a layer has only where a config key says so.
    #[serde(default)]
    pub optional: BTreeMap<String, String>,
    /// Whether `partial_rotary_factor` limits rotation to the first part of a head.
    #[serde(default)]
    pub partial_rotary: bool,
    /// What multiplies `<q, k>` ([`super::Architecture`]); absent: `head_dim^(-1/2)`.
    #[serde(default)]
    pub score_scale: Option<String>,
    /// What multiplies the embedding's rows.
    #[serde(default)]
    pub embedding_scale: Option<String>,
    /// What multiplies the output of attention and of the MLP before they are added to the stream.
    #[serde(default)]
    pub residual_scale: Option<String>,
    /// What multiplies the logits.
    #[serde(default)]
    pub logit_scale: Option<String>,
    /// Config key of the cap `c` on scores, `c tanh(s / c)`.
    #[serde(default)]
    pub score_softcap: Option<String>,
    /// Config key of the cap on logits.
    #[serde(default)]
    pub logit_softcap: Option<String>,
    /// Config key of the sliding window, if the family has one.
    #[serde(default)]
    pub sliding_window: Option<String>,
    /// Config key that turns the window on; absent: the window counts whenever it is not null.
    #[serde(default)]
    pub sliding_window_switch: Option<String>,
    /// Layers that have the window: `all` (the default), `even`, `from:KEY` (from the layer that the key names),
    /// `even-before:KEY` or `list:KEY` (a list of true and false). Unless it is `all`, the config's `layer_types` overrules
    /// it.
    #[serde(default)]
    pub sliding_window_layers: Option<String>,
    /// MLA: epsilon of the latent norms where the stock class fixes it.
    #[serde(default)]
    pub latent_eps: Option<f64>,
    /// Mixture of experts, where the family has one.
    #[serde(default)]
    pub moe: Option<MoeKeys>,
    /// Config key of the number of layers after the last one that predict further tokens.
    #[serde(default)]
    pub mtp_layers: Option<String>,
    /// Other names of config keys, tried where a key is absent.
    #[serde(default)]
    pub aliases: BTreeMap<String, String>,
    /// Values of config keys that a config may leave out, as the stock class assumes them.
    #[serde(default)]
    pub defaults: BTreeMap<String, serde_json::Value>,
    /// Config keys that this tool does not carry, with the values under which they change nothing.
    #[serde(default)]
    pub neutral: BTreeMap<String, serde_json::Value>,
    /// Names of the tensors outside layers, by role: `embed`, `final_norm`, `head`.
    pub tensors: BTreeMap<String, String>,
    /// Names of the tensors of a layer, by role, with `{layer}` (and `{expert}`) for the index.
    pub layer: BTreeMap<String, String>,
    /// Tensors to read past.
    #[serde(default)]
    pub ignore: Ignore,
}

fn hidden_act() -> String {
    "hidden_act".to_owned()
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

/// How a family says which norm queries and keys have.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum QkNormRule {
    /// The same in every checkpoint.
    Fixed(QkNormScope),
    /// Read from this config key; absent or null: none.
    Key {
        /// Config key.
        key: String,
    },
}

/// What a norm of queries and keys is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QkNormScope {
    /// Each head by itself, one weight `[d]` for all (Qwen3).
    Head,
    /// All heads together, weights `[H d]` and `[g d]` (OLMo 2).
    All,
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

impl Default for Switch {
    fn default() -> Self {
        Switch::Fixed(false)
    }
}

/// Whether an MLP has a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MlpKind {
    /// `down(act(gate x) * up x)`.
    #[default]
    Gated,
    /// `down(act(up x))`.
    Plain,
}

/// One of several, fixed for the family or named by a config key.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Rule<T> {
    /// The same in every checkpoint.
    Fixed(T),
    /// Read from this config key.
    Key {
        /// Config key.
        key: String,
    },
}

/// Config keys of a mixture of experts.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeKeys {
    /// Key of the number of experts.
    pub experts: String,
    /// Key of the number of experts a token goes to.
    pub per_token: String,
    /// Key of an expert's width.
    pub width: String,
    /// How router logits become weights.
    pub scoring: Rule<super::Scoring>,
    /// How experts are picked; absent: the best of all, by scores with `router_bias` where there is that role.
    #[serde(default)]
    pub selection: Option<Rule<super::Selection>>,
    /// Key of the number of groups of experts.
    #[serde(default)]
    pub groups: Option<String>,
    /// Key of the number of groups a token may go to.
    #[serde(default)]
    pub groups_kept: Option<String>,
    /// Whether the chosen weights are made to sum to one.
    #[serde(default)]
    pub renormalise: Switch,
    /// Key of a factor on the chosen weights.
    #[serde(default)]
    pub scale: Option<String>,
    /// Width of the expert that sees every token, as an expression; absent or 0: there is none.
    #[serde(default)]
    pub shared_width: Option<String>,
    /// Key of the list of layers that are dense.
    #[serde(default)]
    pub dense_layers: Option<String>,
    /// Key of the period: layer `i` is sparse where `(i + 1)` is a multiple of it.
    #[serde(default)]
    pub sparse_step: Option<String>,
    /// Key of a period that counts from the bottom: layer `i` is sparse where `i` is a multiple of it.
    #[serde(default)]
    pub sparse_every: Option<String>,
    /// Key of the number of dense layers at the bottom.
    #[serde(default)]
    pub first_dense: Option<String>,
    /// As [`Family::neutral`], where any layer is sparse.
    #[serde(default)]
    pub neutral: BTreeMap<String, serde_json::Value>,
}

/// Tensors that carry no information of their own.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ignore {
    /// Name endings.
    pub suffixes: Vec<String>,
}

impl Family {
    /// Parse one description. `extends = "NAME"` starts from an embedded family: tables are merged key by key, an empty
    /// string removes a key.
    ///
    /// # Errors
    /// [`ArchError::BadFamily`] with the position of the fault.
    pub fn parse(name: &str, text: &str) -> Result<Self, ArchError> {
        let bad = |message: String| ArchError::BadFamily { name: name.to_owned(), message };
        let table = resolve(name, text, 0)?;
        let mut family: Family = Family::deserialize(table).map_err(|e| bad(e.to_string()))?;
        family.name = name.to_owned();
        family.check().map_err(bad)?;
        Ok(family)
    }

    fn check(&self) -> Result<(), String> {
        let has = |role: &str| self.layer.contains_key(role);
        let mut needed = vec!["o", "down"];
        match self.attention {
            AttentionKind::Gqa if has("qkv") => {}
            AttentionKind::Gqa => needed.extend(["q", "k", "v"]),
            AttentionKind::Mla => needed.extend(["q", "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b"]),
        }
        match self.mlp {
            MlpKind::Plain if self.moe.is_some() || has("gate") || has("gate_up") => {
                return Err("`mlp = \"plain\"` has no gate, and no experts".to_owned());
            }
            MlpKind::Plain => needed.push("up"),
            MlpKind::Gated if has("gate_up") => {}
            MlpKind::Gated => needed.extend(["gate", "up"]),
        }
        if self.qk_norm.is_some() {
            needed.extend(["q_norm", "k_norm"]);
        }
        if self.moe.is_some() {
            needed.extend(["router", "expert_gate", "expert_up", "expert_down"]);
        }
        if self.moe.as_ref().is_some_and(|m| m.shared_width.is_some()) {
            needed.extend(["shared_gate", "shared_up", "shared_down"]);
        }
        if let Some(missing) = needed.iter().find(|r| !has(r)) {
            return Err(format!("`[layer]` has no `{missing}`"));
        }
        for (role, template) in &self.layer {
            if !template.contains("{layer}") {
                return Err(format!("`layer.{role}` is `{template}`, which has no `{{layer}}`"));
            }
            if role.starts_with("expert_") != template.contains("{expert}") {
                return Err(format!(
                    "`layer.{role}` is `{template}`: `{{expert}}` belongs in the names of experts, and only there"
                ));
            }
        }
        match ["embed", "final_norm", "head"].iter().find(|r| !self.tensors.contains_key(**r)) {
            Some(role) => Err(format!("`[tensors]` has no `{role}`")),
            None => Ok(()),
        }
    }

    /// The family of a `model_type`, `more` before the embedded ones.
    ///
    /// # Errors
    /// [`ArchError::UnknownFamily`] with the list of known types.
    pub fn for_model_type(model_type: &str, more: &[Family]) -> Result<Self, ArchError> {
        let families: Vec<Family> = more.iter().cloned().chain(known_families()?).collect();
        let known = families.iter().flat_map(|f| f.model_types.clone()).collect();
        families
            .into_iter()
            .find(|f| f.model_types.iter().any(|t| t == model_type))
            .ok_or_else(|| ArchError::UnknownFamily { model_type: model_type.to_owned(), known })
    }
}

/// A description with everything it extends under it.
fn resolve(name: &str, text: &str, depth: usize) -> Result<toml::Table, ArchError> {
    let bad = |message: String| ArchError::BadFamily { name: name.to_owned(), message };
    let mut own: toml::Table = toml::from_str(text).map_err(|e| bad(e.to_string()))?;
    let Some(base) = own.remove("extends") else { return Ok(own) };
    let known = || EMBEDDED.map(|(n, _)| n).join(", ");
    let found = base.as_str().and_then(|b| EMBEDDED.iter().find(|(n, _)| *n == b));
    let Some((base, text)) = found.filter(|_| depth < 4) else {
        return Err(bad(format!("`extends = {base}`: expected one of {}", known())));
    };
    let mut table = resolve(base, text, depth + 1)?;
    merge(&mut table, own);
    Ok(table)
}

fn merge(base: &mut toml::Table, own: toml::Table) {
    for (key, value) in own {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(under)), toml::Value::Table(over)) => merge(under, over),
            (_, toml::Value::String(s)) if s.is_empty() => {
                base.remove(&key);
            }
            (_, value) => {
                base.insert(key, value);
            }
        }
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

    #[test]
    fn a_family_may_extend_another() {
        let family =
            Family::parse("mine", "extends = \"llama\"\nmodel_types = [\"mine\"]\n[layer]\ninput_norm = \"\"\n")
                .unwrap();
        assert_eq!(family.model_types, ["mine"]);
        assert!(!family.layer.contains_key("input_norm") && family.layer.contains_key("post_norm"));
        assert!(Family::parse("mine", "extends = \"nothing\"").is_err());
    }
}
