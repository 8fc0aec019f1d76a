//! Running models on text.

use std::path::Path;

use anyhow::{Context as _, bail};
use gqa2mla::calibrate::read_texts;
use gqa2mla::observe::Observer;
use gqa2mla::runtime::{Cpu, Device, Model, XkvSettings};
use gqa2mla::verify::{self, Comparison, Evaluation, XkvEvaluation, windows_from_text};

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

/// Perplexity after prompts whose cache is compressed, and with exact caches.
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
