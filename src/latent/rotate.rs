//! `rotate`: a checkpoint with its latents rotated, and everything else unchanged.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ndarray::{Array, Array2, Dimension};
use serde::Serialize;

use super::statistics::{LatentMoments, latent_moments, latent_windows};
use super::transform::principal;
use super::weights::{LatentNames, LatentTensor, check_slices, is_fp8, need_mla, refused};
use super::{LatentTransform, LatentWeights, Transform};
use crate::arch::{Architecture, MlaShape, Part, SCALE_SUFFIX, StoredPart, check_tensors};
use crate::calibrate::CalibrationSettings;
use crate::error::ConvertError;
use crate::factor::hadamard::Spread;
use crate::observe::{Event, Observer};
use crate::publish::{self, Compute, Config, Extras, Place, Publisher};
use crate::runtime::{Device, DeviceChoice, LayerTensors};
use crate::source::{Dtype, ModelSource};
use crate::target::{Cut, Emit, Origin, OutputDtype};
use crate::write::{Leftover, PlannedTensor, ShardPlan};

/// Version of `rotation.json`.
pub const ROTATION_SCHEMA: u32 = 1;
/// The report in a rotated folder.
pub const ROTATION_FILE: &str = "rotation.json";

/// What `rotate` is asked to do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RotateSettings {
    /// Which kind of matrix rotates the latents.
    pub transform: Transform,
    /// Slices `T` that the latent will be cut into; `T` has to divide it.
    pub slices: usize,
    /// Calibration text, for [`Transform::Pca`].
    pub calibration: CalibrationSettings,
    /// Dtype of the tensors that change: bf16 or f32; `None`: f32, and bf16 for an FP8 source.
    pub dtype: Option<OutputDtype>,
    /// Where calibration runs the model.
    pub device: DeviceChoice,
    /// Longest weight file in bytes.
    pub max_shard_bytes: u64,
    /// Replace an existing output folder.
    #[serde(skip)]
    pub overwrite: bool,
    /// What to do with an unfinished conversion to the same output. A rotation is not resumed: [`Leftover::Resume`] is
    /// [`Leftover::Refuse`] here.
    #[serde(skip)]
    pub leftover: Leftover,
}

/// Figures of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RotatedLayer {
    /// Layer index.
    pub layer: usize,
    /// The one gain of `kv_a_layernorm`; `None` where the class does not norm the latent.
    pub gain: Option<f64>,
    /// Share of each slice in what queries read, on the calibration text; empty without calibration.
    pub slice_energy: Vec<f64>,
}

/// What `rotate` did: `rotation.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RotationReport {
    /// Version of this document.
    pub schema_version: u32,
    /// Tool version.
    pub tool_version: String,
    /// Where the output is.
    pub output: PathBuf,
    /// The model as the user named it.
    pub source: String,
    /// sha256 of each source weight file's header, by file name.
    pub source_fingerprint: BTreeMap<String, String>,
    /// Settings.
    pub settings: RotateSettings,
    /// How the matrix is made.
    pub construction: String,
    /// Which directions belong to which slice.
    pub order: String,
    /// Latent width `r`.
    pub kv_lora_rank: usize,
    /// Cached rotated width `d_R`.
    pub qk_rope_head_dim: usize,
    /// Values cached per token and layer by one rank of `slices`: `r / T + d_R`.
    pub cache_values_per_rank: usize,
    /// Calibration tokens.
    pub calibration_tokens: usize,
    /// Decisions taken for the user, one sentence each.
    pub decisions: Vec<String>,
    /// Figures by layer.
    pub layers: Vec<RotatedLayer>,
}

impl publish::Report for RotationReport {
    const FILE: &'static str = ROTATION_FILE;
}

/// Files beside the weights that the caller wants in the folder: name and content, made of the report.
pub type RotationExtras<'a> = Extras<'a, RotationReport>;

