//! What a conversion would do, as a document.

use serde::Serialize;

use super::{Blueprint, Checked, SCHEMA_VERSION, memory};
use crate::error::ConvertError;
use crate::methods::ConvertSettings;
use crate::mla::Geometry;
use crate::target::{RopeGrid, Target};

/// Everything `convert` would do; nothing is written to make it.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Version of this document.
    pub schema_version: u32,
    /// The model as the user named it.
    pub source: String,
    /// Source family.
    pub family: String,
    /// Settings as given, after defaults.
    pub settings: ConvertSettings,
    /// Decisions taken for the user, one sentence each.
    pub decisions: Vec<String>,
    /// Class that is written for.
    pub target: Target,
    /// Widths.
    pub geometry: Geometry,
    /// Layers.
    pub layers: usize,
    /// `r + d_R`.
    pub cache_values_per_token_per_layer: usize,
    /// `2 g d`.
    pub source_cache_values_per_token_per_layer: usize,
    /// Cached values per token, all layers.
    pub cache_values_per_token: usize,
    /// Layers that become MLA; the others keep the source's attention.
    pub mla_layers: Vec<usize>,
    /// Frequencies of the rotated width.
    pub rope_grid: RopeGrid,
    /// Whether projections have biases.
    pub bias: bool,
    /// Tensors to write: name, dtype, shape.
    pub tensors: Vec<(String, String, Vec<usize>)>,
    /// Shard files with their sizes in bytes.
    pub shards: Vec<(String, u64)>,
    /// Bytes of the output folder.
    pub output_bytes: u64,
    /// Largest resident memory expected, in bytes.
    pub peak_memory_bytes: u64,
    /// Whether hidden states wait on the disk to stay below the memory that was allowed.
    pub spilled: bool,
    /// Calibration tokens, 0 for a method that needs none.
    pub calibration_tokens: usize,
    /// Floating-point operations of calibration and factorisation.
    pub flops: f64,
    /// Rough wall time in seconds on this machine.
    pub estimated_seconds: f64,
    /// Predicted error (relative, per layer output) of the method, where the plan was asked to survey the model.
    pub predicted_error: Option<f64>,
    /// Engines that load the output, as `(engine, verdict)`.
    pub engines: Vec<(String, String)>,
}

/// Floating-point rate assumed for the time estimate, per core, and bytes per second of writing.
const FLOPS_PER_CORE: f64 = 8e10;
const BYTES_PER_SECOND: f64 = 4e8;

/// The document of a plan, for calibration text in `windows`.
///
/// # Errors
/// Memory that does not suffice.
pub(super) fn describe(
    checked: &Checked<'_>,
    blueprint: &Blueprint,
    windows: &[Vec<u32>],
) -> Result<Plan, ConvertError> {
    let (case, spec) = (&checked.case, &blueprint.spec);
    let (arch, settings) = (case.arch, case.settings);
    let flops = arch.layers as f64 * memory::cost(case, spec.geometry, windows).flops;
    let memory = memory::Need::of(case, spec.geometry, windows);
    let spill = memory.spill(settings.max_memory)?;
    let mut decisions = blueprint.decisions.clone();
    if spill {
        decisions.push("hidden states of the calibration text wait on the disk, to stay within --max-memory".into());
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
    let weights: u64 = blueprint.files.iter().map(|file| file.bytes).sum();
    Ok(Plan {
        schema_version: SCHEMA_VERSION,
        source: case.source.spec.clone(),
        family: arch.family.clone(),
        settings: settings.clone(),
        decisions,
        target: spec.class,
        geometry: spec.output(),
        layers: arch.layers,
        cache_values_per_token_per_layer: spec.cache_values(),
        source_cache_values_per_token_per_layer: arch.cache_values(),
        cache_values_per_token: blueprint.cache_values_per_token(arch),
        mla_layers: blueprint.mla_layers(arch.layers),
        rope_grid: blueprint.grid,
        bias: spec.bias,
        tensors: blueprint.files.iter().flat_map(|file| file.tensors.iter().cloned()).collect(),
        shards: blueprint.files.iter().map(|file| (file.name.clone(), file.bytes)).collect(),
        output_bytes: weights + case.source.files.iter().map(|f| f.size).sum::<u64>(),
        peak_memory_bytes: memory.peak(spill),
        spilled: spill,
        calibration_tokens: windows.iter().map(Vec::len).sum(),
        flops,
        estimated_seconds: flops / (FLOPS_PER_CORE * cores) + weights as f64 / BYTES_PER_SECOND,
        predicted_error: blueprint.predicted_error,
        engines: Vec::new(),
    })
}
