//! The plan of a conversion as a value: everything that was decided, nothing that is still open.

use serde::{Deserialize, Serialize};

use crate::arch::Architecture;
use crate::methods::{Case, Made, SurveyResult};
use crate::source::TensorDirectory;
use crate::target::{Emission, RopeGrid, TargetSpec};
use crate::write::{PlannedTensor, ShardPlan, WriteError};

/// Every decision of a conversion. It is made once, by `survey`, goes to the journal whole, and is only read
/// from then on: by the conversion loop, a run that resumes, `plan` and the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Blueprint {
    /// Class, widths, folds and dtypes of the output, and which layers keep the source's attention.
    pub spec: TargetSpec,
    /// Frequencies that the rotated slots take.
    pub grid: RopeGrid,
    /// Longest context of the output.
    pub max_position: usize,
    /// What the method remembers of its survey.
    pub result: SurveyResult,
    /// Mean relative error of the layers that were converted on trial, where some were.
    pub predicted_error: Option<f64>,
    /// Decisions taken for the user, one sentence each.
    pub decisions: Vec<String>,
    /// Weight files, each with its tensors in the order of their bytes.
    pub files: Vec<PlannedFile>,
}

/// A weight file to be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedFile {
    /// File name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Names, dtypes and shapes.
    pub tensors: Vec<(String, String, Vec<usize>)>,
}

impl Blueprint {
    /// Layers that become MLA, of `layers`.
    pub fn mla_layers(&self, layers: usize) -> Vec<usize> {
        (0..layers).filter(|i| !self.spec.keeps(*i)).collect()
    }

    /// Cached values per token of the output, all layers.
    pub fn cache_values_per_token(&self, arch: &Architecture) -> usize {
        let converted = self.mla_layers(arch.layers).len();
        converted * self.spec.cache_values() + (arch.layers - converted) * arch.cache_values()
    }

    /// What the method needs to know of it for a layer.
    pub fn made<'a>(&'a self, case: &Case<'a>) -> Made<'a> {
        Made { case: *case, geometry: self.spec.geometry, bias: self.spec.bias, result: &self.result }
    }

    /// Where each weight goes, byte by byte.
    ///
    /// # Errors
    /// [`WriteError::ForeignPlan`] where the files are others than those that were planned: a journal of another version.
    pub fn shards(&self, planned: &[PlannedTensor], max_shard_bytes: u64) -> Result<ShardPlan, WriteError> {
        let shards = ShardPlan::new(planned, max_shard_bytes)?;
        if files(&shards) == self.files { Ok(shards) } else { Err(WriteError::ForeignPlan) }
    }
}

/// What is written for a spec, and where it comes from.
pub fn emission(arch: &Architecture, spec: &TargetSpec, tensors: &TensorDirectory) -> Emission {
    Emission::new(arch, spec, &|name| tensors.get(name).map_or(spec.storage.base(), |t| t.dtype))
}

/// The files of a layout.
pub(super) fn files(shards: &ShardPlan) -> Vec<PlannedFile> {
    let of_shard = |shard: &crate::write::PlannedShard| PlannedFile {
        name: shard.file.clone(),
        bytes: shard.file_bytes(),
        tensors: shard
            .tensors
            .iter()
            .map(|(name, t)| (name.to_owned(), t.dtype.to_string(), t.shape.clone()))
            .collect(),
    };
    shards.shards().iter().map(of_shard).collect()
}
