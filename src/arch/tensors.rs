//! Tensor names by role, and the check that a checkpoint holds exactly what its config implies.

use std::collections::BTreeMap;
use std::ops::Range;

use super::weights::{BLOCK, SCALE_SUFFIX};
use super::{ArchError, Architecture, Attention, Family, GqaShape, MlaShape, MlpKind, Moe, QkNormScope};
use crate::source::{Dtype, DtypeExt, TensorDirectory};

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
    /// What names of layers after the last one begin with.
    past: Vec<String>,
    /// Of a multimodal model only the language model is read: what its names begin with, and its head.
    only: Option<(String, String)>,
}

/// Names of one layer. Linear layers are stems: append `.weight` or `.bias`.
#[derive(Debug, Clone)]
pub struct LayerNames<'a> {
    names: &'a TensorNames,
    layer: usize,
}

/// A weight as it is stored: a tensor, or some rows of one that holds several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Name of the stored tensor.
    pub name: String,
    /// Rows of it, `None` for all.
    pub rows: Option<Range<usize>>,
}

impl Part {
    /// A whole tensor.
    pub fn whole(name: impl Into<String>) -> Self {
        Self { name: name.into(), rows: None }
    }
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
            past: Vec::new(),
            only: None,
        }
    }

    /// Names of layer `layer`.
    pub fn layer(&self, layer: usize) -> LayerNames<'_> {
        LayerNames { names: self, layer }
    }

    /// Whether a tensor carries no information of its own (such as a stored `inv_freq`), or belongs to what is not read.
    pub fn is_ignored(&self, name: &str) -> bool {
        self.ignore.iter().any(|s| name.ends_with(s.as_str()))
            || self.is_past(name)
            || self.only.as_ref().is_some_and(|(body, head)| !name.starts_with(body.as_str()) && name != head)
    }

    /// Whether a tensor belongs to a layer after the last one ([`Architecture::mtp_layers`]).
    pub fn is_past(&self, name: &str) -> bool {
        self.past.iter().any(|layer| name.starts_with(layer.as_str()))
    }

    pub(super) fn remove(&mut self, role: &str) {
        self.layer.remove(role);
    }

    /// Read past these layers.
    pub(super) fn read_past_layers(&mut self, layers: Range<usize>) {
        // Every name of a layer begins so: `model.layers.`.
        let Some((stem, _)) = self.layer.get("o").and_then(|name| name.split_once("{layer}")) else { return };
        self.past = layers.map(|layer| format!("{stem}{layer}.")).collect();
    }

    /// Names of the language model inside a multimodal one: `from` at the start of a name becomes `to`.
    pub(super) fn move_inside(&mut self, from: &str, to: &str, head: &str) {
        let rename = |name: &mut String| {
            if let Some(rest) = name.strip_prefix(from) {
                *name = format!("{to}{rest}");
            }
        };
        [&mut self.embed, &mut self.final_norm].into_iter().for_each(rename);
        self.layer.values_mut().chain(&mut self.past).for_each(rename);
        head.clone_into(&mut self.head);
        self.only = Some((to.to_owned(), head.to_owned()));
    }
}

