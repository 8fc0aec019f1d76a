//! `rotate`: a checkpoint with its latents turned, everything else as it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::Array2;
use serde::Serialize;

use super::statistics::{LatentMoments, latent_moments, latent_windows};
use super::turn::principal;
use super::weights::{LatentNames, check_slices, need_mla, refused};
use super::{LatentWeights, Transform, Turn};
use crate::arch::{Architecture, MlaShape, Part, SCALE_SUFFIX, StoredPart};
use crate::convert::{CalibrationSettings, ConvertError, OutputDtype};
use crate::factor::hadamard::Spread;
use crate::observe::{Event, Observer};
use crate::runtime::{Device, DeviceChoice, LayerTensors};
use crate::source::{Dtype, ModelSource};
use crate::target::encode;
use crate::write::{Leftover, PlannedTensor, ShardPlan, StagedWriter, Staging, StagingOptions};

/// Version of `rotation.json`.
pub const ROTATION_SCHEMA: u32 = 1;
/// The report in a rotated folder.
pub const ROTATION_FILE: &str = "rotation.json";

/// What `rotate` shall do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RotateSettings {
    /// Which orthogonal matrix.
    pub transform: Transform,
    /// Slices `T` the latent will be cut into; it has to divide it.
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
    /// What to do with an unfinished run of another command for the same output.
    #[serde(skip)]
    pub leftover: Leftover,
}

/// Figures of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TurnedLayer {
    /// Layer index.
    pub layer: usize,
    /// The one gain of `kv_a_layernorm`; `None` where the class norms no latent.
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
    /// How the orthogonal matrix is made.
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
    pub layers: Vec<TurnedLayer>,
}

impl RotationReport {
    /// What the same inputs and settings give again.
    fn reproducible(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        if let Some(map) = value.as_object_mut() {
            map.remove("output");
        }
        value
    }
}

/// The orthogonal matrices of a model's layers, and what is known of them.
#[derive(Debug, Clone)]
pub struct Turns {
    /// One per layer.
    pub layers: Vec<Turn>,
    /// Eigenvalues of the new directions, one list per layer; empty without calibration.
    pub energies: Vec<Vec<f64>>,
}

impl Turns {
    /// The turns of `transform` for `layers` layers with a latent of `rank` values. `moments` is needed for [`Transform::Pca`].
    ///
    /// # Errors
    /// [`ConvertError::Layer`] where a layer's moments have no eigenvectors; a refusal of PCA without moments.
    pub fn new(
        transform: Transform,
        (layers, rank): (usize, usize),
        moments: Option<&[LatentMoments]>,
    ) -> Result<Self, ConvertError> {
        match (transform, moments) {
            (Transform::None, _) => Ok(Self { layers: vec![Turn::None; layers], energies: Vec::new() }),
            (Transform::Hadamard, _) => Ok(Self { layers: vec![Turn::hadamard(rank); layers], energies: Vec::new() }),
            (Transform::Pca, Some(moments)) => {
                let mut out = Self { layers: Vec::with_capacity(layers), energies: Vec::with_capacity(layers) };
                for (layer, m) in moments.iter().enumerate() {
                    let found = principal(&m.reads);
                    let (turn, energies) = found.map_err(|e| ConvertError::Layer { layer, source: e.into() })?;
                    out.layers.push(turn);
                    out.energies.push(energies);
                }
                Ok(out)
            }
            (Transform::Pca, None) => Err(refused("principal directions need calibration text", "give `--calib FILE`")),
        }
    }
}

/// Files beside the weights that the caller wants in the folder: name and a function of the report.
pub type RotationExtras<'a> = &'a dyn Fn(&RotationReport) -> Vec<(String, Vec<u8>)>;

