//! `gqa2mla eval`

use clap::Args;
use gqa2mla::report::{Evaluation, SCHEMA_VERSION, XkvReport, text};
use gqa2mla::runtime::XkvSettings;

use super::devices::DeviceOption;
use super::exit::ExitStatus;
use super::options::TextOptions;
use super::output::width;
use super::xkv::{self, XkvOption};
use super::{Context, measure, model, values};

/// Measure the perplexity of a model, GQA or MLA, on text.
///
/// Every token of a window but its first is predicted from those before it. With --xkv, the first part of each window is a
/// prompt whose cache is replaced by factors that groups of layers share; the perplexity is over the tokens that are
/// predicted from after it, beside that with the exact cache.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Model folder or hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    text: TextOptions,
    #[command(flatten)]
    xkv: XkvOption,
    /// Tokens of each window that are its prompt [default: half the window]
    #[arg(long, value_name = "TOKENS", requires = "xkv", value_parser = values::positive,
          help_heading = "Compressed prompt (xKV)")]
    xkv_prompt: Option<usize>,
    #[command(flatten)]
    device: DeviceOption,
}

impl EvalArgs {
    /// Run the command.
    ///
    /// # Errors
    /// A model or text that cannot be used.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        if let Some(settings) = self.xkv.xkv {
            return self.execute_xkv(settings, context);
        }
        let device = self.device.open(context)?;
        let model = model::open(&self.model, context)?;
        let windows = measure::Windows::new(&self.text, &[&model])?;
        let figures = measure::perplexity(&model, &windows, &device, &context.progress)?;
        let document = Evaluation {
            schema_version: SCHEMA_VERSION,
            model: self.model,
            text: windows.text,
            seq_len: windows.seq_len,
            figures,
        };
        context.show(&document, text::evaluation)?;
        Ok(ExitStatus::Done)
    }

    fn execute_xkv(self, settings: XkvSettings, context: &Context) -> anyhow::Result<ExitStatus> {
        let cpu = self.device.cpu(xkv::OPTION)?;
        let model = model::open(&self.model, context)?;
        xkv::notes(&settings, &model.arch, context);
        let windows = measure::Windows::new(&self.text, &[&model])?;
        let prompt = self.xkv_prompt.unwrap_or(windows.seq_len / 2);
        let figures = measure::xkv(&model, &windows, (prompt, &settings), &cpu, &context.progress)?;
        xkv::judge(figures.prompt_cache_bytes, context);
        let document = XkvReport::new(&self.model, (&windows.text, windows.seq_len), settings, figures);
        context.show(&document, |d| d.text(width()))?;
        Ok(ExitStatus::Done)
    }
}
