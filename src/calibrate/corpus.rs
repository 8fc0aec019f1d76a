//! Calibration text: from files to windows of tokens.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::CalibrationSettings;
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

/// Calibration windows: of the texts' tokens, end to end, `settings.samples` times `settings.seq_len`, in windows that do not
/// overlap, chosen by the seed. Their lengths are those of [`CalibrationSettings::mix`]; the longest come first, windows of one
/// length in order of the text. Where the text is shorter, all of it.
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
    Ok(calibration_text(tokenizer, texts, settings, None, min_tokens, why)?.windows)
}

/// Calibration text as tokens.
#[derive(Debug, Default)]
pub(crate) struct CalibrationText {
    /// As [`calibration_windows`] chooses them.
    pub windows: Vec<Vec<u32>>,
    /// One window beside them, of as many tokens as asked for, where the text has as many left.
    pub longer: Option<Vec<u32>>,
}

/// As [`calibration_windows`], and one window of `longer` tokens.
///
/// # Errors
/// As [`calibration_windows`].
pub(crate) fn calibration_text(
    tokenizer: &Tokenizer,
    texts: &[String],
    settings: &CalibrationSettings,
    longer: Option<usize>,
    min_tokens: usize,
    why: &str,
) -> Result<CalibrationText, CorpusError> {
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
    let (mut kept, total) = (kept * settings.seq_len, total * settings.seq_len);
    let mut mix = settings.mix();
    let longer = longer.filter(|n| kept == settings.samples * settings.seq_len && kept + n <= total);
    if let Some(length) = longer {
        mix.insert(0, (length, length));
        kept += length;
    }
    let mut windows = choose(kept, total, &mix, settings.seed).into_iter().map(|span| tokens[span].to_vec());
    let longer = longer.and_then(|_| windows.next());
    Ok(CalibrationText { windows: windows.collect(), longer })
}

/// All of some tokens as windows of the lengths of [`CalibrationSettings::mix`], in the settings' order; of what is left over less
/// than one short window.
pub(crate) fn windows_of(tokens: &[u32], settings: &CalibrationSettings) -> Vec<Vec<u32>> {
    let total = tokens.len() / settings.seq_len.max(1) * settings.seq_len;
    let samples = total / settings.seq_len.max(1);
    let mix = CalibrationSettings { samples, ..settings.clone() }.mix();
    choose(total, total, &mix, settings.seed).into_iter().map(|span| tokens[span].to_vec()).collect()
}

/// `kept` of `total` tokens as windows: of each length in `mix` as many as hold its tokens. Lengths are longest first and
/// multiples of the last; what is less than a whole window is left to the next shorter one.
fn choose(kept: usize, total: usize, mix: &[(usize, usize)], seed: u64) -> Vec<Range<usize>> {
    let Some(&(unit, _)) = mix.last() else { return Vec::new() };
    let asked: usize = mix.iter().map(|part| part.1).sum();
    let mut free = vec![true; total / unit];
    let mut spans = Vec::new();
    let (mut room, mut left) = (0, kept / unit);
    for (i, &(length, tokens)) in mix.iter().enumerate() {
        let units = length / unit;
        // A text that is shorter than asked for is shared in the same parts.
        let share = (tokens as u128 * kept as u128 / asked.max(1) as u128) as usize / unit;
        room = if i + 1 == mix.len() { left } else { (room + share).min(left) };
        let places = shuffled(total / length, seed).into_iter().map(|w| w * units..(w + 1) * units);
        let mut chosen: Vec<_> = places.filter(|p| free[p.clone()].iter().all(|f| *f)).take(room / units).collect();
        chosen.sort_unstable_by_key(|place| place.start);
        chosen.iter().for_each(|place| free[place.clone()].fill(false));
        let taken = chosen.len() * units;
        (left, room) = (left - taken, room - taken);
        spans.extend(chosen.into_iter().map(|place| place.start * unit..place.end * unit));
    }
    spans
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
    fn windows_of_several_lengths_share_the_tokens_and_do_not_overlap() {
        let mix = |seq_len, samples, longest| {
            CalibrationSettings { seq_len, samples, max_seq_len: longest, ..CalibrationSettings::default() }.mix()
        };
        for (total, kept, mix, want) in [
            (256_000, 32768, mix(256, 128, None), vec![(256, 128)]),
            (256_000, 32768, mix(256, 128, Some(4096)), vec![(4096, 2), (1024, 8), (256, 48), (16, 256)]),
            (256_000, 32768, mix(256, 128, Some(1024)), vec![(1024, 16), (256, 48), (16, 256)]),
            (256_000, 32768, mix(256, 128, Some(512)), vec![(256, 112), (16, 256)]),
            (256_000, 32768, mix(256, 128, Some(256)), vec![(256, 128)]),
            // Not one of the longest: their share is the next ones'.
            (64_000, 3840, mix(64, 60, Some(1024)), vec![(256, 7), (64, 32)]),
            (8000, 24, mix(8, 3, Some(32)), vec![(8, 3)]),
            // The text ends before a whole long window, or has nothing to choose from.
            (60, 60, mix(4, 15, Some(64)), vec![(16, 1), (4, 11)]),
            (64, 64, mix(2, 32, Some(8)), vec![(8, 4), (2, 16)]),
            (3000, 2816, mix(256, 128, Some(4096)), vec![(1024, 1), (256, 5), (16, 32)]),
        ] {
            let spans = choose(kept, total, &mix, 42);
            let mut found: Vec<(usize, usize)> = Vec::new();
            for span in &spans {
                assert!(span.end <= total);
                match found.last_mut() {
                    Some((length, count)) if *length == span.len() => *count += 1,
                    _ => found.push((span.len(), 1)),
                }
            }
            assert_eq!(found, want, "{total} {kept} {mix:?}");
            let mut ordered = spans.clone();
            ordered.sort_unstable_by_key(|span| span.start);
            assert!(ordered.windows(2).all(|two| two[0].end <= two[1].start));
            assert!(spans.windows(2).all(|two| two[0].len() > two[1].len() || two[0].start < two[1].start));
        }
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
