//! `gqa2mla plan`

use clap::Args;
use gqa2mla::convert::{self, Plan};
use gqa2mla::report::engines::{Facts, judge};
use gqa2mla::report::text;

use super::exit::ExitStatus;
use super::options::ConvertOptions;
use super::output::width;
use super::{Context, model};

/// Show what convert would do and need: shapes, ranks, shards, bytes, peak memory, time; writes nothing.
///
/// The checks are those of convert. Unless --quick is given, the model runs on calibration text for the predicted error.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Model folder or hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    /// Leave out the predicted error, which takes running the model on calibration text
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    options: ConvertOptions,
}

impl PlanArgs {
    /// Run the command.
    ///
    /// # Errors
    /// Whatever would stop the conversion.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        show_plan(&self.model, &self.options, !self.quick, context)
    }
}

/// Plan and show it; also `convert --dry-run`.
///
/// # Errors
/// Whatever would stop the conversion.
pub fn show_plan(spec: &str, options: &ConvertOptions, predict: bool, context: &Context) -> anyhow::Result<ExitStatus> {
    let settings = options.settings()?;
    let model = model::open_convertible(spec, context)?;
    let mut plan = convert::plan(&model.source, &model.arch, &settings, predict, &context.progress)?;
    if plan.engines.is_empty() {
        plan.engines = engines(&plan);
    }
    context.show(&plan, |p| text::plan(p, width()))?;
    Ok(ExitStatus::Done)
}

/// `(engine, verdict)` for the output that is planned.
fn engines(plan: &Plan) -> Vec<(String, String)> {
    let mut candidate = Facts::planned(plan.geometry, plan.rope_grid, plan.target);
    candidate.bias = plan.bias;
    let sentence =
        |reasons: &[&str]| if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join("; ")) };
    judge(&candidate)
        .into_iter()
        .map(|v| (v.engine.to_owned(), format!("{}{}", v.loads.word(), sentence(&v.reasons))))
        .collect()
}
