//! `gqa2mla eval`

use clap::Args;
use gqa2mla::report::{Evaluation, SCHEMA_VERSION, text};

use super::devices::DeviceOption;
use super::exit::ExitStatus;
use super::options::TextOptions;
use super::{Context, measure, model};

/// Measure the perplexity of a model, GQA or MLA, on text.
///
/// Every token of a window but its first is predicted from those before it.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Model folder or hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    text: TextOptions,
    #[command(flatten)]
    device: DeviceOption,
}

impl EvalArgs {
    /// Run the command.
    ///
    /// # Errors
    /// A model or text that cannot be used.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
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
}
