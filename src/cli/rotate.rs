//! `gqa2mla rotate`

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gqa2mla::convert::OutputDtype;
use gqa2mla::latent::{self, RotateSettings, RotationReport, Transform};
use gqa2mla::report::rotation;
use gqa2mla::runtime::DeviceChoice;
use gqa2mla::write::Leftover;

use super::command_line::quoted;
use super::exit::ExitStatus;
use super::options::CalibrationOptions;
use super::output::width;
use super::{Context, model, values};

/// Rotate the latents of an MLA model by a matrix that is folded into its weights; the model computes what it did.
///
/// For tensor-parallel decoding with sliced latents (TPLA): what slicing costs depends on the coordinates that are sliced.
/// The matrix and the gain of the latent's norm go into kv_a_proj_with_mqa, kv_a_layernorm and kv_b_proj; every other tensor
/// is copied bit for bit. Takes conversions of this tool and native models. `gqa2mla verify MLA_DIR OUT` proves the
/// result, and with --tp measures what slicing costs.
#[derive(Debug, Args)]
pub struct RotateArgs {
    /// MLA model: folder or hub id `org/name[@revision]`
    #[arg(value_name = "MLA_DIR")]
    model: String,
    /// Folder to write
    #[arg(long, short, value_name = "DIR", help_heading = "Output")]
    output: PathBuf,
    /// none; hadamard: spread over all coordinates, needs no data (where the latent's norm does nothing, as in
    /// conversions, directions scaled by what the weights read of them); pca: principal directions of what each layer's
    /// scores and outputs read, most first
    #[arg(long, value_name = "TRANSFORM", default_value = "hadamard", value_parser = transform())]
    transform: Transform,
    /// Slices the latent will be cut into; has to divide it. For the report: the matrices do not depend on it
    #[arg(long, value_name = "T", default_value = "1", value_parser = values::positive)]
    slices: usize,
    #[command(flatten)]
    calibration: CalibrationOptions,
    #[command(flatten)]
    written: WrittenOptions,
    /// Where calibration runs the model: cpu, auto, gpu[:N], vulkan, metal or cuda[:N][:bf16]
    #[arg(long, value_name = "DEVICE", default_value = "cpu", help_heading = "Device")]
    device: DeviceChoice,
}

/// How weights of an MLA model are written anew.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub struct WrittenOptions {
    /// Dtype of the tensors that change: auto (f32, since turning fills every digit; bf16 for an FP8 source), bf16 or f32
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = dtype())]
    dtype: Dtype,
    /// Largest weight file; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = values::size)]
    pub max_shard_size: u64,
    /// Replace an existing output folder
    #[arg(long)]
    pub overwrite: bool,
}

impl WrittenOptions {
    /// The dtype, unless it is left to the tool.
    pub fn dtype(&self) -> Option<OutputDtype> {
        self.dtype.0
    }
}

/// A dtype or `auto`.
#[derive(Debug, Clone, Copy)]
struct Dtype(Option<OutputDtype>);

fn dtype() -> impl TypedValueParser<Value = Dtype> {
    PossibleValuesParser::new(["auto", "bf16", "f32"]).map(|s| {
        Dtype(match s.as_str() {
            "bf16" => Some(OutputDtype::Bf16),
            "f32" => Some(OutputDtype::F32),
            _ => None,
        })
    })
}

/// Parser of a transform's name, for any command.
pub fn transform() -> impl TypedValueParser<Value = Transform> {
    PossibleValuesParser::new(Transform::ALL.map(Transform::name))
        .map(|s| Transform::ALL.into_iter().find(|t| t.name() == s).unwrap_or(Transform::None))
}

impl RotateArgs {
    /// Run the command.
    ///
    /// # Errors
    /// Whatever stopped it; then nothing is published.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let settings = RotateSettings {
            transform: self.transform,
            slices: self.slices,
            calibration: self.calibration.settings(),
            dtype: self.written.dtype(),
            device: self.device,
            max_shard_bytes: self.written.max_shard_size,
            overwrite: self.written.overwrite,
            leftover: Leftover::Refuse,
        };
        let model = model::open(&self.model, context)?;
        let command = command(&self.model, &settings);
        let extras = |r: &RotationReport| vec![("README.md".to_owned(), rotation::note(r, &command).into_bytes())];
        let report = latent::rotate(&model.source, &model.arch, &settings, &self.output, &extras, &context.progress)?;
        context.show(&report, |r| rotation::text(r, width()))?;
        Ok(ExitStatus::Done)
    }
}

/// The command that makes the folder again; of paths only the last part, since the note is published.
fn command(model: &str, s: &RotateSettings) -> String {
    let last = |path: &std::path::Path| path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let folder = std::path::Path::new(model);
    let model = if folder.exists() { last(folder) } else { model.to_owned() };
    let mut out =
        format!("gqa2mla rotate {} -o OUTPUT --transform {} --slices {}", quoted(&model), s.transform, s.slices);
    if s.transform == Transform::Pca {
        for file in &s.calibration.files {
            out += &format!(" --calib {}", quoted(&last(file)));
        }
        let c = &s.calibration;
        out += &format!(" --calib-samples {} --calib-seq-len {} --seed {}", c.samples, c.seq_len, c.seed);
    }
    if let Some(dtype) = s.dtype {
        out += &format!(" --dtype {}", dtype.name());
    }
    out
}