/// Write `source` with its latents turned into the folder `output`.
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
    let options = StagingOptions {
        overwrite: settings.overwrite,
        source: Some(source.dir.clone()),
        needed_bytes: shards.file_bytes().saturating_sub(source.tensors.hole_bytes()),
        leftover: settings.leftover,
    };
    let staging = Staging::create(output, &options)?;
    for decision in &decisions {
        observer.event(Event::Note(decision.clone()));
    }
    let moments = match settings.transform {
        Transform::Pca => Some(latent_moments(source, arch, &Device::open(settings.device)?, &windows, observer)?),
        _ => None,
    };
    let turns = Turns::new(settings.transform, (arch.layers, rank), moments.as_deref())?;

    let mut writer = StagedWriter::new(staging, shards);
    let mut layers = Vec::with_capacity(arch.layers);
    observer.event(Event::Phase { name: "rotate", steps: Some(arch.layers as u64) });
    let mut scaled = false;
    let mut current: Option<(usize, LatentWeights)> = None;
    for emit in &list {
        match &emit.from {
            From::Copy => copy(source, &emit.planned.name, &mut writer)?,
            From::Widen => {
                let values = StoredPart::find(&source.tensors, &Part::whole(&emit.planned.name))?.to_f64();
                put(&mut writer, &emit.planned, &values)?;
            }
            From::Latent(layer, role) => {
                if current.as_ref().is_none_or(|(at, _)| at != layer) {
                    let mut weights = LatentWeights::load(source, arch, *layer)?;
                    let turn = match settings.transform {
                        Transform::Hadamard => hadamard_of(source, arch, shape, *layer, &weights)?,
                        _ => turns.layers[*layer].clone(),
                    };
                    scaled |= matches!(turn, Turn::Scaled { .. });
                    weights.turn(&turn);
                    layers.push(TurnedLayer {
                        layer: *layer,
                        gain: weights.gain.as_ref().and_then(|g| g.first().copied()),
                        slice_energy: shares(turns.energies.get(*layer).map_or(&[][..], |e| e), slices),
                    });
                    current = Some((*layer, weights));
                    observer.event(Event::Step { done: *layer as u64 + 1, tokens: 0 });
                }
                let Some((_, w)) = &current else { continue };
                let values: Vec<f64> = match role {
                    Role::KvA => w.kv_a.iter().copied().collect(),
                    Role::Bias => w.bias.iter().flatten().copied().collect(),
                    Role::Gain => w.gain.iter().flatten().map(|g| g - arch.norm_offset).collect(),
                    Role::KvB => w.kv_b.iter().copied().collect(),
                };
                put(&mut writer, &emit.planned, &values)?;
            }
        }
        observer.event(Event::Written { tensor: emit.planned.name.clone() });
    }
    source.check_unchanged()?;
    side_files(source, settings.transform != Transform::None && is_fp8(source), &mut writer)?;
    let report = RotationReport {
        schema_version: ROTATION_SCHEMA,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        output: output.to_owned(),
        source: source.spec.clone(),
        source_fingerprint: source.fingerprint().into_iter().map(|f| (f.file, f.header_sha256)).collect(),
        settings: settings.clone(),
        construction: construction(settings.transform, rank, scaled),
        order: order(settings.transform, rank, slices),
        kv_lora_rank: rank,
        qk_rope_head_dim: shape.qk_rope_head_dim,
        cache_values_per_rank: rank / slices + shape.qk_rope_head_dim,
        calibration_tokens: windows.iter().map(Vec::len).sum(),
        decisions,
        layers,
    };
    for (name, bytes) in extras(&report) {
        writer.write_file(&name, &bytes)?;
    }
    writer.write_file(ROTATION_FILE, &pretty(&report.reproducible()))?;
    let published = writer.finish()?;
    if let Some(left) = published.left_behind {
        observer.event(Event::Warning(format!("could not be removed: {}", left.display())));
    }
    Ok(RotationReport { output: published.path, ..report })
}

/// The Hadamard turn of layer `layer`, over scaled directions where the norm does nothing.
fn hadamard_of(
    source: &ModelSource,
    arch: &Architecture,
    shape: &MlaShape,
    layer: usize,
    weights: &LatentWeights,
) -> Result<Turn, ConvertError> {
    let input = LayerTensors::load_input_norm(source, arch, layer)?;
    if !weights.is_neutral(&input, shape.latent_eps) {
        return Ok(Turn::hadamard(weights.rank()));
    }
    let name = arch.weight(layer, "o").name;
    let values = StoredPart::find(&source.tensors, &Part::whole(&name))?.to_f64();
    let output = Array2::from_shape_vec((arch.hidden, arch.heads * shape.v_head_dim), values).map_err(|_| {
        refused(format!("tensor `{name}` has another shape than the config says"), "is the checkpoint intact?")
    })?;
    let turn = Turn::spread_by(&weights.read_by_weights(shape, output.view()));
    turn.map_err(|e| ConvertError::Layer { layer, source: e.into() })
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

pub(super) fn pretty(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Share of the whole in each of `slices` equal runs; empty for no values.
fn shares(energies: &[f64], slices: usize) -> Vec<f64> {
    let total: f64 = energies.iter().sum();
    if energies.is_empty() || total <= 0.0 {
        return Vec::new();
    }
    energies.chunks(energies.len() / slices).map(|c| c.iter().sum::<f64>() / total).collect()
}

pub(super) fn is_fp8(source: &ModelSource) -> bool {
    source.tensors.iter().any(|(_, t)| t.dtype == Dtype::F8_E4M3)
}

/// Dtype of the tensors that change. Turning mixes values of every size, which no narrow dtype holds.
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
            "the source is FP8, and a turned matrix fits none of its scales: all weights are written in bf16".into(),
        );
    }
    match settings.dtype {
        None if fp8 => Ok(Dtype::BF16),
        None => {
            let narrow = source.tensors.iter().any(|(_, t)| matches!(t.dtype, Dtype::BF16 | Dtype::F16));
            if narrow {
                decisions.push(
                    "the tensors that turn are written in f32, all others bit for bit as they are (`--dtype bf16` rounds \
                     them once more)"
                        .into(),
                );
            }
            Ok(Dtype::F32)
        }
        Some(OutputDtype::F32) => Ok(Dtype::F32),
        Some(OutputDtype::Bf16) => Ok(Dtype::BF16),
        Some(other) => Err(refused(
            format!("`--dtype {}`: turned tensors are written in bf16 or f32", other.name()),
            "f16 would round neutralised latents to zero, and FP8 scales would have to be made anew",
        )),
    }
}

