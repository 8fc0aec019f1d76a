//! `gqa2mla verify --tp`: what decoding by ranks that share the latents out costs.

use anyhow::bail;
use clap::Args;
use gqa2mla::latent::{Sharing, Transform, check_slices, latent_moments, latent_windows, need_mla, refitted_ranks};
use gqa2mla::report::SlicedVerification;
use gqa2mla::runtime::{Device, Model};
use gqa2mla::verify::{CACHED_VS_FULL, SharedOut, Thresholds, compare_sliced};

use super::exit::ExitStatus;
use super::measure::Windows;
use super::model::OpenModel;
use super::options::CalibrationOptions;
use super::output::width;
use super::{Context, rotate, values};

/// How latents are shared out.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tensor parallelism")]
pub struct SlicedOptions {
    /// Decode with the latents shared out over this many ranks, which has to divide the latent; several separated by commas
    #[arg(long, value_name = "T,..", value_delimiter = ',', value_parser = values::positive)]
    tp: Vec<usize>,
    /// With --tp: rotate the latents first, as rotate does; several separated by commas; none: as they are in the folder
    #[arg(long, value_name = "TRANSFORM,..", value_delimiter = ',', default_value = "none", value_parser = rotate::transform())]
    transform: Vec<Transform>,
    /// With --tp: every rank norms its slice by the whole latent's root mean square, and not by the slice's own
    #[arg(long, requires = "tp")]
    shared_rms: bool,
    /// With --tp: factor on the part of a rank's scores that comes from its slice; several separated by commas
    #[arg(long, value_name = "X,..", value_delimiter = ',', default_value = "1", value_parser = values::positive_number)]
    logit_scale: Vec<f64>,
    /// With --tp: tokens of each window that are a prompt, run whole; the rest is decoded [default: half a window]
    #[arg(long, value_name = "TOKENS", requires = "tp")]
    prefill: Option<usize>,
    /// With --tp: fit each rank's keys and values to its slice on the calibration text: of latents that are turned
    /// (hadamard, pca), of all, of none
    #[arg(long, value_name = "WHICH", default_value = "turned")]
    refit: Refit,
    #[command(flatten)]
    calibration: CalibrationOptions,
}

/// Which ranks are fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Refit {
    /// Those of latents that were turned
    Turned,
    /// All
    All,
    /// None: slices as they are
    None,
}

impl Refit {
    fn applies(self, transform: Transform) -> bool {
        match self {
            Refit::Turned => transform != Transform::None,
            Refit::All => true,
            Refit::None => false,
        }
    }
}

impl SlicedOptions {
    /// Whether ranks were asked for.
    ///
    /// # Errors
    /// Options that would be ignored without them.
    pub fn asked(&self) -> anyhow::Result<bool> {
        if self.tp.is_empty() {
            let ignored = [
                (self.transform != [Transform::None], "--transform"),
                (self.logit_scale != [1.0], "--logit-scale"),
                (self.refit != Refit::Turned, "--refit"),
                (!self.calibration.settings().files.is_empty(), "--calib"),
            ];
            if let Some((_, option)) = ignored.iter().find(|i| i.0) {
                bail!(
                    "{option} says how latents are shared out over ranks\n\nhint: give the number of ranks with `--tp`"
                );
            }
        }
        Ok(!self.tp.is_empty())
    }

    /// Measure, and show the figures.
    ///
    /// # Errors
    /// A model that is not MLA, ranks that do not divide the latent, text that cannot be used.
    pub fn execute(
        &self,
        (source, converted): (&OpenModel, &OpenModel),
        windows: &Windows,
        limits: Thresholds,
        device: &Device,
        context: &Context,
    ) -> anyhow::Result<ExitStatus> {
        let shape = need_mla(&converted.source, &converted.arch)?;
        for ranks in &self.tp {
            check_slices(shape.kv_lora_rank, *ranks)?;
        }
        let prefill = self.prefill.unwrap_or(windows.seq_len / 2);
        if prefill + 1 >= windows.seq_len {
            bail!(
                "a prompt of {prefill} tokens leaves nothing to decode in windows of {}\n\nhint: give a smaller --prefill",
                windows.seq_len
            );
        }
        let mut cases = Vec::new();
        for &transform in &self.transform {
            for &ranks in &self.tp {
                for &logit_scale in &self.logit_scale {
                    let sharing = Sharing { ranks, shared_rms: self.shared_rms, logit_scale };
                    cases.push(SharedOut { transform, sharing, refitted: None });
                }
            }
        }
        let settings = self.calibration.settings();
        let refit = self.transform.iter().any(|t| self.refit.applies(*t));
        let calibrated = refit || self.transform.contains(&Transform::Pca) || !settings.files.is_empty();
        let (mut moments, mut calibration_tokens) = (None, 0);
        if calibrated {
            let text = latent_windows(&converted.source, &converted.arch, &settings, shape.kv_lora_rank)?;
            calibration_tokens = text.iter().map(Vec::len).sum();
            let found = latent_moments(&converted.source, &converted.arch, device, &text, &context.progress)?;
            for case in cases.iter_mut().filter(|c| self.refit.applies(c.transform)) {
                case.refitted = Some(refitted_ranks(
                    &converted.source,
                    &converted.arch,
                    device,
                    (&text, &found),
                    (case.transform, &case.sharing),
                    &context.progress,
                )?);
            }
            moments = Some(found);
        }
        let a = Model::new(&source.source, &source.arch, device).in_place();
        let b = Model::new(&converted.source, &converted.arch, device).in_place();
        let figures = compare_sliced(
            &a,
            (&b, &converted.source),
            &cases,
            moments.as_deref(),
            (&windows.tokens, prefill),
            &context.progress,
        )?;
        let names = (source.source.spec.as_str(), converted.source.spec.as_str());
        let document = SlicedVerification::new(
            names,
            (&windows.text, windows.seq_len),
            (converted.arch.layers, converted.arch.cache_values()),
            calibration_tokens,
            (&cases, figures),
            Thresholds { cached_vs_full: Some(CACHED_VS_FULL), ..limits },
        );
        context.show(&document, |d| d.text(width()))?;
        Ok(if document.passed { ExitStatus::Done } else { ExitStatus::CheckFailed })
    }
}