impl LayerNames<'_> {
    /// Whether the family has such a tensor.
    pub fn has(&self, role: &str) -> bool {
        self.names.layer.contains_key(role)
    }

    /// Full name of a norm, or stem of a linear layer, by role (`q`, `kv_a_norm`, `down`, ...).
    ///
    /// # Panics
    /// If the family has no such role; [`Family::parse`] guarantees those of its attention variant.
    pub fn role(&self, role: &str) -> String {
        let template = &self.names.layer[role];
        template.replace("{layer}", &self.layer.to_string())
    }

    /// Stem of a linear layer of expert `expert`.
    ///
    /// # Panics
    /// As [`LayerNames::role`].
    pub fn expert(&self, role: &str, expert: usize) -> String {
        self.role(role).replace("{expert}", &expert.to_string())
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
    /// Where the weight of a linear layer is stored, by role (`q`, `gate`, ...).
    ///
    /// # Panics
    /// If the family has neither the role nor a fused tensor that holds it.
    pub fn weight(&self, layer: usize, role: &str) -> Part {
        self.part(layer, role, "weight")
    }

    /// Where its bias is stored.
    ///
    /// # Panics
    /// As [`Architecture::weight`].
    pub fn bias(&self, layer: usize, role: &str) -> Part {
        self.part(layer, role, "bias")
    }

    fn part(&self, layer: usize, role: &str, what: &str) -> Part {
        let names = self.names.layer(layer);
        if let (Some((fused, rows)), false) = (self.fused(role), names.has(role)) {
            return Part { name: format!("{}.{what}", names.role(fused)), rows: Some(rows) };
        }
        Part::whole(format!("{}.{what}", names.role(role)))
    }

    /// The tensor that holds a role where a family stores several in one, and the rows.
    fn fused(&self, role: &str) -> Option<(&'static str, Range<usize>)> {
        let i = self.intermediate;
        let a = self.gqa()?;
        let (q, kv) = (self.heads * a.head_dim, a.kv_heads * a.head_dim);
        match role {
            "q" => Some(("qkv", 0..q)),
            "k" => Some(("qkv", q..q + kv)),
            "v" => Some(("qkv", q + kv..q + 2 * kv)),
            "gate" => Some(("gate_up", 0..i)),
            "up" => Some(("gate_up", i..2 * i)),
            _ => None,
        }
    }

    /// Every tensor that the config implies, in model order.
    pub fn expected_tensors(&self) -> Vec<ExpectedTensor> {
        let mut out =
            vec![ExpectedTensor { name: self.names.embed.clone(), shape: vec![self.vocab, self.hidden], layer: None }];
        for layer in 0..self.layers {
            self.at_layer(layer).expect_layer(layer, &mut out);
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
        self.at_layer(layer).expect_layer(layer, &mut out);
        out.into_iter().map(|t| t.name).collect()
    }

    /// Lengths of the gains of queries' and keys' norms in an MLA model that has them.
    pub(crate) fn mla_norm_widths(&self, shape: &MlaShape) -> (usize, usize) {
        match self.qk_norm {
            Some(QkNormScope::All) => (self.heads * shape.qk_rope_head_dim, shape.qk_rope_head_dim),
            _ => (shape.norm_width, shape.norm_width),
        }
    }

    fn expect_layer(&self, layer: usize, out: &mut Vec<ExpectedTensor>) {
        let names = self.names.layer(layer);
        let mut of = LayerTensors { names: &names, layer, tensors: out, linears: Vec::new() };
        for role in ["input_norm", "attention_out_norm", "post_norm", "mlp_out_norm"] {
            if names.has(role) {
                of.tensor(names.role(role), &[self.hidden]);
            }
        }
        match &self.attention {
            Attention::Gqa(a) => self.expect_gqa(a, &mut of),
            Attention::Mla(a) => self.expect_mla(a, &mut of),
        }
        match &self.moe {
            Some(moe) if self.is_sparse(layer) => self.expect_experts(moe, &mut of),
            _ => self.expect_mlp(&mut of),
        }
        of.finish();
    }

    fn expect_gqa(&self, a: &GqaShape, of: &mut LayerTensors<'_>) {
        let (hidden, q, kv) = (self.hidden, self.heads * a.head_dim, a.kv_heads * a.head_dim);
        if of.names.has("q") {
            of.linear("q", q, hidden, a.qkv_bias);
            of.linear("k", kv, hidden, a.qkv_bias);
            of.linear("v", kv, hidden, a.qkv_bias);
        } else {
            of.linear("qkv", q + 2 * kv, hidden, a.qkv_bias);
        }
        of.linear("o", hidden, q, a.out_bias);
        match self.qk_norm {
            None => {}
            Some(QkNormScope::Head) => of.qk_norms(a.head_dim, a.head_dim),
            Some(QkNormScope::All) => of.qk_norms(q, kv),
        }
    }

    fn expect_mla(&self, a: &MlaShape, of: &mut LayerTensors<'_>) {
        let (hidden, heads) = (self.hidden, self.heads);
        let q = heads * (a.qk_nope_head_dim + a.qk_rope_head_dim);
        match a.q_lora_rank {
            None => of.linear("q", q, hidden, a.query_bias),
            Some(rank) => {
                of.linear("q_a", rank, hidden, a.bias);
                of.linear("q_b", q, rank, a.query_bias);
                if a.latent_norm {
                    of.tensor(of.names.role("q_a_norm"), &[rank]);
                }
            }
        }
        if a.latent_norm {
            of.tensor(of.names.role("kv_a_norm"), &[a.kv_lora_rank]);
        }
        if self.qk_norm.is_some() {
            let (wide, narrow) = self.mla_norm_widths(a);
            of.qk_norms(wide, narrow);
        }
        of.linear("kv_a", a.kv_lora_rank + a.qk_rope_head_dim, hidden, a.bias);
        of.linear("kv_b", heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank, false);
        of.linear("o", hidden, heads * a.v_head_dim, a.bias);
    }

    fn expect_experts(&self, moe: &Moe, of: &mut LayerTensors<'_>) {
        let hidden = self.hidden;
        of.tensor(format!("{}.weight", of.names.role("router")), &[moe.experts, hidden]);
        if moe.choice_bias {
            of.tensor(of.names.role("router_bias"), &[moe.experts]);
        }
        for expert in 0..moe.experts {
            let mut weight =
                |role: &str, shape: [usize; 2]| of.tensor(format!("{}.weight", of.names.expert(role, expert)), &shape);
            weight("expert_gate", [moe.width, hidden]);
            weight("expert_up", [moe.width, hidden]);
            weight("expert_down", [hidden, moe.width]);
        }
        if let Some(width) = moe.shared_width {
            of.linear("shared_gate", width, hidden, false);
            of.linear("shared_up", width, hidden, false);
            of.linear("shared_down", hidden, width, false);
            if moe.shared_gated {
                of.linear("shared_router", 1, hidden, false);
            }
        }
    }

    fn expect_mlp(&self, of: &mut LayerTensors<'_>) {
        let (hidden, inner, bias) = (self.hidden, self.intermediate, self.mlp_bias);
        if self.mlp == MlpKind::Gated && !of.names.has("gate") {
            of.linear("gate_up", 2 * inner, hidden, bias);
        } else {
            if self.mlp == MlpKind::Gated {
                of.linear("gate", inner, hidden, bias);
            }
            of.linear("up", inner, hidden, bias);
        }
        of.linear("down", hidden, inner, bias);
    }
}

/// The tensors of one layer as they are gathered: linear layers come after norms and experts.
struct LayerTensors<'a> {
    names: &'a LayerNames<'a>,
    layer: usize,
    tensors: &'a mut Vec<ExpectedTensor>,
    linears: Vec<ExpectedTensor>,
}