/// Where a tensor of the output comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    /// The source's bytes.
    Copy,
    /// The source's FP8 values, in bf16.
    Widen,
    /// A layer's turned weights.
    Latent(usize, Role),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    KvA,
    Bias,
    Gain,
    KvB,
}

struct Emit {
    planned: PlannedTensor,
    from: From,
}

/// Every tensor of the output in model order; what the config does not imply comes last.
fn emission(
    source: &ModelSource,
    arch: &Architecture,
    shape: &MlaShape,
    transform: Transform,
    dtype: Dtype,
) -> Vec<Emit> {
    let mut latent = BTreeMap::new();
    if transform != Transform::None {
        for layer in 0..arch.layers {
            let names = LatentNames::of(arch, shape, layer);
            latent.insert(names.kv_a, From::Latent(layer, Role::KvA));
            latent.insert(names.kv_b, From::Latent(layer, Role::KvB));
            names.bias.map(|n| latent.insert(n, From::Latent(layer, Role::Bias)));
            names.gain.map(|n| latent.insert(n, From::Latent(layer, Role::Gain)));
        }
    }
    let expected: Vec<String> = arch.expected_tensors().into_iter().map(|t| t.name).collect();
    let known: std::collections::BTreeSet<&str> = expected.iter().map(String::as_str).collect();
    let more = source.tensors.in_file_order().map(|(n, _)| n).filter(|n| !known.contains(n));
    let mut out = Vec::new();
    for name in expected.iter().map(String::as_str).chain(more) {
        let Some(info) = source.tensors.get(name) else { continue };
        let widened = transform != Transform::None;
        let scale_of = name.strip_suffix(SCALE_SUFFIX).and_then(|of| source.tensors.get(of));
        if widened && scale_of.is_some_and(|t| t.dtype == Dtype::F8_E4M3) {
            continue;
        }
        let from = latent.get(name).copied().unwrap_or(match info.dtype {
            Dtype::F8_E4M3 if widened => From::Widen,
            _ => From::Copy,
        });
        let dtype = match from {
            From::Copy => info.dtype,
            From::Widen => Dtype::BF16,
            // One number, exact in any dtype: its own, or a power of two.
            From::Latent(_, Role::Gain) => info.dtype,
            From::Latent(..) => dtype,
        };
        out.push(Emit { planned: PlannedTensor { name: name.to_owned(), dtype, shape: info.shape.clone() }, from });
    }
    out
}

/// Bytes as they are, some megabytes at a time.
pub(super) fn copy(source: &ModelSource, name: &str, writer: &mut StagedWriter) -> Result<(), ConvertError> {
    if source.tensors.get(name).is_some_and(|t| t.bytes() == 0) {
        return Ok(writer.write_tensor(name, &[])?);
    }
    source.tensors.for_each_piece::<ConvertError>(name, |piece| Ok(writer.write_piece(name, piece)?))
}

pub(super) fn put(writer: &mut StagedWriter, planned: &PlannedTensor, values: &[f64]) -> Result<(), ConvertError> {
    // Finite in f64 is not enough: what is written has to be.
    let largest = values.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    if values.iter().any(|v| !v.is_finite()) || largest > f64::from(f32::MAX) {
        return Err(ConvertError::Produced { name: planned.name.clone() });
    }
    Ok(writer.write_tensor(&planned.name, &encode(values, planned.dtype))?)
}

/// Config, tokenizer, and the code that the config names.
pub(super) fn side_files(source: &ModelSource, widened: bool, writer: &mut StagedWriter) -> Result<(), ConvertError> {
    let mut config = source.config.clone();
    if let (true, Some(map)) = (widened, config.as_object_mut()) {
        map.remove("quantization_config");
    }
    writer.write_file("config.json", &pretty(&config))?;
    for file in &source.files {
        writer.copy_file(&file.name, &file.path)?;
    }
    // `modeling_x.Class` is the class of `modeling_x.py`.
    let mapped = source.config.get("auto_map").and_then(serde_json::Value::as_object);
    let class =
        |value: &serde_json::Value| value.as_str().and_then(|v| v.split_once('.')).map(|(m, _)| format!("{m}.py"));
    let code: std::collections::BTreeSet<String> =
        mapped.into_iter().flat_map(|m| m.values().filter_map(class)).collect();
    for name in code.iter().chain([&"conversion.json".to_owned()]) {
        let path = source.dir.join(name);
        if path.is_file() {
            writer.copy_file(name, &path)?;
        }
    }
    Ok(())
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
