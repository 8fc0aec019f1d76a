//! Every method by what it promises, on small layers and on whole models.

mod attention_aware;
mod exact;
mod forward;
mod mha2mla;
mod source_layer;
mod weight_svd;
mod x_ecomla;

use gqa2mla::convert::{CalibrationSettings, ConversionReport, ConvertSettings, MethodChoice};
use gqa2mla::verify::Comparison;

use crate::common::judge::{converted, heldout, side_by_side};
use crate::common::models::fixture;

/// A method at its defaults, calibrated on little.
fn settings(method: impl Into<MethodChoice>) -> ConvertSettings {
    let calibration = CalibrationSettings { samples: 48, seq_len: 128, ..CalibrationSettings::default() };
    ConvertSettings { method: method.into(), calibration, ..ConvertSettings::default() }
}

/// Trained pico at a budget, and how it does on held-out text.
fn trained(settings: &ConvertSettings) -> (ConversionReport, Comparison) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let report = converted(&fixture("pico-trained"), &to, settings).expect("converts");
    let comparison = side_by_side(&fixture("pico-trained"), &to, &heldout(128, 24));
    (report, comparison)
}
