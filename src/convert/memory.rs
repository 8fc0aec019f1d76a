//! How much memory a conversion takes, before it takes it.

use super::streams::Stream;
use super::{ConvertError, Job, Method};

/// The program itself, its threads, and what the allocator keeps.
const BASE: u64 = 60_000_000;

/// Resident memory of a conversion, in bytes, by what can wait on the disk and what cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    /// Hidden states between layers.
    hidden: u64,
    /// Everything else at its peak.
    working: u64,
}

impl Need {
    /// What the job needs with `tokens` calibration tokens.
    pub fn of(job: &Job<'_>, tokens: usize) -> Self {
        let arch = job.arch;
        let streams = match job.settings.method {
            Method::Exact => 0,
            Method::AttentionAware => 2,
            Method::Transmla | Method::Care => 1,
        };
        let hidden = Stream::bytes(tokens, arch.hidden);
        let heads = Stream::bytes(tokens, arch.heads * job.shape.head_dim);
        // Normed inputs and attention outputs of each stream; head outputs, queries, keys and values of the layer at
        // work, in f32.
        let activations = if streams == 0 { 0 } else { (2 * streams + 1) * hidden + 5 * heads };
        Need { hidden: streams * hidden, working: BASE + activations + job.layer_bytes() }
    }

    /// Most memory at any time; with `spill`, hidden states wait on the disk while a layer is factorised.
    pub fn peak(&self, spill: bool) -> u64 {
        self.working + if spill { 0 } else { self.hidden }
    }

    /// Whether hidden states have to wait on the disk to stay within `limit`.
    ///
    /// # Errors
    /// A limit that not even that can keep.
    pub fn spill(&self, limit: Option<u64>) -> Result<bool, ConvertError> {
        let Some(limit) = limit.filter(|l| *l < self.peak(false)) else { return Ok(false) };
        if self.peak(true) <= limit {
            return Ok(true);
        }
        let megabytes = |bytes: u64| bytes.div_ceil(1_000_000);
        Err(ConvertError::refused(
            format!(
                "--max-memory allows {} MB, the conversion needs {} MB even with hidden states on the disk",
                limit / 1_000_000,
                megabytes(self.peak(true))
            ),
            "allow more, or calibrate on fewer tokens (`--calib-samples`, `--calib-seq-len`)",
        ))
    }
}
