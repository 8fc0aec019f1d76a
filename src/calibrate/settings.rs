//! Which text is calibrated on, and how much of it.

use std::path::PathBuf;

use serde::Serialize;

/// Calibration text and how much of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CalibrationSettings {
    /// `.txt` or `.jsonl` (field `text`) files, in order; empty: the bundled corpus.
    pub files: Vec<PathBuf>,
    /// Windows of `seq_len` that all the tokens would fill.
    pub samples: usize,
    /// Tokens per window; `attention-aware` adds longer and shorter ones ([`CalibrationSettings::mix`]).
    pub seq_len: usize,
    /// Tokens of the longest windows, at most; none: `attention-aware` takes [`CalibrationSettings::LONGEST`], all others
    /// `seq_len`.
    pub max_seq_len: Option<usize>,
    /// Seed of the choice of windows.
    pub seed: u64,
}

impl Default for CalibrationSettings {
    fn default() -> Self {
        Self { files: Vec::new(), samples: 128, seq_len: 256, max_seq_len: None, seed: 42 }
    }
}

impl CalibrationSettings {
    /// Longest windows of `attention-aware` where nothing is said.
    pub const LONGEST: usize = 1024;
    /// How many times as long as the one before each longer window is.
    const LADDER: usize = 4;
    /// How many times as short as `seq_len` short windows are.
    const SHORT: usize = 16;
    /// Tokens of a short window, at least.
    const LEAST: usize = 8;

    /// Tokens per window and how many tokens are in windows of that length, longest first. Where `max_seq_len` asks for longer
    /// windows than `seq_len`, those are 4, 16, ... times as long, and have half the tokens in equal shares; an eighth is in
    /// windows of a sixteenth of `seq_len`, of which there are so many that many a first token is seen: all others look
    /// at it. What remains is in windows of `seq_len`.
    pub fn mix(&self) -> Vec<(usize, usize)> {
        let total = self.samples.saturating_mul(self.seq_len);
        let longest = self.max_seq_len.unwrap_or(self.seq_len);
        let longer = std::iter::successors(self.seq_len.checked_mul(Self::LADDER), |n| n.checked_mul(Self::LADDER));
        let longer: Vec<usize> = longer.take_while(|n| *n > 0 && *n <= longest).collect();
        let mut out: Vec<_> = longer.iter().rev().map(|n| (*n, total / 2 / longer.len())).collect();
        let short = self.seq_len / Self::SHORT;
        let short = (longest > self.seq_len && short >= Self::LEAST && short * Self::SHORT == self.seq_len)
            .then_some((short, total / 8));
        let others = out.iter().chain(&short).map(|part| part.1).sum::<usize>();
        out.push((self.seq_len, total - others));
        out.extend(short);
        out
    }
}
