//! Thresholds where the user gives none.

use super::Thresholds;
use crate::latent::ROTATION_FILE;
use crate::methods::MethodChoice;
use crate::source::{Dtype, ModelSource};

/// Cached and full decoding of one model do the same sums in another order, in f32: logits of a few tens agree to this.
pub const CACHED_VS_FULL: f64 = 5e-3;

/// A report in a model's folder, if there is one that can be read.
fn report_of(model: &ModelSource, file: &str) -> Option<serde_json::Value> {
    let report = model.dir.join(file);
    // A report takes some kilobytes per layer.
    let small = fs_err::metadata(&report).is_ok_and(|m| m.is_file() && m.len() < 64 << 20);
    let bytes = small.then(|| fs_err::read(report).ok()).flatten();
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok())
}

/// Whether `converted` is `source` with its latents rotated: by the hashes in its `rotation.json`.
fn is_rotation_of(converted: &ModelSource, source: &ModelSource) -> Option<serde_json::Value> {
    let report = report_of(converted, ROTATION_FILE)?;
    let from = report["source_fingerprint"].as_object()?;
    let own = source.fingerprint();
    let same = own.len() == from.len()
        && own.iter().all(|f| from.get(&f.file).and_then(|h| h.as_str()) == Some(f.header_sha256.as_str()));
    same.then_some(report)
}

/// What a conversion has to reach where nobody says, and in words why: read off its `conversion.json`, or its `rotation.json` where
/// it is a rotation of the source.
pub fn default_thresholds(source: &ModelSource, converted: &ModelSource) -> (Thresholds, &'static str) {
    let cached = Thresholds { cached_vs_full: Some(CACHED_VS_FULL), ..Thresholds::default() };
    if let Some(rotation) = is_rotation_of(converted, source) {
        let narrow =
            rotation["settings"]["dtype"] == "bf16" || source.tensors.iter().any(|(_, t)| t.dtype == Dtype::F8_E4M3);
        return if narrow {
            (Thresholds { kl: Some(5e-3), ppl_ratio: Some(1.01), ..cached }, "those of a rotation, rounded to bf16")
        } else {
            let exact = Thresholds { max_abs_dlogit: Some(2e-3), ppl_ratio: Some(1.0001), ..cached };
            (exact, "those of a rotation, which changes nothing but rounding")
        };
    }
    let report = report_of(converted, "conversion.json");
    let Some(report) = report else {
        return (cached, "finite figures and agreement of cached decoding, since conversion.json is missing");
    };
    let loses_nothing = |name: &str| MethodChoice::named(name).is_some_and(|method| !method.compresses());
    if !report["method"].as_str().is_some_and(loses_nothing) {
        return (cached, "finite figures and agreement of cached decoding, since the method compresses");
    }
    // With the default dtype, what a fold would round is stored in f32: only an explicit `--dtype bf16` rounds.
    if report["settings"]["dtype"] != "bf16" {
        let exact = Thresholds { max_abs_dlogit: Some(2e-3), top1: Some(1.0), ..cached };
        (exact, "those of method exact")
    } else {
        // Weights that had to be rescaled are rounded once more: 2^-9 relative per weight.
        let rounded = Thresholds { kl: Some(5e-3), ppl_ratio: Some(1.01), ..cached };
        (rounded, "those of method exact, rounded to the stored dtype")
    }
}
