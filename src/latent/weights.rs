//! Reading what touches the latent from a checkpoint.

use ndarray::{Array1, Array2};

use super::LatentWeights;
use crate::arch::{Architecture, Attention, MlaShape, Part, StoredPart};
use crate::error::ConvertError;
use crate::source::{Dtype, ModelSource, scan_non_finite};

/// A tensor around the latent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LatentTensor {
    /// `kv_a_proj_with_mqa`.
    KvA,
    /// Its bias.
    Bias,
    /// `kv_a_layernorm`.
    Gain,
    /// `kv_b_proj`.
    KvB,
}

/// Names of the tensors around the latent of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LatentNames {
    pub kv_a: String,
    pub bias: Option<String>,
    pub gain: Option<String>,
    pub kv_b: String,
}

impl LatentNames {
    pub fn of(arch: &Architecture, shape: &MlaShape, layer: usize) -> Self {
        let names = arch.names.layer(layer);
        Self {
            kv_a: arch.weight(layer, "kv_a").name,
            bias: shape.bias.then(|| arch.bias(layer, "kv_a").name),
            gain: shape.latent_norm.then(|| names.role("kv_a_norm")),
            kv_b: arch.weight(layer, "kv_b").name,
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (LatentTensor, &str)> {
        [
            (LatentTensor::KvA, Some(&self.kv_a)),
            (LatentTensor::Bias, self.bias.as_ref()),
            (LatentTensor::Gain, self.gain.as_ref()),
            (LatentTensor::KvB, Some(&self.kv_b)),
        ]
        .into_iter()
        .filter_map(|(tensor, name)| Some((tensor, name?.as_str())))
    }
}

/// The MLA geometry of a model, or the refusal of one that has none.
///
/// # Errors
/// [`ConvertError::Refused`] for a GQA model, and for one that has grouped-query attention in some layers.
pub fn need_mla<'a>(source: &ModelSource, arch: &'a Architecture) -> Result<&'a MlaShape, ConvertError> {
    match &arch.attention {
        Attention::Mla(_) if arch.hybrid.is_some() => Err(refused(
            format!("`{}` has grouped-query attention in some of its layers, which have no latent", source.spec),
            "convert all layers (`gqa2mla convert` without `--mla-layers`)",
        )),
        Attention::Mla(shape) => Ok(shape),
        Attention::Gqa(_) => Err(refused(
            format!("`{}` ({}) has no latent: its attention is grouped-query", source.spec, arch.model_type),
            "convert it first (`gqa2mla convert`), or give a model that is MLA already",
        )),
    }
}

pub(super) fn refused(message: impl Into<String>, hint: impl Into<String>) -> ConvertError {
    ConvertError::Refused { message: message.into(), hint: Some(hint.into()) }
}

/// Whether some weights of a model are FP8.
pub(super) fn is_fp8(source: &ModelSource) -> bool {
    source.tensors.iter().any(|(_, t)| t.dtype == Dtype::F8_E4M3)
}

/// Refuse a number of slices that does not divide the latent.
///
/// # Errors
/// [`ConvertError::Refused`] naming those that do.
pub fn check_slices(rank: usize, slices: usize) -> Result<(), ConvertError> {
    if slices > 0 && rank.is_multiple_of(slices) {
        return Ok(());
    }
    let fits: Vec<String> = (1..=64.min(rank)).filter(|t| rank.is_multiple_of(*t)).map(|t| t.to_string()).collect();
    Err(refused(
        format!("{slices} slices do not divide a latent of {rank} values"),
        format!("possible are {}", fits.join(", ")),
    ))
}

impl LatentWeights {
    /// Read layer `layer`, without a constant in the latent ([`LatentWeights::fold_constant`]).
    ///
    /// # Errors
    /// [`ConvertError::NotFinite`] naming the tensor; [`ConvertError::Source`].
    pub fn load(source: &ModelSource, arch: &Architecture, layer: usize) -> Result<Self, ConvertError> {
        let mut weights = Self::stored(source, arch, layer)?;
        weights.fold_constant(need_mla(source, arch)?.latent_eps);
        Ok(weights)
    }

    /// Whether the latent of layer `layer` has a constant in it as it is stored.
    ///
    /// # Errors
    /// As [`LatentWeights::load`].
    pub(super) fn has_constant(source: &ModelSource, arch: &Architecture, layer: usize) -> Result<bool, ConvertError> {
        Ok(Self::stored(source, arch, layer)?.constant_slot().is_some())
    }

    fn stored(source: &ModelSource, arch: &Architecture, layer: usize) -> Result<Self, ConvertError> {
        let shape = need_mla(source, arch)?;
        let names = LatentNames::of(arch, shape, layer);
        for (_, name) in names.iter() {
            if let Some(fault) = scan_non_finite(&source.tensors, name)? {
                return Err(ConvertError::NotFinite {
                    name: name.to_owned(),
                    count: fault.count,
                    index: fault.first_index,
                    value: fault.value,
                });
            }
        }
        let values = |name: &str| -> Result<Vec<f64>, ConvertError> {
            Ok(StoredPart::find(&source.tensors, &Part::whole(name))?.to_f64())
        };
        let matrix = |name: &str, rows: usize, columns: usize| -> Result<Array2<f64>, ConvertError> {
            // The shape was checked against the config when the model was opened.
            Array2::from_shape_vec((rows, columns), values(name)?).map_err(|_| {
                refused(format!("tensor `{name}` is not [{rows}, {columns}]"), "is the checkpoint intact?")
            })
        };
        let (r, rope) = (shape.kv_lora_rank, shape.qk_rope_head_dim);
        let vector = |name: &Option<String>| name.as_ref().map(|n| values(n).map(Array1::from_vec)).transpose();
        Ok(Self {
            kv_a: matrix(&names.kv_a, r + rope, arch.hidden)?,
            bias: vector(&names.bias)?,
            gain: vector(&names.gain)?.map(|g| g + arch.norm_offset),
            kv_b: matrix(&names.kv_b, arch.heads * (shape.qk_nope_head_dim + shape.v_head_dim), r)?,
        })
    }
}
