//! How much memory a conversion takes, before it takes it.
//!
//! The bytes per value below were counted, or fitted to the allocator's own count on 59 models of other shapes
//! (`tests/memory.rs` holds the plan against what the system measures). They are the layer at work in f32 and f64, its
//! moments, and what every calibration token carries through a layer; nothing in them grows with the number of layers.

use crate::error::ConvertError;
use crate::methods::{Case, Cost, Work};
use crate::mla::Geometry;
use crate::runtime::{CHUNK, LONG_MLP};

/// The program itself, its threads and buffers.
const BASE: u64 = 55_000_000;
/// Room that matrix products keep for a packed operand, at most.
const PACKED: u64 = 64 << 20;
/// What the allocator holds beyond what is asked of it, in percent.
const SLACK: u64 = 5;
/// Bytes that a tokenizer takes, per byte of its file.
const TOKENIZER: u64 = 18;

/// Resident memory of a conversion at its peak, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// With hidden states in memory throughout.
    held: u64,
    /// With hidden states on the disk while a layer is factorised.
    spilled: u64,
}

impl Need {
    /// What a conversion needs on windows of calibration text.
    pub fn of(case: &Case<'_>, geometry: Geometry, windows: &[Vec<u32>]) -> Self {
        let Cost { streamed_tokens, working_bytes, overlapped_bytes, .. } = cost(case, geometry, windows);
        let (d, i) = (case.arch.hidden as u64, case.arch.intermediate as u64);
        let packed = if streamed_tokens == 0 { 0 } else { (4 * i * d).min(PACKED) * 5 / 4 };
        let tokenizer = match streamed_tokens {
            0 => 0,
            _ => case.source.files.iter().filter(|f| f.name == "tokenizer.json").map(|f| f.size * TOKENIZER).sum(),
        };
        // Text becomes tokens before a layer is touched.
        let total = |working: u64| BASE + (working + working * SLACK / 100 + packed).max(tokenizer);
        let spilled = total(working_bytes);
        let streams = streamed_tokens * d * 4;
        Need { held: total(overlapped_bytes), spilled: spilled - streams.min(spilled - BASE) }
    }

    /// Most memory at any time; with `spill`, hidden states wait on the disk while a layer is factorised.
    pub fn peak(&self, spill: bool) -> u64 {
        if spill { self.spilled } else { self.held }
    }

    /// Whether hidden states have to wait on the disk to stay within `limit`.
    ///
    /// # Errors
    /// A limit that not even that can keep.
    pub fn spill(&self, limit: Option<u64>) -> Result<bool, ConvertError> {
        let Some(limit) = limit.filter(|l| *l < self.peak(false)) else { return Ok(false) };
        if self.spilled < self.held && self.spilled <= limit {
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

/// What the method takes for one layer.
pub(super) fn cost(case: &Case<'_>, geometry: Geometry, windows: &[Vec<u32>]) -> Cost {
    let tokens: usize = windows.iter().map(Vec::len).sum();
    let squares: f64 = windows.iter().map(|window| (window.len() as f64).powi(2)).sum();
    let (t, d) = (tokens as u64, case.arch.hidden as u64);
    let intermediate = case.arch.intermediate as u64;
    let mut work = Work {
        case: *case,
        geometry,
        tokens: t,
        mean_window: squares / (tokens as f64).max(1.0),
        forward_bytes: 0,
        // The MLP takes some tokens at a time; of what its first products give it holds all where the tokens are few.
        mlp_bytes: t.min(LONG_MLP as u64) * 8 * intermediate + t.min(CHUNK as u64) * 12 * d,
    };
    work.forward_bytes = 4 * work.attention_weights() + 4 * work.mlp_weights() + t * 16 * d + work.mlp_bytes;
    case.settings.method.cost(&work)
}

/// Gives memory that was freed back to the system, which allocators put off: what is resident should be what is used.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            /// glibc's `malloc_trim(3)`.
            fn malloc_trim(pad: usize) -> i32;
        }
        // SAFETY: it takes no pointer, may be called at any time from any thread, and touches only free memory.
        unsafe { malloc_trim(0) };
    }
}
