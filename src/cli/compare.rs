//! `gqa2mla compare`

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use gqa2mla::convert::{Budget, CalibrationSettings, ConvertSettings, MethodChoice, OutputDtype};
use gqa2mla::observe::{Event, Observer};
use gqa2mla::report::{MethodComparison, MethodFigures, MethodRow};
use gqa2mla::runtime::{Cpu, Device};

use super::exit::ExitStatus;
use super::measure::{self, Windows};
use super::method_args::MethodArgs;
use super::model::{self, OpenModel};
use super::options::{self, CalibrationOptions, TextOptions};
use super::output::{width, write_with_plot};
use super::{Context, convert, values};

/// Convert with several methods and budgets, evaluate each, print one table.
///
/// Every conversion is calibrated on the same text, evaluated on the same tokens, written in f32 to a temporary folder, and
/// removed once it is evaluated. With -o, compare.json and compare.svg (perplexity against cache) are written. A method that
/// fails at a budget keeps its row, with the reason; the exit code is then 1.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Model folder or hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    /// Cache per token and layer: values (`192`) or shares of the source's (`50%`), comma separated
    #[arg(long, value_name = "BUDGET,...", default_value = "50%", value_delimiter = ',')]
    kv_budget: Vec<Budget>,
    /// Methods, comma separated
    #[arg(long, value_name = "METHOD,...", default_value = "transmla,care,attention-aware", value_delimiter = ',',
          value_parser = options::method())]
    methods: Vec<MethodChoice>,
    /// attention-aware: tokens of the longest calibration windows, as with convert; as --calib-seq-len: all have one length
    /// [default: 1024]
    #[arg(long, value_name = "TOKENS", value_parser = values::positive)]
    calib_max_seq_len: Option<usize>,
    /// attention-aware: at each budget, also once without each of its steps
    #[arg(long)]
    ablate: bool,
    #[command(flatten)]
    own: MethodArgs,
    /// Folder for compare.json and compare.svg; temporary files go there as well
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    calibration: CalibrationOptions,
    #[command(flatten)]
    text: TextOptions,
}

impl CompareArgs {
    /// Run the command.
    ///
    /// # Errors
    /// A model or text that cannot be used, files that cannot be written. A method that fails is no error.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let source = model::open_convertible(&self.model, context)?;
        let windows = Windows::new(&self.text, &[&source])?;
        let device = Device::Cpu(Cpu);
        let base = measure::perplexity(&source, &windows, &device, &context.progress)?;
        // Not before the model is known to run: a refusal leaves no folder.
        if let Some(dir) = &self.output {
            fs_err::create_dir_all(dir)?;
        }
        let scratch = scratch(self.output.as_deref())?;
        let mut document =
            MethodComparison::new(&self.model, &windows.text, base.tokens, base.perplexity, source.arch.cache_values());
        for Run { method, budget, without } in self.runs()? {
            let budget_name = budget.map(|b| b.to_string());
            let name = without.map_or_else(|| method.name().to_owned(), |step| format!("{method} --without {step}"));
            context.progress.event(Event::Note(match &budget_name {
                Some(budget) => format!("{name} at {budget}"),
                None => name.clone(),
            }));
            let settings = self.settings(method, budget);
            let output = scratch.path().join("converted");
            let row = run(&source, &settings, &output, &windows, base.perplexity, context);
            if output.exists() {
                fs_err::remove_dir_all(&output)?;
            }
            let (figures, error) = match row {
                Ok(figures) => (Some(figures), None),
                Err(e) => (None, Some(reason(&e))),
            };
            document.rows.push(MethodRow { method: name, budget: budget_name, figures, error });
        }
        if let Some(dir) = &self.output {
            write_with_plot(dir, "compare", &document, &document.svg())?;
        }
        context.show(&document, |d| d.table().render(width()))?;
        let failed = document.rows.iter().any(|r| r.figures.is_none());
        Ok(if failed { ExitStatus::CheckFailed } else { ExitStatus::Done })
    }

    /// Every method at every budget; what compresses nothing takes none and runs once.
    fn runs(&self) -> anyhow::Result<Vec<Run>> {
        let mut runs = Vec::new();
        for method in self.own.methods(&self.methods)? {
            let budgets = match method.compresses() {
                false => vec![None],
                true => self.kv_budget.iter().copied().map(Some).collect(),
            };
            runs.extend(budgets.iter().map(|&budget| Run { method: method.clone(), budget, without: None }));
            if self.ablate {
                let run = |&budget: &Option<Budget>| {
                    let runs = method.ablations().into_iter();
                    runs.map(move |(step, method)| Run { method, budget, without: Some(step) })
                };
                runs.extend(budgets.iter().flat_map(run));
            }
        }
        Ok(runs)
    }

    fn settings(&self, method: MethodChoice, budget: Option<Budget>) -> ConvertSettings {
        let max_seq_len = self.calib_max_seq_len.filter(|_| method.mixes_window_lengths());
        ConvertSettings {
            method,
            kv_budget: budget,
            // So that only the method makes a difference, not rounding.
            dtype: Some(OutputDtype::F32),
            calibration: CalibrationSettings { max_seq_len, ..self.calibration.settings() },
            force: true,
            ..ConvertSettings::default()
        }
    }
}