/// Write `source` with its latents rotated into the folder `output`.
///
/// The output is the same class with the same `config.json`. Tensors that the fold does not touch are copied bit for bit,
/// except that an FP8 source, whose scales a fold would break, is written in bf16 throughout. The folder appears, complete,
/// in one rename; on any error it is as it was. Phases reported: `calibrate`, `rotate`.
///
/// # Errors
/// [`ConvertError`]: a GQA model, slices that do not divide the latent, text or files that cannot be used.
pub fn rotate(
    source: &ModelSource,
    arch: &Architecture,
    settings: &RotateSettings,
    output: &Path,
    extras: RotationExtras<'_>,
    observer: &dyn Observer,
) -> Result<RotationReport, ConvertError> {
    let shape = need_mla(source, arch)?;
    check_tensors(arch, &source.tensors)?;
    let (rank, slices) = (shape.kv_lora_rank, settings.slices);
    check_slices(rank, slices)?;
    let mut decisions = Vec::new();
    let dtype = folded_dtype(source, settings, &mut decisions)?;
    let windows = match settings.transform {
        Transform::Pca => latent_windows(source, arch, &settings.calibration, rank)?,
        _ => Vec::new(),
    };
    let list = emission(source, arch, shape, settings.transform, dtype);
    let planned: Vec<PlannedTensor> = list.iter().map(|e| e.planned.clone()).collect();
    let shards = ShardPlan::new(&planned, settings.max_shard_bytes)?;
    let leftover = if settings.leftover == Leftover::Resume { Leftover::Refuse } else { settings.leftover };
    let place = Place { output, overwrite: settings.overwrite, leftover, bytes: shards.file_bytes() };
    let staging = publish::stage(source, &place)?;
    for decision in &decisions {
        observer.event(Event::Note(decision.clone()));
    }
    let moments = match settings.transform {
        Transform::Pca => latent_moments(source, arch, &Device::open(settings.device)?, &windows, observer)?,
        _ => Vec::new(),
    };

    let mut publisher = Publisher::new(source, staging, shards, observer);
    observer.event(Event::Phase { name: "rotate", steps: Some(arch.layers as u64) });
    let mut folded = FoldedLayers::new(source, arch, settings, moments, observer)?;
    publisher.write(&list, &mut folded)?;
    let widened = settings.transform != Transform::None && is_fp8(source);
    publisher
        .side_files(Config::Kept { without: if widened { &["quantization_config"] } else { &[] }, with: &[] }, &[])?;
    let report = RotationReport {
        schema_version: ROTATION_SCHEMA,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        output: output.to_owned(),
        source: source.spec.clone(),
        source_fingerprint: publish::fingerprint(source),
        settings: settings.clone(),
        construction: construction(settings.transform, rank, folded.scaled),
        order: order(settings.transform, rank, slices),
        kv_lora_rank: rank,
        qk_rope_head_dim: shape.qk_rope_head_dim,
        cache_values_per_rank: rank / slices + shape.qk_rope_head_dim,
        calibration_tokens: windows.iter().map(Vec::len).sum(),
        decisions,
        layers: folded.layers,
    };
    publisher.report(&report, extras)?;
    Ok(RotationReport { output: publisher.finish()?, ..report })
}

/// A tensor around the latent of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Folded {
    layer: usize,
    tensor: LatentTensor,
}

/// Rotates the layers one after the other, as their tensors are written.
struct FoldedLayers<'a> {
    source: &'a ModelSource,
    arch: &'a Architecture,
    shape: &'a MlaShape,
    settings: &'a RotateSettings,
    /// By layer; none without calibration.
    moments: Vec<LatentMoments>,
    observer: &'a dyn Observer,
    /// The layer that is being written.
    current: Option<(usize, LatentWeights)>,
    /// Figures of the layers so far.
    layers: Vec<RotatedLayer>,
    /// Whether directions of some layer were scaled.
    scaled: bool,
}

impl<'a> FoldedLayers<'a> {
    fn new(
        source: &'a ModelSource,
        arch: &'a Architecture,
        settings: &'a RotateSettings,
        moments: Vec<LatentMoments>,
        observer: &'a dyn Observer,
    ) -> Result<Self, ConvertError> {
        let shape = need_mla(source, arch)?;
        let layers = Vec::with_capacity(arch.layers);
        Ok(Self { source, arch, shape, settings, moments, observer, current: None, layers, scaled: false })
    }

