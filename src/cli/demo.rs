//! `gqa2mla demo`

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use gqa2mla::convert::{Budget, ConvertSettings, MethodChoice};
use gqa2mla::methods::DEMONSTRATED;
use gqa2mla::report::table::Table;
use gqa2mla::report::{SCHEMA_VERSION, Verification, units};
use gqa2mla::runtime::{Cpu, Device};
use serde::Serialize;

use super::exit::ExitStatus;
use super::output::width;
use super::{Context, convert, model};

/// Files of the trained model that is built in (`fixtures/pico-trained`).
const FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../fixtures/pico-trained/config.json")),
    ("generation_config.json", include_bytes!("../../fixtures/pico-trained/generation_config.json")),
    ("model.safetensors", include_bytes!("../../fixtures/pico-trained/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../fixtures/pico-trained/tokenizer.json")),
];

/// Convert and verify the small trained model that is built in.
///
/// The model reads bytes and was trained on the text in data/. It is converted by method exact, which has to give the
/// same logits, and to half its cache by the published TransMLA and by attention-aware.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Leave the attention-aware conversion in this folder
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Replace an existing output folder
    #[arg(long, requires = "output")]
    overwrite: bool,
}

/// What the demo did.
#[derive(Debug, Serialize)]
struct Demonstration {
    schema_version: u32,
    source_cache_values_per_token_per_layer: usize,
    runs: Vec<Run>,
    output: Option<PathBuf>,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Run {
    method: &'static str,
    cache_values_per_token_per_layer: usize,
    verification: Verification,
}

impl DemoArgs {
    /// Run the command.
    ///
    /// # Errors
    /// Whatever stopped a conversion, which would be a bug or a full disk.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let started = Instant::now();
        let scratch = tempfile::Builder::new().prefix("gqa2mla-demo-").tempdir()?;
        let folder = scratch.path().join("pico-trained");
        fs_err::create_dir(&folder)?;
        for (name, bytes) in FILES {
            fs_err::write(folder.join(name), bytes)?;
        }
        let source = model::open(&folder.to_string_lossy(), context)?;
        let mut runs = Vec::new();
        for method in DEMONSTRATED.iter().filter_map(|name| MethodChoice::named(name)) {
            let kept = self.output.as_deref().filter(|_| method == MethodChoice::default());
            let output = kept.map_or_else(|| scratch.path().join(method.name()), Path::to_path_buf);
            let settings = ConvertSettings {
                kv_budget: method.compresses().then_some(Budget::Percent(50.0)),
                overwrite: self.overwrite,
                force: !method.compresses(),
                method: method.clone(),
                ..ConvertSettings::default()
            };
            let report = convert::publish(&source, &settings, &output, context)?;
            let converted = model::open(&output.to_string_lossy(), context)?;
            let verification = convert::verification(&source, &converted, &Device::Cpu(Cpu), context)?;
            let cache = report.cache_values_per_token_per_layer;
            runs.push(Run { method: method.name(), cache_values_per_token_per_layer: cache, verification });
        }
        let passed = runs.iter().all(|r| r.verification.passed);
        let document = Demonstration {
            schema_version: SCHEMA_VERSION,
            source_cache_values_per_token_per_layer: source.arch.cache_values(),
            runs,
            output: self.output,
            seconds: started.elapsed().as_secs_f64(),
        };
        context.show(&document, text)?;
        Ok(if passed { ExitStatus::Done } else { ExitStatus::CheckFailed })
    }
}

fn text(d: &Demonstration) -> String {
    let source = d.source_cache_values_per_token_per_layer;
    let mut t =
        Table::new(&["method", ">cache", ">of source", ">perplexity", ">same token", ">largest dlogit", "checks"]);
    if let Some(first) = d.runs.first() {
        let ppl = format!("{:.4}", first.verification.figures.ppl_source);
        t.row(["(source)", &source.to_string(), "100.0%", &ppl, "", "", ""]);
    }
    for run in &d.runs {
        let f = &run.verification.figures;
        t.row([
            run.method.to_owned(),
            run.cache_values_per_token_per_layer.to_string(),
            units::percent(run.cache_values_per_token_per_layer as f64 / source as f64),
            format!("{:.4}", f.ppl_converted),
            units::percent(f.top1_agreement),
            units::figure(f.max_abs_dlogit),
            if run.verification.passed { "passed" } else { "NOT PASSED" }.to_owned(),
        ]);
    }
    let mut out = "A trained GQA model of a few hundred thousand parameters, converted to MLA without training.\n\
                   Cache: values per token and layer. Perplexity: on held-out text that calibration never saw.\n\n"
        .to_owned();
    out += &t.render(width());
    out += &match &d.output {
        Some(dir) => format!("\nThe attention-aware conversion is in {}.", dir.display()),
        None => "\nNothing was kept; with -o DIR the attention-aware conversion is.".to_owned(),
    };
    out += &format!(" Took {}.\n", units::seconds(d.seconds));
    out
}
