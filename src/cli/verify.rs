//! `gqa2mla verify`

use clap::Args;
use gqa2mla::report::{Verification, text};
use gqa2mla::verify::{Thresholds, default_thresholds};

use super::devices::DeviceOption;
use super::exit::ExitStatus;
use super::options::TextOptions;
use super::output::width;
use super::sliced::SlicedOptions;
use super::{Context, measure, model, values};

/// Compare the logits of a conversion with those of its source; exit 1 if a threshold does not hold.
///
/// Without thresholds: a conversion by method exact has to give the source's logits (within 2e-3 in f32) and the same
/// likeliest token everywhere; any other has to give finite figures, and the same logits with its cache as without.
/// A rotation of SOURCE has to give its logits as well. Thresholds that are given replace the defaults, but for the
/// agreement of cached decoding.
///
/// With --tp the conversion is decoded by T ranks that share its latents out (TPLA), and the figures say what that costs.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Source: model folder or hub id `org/name[@revision]`
    #[arg(value_name = "SOURCE")]
    source: String,
    /// Conversion: model folder or hub id
    #[arg(value_name = "CONVERTED")]
    converted: String,
    #[command(flatten)]
    text: TextOptions,
    #[command(flatten)]
    thresholds: ThresholdOptions,
    #[command(flatten)]
    sliced: SlicedOptions,
    #[command(flatten)]
    device: DeviceOption,
}

#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Thresholds")]
struct ThresholdOptions {
    /// Largest difference of any logit
    #[arg(long, value_name = "X", value_parser = values::limit)]
    max_dlogit: Option<f64>,
    /// Largest mean KL(source || converted), nats per token
    #[arg(long, value_name = "NATS", value_parser = values::limit)]
    max_kl: Option<f64>,
    /// Smallest share of positions, 0 to 1, whose likeliest token is the same
    #[arg(long, value_name = "SHARE", value_parser = values::share)]
    min_top1: Option<f64>,
    /// Largest perplexity of the conversion over that of the source
    #[arg(long, value_name = "X", value_parser = values::positive_number)]
    max_ppl_ratio: Option<f64>,
}

impl ThresholdOptions {
    fn given(self) -> Thresholds {
        Thresholds {
            max_abs_dlogit: self.max_dlogit,
            kl: self.max_kl,
            top1: self.min_top1,
            ppl_ratio: self.max_ppl_ratio,
            cached_vs_full: None,
        }
    }
}

impl VerifyArgs {
    /// Run the command.
    ///
    /// # Errors
    /// Models or text that cannot be used.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let device = self.device.open(context)?;
        let source = model::open(&self.source, context)?;
        let converted = model::open(&self.converted, context)?;
        let windows = measure::Windows::new(&self.text, &[&source, &converted])?;
        if self.sliced.asked()? {
            let limits = self.thresholds.given();
            return self.sliced.execute((&source, &converted), &windows, limits, &device, context);
        }
        let figures = measure::compare(&source, &converted, &windows, &device, &context.progress)?;
        let (defaults, why) = default_thresholds(&source.source, &converted.source);
        let given = self.thresholds.given();
        let (thresholds, why) = if given == Thresholds::default() {
            (defaults, why)
        } else {
            (Thresholds { cached_vs_full: defaults.cached_vs_full, ..given }, "as given")
        };
        let text = (windows.text.as_str(), windows.seq_len);
        let document = Verification::new((&self.source, &self.converted), text, figures, thresholds, why);
        context.show(&document, |v| text::verification(v, width()))?;
        Ok(if document.passed { ExitStatus::Done } else { ExitStatus::CheckFailed })
    }
}