    /// The weights of `layer`, rotated.
    fn fold(&mut self, layer: usize) -> Result<LatentWeights, ConvertError> {
        let mut weights = LatentWeights::load(self.source, self.arch, layer)?;
        let (transform, energies) = self.transform(layer, &weights)?;
        self.scaled |= matches!(transform, LatentTransform::Scaled { .. });
        weights.fold(&transform);
        self.layers.push(RotatedLayer {
            layer,
            gain: weights.gain.as_ref().and_then(|g| g.first().copied()),
            slice_energy: shares(&energies, self.settings.slices),
        });
        self.observer.event(Event::Step { done: layer as u64 + 1, tokens: 0 });
        Ok(weights)
    }

    /// The matrix of one layer, and what is read of each of its directions, where that was measured.
    fn transform(&self, layer: usize, weights: &LatentWeights) -> Result<(LatentTransform, Vec<f64>), ConvertError> {
        match (self.settings.transform, self.moments.get(layer)) {
            (Transform::None, _) => Ok((LatentTransform::Identity, Vec::new())),
            (Transform::Hadamard, _) => Ok((self.hadamard(layer, weights)?, Vec::new())),
            (Transform::Pca, Some(moments)) => {
                principal(&moments.reads).map_err(|e| ConvertError::Layer { layer, source: e.into() })
            }
            (Transform::Pca, None) => Err(refused("principal directions need calibration text", "give `--calib FILE`")),
        }
    }

    /// The Hadamard matrix of one layer, over scaled directions where the norm does nothing.
    fn hadamard(&self, layer: usize, weights: &LatentWeights) -> Result<LatentTransform, ConvertError> {
        let Self { source, arch, shape, .. } = *self;
        let input = LayerTensors::load_input_norm(source, arch, layer)?;
        if !weights.is_neutral(&input, shape.latent_eps) {
            return Ok(LatentTransform::hadamard(weights.rank()));
        }
        let name = arch.weight(layer, "o").name;
        let values = StoredPart::find(&source.tensors, &Part::whole(&name))?.to_f64();
        let output = Array2::from_shape_vec((arch.hidden, arch.heads * shape.v_head_dim), values).map_err(|_| {
            refused(format!("tensor `{name}` has another shape than the config says"), "is the checkpoint intact?")
        })?;
        let transform = LatentTransform::spread_by(&weights.read_by_weights(shape, output.view()));
        transform.map_err(|e| ConvertError::Layer { layer, source: e.into() })
    }
}

impl Compute<Folded> for FoldedLayers<'_> {
    fn values(&mut self, key: &Folded) -> Result<Option<Cow<'_, [f64]>>, ConvertError> {
        let weights = match self.current.take() {
            Some((layer, weights)) if layer == key.layer => weights,
            _ => self.fold(key.layer)?,
        };
        let (_, weights) = self.current.insert((key.layer, weights));
        Ok(match key.tensor {
            LatentTensor::KvA => Some(row_major(&weights.kv_a)),
            LatentTensor::Bias => weights.bias.as_ref().map(row_major),
            // As stored: some classes add a number to every gain.
            LatentTensor::Gain => weights.gain.as_ref().map(|g| g.iter().map(|g| g - self.arch.norm_offset).collect()),
            LatentTensor::KvB => Some(row_major(&weights.kv_b)),
        })
    }
}

fn row_major<D: Dimension>(array: &Array<f64, D>) -> Cow<'_, [f64]> {
    array.as_slice().map_or_else(|| array.iter().copied().collect(), Cow::Borrowed)
}

fn construction(transform: Transform, rank: usize, scaled: bool) -> String {
    match transform {
        Transform::None => "the identity: latents stay as they are".to_owned(),
        Transform::Hadamard if scaled => format!(
            "{}, over each layer's directions scaled by what its weights read of them",
            Spread::new(rank).describe()
        ),
        Transform::Hadamard => Spread::new(rank).describe(),
        Transform::Pca => "eigenvectors of what each layer's scores and outputs read of its latent".to_owned(),
    }
}

fn order(transform: Transform, rank: usize, slices: usize) -> String {
    let width = rank / slices;
    let blocks = format!("slice t holds coordinates {width} t to {width} t + {}", width - 1);
    match transform {
        Transform::Pca => format!("{blocks}, by falling share in what is read"),
        _ => blocks,
    }
}

