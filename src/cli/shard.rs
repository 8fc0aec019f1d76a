//! `gqa2mla shard`

use std::path::PathBuf;

use clap::Args;
use gqa2mla::latent::{self, ShardSettings, Sharing};
use gqa2mla::report::rotation;
use gqa2mla::runtime::DeviceChoice;

use super::exit::ExitStatus;
use super::options::CalibrationOptions;
use super::output::width;
use super::{Context, model, values};

/// Write an MLA model as one weight file per rank of a tensor-parallel group that shares its latents out (TPLA).
///
/// OUT holds rank-0-of-T.safetensors and so on, the model's config.json and tokenizer, and tpla.json, which says what each
/// rank holds and where the ranks' results are summed. Every rank runs all heads on its slice of the latent, and its share
/// of the MLPs. Rotate the latents first with rotate: what slicing costs depends on it, and `gqa2mla verify --tp` measures it.
#[derive(Debug, Args)]
pub struct ShardArgs {
    /// MLA model: folder or hub id `org/name[@revision]`
    #[arg(value_name = "MLA_DIR")]
    model: String,
    /// Folder to write
    #[arg(long, short, value_name = "DIR", help_heading = "Output")]
    output: PathBuf,
    /// Ranks; has to divide the latent
    #[arg(long, value_name = "T", value_parser = values::positive)]
    tp: usize,
    /// Every rank computes the whole latent, to norm its slice by the whole's root mean square, and caches its slice
    #[arg(long)]
    shared_rms: bool,
    /// Factor on the part of a rank's scores that comes from its slice, folded into its kv_b_proj
    #[arg(long, value_name = "X", default_value = "1", value_parser = values::positive_number)]
    logit_scale: f64,
    /// Calibrate the size of slices that are normed by themselves; --calib does so too
    #[arg(long)]
    calibrate: bool,
    /// Fit each rank's keys and values to its slice on calibration text
    #[arg(long)]
    refit: bool,
    #[command(flatten)]
    calibration: CalibrationOptions,
    /// Replace an existing output folder
    #[arg(long, help_heading = "Output")]
    overwrite: bool,
    /// Where calibration runs the model: cpu, auto, gpu[:N], vulkan, metal or cuda[:N][:bf16]
    #[arg(long, value_name = "DEVICE", default_value = "cpu", help_heading = "Device")]
    device: DeviceChoice,
}

impl ShardArgs {
    /// Run the command.
    ///
    /// # Errors
    /// Whatever stopped it; then nothing is published.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let calibration = self.calibration.settings();
        let settings = ShardSettings {
            sharing: Sharing { ranks: self.tp, shared_rms: self.shared_rms, logit_scale: self.logit_scale },
            calibrate: self.calibrate || !calibration.files.is_empty(),
            refit: self.refit,
            calibration,
            device: self.device,
            overwrite: self.overwrite,
        };
        let model = model::open(&self.model, context)?;
        let report = latent::shard(&model.source, &model.arch, &settings, &self.output, &context.progress)?;
        context.show(&report, |r| rotation::shards(r, width()))?;
        Ok(ExitStatus::Done)
    }
}
