//! What a conversion would do, and what it did: plain data, serialisable.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConvertError, ConvertSettings, Job, Method, RopeGrid, SCHEMA_VERSION, TargetKind, memory};
use crate::write::ShardPlan;

/// Widths of the MLA layer that will be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PlannedGeometry {
    pub kv_lora_rank: usize,
    pub q_lora_rank: Option<usize>,
    pub qk_nope_head_dim: usize,
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
}

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
    /// Class that is written for, never `auto`.
    pub target: TargetKind,
    /// Widths.
    pub geometry: PlannedGeometry,
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

/// Figures of one converted layer.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LayerReport {
    /// Layer index.
    pub layer: usize,
    /// Predicted relative squared error of the layer's attention output.
    pub predicted_error: f64,
    /// Measured on the calibration windows, where the method measures it.
    pub measured_error: Option<f64>,
    /// Share of key energy whose rotation is lost.
    pub rope_loss: f64,
    /// Share of the joint key/value energy outside the latent.
    pub rank_loss: f64,
    /// Rank of keys and values, where ranks differ by layer or may be padded with zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_rank: Option<usize>,
    /// Rank of the queries, where they go through a latent of a method's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub q_rank: Option<usize>,
    /// Whether the layer keeps the source's attention.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept: bool,
    /// Anything out of the ordinary: regularisation, rejected refinement.
    pub notes: Vec<String>,
}

/// What a conversion did: `conversion.json`.
#[derive(Debug, Clone, Serialize)]
pub struct ConversionReport {
    /// Version of this document.
    pub schema_version: u32,
    /// Tool version.
    pub tool_version: String,
    /// Where the output is.
    pub output: PathBuf,
    /// The model as the user named it.
    pub source: String,
    /// Hub commit of the source, if it came from the hub.
    pub source_revision: Option<String>,
    /// sha256 of each source weight file's header, by file name.
    pub source_fingerprint: BTreeMap<String, String>,
    /// Method name.
    pub method: String,
    /// Settings.
    pub settings: ConvertSettings,
    /// Decisions taken for the user.
    pub decisions: Vec<String>,
    /// Class that was written for, never `auto`.
    pub target: TargetKind,
    /// Widths.
    pub geometry: PlannedGeometry,
    /// `r + d_R`.
    pub cache_values_per_token_per_layer: usize,
    /// `2 g d`.
    pub source_cache_values_per_token_per_layer: usize,
    /// Cached values per token, all layers.
    pub cache_values_per_token: usize,
    /// Layers that became MLA; the others keep the source's attention.
    pub mla_layers: Vec<usize>,
    /// Radians per token of each rotated slot.
    pub rope_frequencies: Vec<f64>,
    /// Per-layer figures.
    pub layers: Vec<LayerReport>,
    /// Mean of the layers' predicted errors.
    pub predicted_error: f64,
    /// Calibration tokens used.
    pub calibration_tokens: usize,
    /// Peak resident memory of the process in bytes.
    pub peak_rss_bytes: u64,
    /// Wall seconds by phase.
    pub seconds: BTreeMap<String, f64>,
}

impl ConversionReport {
    /// The part that the same inputs and settings give again: what is written into the folder, whose bytes must not
    /// depend on the machine, the path or the clock.
    pub(super) fn reproducible(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        if let Some(map) = value.as_object_mut() {
            for key in ["output", "peak_rss_bytes", "seconds"] {
                map.remove(key);
            }
        }
        value
    }
}

/// Floating-point rate assumed for the time estimate, per core, and bytes per second of writing.
const FLOPS_PER_CORE: f64 = 8e10;
const BYTES_PER_SECOND: f64 = 4e8;

/// The plan of a prepared job.
pub(super) fn describe(
    job: &Job<'_>,
    windows: &[Vec<u32>],
    predicted_error: Option<f64>,
) -> Result<Plan, ConvertError> {
    let tokens: usize = windows.iter().map(Vec::len).sum();
    let (arch, settings) = (job.arch, job.settings);
    let tensors = job.planned_tensors();
    let shards = ShardPlan::new(&tensors, settings.max_shard_bytes)?;
    let flops = flops(job, windows);
    let memory = memory::Need::of(job, tokens);
    let spill = memory.spill(settings.max_memory)?;
    let mut decisions = job.decisions.clone();
    if spill {
        decisions.push("hidden states of the calibration text wait on the disk, to stay within --max-memory".into());
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
    Ok(Plan {
        schema_version: SCHEMA_VERSION,
        source: job.source.spec.clone(),
        family: arch.family.clone(),
        settings: settings.clone(),
        decisions,
        target: job.spec.kind,
        geometry: job.spec.output(),
        layers: arch.layers,
        cache_values_per_token_per_layer: job.cache_values(),
        source_cache_values_per_token_per_layer: arch.cache_values(),
        cache_values_per_token: job.cache_values_per_token(),
        mla_layers: job.mla_layers(),
        rope_grid: match settings.method {
            Method::Exact if job.shape.kv_heads > 1 => RopeGrid::Free,
            _ => job.grid,
        },
        bias: job.spec.bias,
        tensors: tensors.into_iter().map(|t| (t.name, t.dtype.to_string(), t.shape)).collect(),
        shards: shards.shards().iter().map(|s| (s.file.clone(), s.file_bytes())).collect(),
        output_bytes: shards.file_bytes() + job.source.files.iter().map(|f| f.size).sum::<u64>(),
        peak_memory_bytes: memory.peak(spill),
        spilled: spill,
        calibration_tokens: tokens,
        flops,
        estimated_seconds: flops / (FLOPS_PER_CORE * cores) + shards.file_bytes() as f64 / BYTES_PER_SECOND,
        predicted_error,
        engines: Vec::new(),
    })
}

/// Products of calibration and factorisation, two operations each.
fn flops(job: &Job<'_>, windows: &[Vec<u32>]) -> f64 {
    let lengths = || windows.iter().map(|window| window.len() as f64);
    let tokens: f64 = lengths().sum();
    let arch = job.arch;
    let (t, d, i, l) = (tokens, arch.hidden as f64, arch.intermediate as f64, arch.layers as f64);
    let (q, kv) = ((arch.heads * job.shape.head_dim) as f64, (job.shape.kv_heads * job.shape.head_dim) as f64);
    let rank = job.spec.geometry.kv_lora_rank as f64;
    // Length of the window that a token is in, on average.
    let seq = lengths().map(|n| n * n).sum::<f64>() / tokens.max(1.0);
    let source = 2.0 * t * (d * (2.0 * q + 2.0 * kv) + 3.0 * d * i + seq * q);
    let moments = 2.0 * t * d * d;
    let z = 2.0 * kv;
    let solve = 30.0 * z.powi(3) + 6.0 * z * d * d;
    l * match job.settings.method {
        Method::Exact => 0.0,
        Method::Transmla | Method::Care => source + moments + solve,
        // Decompositions of the queries and of keys and values, once for the ranks and once for the factors.
        Method::XEcomla | Method::Mha2mla => source + moments + 2.0 * solve + 30.0 * q.min(d).powi(2) * q.max(d),
        Method::AttentionAware => {
            let pooled = arch.heads as f64 * 2.0 * t * rank * (rank + seq);
            2.0 * source + moments + pooled + 4.0 * t * q * (q + d) + 3.0 * solve
        }
    }
}
