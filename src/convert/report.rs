//! What a conversion did: `conversion.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::methods::{ConvertSettings, LayerReport};
use crate::mla::Geometry;
use crate::target::{LatentNorm, Target};

/// What a conversion did: `conversion.json`.
#[derive(Debug, Clone, Serialize)]
pub struct ConversionReport {
    /// Version of this document.
    pub schema_version: u32,
    /// Tool version.
    pub tool_version: String,
    /// Library that decomposed matrices, with its version; nothing where it is the one that belongs to the tool's version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linear_algebra: Option<String>,
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
    /// Class that was written for.
    pub target: Target,
    /// Widths.
    pub geometry: Geometry,
    /// How the class's norm of latents is neutralised; nothing where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latent_norm: Option<LatentNorm>,
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
    /// Mean of the converted layers' errors on calibration text.
    pub calibration_error: f64,
    /// The same under its first name, until `schema_version` 2.
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
