//! Everything that decides names, shapes and dtypes of the output, as plain data.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::attention;
use super::neutral::LatentNorm;
use super::rope::{RopeConfig, rope_config};
use super::storage::Storage;
use super::{OutTensor, Padding, Profile, RopeGrid, Target, pad};
use crate::arch::{Architecture, LongRope};
use crate::mla::{Geometry, MlaLayer};
use crate::source::Dtype;
use crate::write::PlannedTensor;

/// A query latent with a constant row is padded with zero rows to a multiple of this: an odd width would leave f32 tensors
/// unaligned after bf16 ones.
const QUERY_LATENT_MULTIPLE: usize = 16;

/// Everything that decides names, shapes and dtypes of the output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetSpec {
    /// Class that is written for.
    pub class: Target,
    /// Widths that the method fills, before padding to kernels. `q_lora_rank` is that of the output ([`TargetSpec::set_query_rank`]).
    pub geometry: Geometry,
    /// What widths are padded to.
    pub padding: Padding,
    /// Which engines the class is written for: the portable profile knows the stock grid and YaRN only.
    pub profile: Profile,
    /// Where frequencies of rotated slots lie: on the grid of the config, which padding has to keep, or anywhere.
    pub slots: RopeGrid,
    /// `attention_bias`: biases on `kv_a`, `o` and, where there is a query latent, `q_a`.
    pub bias: bool,
    /// Whether the output carries a bias of the queries.
    pub query_bias: bool,
    /// Whether norms of queries and keys are carried over.
    pub head_norms: bool,
    /// Dtypes.
    pub storage: Storage,
    /// Whether the query and key/value weights are the source's own times powers of two, so that no dtype of its rounds them.
    pub plain_weights: bool,
    /// How the class's norm of latents is neutralised; `None`: it has none.
    pub latent_norm: Option<LatentNorm>,
    /// Layers that keep the source's attention, `[layers]`; empty: none.
    pub kept: Vec<bool>,
}

impl TargetSpec {
    /// Set the query latent's width for the method's rank of queries, `None` where it projects them directly. A latent that the
    /// class needs, or that carries the queries' bias in a constant row, is made (docs/targets.md, section 3). `hidden`: `D`.
    pub fn set_query_rank(&mut self, rank: Option<usize>, hidden: usize) {
        let made = self.has_constant_row() || rank.is_none() && self.class.needs_query_latent();
        let constant = self.has_constant_row() || self.latent_norm.is_some_and(LatentNorm::needs_bias);
        let constant = usize::from(constant);
        self.geometry.q_lora_rank = match made || rank.is_some() && constant == 1 {
            true => Some((rank.unwrap_or(hidden) + constant).next_multiple_of(QUERY_LATENT_MULTIPLE)),
            false => rank,
        };
    }

    /// Whether a constant row of the query latent carries the queries' bias, for which the class has no place of its own.
    pub fn has_constant_row(&self) -> bool {
        self.query_bias && !self.class.has_query_biases()
    }

    /// Epsilon of every norm of the output.
    pub fn norm_eps(&self, arch: &Architecture) -> f64 {
        self.latent_norm.map_or(arch.norm_eps, |norm| norm.eps(arch.norm_eps))
    }

    /// Factor on the residual stream, which makes up for an epsilon that is not the source's.
    pub fn stream_scale(&self, arch: &Architecture) -> f64 {
        self.latent_norm.map_or(1.0, |norm| norm.stream_scale(arch.norm_eps))
    }

    /// Factor on the gain of the norm before attention, whose inverse is in the maps that read it.
    pub fn input_scale(&self) -> f64 {
        self.latent_norm.map_or(1.0, LatentNorm::input_scale)
    }

    /// Whether layer `layer` keeps the source's attention.
    pub fn keeps(&self, layer: usize) -> bool {
        self.kept.get(layer) == Some(&true)
    }

    /// Widths of the output.
    pub fn output(&self) -> Geometry {
        self.kernel_shape().unwrap_or_else(|| self.unpadded())
    }

    /// Widths with what the latent norm takes, before padding to kernels.
    pub fn unpadded(&self) -> Geometry {
        let slots = self.latent_norm.map_or(0, LatentNorm::slots);
        Geometry { kv_lora_rank: self.geometry.kv_lora_rank + slots, ..self.geometry }
    }

    /// Widths padded to those of kernels, where that is asked for and possible.
    pub(super) fn kernel_shape(&self) -> Option<Geometry> {
        match self.padding {
            Padding::Kernels => pad::kernel_shape(&self.unpadded(), self.slots == RopeGrid::Stock),
            Padding::None => None,
        }
    }

    /// Cached values per token and layer of the output.
    pub fn cache_values(&self) -> usize {
        self.output().kv_lora_rank + self.output().qk_rope_head_dim
    }

    /// Dtype of weights that hold the source's numbers times powers of two, if the method's do at all.
    pub(super) fn plain_dtype(&self) -> Dtype {
        if self.plain_weights { self.storage.base() } else { self.storage.inexact() }
    }

    /// Attention tensors of layer `layer`, in writing order.
    pub fn planned_attention(&self, arch: &Architecture, layer: usize) -> Vec<PlannedTensor> {
        self.class.attention(self, arch).into_iter().map(|tensor| tensor.planned(layer)).collect()
    }

    /// The same tensors with their values. `gain` is the weight of the layer's input norm, which bounds what the latent norms
    /// can meet.
    pub fn attention_tensors(&self, arch: &Architecture, layer: usize, mla: &MlaLayer, gain: &[f64]) -> Vec<OutTensor> {
        let mut values = attention::Values::new(self, arch, mla, gain);
        let tensors = self.class.attention(self, arch);
        tensors.into_iter().map(|tensor| tensor.with_values(layer, &mut values)).collect()
    }

    /// Frequencies as the output's config will express them. `frequencies` are those of the slots, radians per token.
    pub fn rope(&self, frequencies: &[f64], arch: &Architecture, source: &Value, max_position: usize) -> RopeConfig {
        let frequencies = &pad::frequencies(frequencies, self.output().qk_rope_head_dim, arch.rope.theta);
        let scaling = ["rope_scaling", "rope_parameters"].iter().find_map(|k| source.get(k).and_then(Value::as_object));
        // Slots rotate as pairs of the source do, so each takes from its pair what applies past the original context.
        let long = arch.rope.long.as_ref().filter(|l| max_position > l.original).map(|long| {
            let beyond = |f: &f64| {
                let pair = arch.rope.inv_freq.iter().position(|own| own == f);
                pair.map_or(*f, |j| long.inv_freq[j])
            };
            LongRope { original: long.original, inv_freq: frequencies.iter().map(beyond).collect() }
        });
        let portable = self.profile == Profile::Portable;
        rope_config(frequencies, long, arch.rope.theta, scaling, max_position, portable)
    }
}
