//! Running models on text.

use std::path::Path;

use anyhow::{Context as _, bail};
use gqa2mla::calibrate::read_texts;
use gqa2mla::latent::ROTATION_FILE;
use gqa2mla::observe::Observer;
use gqa2mla::runtime::{Cpu, Device, Model, XkvSettings};
use gqa2mla::source::Dtype;
use gqa2mla::verify::{self, Comparison, Evaluation, Thresholds, XkvEvaluation, windows_from_text};

use super::model::OpenModel;
use super::options::TextOptions;

/// Text that no calibration uses.
const HELD_OUT: &str = include_str!("../../data/heldout.txt");
/// Largest text read. Tokens of more than this are never measured in one run.
const MAX_TEXT_BYTES: u64 = 1 << 30;

/// Tokens to measure on.
pub struct Windows {
    pub tokens: Vec<Vec<u32>>,
    pub seq_len: usize,
    /// Where the text came from.
    pub text: String,
}

impl Windows {
    /// Windows for all of `models`, with the tokenizer of the first. The built-in text is short: its windows shrink to
    /// what models and text allow; a text that the user gives has to hold at least one whole window.
    ///
    /// # Errors
    /// A text that cannot be read or is too short, windows longer than a model's context.
    pub fn new(options: &TextOptions, models: &[&OpenModel]) -> anyhow::Result<Self> {
        let Some(first) = models.first() else { bail!("no model to measure") };
        let longest = models.iter().map(|m| m.arch.max_position).min().unwrap_or(options.seq_len);
        let seq_len = options.seq_len.min(longest);
        let (text, name) = match &options.text {
            Some(path) => (read_text(path)?, format!("`{}`", path.display())),
            None => (HELD_OUT.to_owned(), "the built-in held-out text".to_owned()),
        };
        let ids = first.source.tokenizer()?.encode(&text).with_context(|| format!("cannot tokenize {name}"))?;
        let limit = Some(options.windows.0).filter(|n| *n < usize::MAX);
        let tokens = windows_from_text(&ids, seq_len, options.every, limit);
        if tokens.is_empty() {
            bail!(
                "{name} has {} tokens, less than one window of {seq_len}\n\nhint: give a longer text, or a smaller \
                 --seq-len",
                ids.len()
            );
        }
        Ok(Self { tokens, seq_len, text: name })
    }
}

/// A text file; of a .jsonl file, the field `text` of every line, as calibration reads it.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let size = fs_err::metadata(path).with_context(|| format!("cannot read the text `{}`", path.display()))?.len();
    if size > MAX_TEXT_BYTES {
        bail!("`{}` has {size} bytes, more than {MAX_TEXT_BYTES}\n\nhint: cut a part out of it", path.display());
    }
    Ok(read_texts(&[path.to_owned()])?.join("\n"))
}

/// Perplexity of a model.
///
/// # Errors
/// Tokens outside the vocabulary, numbers that are not finite.
pub fn perplexity(
    model: &OpenModel,
    windows: &Windows,
    device: &Device,
    observer: &dyn Observer,
) -> anyhow::Result<Evaluation> {
    let runnable = Model::new(&model.source, &model.arch, device).in_place();
    verify::perplexity(&runnable, &windows.tokens, observer)
        .with_context(|| format!("cannot evaluate `{}`", model.source.spec))
}

/// Perplexity behind prompts whose cache is compressed, and with exact caches.
///
/// # Errors
/// As [`perplexity`], and prompts or settings that are not possible.
pub fn xkv(
    model: &OpenModel,
    windows: &Windows,
    (prompt, settings): (usize, &XkvSettings),
    cpu: &Cpu,
    observer: &dyn Observer,
) -> anyhow::Result<XkvEvaluation> {
    let runnable = Model::new(&model.source, &model.arch, cpu).in_place();
    verify::xkv_perplexity(&runnable, &windows.tokens, prompt, settings, observer)
        .with_context(|| format!("cannot evaluate `{}`", model.source.spec))
}

/// Both models on the same tokens.
///
/// # Errors
/// As [`perplexity`], and models that do not share a vocabulary.
pub fn compare(
    source: &OpenModel,
    converted: &OpenModel,
    windows: &Windows,
    device: &Device,
    observer: &dyn Observer,
) -> anyhow::Result<Comparison> {
    let a = Model::new(&source.source, &source.arch, device).in_place();
    let b = Model::new(&converted.source, &converted.arch, device).in_place();
    Ok(verify::compare(&a, &b, &windows.tokens, observer)?)
}

/// Cached and full decoding of one model do the same sums in another order, in f32: logits of a few tens agree to this.
pub const CACHED_VS_FULL: f64 = 5e-3;

/// A report in a model's folder, if there is one that can be read.
fn report_of(model: &OpenModel, file: &str) -> Option<serde_json::Value> {
    let report = model.source.dir.join(file);
    // A report takes some kilobytes per layer.
    let small = fs_err::metadata(&report).is_ok_and(|m| m.is_file() && m.len() < 64 << 20);
    let bytes = small.then(|| fs_err::read(report).ok()).flatten();
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok())
}

/// Whether `converted` is `source` with its latents turned: by the hashes in its `rotation.json`.
fn is_rotation_of(converted: &OpenModel, source: &OpenModel) -> Option<serde_json::Value> {
    let report = report_of(converted, ROTATION_FILE)?;
    let from = report["source_fingerprint"].as_object()?;
    let own = source.source.fingerprint();
    let same = own.len() == from.len()
        && own.iter().all(|f| from.get(&f.file).and_then(|h| h.as_str()) == Some(f.header_sha256.as_str()));
    same.then_some(report)
}

/// What a conversion has to reach when the user does not say: read off its `conversion.json`, or its `rotation.json` where
/// it is a rotation of the source.
pub fn default_thresholds(source: &OpenModel, converted: &OpenModel) -> (Thresholds, &'static str) {
    let cached = Thresholds { cached_vs_full: Some(CACHED_VS_FULL), ..Thresholds::default() };
    if let Some(rotation) = is_rotation_of(converted, source) {
        let narrow = rotation["settings"]["dtype"] == "bf16"
            || source.source.tensors.iter().any(|(_, t)| t.dtype == Dtype::F8E4M3);
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
    if report["method"] != "exact" {
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
