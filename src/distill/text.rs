//! Windows to train on, and windows of every text that are never trained on.

use std::path::{Path, PathBuf};

use super::DistillSettings;
use crate::calibrate::{CalibrationSettings, CorpusError, read_texts, shuffle, windows_of};
use crate::source::Tokenizer;

/// Part of a text that is held out, unless the limits below say otherwise.
const HELD_OUT: f64 = 1.0 / 16.0;
/// Tokens held out of all texts together, at most, unless that is less than one window of each.
const HELD_TOKENS: usize = 4096;
/// The longest windows are this many times as long as ordinary ones.
const LADDER: usize = 4;
/// What the bundled text is called.
const BUNDLED: &str = "bundled calibration text";

/// One text.
#[derive(Debug)]
pub(super) struct Text {
    /// Name of its file.
    pub name: String,
    pub train: Vec<Vec<u32>>,
    pub held_out: Vec<Vec<u32>>,
    /// Their numbers among the windows of the longest length.
    pub held_out_windows: Vec<usize>,
}

impl Text {
    pub fn train_tokens(&self) -> usize {
        self.train.iter().map(Vec::len).sum()
    }

    pub fn held_out_tokens(&self) -> usize {
        self.held_out.iter().map(Vec::len).sum()
    }
}

/// Every text of the settings, cut into windows of up to `seq_len` tokens.
///
/// # Errors
/// A file that cannot be read; [`CorpusError::TooShort`] for one that leaves nothing to train on beside a held-out window.
pub(super) fn read(
    tokenizer: &Tokenizer,
    settings: &DistillSettings,
    seq_len: usize,
) -> Result<Vec<Text>, CorpusError> {
    let files: Vec<Option<&PathBuf>> = match settings.files.is_empty() {
        true => vec![None],
        false => settings.files.iter().map(Some).collect(),
    };
    let share = (HELD_TOKENS / files.len() / seq_len).max(1);
    files.into_iter().map(|file| one(tokenizer, file, settings, (seq_len, share))).collect()
}

fn one(
    tokenizer: &Tokenizer,
    file: Option<&PathBuf>,
    settings: &DistillSettings,
    (seq_len, share): (usize, usize),
) -> Result<Text, CorpusError> {
    let mut tokens = Vec::new();
    for text in read_texts(file.map(std::slice::from_ref).unwrap_or_default())? {
        tokens.extend(tokenizer.encode(&text)?);
    }
    let name = file.map_or_else(|| BUNDLED.to_owned(), |path| short(path));
    let windows = tokens.len() / seq_len;
    if windows < 2 {
        return Err(CorpusError::TooShort {
            found: tokens.len(),
            needed: 2 * seq_len,
            why: format!(" of {name}: a window to hold out, and one to train on"),
            option: "--calib",
            seq_option: "--seq-len",
        });
    }
    let mut order: Vec<usize> = (0..windows).collect();
    shuffle(&mut order, &mut settings.seed.clone());
    let held = ((windows as f64 * HELD_OUT) as usize).clamp(1, share);
    let mut held = order.split_off(windows - held);
    held.sort_unstable();
    let window = |w: usize| tokens[w * seq_len..(w + 1) * seq_len].to_vec();
    let held_out: Vec<Vec<u32>> = held.iter().map(|w| window(*w)).collect();
    // The rest, in order: where a window was taken out two passages meet, as documents do.
    let mut rest: Vec<u32> = (0..windows).filter(|w| held.binary_search(w).is_err()).flat_map(window).collect();
    rest.extend(&tokens[windows * seq_len..]);
    let mix = CalibrationSettings {
        files: Vec::new(),
        samples: 0,
        seq_len: if seq_len.is_multiple_of(LADDER) { seq_len / LADDER } else { seq_len },
        max_seq_len: Some(seq_len),
        seed: settings.seed,
    };
    Ok(Text { name, train: windows_of(&rest, &mix), held_out, held_out_windows: held })
}

/// Name of a file; its folder is nobody's business.
fn short(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Windows in a random order; each comes once before any comes again.
#[derive(Debug)]
pub(super) struct Order {
    windows: Vec<usize>,
    next: usize,
    state: u64,
}

impl Order {
    /// Of `count` windows.
    pub fn new(count: usize, seed: u64) -> Self {
        // Another stream than the one that chose the held-out windows.
        Self { windows: (0..count).collect(), next: count, state: !seed }
    }

    /// The next windows, as many as have `tokens` by their `length`.
    pub fn take(&mut self, tokens: usize, length: impl Fn(usize) -> usize) -> Vec<usize> {
        let (mut taken, mut total) = (Vec::new(), 0);
        while !self.windows.is_empty() && (taken.is_empty() || total < tokens) {
            if self.next == self.windows.len() {
                shuffle(&mut self.windows, &mut self.state);
                self.next = 0;
            }
            taken.push(self.windows[self.next]);
            total += length(self.windows[self.next]);
            self.next += 1;
        }
        taken
    }
}

/// Runs of windows of at most `tokens` together, one window at least.
pub(super) fn runs(lengths: &[usize], tokens: usize) -> Vec<std::ops::Range<usize>> {
    let mut out = Vec::new();
    let (mut first, mut total) = (0, 0);
    for (i, length) in lengths.iter().enumerate() {
        if i > first && total + length > tokens {
            out.push(first..i);
            (first, total) = (i, 0);
        }
        total += length;
    }
    if first < lengths.len() {
        out.push(first..lengths.len());
    }
    out
}
