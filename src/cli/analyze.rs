//! `gqa2mla analyze`

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use gqa2mla::analyze::{AnalyzeSettings, analyze};
use gqa2mla::report::AnalysisReport;
use gqa2mla::runtime::Model;

use super::devices::DeviceOption;
use super::exit::ExitStatus;
use super::measure::Windows;
use super::options::TextOptions;
use super::output::{width, write_with_plots};
use super::{Context, model, values};

/// Group sizes analysed when the user names none, as far as the model has layers.
const GROUPS: [usize; 4] = [1, 2, 4, 8];

/// Show what caches of different layers have in common: what sharing one low rank among layers (xKV) would cost.
///
/// Of keys before RoPE and values, or of latents before their norm: the overlap of the leading left singular subspaces of
/// every two layers, and the energy that groups of layers keep against their shared rank. Advice only: nothing is
/// converted; `eval` and `generate` decode with such a cache (--xkv). Memory grows with the square of --seq-len.
#[derive(Debug, Args)]
pub struct AnalyzeArgs {
    /// Model folder or hub id `org/name[@revision]`, GQA or MLA
    #[arg(value_name = "MODEL")]
    model: String,
    /// Layers per group, comma separated [default: 1,2,4,8, as far as the model has layers]
    #[arg(long, value_name = "LAYERS,...", value_delimiter = ',', value_parser = values::positive)]
    groups: Option<Vec<usize>>,
    /// Leading singular vectors compared between layers [default: a quarter of a layer's width]
    #[arg(long, value_name = "N", value_parser = values::positive)]
    align_rank: Option<usize>,
    /// Folder for analyze.json, and per matrix alignment-*.svg (heat map) and energy-*.svg (curves)
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    text: TextOptions,
    #[command(flatten)]
    device: DeviceOption,
}

impl AnalyzeArgs {
    /// Run the command.
    ///
    /// # Errors
    /// A model or text that cannot be used, groups or ranks that the model cannot have, files that cannot be written.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let device = self.device.open(context)?;
        let model = model::open(&self.model, context)?;
        let settings = self.settings(model.arch.layers);
        let windows = Windows::new(&self.text, &[&model])?;
        let runnable = Model::new(&model.source, &model.arch, &device);
        let found = analyze(&runnable, &windows.tokens, &settings, &context.progress)
            .with_context(|| format!("cannot analyze `{}`", self.model))?;
        let report = AnalysisReport::new(&self.model, &windows.text, found);
        if let Some(dir) = &self.output {
            write_with_plots(dir, "analyze", &report, &report.plots())?;
        }
        context.show(&report, |r| r.text(width()))?;
        Ok(ExitStatus::Done)
    }

    fn settings(&self, layers: usize) -> AnalyzeSettings {
        let mut groups = match &self.groups {
            Some(groups) => groups.clone(),
            None => GROUPS.into_iter().filter(|g| *g <= layers).collect(),
        };
        groups.sort_unstable();
        groups.dedup();
        AnalyzeSettings { groups, align_rank: self.align_rank }
    }
}
