//! `gqa2mla plan`

use clap::Args;
use gqa2mla::convert;
use gqa2mla::report::text;

use super::exit::ExitStatus;
use super::options::ConvertOptions;
use super::output::width;
use super::{Context, model};

/// Show what convert would do and need: shapes, ranks, shards, bytes, peak memory, time; writes nothing.
///
/// Every check of convert that needs no calibration is made.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Model folder or hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    options: ConvertOptions,
}

impl PlanArgs {
    /// Run the command.
    ///
    /// # Errors
    /// Whatever would stop the conversion.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        show_plan(&self.model, &self.options, context)
    }
}

/// Plan and show it; also `convert --dry-run`.
pub fn show_plan(spec: &str, options: &ConvertOptions, context: &Context) -> anyhow::Result<ExitStatus> {
    let settings = options.settings()?;
    let model = model::open_convertible(spec, &context.progress)?;
    let plan = convert::plan(&model.source, &model.arch, &settings, &context.progress)?;
    context.show(&plan, |p| text::plan(p, width()))?;
    Ok(ExitStatus::Done)
}
