//! Tensor names by role, and the check that a checkpoint holds exactly what its config implies.

use std::collections::BTreeMap;

use super::{ArchError, Architecture, Attention, Family};
use crate::source::TensorDirectory;

/// Tensor names of a model, resolved from its family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorNames {
    /// Embedding `[V, D]`.
    pub embed: String,
    /// Final RMSNorm gain `[D]`.
    pub final_norm: String,
    /// Output head `[V, D]`; absent from the file when tied.
    pub head: String,
    layer: BTreeMap<String, String>,
    ignore: Vec<String>,
}

/// Names of one layer. Linear layers are stems: append `.weight` or `.bias`.
#[derive(Debug, Clone)]
pub struct LayerNames<'a> {
    names: &'a TensorNames,
    layer: usize,
}

impl TensorNames {
    pub(super) fn new(family: &Family) -> Self {
        let get = |role: &str| family.tensors.get(role).cloned().unwrap_or_default();
        Self {
            embed: get("embed"),
            final_norm: get("final_norm"),
            head: get("head"),
            layer: family.layer.clone(),
            ignore: family.ignore.suffixes.clone(),
        }
    }

    /// Names of layer `layer`.
    pub fn layer(&self, layer: usize) -> LayerNames<'_> {
        LayerNames { names: self, layer }
    }

    /// Whether a tensor carries no information of its own (such as a stored `inv_freq`).
    pub fn is_ignored(&self, name: &str) -> bool {
        self.ignore.iter().any(|s| name.ends_with(s.as_str()))
    }
}

impl LayerNames<'_> {
    /// Full name of a norm, or stem of a linear layer, by role (`q`, `kv_a_norm`, `down`, ...).
    ///
    /// # Panics
    /// If the family has no such role; [`Family::parse`] guarantees those of its attention variant.
    pub fn role(&self, role: &str) -> String {
        let template = &self.names.layer[role];
        template.replace("{layer}", &self.layer.to_string())
    }

    /// `.weight` of a linear layer.
    pub fn weight(&self, role: &str) -> String {
        format!("{}.weight", self.role(role))
    }

    /// `.bias` of a linear layer.
    pub fn bias(&self, role: &str) -> String {
        format!("{}.bias", self.role(role))
    }
}

/// A tensor that the config implies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape implied by the config.
    pub shape: Vec<usize>,
    /// Decoder layer it belongs to, `None` outside layers.
    pub layer: Option<usize>,
}

impl Architecture {
    /// Every tensor that the config implies, in model order.
    pub fn expected_tensors(&self) -> Vec<ExpectedTensor> {
        let mut out =
            vec![ExpectedTensor { name: self.names.embed.clone(), shape: vec![self.vocab, self.hidden], layer: None }];
        for layer in 0..self.layers {
            self.expect_layer(layer, &mut out);
        }
        out.push(ExpectedTensor { name: self.names.final_norm.clone(), shape: vec![self.hidden], layer: None });
        if !self.tied_head {
            out.push(ExpectedTensor {
                name: self.names.head.clone(),
                shape: vec![self.vocab, self.hidden],
                layer: None,
            });
        }
        out
    }

    /// Names of every tensor of one layer that the config implies.
    pub fn layer_tensor_names(&self, layer: usize) -> Vec<String> {
        let mut out = Vec::new();
        self.expect_layer(layer, &mut out);
        out.into_iter().map(|t| t.name).collect()
    }

    fn expect_layer(&self, layer: usize, out: &mut Vec<ExpectedTensor>) {
        let names = self.names.layer(layer);
        let (hidden, heads) = (self.hidden, self.heads);
        let mut push = |name: String, shape: Vec<usize>| out.push(ExpectedTensor { name, shape, layer: Some(layer) });
        push(names.role("input_norm"), vec![hidden]);
        let mut linears: Vec<(&str, usize, usize, bool)> = Vec::new();
        match &self.attention {
            Attention::Gqa(a) => {
                let (q, kv) = (heads * a.head_dim, a.kv_heads * a.head_dim);
                linears.push(("q", q, hidden, a.qkv_bias));
                linears.push(("k", kv, hidden, a.qkv_bias));
                linears.push(("v", kv, hidden, a.qkv_bias));
                linears.push(("o", hidden, q, a.out_bias));
            }
            Attention::Mla(a) => {
                let q = heads * (a.qk_nope_head_dim + a.qk_rope_head_dim);
                match a.q_lora_rank {
                    None => linears.push(("q", q, hidden, false)),
                    Some(rank) => {
                        linears.push(("q_a", rank, hidden, a.bias));
                        linears.push(("q_b", q, rank, false));
                        push(names.role("q_a_norm"), vec![rank]);
                    }
                }
                push(names.role("kv_a_norm"), vec![a.kv_lora_rank]);
                linears.push(("kv_a", a.kv_lora_rank + a.qk_rope_head_dim, hidden, a.bias));
                linears.push(("kv_b", heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank, false));
                linears.push(("o", hidden, heads * a.v_head_dim, a.bias));
            }
        }
        linears.push(("gate", self.intermediate, hidden, self.mlp_bias));
        linears.push(("up", self.intermediate, hidden, self.mlp_bias));
        linears.push(("down", hidden, self.intermediate, self.mlp_bias));
        for (role, rows, cols, bias) in linears {
            push(names.weight(role), vec![rows, cols]);
            if bias {
                push(names.bias(role), vec![rows]);
            }
        }
        push(names.role("post_norm"), vec![hidden]);
    }
}

/// Check that the checkpoint holds exactly the tensors the config implies, with those shapes and a readable dtype.
///
/// A stored `lm_head` beside a tied config is accepted when `tied_duplicate` says it equals the embedding.
///
/// # Errors
/// [`ArchError::Mismatch`] listing up to 20 differences at once.
pub fn check_tensors(arch: &Architecture, tensors: &TensorDirectory) -> Result<(), ArchError> {
    let expected: BTreeMap<String, Vec<usize>> =
        arch.expected_tensors().into_iter().map(|t| (t.name, t.shape)).collect();
    let mut lines = Vec::new();
    for (name, shape) in &expected {
        match tensors.get(name) {
            None => lines.push(format!("tensor `{name}` {shape:?} is missing")),
            Some(t) if &t.shape != shape => {
                lines.push(format!("tensor `{name}`: expected {shape:?}, found {:?}", t.shape));
            }
            Some(t) if !t.dtype.is_float() => {
                lines.push(format!("tensor `{name}`: dtype {} cannot be read as weights", t.dtype));
            }
            Some(_) => {}
        }
    }
    for name in tensors.names() {
        if expected.contains_key(name) || arch.names.is_ignored(name) {
            continue;
        }
        if arch.tied_head && name == arch.names.head {
            if tensors.same_bytes(name, &arch.names.embed)? {
                continue;
            }
            lines.push(format!(
                "`tie_word_embeddings` is true, but `{name}` is stored and differs from `{}`",
                arch.names.embed
            ));
            continue;
        }
        lines.push(format!("tensor `{name}` is stored, but nothing in the config implies it"));
    }
    if lines.is_empty() {
        return Ok(());
    }
    let total = lines.len();
    if total > 20 {
        lines.truncate(20);
        lines.push(format!("... and {} more", total - 20));
    }
    Err(ArchError::Mismatch { lines })
}
