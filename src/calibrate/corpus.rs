//! Calibration text: from files to windows of tokens.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::convert::CalibrationSettings;
use crate::random::split_mix;
use crate::source::{SourceError, Tokenizer};

/// Bundled calibration text of this project's own writing.
const CALIBRATION: &str = include_str!("../../data/calib.txt");
/// Bundled held-out text, for `verify` and `eval`.
const HELDOUT: &str = include_str!("../../data/heldout.txt");

/// What can be wrong with a text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CorpusError {
    /// A file could not be read.
    #[error("cannot read the text {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file holds no usable text.
    #[error("{path}: {message}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Fewer tokens than needed.
    #[error(
        "the text is too short: {found} tokens, at least {needed} are needed{why}\n\nhint: give more text with `{option}`{}",
        if found >= needed { format!(", or shorter windows with `{seq_option}`") } else { String::new() }
    )]
    TooShort {
        /// Tokens found.
        found: usize,
        /// Tokens needed.
        needed: usize,
        /// Why that many.
        why: String,
        /// Option that takes text.
        option: &'static str,
        /// Option that shortens windows.
        seq_option: &'static str,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Source(#[from] SourceError),
}

/// The bundled calibration text.
pub fn bundled_calibration() -> &'static str {
    CALIBRATION
}

/// The bundled held-out text.
pub fn bundled_heldout() -> &'static str {
    HELDOUT
}

/// The documents of text files, in order: a `.jsonl` file gives one per line (its field `text`), any other file is one
/// document. No file: the bundled calibration text.
///
/// # Errors
/// [`CorpusError`] naming the file, and the line in a `.jsonl` file.
pub fn read_texts(files: &[PathBuf]) -> Result<Vec<String>, CorpusError> {
    if files.is_empty() {
        return Ok(vec![CALIBRATION.to_owned()]);
    }
    let mut out = Vec::new();
    for path in files {
        let bytes = fs_err::read(path).map_err(|source| CorpusError::Io { path: path.clone(), source })?;
        let content = |message: String| CorpusError::Content { path: path.clone(), message };
        let text = String::from_utf8(bytes).map_err(|e| {
            content(format!("not UTF-8 at byte {}\n\nhint: give plain text or .jsonl", e.utf8_error().valid_up_to()))
        })?;
        if is_jsonl(path) {
            for (n, line) in
                text.trim_start_matches('\u{feff}').lines().enumerate().filter(|(_, l)| !l.trim().is_empty())
            {
                let value: Value =
                    serde_json::from_str(line).map_err(|e| content(format!("line {}: not JSON: {e}", n + 1)))?;
                let field = value.get("text").and_then(Value::as_str);
                out.push(field.ok_or_else(|| content(format!("line {}: no string field `text`", n + 1)))?.to_owned());
            }
        } else {
            out.push(text);
        }
        if out.iter().all(|t| t.trim().is_empty()) {
            return Err(content("no text in it".to_owned()));
        }
    }
    Ok(out)
}

fn is_jsonl(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl") || e.eq_ignore_ascii_case("ndjson"))
}

/// Calibration windows of `settings.seq_len` tokens: the texts' tokens, end to end, cut into windows that do not overlap,
/// `settings.samples` of them chosen by the seed and kept in order of the text. Where the text has fewer, all of them.
///
/// # Errors
/// [`CorpusError::TooShort`] when there are fewer than `min_tokens` (with `why`) or not one whole window.
pub fn calibration_windows(
    tokenizer: &Tokenizer,
    texts: &[String],
    settings: &CalibrationSettings,
    min_tokens: usize,
    why: &str,
) -> Result<Vec<Vec<u32>>, CorpusError> {
    let mut tokens = Vec::new();
    for text in texts {
        tokens.extend(tokenizer.encode(text)?);
    }
    let total = tokens.len() / settings.seq_len.max(1);
    let kept = total.min(settings.samples);
    if kept == 0 || kept * settings.seq_len < min_tokens {
        return Err(CorpusError::TooShort {
            found: (kept * settings.seq_len).max(tokens.len().min(settings.samples * settings.seq_len)),
            needed: min_tokens.max(settings.seq_len),
            why: why.to_owned(),
            option: "--calib",
            seq_option: "--calib-seq-len",
        });
    }
    let mut chosen = shuffled(total, settings.seed);
    chosen.truncate(kept);
    chosen.sort_unstable();
    Ok(chosen.into_iter().map(|w| tokens[w * settings.seq_len..(w + 1) * settings.seq_len].to_vec()).collect())
}

/// `0..n` in an order given by `seed`.
fn shuffled(n: usize, mut seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    shuffle(&mut order, &mut seed);
    order
}

/// Fisher-Yates over SplitMix64, whose state moves on.
pub(crate) fn shuffle(items: &mut [usize], state: &mut u64) {
    for i in (1..items.len()).rev() {
        items.swap(i, ((u128::from(split_mix(state)) * (i as u128 + 1)) >> 64) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_texts_are_there_and_differ() {
        assert!(bundled_calibration().len() >= 60_000);
        assert!(bundled_heldout().len() >= 8_000);
        let shared = bundled_heldout().lines().filter(|l| l.len() > 40 && bundled_calibration().contains(*l)).count();
        assert_eq!(shared, 0);
    }

    #[test]
    fn a_shuffle_is_a_permutation_given_by_its_seed() {
        let a = shuffled(100, 7);
        let mut sorted = a.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_eq!(a, shuffled(100, 7));
        assert_ne!(a, shuffled(100, 8));
    }

    #[test]
    fn jsonl_lines_are_documents_and_faults_name_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.jsonl");
        fs_err::write(&path, "{\"text\": \"one\"}\n\n{\"text\": \"two\"}\n").unwrap();
        assert_eq!(read_texts(std::slice::from_ref(&path)).unwrap(), ["one", "two"]);
        fs_err::write(&path, "{\"text\": \"one\"}\n{\"body\": \"two\"}\n").unwrap();
        let error = read_texts(&[path]).unwrap_err().to_string();
        assert!(error.contains("line 2: no string field `text`"), "{error}");
    }
}