/// One conversion to make.
struct Run {
    method: MethodChoice,
    budget: Option<Budget>,
    /// Step that is left out.
    without: Option<&'static str>,
}

/// A temporary folder beside the results, or in the system's.
fn scratch(output: Option<&Path>) -> anyhow::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".gqa2mla-compare-");
    match output {
        Some(dir) => builder.tempdir_in(dir).with_context(|| format!("cannot make a folder in `{}`", dir.display())),
        None => builder.tempdir().context("cannot make a temporary folder"),
    }
}

fn run(
    source: &OpenModel,
    settings: &ConvertSettings,
    output: &Path,
    windows: &Windows,
    ppl_source: f64,
    context: &Context,
) -> anyhow::Result<MethodFigures> {
    let started = Instant::now();
    let report = convert::publish(source, settings, output, context)?;
    let seconds = started.elapsed().as_secs_f64();
    let converted = model::open(&output.to_string_lossy(), context)?;
    let perplexity = measure::perplexity(&converted, windows, &Device::Cpu(Cpu), &context.progress)?.perplexity;
    let cache = report.cache_values_per_token_per_layer;
    Ok(MethodFigures {
        kv_lora_rank: report.geometry.kv_lora_rank,
        qk_rope_head_dim: report.geometry.qk_rope_head_dim,
        cache_values_per_token_per_layer: cache,
        cache_percent: 100.0 * cache as f64 / source.arch.cache_values() as f64,
        perplexity,
        excess_nats: (perplexity / ppl_source).ln(),
        calibration_error: report.calibration_error,
        predicted_error: report.calibration_error,
        seconds,
    })
}

/// The chain of an error in one line, without hints.
fn reason(e: &anyhow::Error) -> String {
    let links: Vec<String> =
        e.chain().map(|l| l.to_string().split("\n\nhint: ").next().unwrap_or_default().to_owned()).collect();
    links.join(": ").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Probe {
        #[command(flatten)]
        compare: CompareArgs,
    }

    #[test]
    fn what_only_attention_aware_has_is_left_out_of_other_methods() {
        let args = "probe model --methods care,attention-aware --refine 3 --calib-max-seq-len 2048 --calib-samples 7";
        let args = Probe::try_parse_from(args.split_whitespace()).expect("valid").compare;
        let runs = args.runs().expect("both methods");
        let of = |run: &Run| {
            let settings = args.settings(run.method.clone(), None);
            (settings.method.arguments(), settings.calibration.max_seq_len, settings.calibration.samples)
        };
        assert_eq!(of(&runs[0]), (vec![], None, 7));
        assert_eq!(of(&runs[1]), (vec![("refine", Some("3".to_owned()))], Some(2048), 7));
        let foreign = "probe model --methods care --refine 3";
        let foreign = Probe::try_parse_from(foreign.split_whitespace()).expect("options").compare;
        assert!(foreign.runs().is_err());
    }
}