/// Share of the whole in each of `slices` equal runs; empty for no values.
fn shares(energies: &[f64], slices: usize) -> Vec<f64> {
    let total: f64 = energies.iter().sum();
    if energies.is_empty() || total <= 0.0 {
        return Vec::new();
    }
    energies.chunks(energies.len() / slices).map(|c| c.iter().sum::<f64>() / total).collect()
}

/// Dtype of the tensors that change. A rotation mixes values of every size, which no narrow dtype holds.
fn folded_dtype(
    source: &ModelSource,
    settings: &RotateSettings,
    decisions: &mut Vec<String>,
) -> Result<Dtype, ConvertError> {
    let fp8 = is_fp8(source);
    if settings.transform == Transform::None {
        return match settings.dtype {
            None => Ok(Dtype::F32),
            Some(_) => Err(refused(
                "`--transform none` changes no tensor, so there is none to give a dtype",
                "leave `--dtype` out",
            )),
        };
    }
    if fp8 {
        decisions.push(
            "the source is FP8, and a rotated matrix fits none of its scales: all weights are written in bf16".into(),
        );
    }
    match settings.dtype {
        None if fp8 => Ok(Dtype::BF16),
        None => {
            let narrow = source.tensors.iter().any(|(_, t)| matches!(t.dtype, Dtype::BF16 | Dtype::F16));
            if narrow {
                decisions.push(
                    "the tensors that are rotated are written in f32, all others bit for bit as they are (`--dtype bf16` rounds \
                     them once more)"
                        .into(),
                );
            }
            Ok(Dtype::F32)
        }
        Some(OutputDtype::F32) => Ok(Dtype::F32),
        Some(OutputDtype::Bf16) => Ok(Dtype::BF16),
        Some(other) => Err(refused(
            format!("`--dtype {}`: rotated tensors are written in bf16 or f32", other.name()),
            "f16 would round neutralised latents to zero, and FP8 scales would have to be made anew",
        )),
    }
}

/// Every tensor of the output in model order; what the config does not imply comes last.
fn emission(
    source: &ModelSource,
    arch: &Architecture,
    shape: &MlaShape,
    transform: Transform,
    dtype: Dtype,
) -> Vec<Emit<Folded>> {
    let changes = transform != Transform::None;
    let mut latent = BTreeMap::new();
    for layer in (0..arch.layers).filter(|_| changes) {
        let names = LatentNames::of(arch, shape, layer);
        latent.extend(names.iter().map(|(tensor, name)| (name.to_owned(), Folded { layer, tensor })));
    }
    let expected: Vec<String> = arch.expected_tensors().into_iter().map(|t| t.name).collect();
    let known: BTreeSet<&str> = expected.iter().map(String::as_str).collect();
    let more = source.tensors.in_file_order().map(|(n, _)| n).filter(|n| !known.contains(n));
    let mut out = Vec::new();
    for name in expected.iter().map(String::as_str).chain(more) {
        let Some(info) = source.tensors.get(name) else { continue };
        let scale_of = name.strip_suffix(SCALE_SUFFIX).and_then(|of| source.tensors.get(of));
        if changes && scale_of.is_some_and(|t| t.dtype == Dtype::F8_E4M3) {
            continue;
        }
        let (dtype, from) = match (latent.get(name), info.dtype) {
            // One number, exact in any dtype: its own, or a power of two.
            (Some(folded), own) if folded.tensor == LatentTensor::Gain => (own, Origin::Computed(*folded)),
            (Some(folded), _) => (dtype, Origin::Computed(*folded)),
            (None, Dtype::F8_E4M3) if changes => (Dtype::BF16, Origin::Widened(Part::whole(name))),
            (None, own) => (own, Origin::Stored { name: name.to_owned(), cut: Cut::Whole }),
        };
        out.push(Emit { planned: PlannedTensor { name: name.to_owned(), dtype, shape: info.shape.clone() }, from });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        assert_eq!(shares(&[3.0, 1.0, 2.0, 2.0], 2), [0.5, 0.5]);
        assert!(shares(&[], 2).is_empty() && shares(&[0.0, 0.0], 2).is_empty());
    }
}
