//! `gqa2mla convert`

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use gqa2mla::convert::{self, ConversionReport, ConvertSettings};
use gqa2mla::report::{Verification, card, text};
use gqa2mla::runtime::Device;
use gqa2mla::verify;
use gqa2mla::write::Leftover;
use serde::Serialize;

use super::exit::ExitStatus;
use super::options::{ConvertOptions, TextOptions};
use super::output::width;
use super::values::Count;
use super::{Context, command_line, devices, measure, model, plan, resume};

/// Convert a model and write the MLA checkpoint.
///
/// Without options: method attention-aware at half the source's cache, calibrated on built-in text. The output folder
/// appears when it is complete, or not at all. It holds config.json, safetensors weights, the tokenizer files, a model
/// card, conversion.json (settings and figures per layer) and manifest.json (sha256 of every file). A run that is stopped
/// or killed keeps its finished layers beside the output; the same command with --resume goes on after them and writes
/// the same bytes.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Model folder or hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    /// Folder to write
    #[arg(long, short, value_name = "DIR", required_unless_present = "dry_run", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Go on with the unfinished run of this very command, if there is one
    #[arg(long, help_heading = "Output", conflicts_with_all = ["restart", "dry_run"])]
    resume: bool,
    /// Remove what an unfinished run for this output left, and begin anew
    #[arg(long, help_heading = "Output", conflicts_with = "dry_run")]
    restart: bool,
    /// Only show the plan, as the command plan does
    #[arg(long, help_heading = "Output")]
    dry_run: bool,
    /// Compare the output with the source afterwards, on the built-in held-out text; exit 1 if a check does not hold
    #[arg(long, help_heading = "Output", conflicts_with = "dry_run")]
    verify: bool,
    #[command(flatten)]
    options: ConvertOptions,
}

/// The report, and the verification where one was asked for.
#[derive(Debug, Serialize)]
struct Converted {
    #[serde(flatten)]
    report: ConversionReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    verify: Option<Verification>,
}

impl ConvertArgs {
    /// Run the command.
    ///
    /// # Errors
    /// Whatever stopped the conversion; then nothing is published.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        if self.dry_run {
            return plan::show_plan(&self.model, &self.options, true, context);
        }
        let Some(output) = &self.output else { bail!("-o DIR is missing") };
        let mut settings = self.options.settings()?;
        settings.leftover = match (self.resume, self.restart) {
            (true, _) => Leftover::Resume,
            (_, true) => Leftover::Restart,
            _ => Leftover::Refuse,
        };
        let source = model::open_convertible(&self.model, context)?;
        let report = publish(&source, &settings, output, context).map_err(|e| match resume::pending() {
            Some(command) => e.context(format!("stopped before the end\n\nhint: go on with `{command}`")),
            None => e,
        })?;
        resume::forget();
        let verify = if self.verify {
            let converted = model::open(&output.to_string_lossy(), context)?;
            Some(verification(&source, &converted, &devices::open(settings.device, context)?, context)?)
        } else {
            None
        };
        let passed = verify.as_ref().is_none_or(|v| v.passed);
        context.show(&Converted { report, verify }, |c| {
            let mut out = text::conversion(&c.report, width());
            if let Some(v) = &c.verify {
                out.push('\n');
                out += &text::verification(v, width());
            }
            out
        })?;
        Ok(if passed { ExitStatus::Done } else { ExitStatus::CheckFailed })
    }
}

/// Convert, with a model card beside the weights.
///
/// # Errors
/// Whatever stopped the conversion.
pub fn publish(
    model: &model::OpenModel,
    settings: &ConvertSettings,
    output: &Path,
    context: &Context,
) -> anyhow::Result<ConversionReport> {
    let command = command_line::command_line(&model.source.spec, settings);
    let extras = |report: &ConversionReport| vec![("README.md".to_owned(), card(report, &command, None).into_bytes())];
    Ok(convert::convert(&model.source, &model.arch, settings, output, &extras, &context.progress)?)
}

/// What `verify` without options says.
///
/// # Errors
/// Models that cannot be run.
pub fn verification(
    source: &model::OpenModel,
    converted: &model::OpenModel,
    device: &Device,
    context: &Context,
) -> anyhow::Result<Verification> {
    let options = TextOptions { text: None, seq_len: 512, windows: Count(8), every: 1 };
    let windows = measure::Windows::new(&options, &[source, converted])?;
    let figures = measure::compare(source, converted, &windows, device, &context.progress)?;
    let (thresholds, from) = verify::default_thresholds(&source.source, &converted.source);
    let names = (source.source.spec.as_str(), converted.source.spec.as_str());
    Ok(Verification::new(names, (&windows.text, windows.seq_len), figures, thresholds, from))
}
