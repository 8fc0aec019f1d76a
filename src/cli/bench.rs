//! `gqa2mla bench`

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use gqa2mla::observe::{Event, Observer};
use gqa2mla::report::{BenchReport, BenchRow};
use gqa2mla::runtime::{Backend, Case, Device, Model, Resident, Trial};

use super::devices::DeviceOption;
use super::exit::ExitStatus;
use super::model::{self, OpenModel};
use super::output::{width, write_with_plot};
use super::{Context, values};

/// Measure prefill and decoding speed, and the bytes of the caches, of models side by side.
///
/// Every model fills its cache with the same number of tokens, then decodes: the models of a case take turns, step by
/// step, so that what else the machine does meets them alike. All are held at once; on a processor, bf16 and f32 weights are
/// used in place, in their files. Cache bytes are those of the caches that were allocated.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Model folders or hub ids `org/name[@revision]`; speeds are also shown relative to the first
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<String>,
    /// Tokens in the cache when decoding begins, comma separated
    #[arg(long, value_name = "TOKENS,...", default_value = "128,1024,4096", value_delimiter = ',',
          value_parser = values::positive)]
    contexts: Vec<usize>,
    /// Sequences decoded side by side, comma separated
    #[arg(long, value_name = "N,...", default_value = "1", value_delimiter = ',', value_parser = values::positive)]
    batches: Vec<usize>,
    /// Decoding steps measured in each case, after one that is not
    #[arg(long, value_name = "N", default_value = "16", value_parser = values::positive)]
    steps: usize,
    /// Allow contexts longer than a model has positions for
    #[arg(long)]
    beyond_context: bool,
    /// Folder for bench.json and bench.svg (decoding speed against context)
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceOption,
}

impl BenchArgs {
    /// Run the command.
    ///
    /// # Errors
    /// A model that cannot be used, a context that is too long for one, files that cannot be written.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let device = self.device.open(context)?;
        let models: Vec<OpenModel> = self.models.iter().map(|m| model::open(m, context)).collect::<Result<_, _>>()?;
        let report = self.measure(&models, &device, context)?;
        if let Some(dir) = &self.output {
            write_with_plot(dir, "bench", &report, &report.svg())?;
        }
        context.show(&report, |r| r.text(width()))?;
        Ok(ExitStatus::Done)
    }

    fn measure(&self, models: &[OpenModel], device: &Device, context: &Context) -> anyhow::Result<BenchReport> {
        let cases: Vec<Case> = self.cases();
        let progress = &context.progress;
        progress.event(Event::Phase { name: "load", steps: Some(models.len() as u64) });
        let mut residents = Vec::new();
        for (model, name) in models.iter().zip(&self.models) {
            let loaded = Resident::load(Model::new(&model.source, &model.arch, device).in_place());
            residents.push(loaded.with_context(|| format!("cannot load `{name}`"))?);
            progress.event(Event::Step { done: residents.len() as u64, tokens: 0 });
        }
        progress.event(Event::Phase { name: "bench", steps: Some(cases.len() as u64) });
        let mut report = BenchReport::new(device.name(), rayon::current_num_threads());
        for (done, case) in cases.iter().enumerate() {
            let mut trials = Vec::new();
            for (resident, name) in residents.iter().zip(&self.models) {
                progress.event(Event::Step { done: done as u64, tokens: 0 });
                trials.push(Trial::new(resident, *case).with_context(|| format!("cannot run `{name}`"))?);
            }
            let mut seconds = vec![Vec::new(); trials.len()];
            for step in 0..self.steps + 1 {
                progress.event(Event::Step { done: done as u64, tokens: 0 });
                for (trial, seconds) in trials.iter_mut().zip(&mut seconds) {
                    let taken = trial.step()?;
                    // The first step pays for what is set up once.
                    if step > 0 {
                        seconds.push(taken);
                    }
                }
            }
            for ((trial, seconds), name) in trials.iter().zip(seconds).zip(&self.models) {
                let cache = (trial.cache_bytes(), (case.context + case.steps) * case.batch);
                let row = BenchRow::new(name, (case.context, case.batch), trial.prefill_seconds, seconds, cache);
                report.rows.push(row);
            }
        }
        Ok(report)
    }

    fn cases(&self) -> Vec<Case> {
        let (steps, beyond_context) = (self.steps + 1, self.beyond_context);
        let case = |(&batch, &context): (&usize, &usize)| Case { context, batch, steps, beyond_context };
        self.batches.iter().flat_map(|b| self.contexts.iter().map(move |c| (b, c))).map(case).collect()
    }
}
