//! What a conversion would do, and what it did: plain data, serialisable.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::ConvertSettings;

/// Widths of the MLA layer that will be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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
    /// Widths.
    pub geometry: PlannedGeometry,
    /// Layers.
    pub layers: usize,
    /// `r + d_R`.
    pub cache_values_per_token_per_layer: usize,
    /// `2 g d`.
    pub source_cache_values_per_token_per_layer: usize,
    /// Tensors to write: name, dtype, shape.
    pub tensors: Vec<(String, String, Vec<usize>)>,
    /// Shard files with their sizes in bytes.
    pub shards: Vec<(String, u64)>,
    /// Bytes of the output folder.
    pub output_bytes: u64,
    /// Largest resident memory expected, in bytes.
    pub peak_memory_bytes: u64,
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
#[derive(Debug, Clone, Default, Serialize)]
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
    /// Widths.
    pub geometry: PlannedGeometry,
    /// `r + d_R`.
    pub cache_values_per_token_per_layer: usize,
    /// `2 g d`.
    pub source_cache_values_per_token_per_layer: usize,
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
