//! Conversions, and what they do beside their source, by the reference runtime (which the golden logits tie to stock
//! transformers; `scripts/check_transformers.py` loads outputs there too).

use std::path::Path;

use gqa2mla::convert::{ConversionReport, ConvertSettings, convert};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model};
use gqa2mla::verify::{Comparison, compare, windows_from_text};

use super::models::{fixture, open};

/// What the logits of two exact models may differ by: both carry the f32 rounding of a few hundred products. Stock f32 is
/// within 1.3e-5 of f64 on the fixtures, and two such errors plus the refolded weights' own rounding stay below ten times
/// that.
pub const ROUNDING: f64 = 1.3e-4;

/// Converts a model, or says why not.
pub fn converted(from: &Path, to: &Path, settings: &ConvertSettings) -> Result<ConversionReport, String> {
    let (source, arch) = open(from);
    convert(&source, &arch, settings, to, &|_| Vec::new(), &Silent).map_err(|e| e.to_string())
}

/// Two models on the same windows.
pub fn side_by_side(from: &Path, to: &Path, windows: &[Vec<u32>]) -> Comparison {
    let ((s, sa), (c, ca)) = (open(from), open(to));
    compare(&Model::new(&s, &sa, &Cpu), &Model::new(&c, &ca, &Cpu), windows, &Silent).expect("both models run")
}

/// Two models on the window where their logits differ most.
pub fn worst_window(from: &Path, to: &Path, windows: &[Vec<u32>]) -> Comparison {
    let one = |w: &Vec<u32>| side_by_side(from, to, std::slice::from_ref(w));
    windows.iter().map(one).max_by(|a, b| a.max_abs_dlogit.total_cmp(&b.max_abs_dlogit)).expect("a window")
}

/// Windows of the built-in held-out text, in the tokens of the trained fixture.
pub fn heldout(seq_len: usize, count: usize) -> Vec<Vec<u32>> {
    let (source, _) = open(&fixture("pico-trained"));
    let tokens = source.tokenizer().expect("tokenizer").encode(gqa2mla::calibrate::bundled_heldout()).expect("encodes");
    windows_from_text(&tokens, seq_len, 1, Some(count))
}
