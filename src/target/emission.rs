//! What a conversion writes, in order, and where each tensor comes from.

use crate::arch::{Architecture, Part, QkNormScope};
use crate::source::Dtype;
use crate::write::PlannedTensor;

use super::fp8;
use super::origin::{Emit, Origin};
use super::spec::TargetSpec;

/// Everything that is written.
#[derive(Debug, Clone, Default)]
pub struct Emission {
    /// Before the layers.
    pub first: Vec<Emit>,
    /// Each layer's.
    pub layers: Vec<Vec<Emit>>,
    /// After the layers.
    pub last: Vec<Emit>,
}

impl Emission {
    /// Everything that `spec` writes for `arch`. `stored` is the dtype of a source tensor.
    pub fn new(arch: &Architecture, spec: &TargetSpec, stored: &dyn Fn(&str) -> Dtype) -> Self {
        let names = &arch.names;
        let m = &arch.multipliers;
        let own_multipliers = spec.class.has_multipliers();
        let list = || List { spec, stored, out: Vec::new() };
        let (v, d) = (arch.vocab, arch.hidden);
        let mut first = list();
        let scale = spec.stream_scale(arch) * if own_multipliers { 1.0 } else { m.embedding };
        first.source("model.embed_tokens.weight", Part::whole(names.embed.as_str()), vec![v, d], scale, 0.0);
        let layers = (0..arch.layers).map(|layer| {
            let mut out = list();
            out.layer(arch, layer);
            out.finish()
        });
        let layers = layers.collect();
        let mut last = list();
        let scale = if own_multipliers { 1.0 } else { m.logits };
        // The head is linear in the normed state, so a factor on logits may as well be in the gain.
        let offset = arch.norm_offset * scale;
        last.source("model.norm.weight", Part::whole(names.final_norm.as_str()), vec![d], scale, offset);
        let head = if arch.tied_head { &names.embed } else { &names.head };
        last.source("lm_head.weight", Part::whole(head.as_str()), vec![v, d], 1.0, 0.0);
        Self { first: first.finish(), layers, last: last.finish() }
    }

    /// All tensors in writing order.
    pub fn planned(&self) -> Vec<PlannedTensor> {
        let all = self.first.iter().chain(self.layers.iter().flatten()).chain(&self.last);
        all.map(|e| e.planned.clone()).collect()
    }
}

struct List<'a> {
    spec: &'a TargetSpec,
    stored: &'a dyn Fn(&str) -> Dtype,
    out: Vec<Emit>,
}