impl LayerTensors<'_> {
    fn tensor(&mut self, name: String, shape: &[usize]) {
        self.tensors.push(ExpectedTensor { name, shape: shape.to_vec(), layer: Some(self.layer) });
    }

    fn qk_norms(&mut self, q: usize, k: usize) {
        self.tensor(self.names.role("q_norm"), &[q]);
        self.tensor(self.names.role("k_norm"), &[k]);
    }

    /// A linear layer of `outs` rows and `inner` columns.
    fn linear(&mut self, role: &str, outs: usize, inner: usize, bias: bool) {
        let (stem, layer) = (self.names.role(role), Some(self.layer));
        self.linears.push(ExpectedTensor { name: format!("{stem}.weight"), shape: vec![outs, inner], layer });
        if bias {
            self.linears.push(ExpectedTensor { name: format!("{stem}.bias"), shape: vec![outs], layer });
        }
    }

    fn finish(self) {
        self.tensors.extend(self.linears);
    }
}

/// Check that the checkpoint holds exactly the tensors the config implies, with those shapes and a readable dtype.
///
/// A stored `lm_head` beside a tied config is accepted when `tied_duplicate` says it equals the embedding. FP8 weights
/// need their block scales, f32, beside them.
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
            Some(t) if t.dtype == Dtype::F8_E4M3 && shape.len() == 2 => {
                let scales = format!("{name}{SCALE_SUFFIX}");
                let blocks: Vec<usize> = shape.iter().map(|n| n.div_ceil(BLOCK)).collect();
                match tensors.get(&scales) {
                    None => lines.push(format!("tensor `{name}` is FP8, and its scales `{scales}` are missing")),
                    Some(s) if s.shape != blocks || s.dtype != Dtype::F32 => lines
                        .push(format!("tensor `{scales}`: expected {blocks:?} F32, found {:?} {}", s.shape, s.dtype)),
                    Some(_) => {}
                }
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
        let scaled = name.strip_suffix(SCALE_SUFFIX).and_then(|of| tensors.get(of));
        if scaled.is_some_and(|t| t.dtype == Dtype::F8_E4M3) {
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
