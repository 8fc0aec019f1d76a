//! What `export` is asked, and what it did.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::mla::Geometry;
use crate::publish;
use crate::target::{LatentNorm, OutputDtype, Padding, Profile, Target};
use crate::write::Leftover;

/// Version of `export.json`.
pub const EXPORT_SCHEMA: u32 = 1;
/// The report in an exported folder.
pub const EXPORT_FILE: &str = "export.json";

/// What `export` is asked to do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExportSettings {
    /// Class to write for; `None`: the folder's own where this tool writes it, or else the one a conversion would take.
    pub target: Option<Target>,
    /// Which engines the class is written for.
    pub profile: Profile,
    /// What widths are padded to; `None`: kernels in the portable profile, and nothing else.
    pub pad: Option<Padding>,
    /// Dtype of all weights; `None`: as in the folder, what changes in a dtype that holds it.
    pub dtype: Option<OutputDtype>,
    /// Longest weight file in bytes.
    pub max_shard_bytes: u64,
    /// Replace an existing output folder.
    #[serde(skip)]
    pub overwrite: bool,
    /// What to do with an unfinished conversion to the same output. An export is not resumed: [`Leftover::Resume`] is
    /// [`Leftover::Refuse`] here.
    #[serde(skip)]
    pub leftover: Leftover,
}

/// How the folder was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// Attention was read into the neutral form and written for the class.
    Rewritten,
    /// Every tensor is the source's in another dtype.
    Cast,
}

/// What `export` did: `export.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExportReport {
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
    pub settings: ExportSettings,
    /// How it was written.
    pub route: Route,
    /// `model_type` of the folder that was read.
    pub source_class: String,
    /// `model_type` of the output.
    pub class: String,
    /// Widths of the output.
    pub geometry: Geometry,
    /// How the norm of latents is neutralised; `None` where the class has none, or the model's own is kept.
    pub latent_norm: Option<LatentNorm>,
    /// Values cached per token and layer by the output.
    pub cache_values_per_token_per_layer: usize,
    /// The same for the folder that was read.
    pub source_cache_values_per_token_per_layer: usize,
    /// Largest relative error, over the layers, of taking the norm of latents in the folder for none; 0 where there is none or
    /// it is kept.
    pub norm_error: f64,
    /// Decisions taken for the user, one sentence each.
    pub decisions: Vec<String>,
}

impl publish::Report for ExportReport {
    const FILE: &'static str = EXPORT_FILE;
}