impl List<'_> {
    fn push(&mut self, name: String, dtype: Dtype, shape: Vec<usize>, from: Origin) {
        self.out.push(Emit { planned: PlannedTensor { name, dtype, shape }, from });
    }

    fn source(&mut self, name: &str, part: Part, shape: Vec<usize>, scale: f64, offset: f64) {
        let exact = offset == 0.0 && scale.log2().fract() == 0.0;
        let own = match (self.stored)(&part.name) {
            Dtype::F8_E4M3 => self.spec.storage.base(),
            own => own,
        };
        let dtype = match (scale == 1.0 && offset == 0.0, exact) {
            (true, _) if self.spec.storage.keeps_stored() => own,
            (_, true) => self.spec.storage.base(),
            _ => self.spec.storage.inexact(),
        };
        self.push(name.to_owned(), dtype, shape, Origin::Source { part, scale, offset });
    }

    fn layer(&mut self, arch: &Architecture, layer: usize) {
        let to = format!("model.layers.{layer}.");
        let d = arch.hidden;
        let scale = if self.spec.keeps(layer) { 1.0 } else { self.spec.input_scale() };
        self.norm(arch, layer, "input_norm", &format!("{to}input_layernorm.weight"), scale);
        if self.spec.keeps(layer) {
            self.kept_attention(arch, layer, &to);
        } else {
            for (i, planned) in self.spec.planned_attention(arch, layer).into_iter().enumerate() {
                self.push(planned.name, planned.dtype, planned.shape, Origin::Computed(i));
            }
        }
        if self.spec.head_norms && !self.spec.keeps(layer) {
            self.head_norms(arch, layer, &to);
        }
        self.norm(arch, layer, "attention_out_norm", &format!("{to}attention_out_layernorm.weight"), 1.0);
        let down = self.spec.stream_scale(arch) * arch.multipliers.residual;
        match &arch.moe {
            Some(_) if arch.is_sparse(layer) => self.experts(arch, layer, &to, down),
            _ => {
                let i = arch.intermediate;
                for (role, name, shape, scale) in [
                    ("gate", "gate_proj", [i, d], 1.0),
                    ("up", "up_proj", [i, d], 1.0),
                    ("down", "down_proj", [d, i], down),
                ] {
                    let weight = arch.weight(layer, role);
                    self.source(&format!("{to}mlp.{name}.weight"), weight, shape.to_vec(), scale, 0.0);
                    if arch.mlp_bias {
                        let bias = arch.bias(layer, role);
                        self.source(&format!("{to}mlp.{name}.bias"), bias, vec![shape[0]], scale, 0.0);
                    }
                }
            }
        }
        self.norm(arch, layer, "post_norm", &format!("{to}post_attention_layernorm.weight"), 1.0);
        self.norm(arch, layer, "mlp_out_norm", &format!("{to}mlp_out_layernorm.weight"), 1.0);
    }

    /// The source's own attention.
    fn kept_attention(&mut self, arch: &Architecture, layer: usize, to: &str) {
        let Some(shape) = arch.gqa() else { return };
        let (q, kv, d) = (arch.heads * shape.head_dim, shape.kv_heads * shape.head_dim, arch.hidden);
        let down = self.spec.stream_scale(arch) * arch.multipliers.residual;
        for (role, shape, bias, scale) in [
            ("q", [q, d], shape.qkv_bias, 1.0),
            ("k", [kv, d], shape.qkv_bias, 1.0),
            ("v", [kv, d], shape.qkv_bias, 1.0),
            ("o", [d, q], shape.out_bias, down),
        ] {
            let name = format!("{to}self_attn.{role}_proj");
            self.source(&format!("{name}.weight"), arch.weight(layer, role), shape.to_vec(), scale, 0.0);
            if bias {
                self.source(&format!("{name}.bias"), arch.bias(layer, role), vec![shape[0]], scale, 0.0);
            }
        }
        let widths = match arch.qk_norm {
            None => return,
            Some(QkNormScope::Head) => [shape.head_dim; 2],
            Some(QkNormScope::All) => [q, kv],
        };
        for (role, width) in ["q_norm", "k_norm"].into_iter().zip(widths) {
            let part = Part::whole(arch.names.layer(layer).role(role));
            self.source(&format!("{to}self_attn.{role}.weight"), part, vec![width], 1.0, arch.norm_offset);
        }
    }

    fn norm(&mut self, arch: &Architecture, layer: usize, role: &str, name: &str, scale: f64) {
        let names = arch.names.layer(layer);
        if names.has(role) {
            self.source(name, Part::whole(names.role(role)), vec![arch.hidden], scale, arch.norm_offset * scale);
        }
    }

    fn experts(&mut self, arch: &Architecture, layer: usize, to: &str, down: f64) {
        let Some(moe) = &arch.moe else { return };
        let (d, i, names) = (arch.hidden, moe.width, arch.names.layer(layer));
        self.source(&format!("{to}mlp.gate.weight"), arch.weight(layer, "router"), vec![moe.experts, d], 1.0, 0.0);
        for e in 0..moe.experts {
            for (role, name, shape, scale) in [
                ("expert_gate", "gate_proj", vec![i, d], 1.0),
                ("expert_up", "up_proj", vec![i, d], 1.0),
                ("expert_down", "down_proj", vec![d, i], down),
            ] {
                let part = Part::whole(format!("{}.weight", names.expert(role, e)));
                self.source(&format!("{to}mlp.experts.{e}.{name}.weight"), part, shape, scale, 0.0);
            }
        }
        for (role, name, scale) in
            [("shared_gate", "gate_proj", 1.0), ("shared_up", "up_proj", 1.0), ("shared_down", "down_proj", down)]
        {
            let name = format!("{to}mlp.shared_experts.{name}.weight");
            let shape = |width: usize| if role == "shared_down" { vec![d, width] } else { vec![width, d] };
            match moe.shared_width {
                Some(width) => self.source(&name, arch.weight(layer, role), shape(width), scale, 0.0),
                // Stock loaders expect one expert that sees every token.
                None if self.spec.class.needs_shared_expert() => {
                    self.push(name, self.spec.storage.base(), shape(i), Origin::Zero)
                }
                None => {}
            }
        }
        if moe.shared_gated {
            let gate = arch.weight(layer, "shared_router");
            self.source(&format!("{to}mlp.shared_expert_gate.weight"), gate, vec![1, d], 1.0, 0.0);
        }
    }

    /// Gains of the norms of queries and keys in the places their values have in the rotated width.
    fn head_norms(&mut self, arch: &Architecture, layer: usize, to: &str) {
        let (Some(shape), Some(scope)) = (arch.gqa(), arch.qk_norm) else { return };
        let (d, g, half) = (shape.head_dim, shape.kv_heads, shape.head_dim / 2);
        // Row of a head in slot order: pair `p` is rows `(2p, 2p + 1)`.
        let row = |i: usize| i / 2 + i % 2 * half;
        let one: Vec<Option<usize>> = (0..d).map(|i| Some(row(i))).collect();
        let keys: Vec<Option<usize>> = (0..g * d).map(|i| Some(i / d * d + row(i % d))).collect();
        let group = arch.heads / g;
        let queries = (0..arch.heads * g * d).map(|i| {
            let (h, inner) = (i / (g * d), i % (g * d));
            (inner / d == h / group).then_some(h * d + row(inner % d))
        });
        let (queries, keys) = match scope {
            QkNormScope::Head => (one.clone(), one),
            QkNormScope::All => (queries.collect(), keys),
        };
        for (role, places) in [("q_norm", queries), ("k_norm", keys)] {
            let part = Part::whole(arch.names.layer(layer).role(role));
            let dtype = if arch.norm_offset == 0.0 { (self.stored)(&part.name) } else { self.spec.storage.inexact() };
            let shape = vec![places.len()];
            let from = Origin::Spread { part, places, offset: arch.norm_offset };
            self.push(format!("{to}self_attn.{role}.weight"), dtype, shape, from);
        }
    }

    /// With the linear layers in FP8 and their scales after them, where that was asked for.
    fn finish(self) -> Vec<Emit> {
        if !self.spec.storage.is_fp8() {
            return self.out;
        }
        let mut out = Vec::with_capacity(2 * self.out.len());
        for mut emit in self.out {
            let planned = &mut emit.planned;
            if !fp8::is_quantised(&planned.name) {
                out.push(emit);
                continue;
            }
            planned.dtype = Dtype::F8_E4M3;
            let scales = PlannedTensor {
                name: fp8::scale_name(&planned.name),
                dtype: Dtype::F32,
                shape: planned.shape.iter().map(|n| n.div_ceil(fp8::BLOCK)).collect(),
            };
            out.push(emit);
            out.push(Emit { planned: scales, from: Origin::Scales });
        }
        out
    }
}
