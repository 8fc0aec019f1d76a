//! How much memory a conversion takes, before it takes it.
//!
//! The bytes per value below were counted, or fitted to the allocator's own count on 59 models of other shapes
//! (`tests/memory/` holds the plan against what the system measures). They are the layer at work in f32 and f64, its
//! moments, and what every calibration token carries through a layer; nothing in them grows with the number of layers.

use super::{ConvertError, Job, Method, fit, scores};
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
pub(super) struct Need {
    /// With hidden states in memory throughout.
    held: u64,
    /// With hidden states on the disk while a layer is factorised.
    spilled: u64,
}

impl Need {
    /// What the job needs with `tokens` calibration tokens.
    pub fn of(job: &Job<'_>, tokens: usize) -> Self {
        let (arch, geometry) = (job.arch, job.spec.geometry);
        let wide = |n: usize| n as u64;
        let (t, d, i) = (wide(tokens), wide(arch.hidden), wide(arch.intermediate));
        let heads = wide(arch.heads);
        let (q, kv) = (heads * wide(job.shape.head_dim), wide(job.shape.kv_heads * job.shape.head_dim));
        let (rank, rope) = (wide(geometry.kv_lora_rank), wide(geometry.qk_rope_head_dim));
        let (nope, value) = (wide(geometry.qk_nope_head_dim), wide(geometry.v_head_dim));
        let attention = 2 * (q + kv) * d;
        let mlp = 3 * i * d;
        // Queries of the output, through a latent where they have one.
        let latent = wide(geometry.q_lora_rank.unwrap_or(0));
        let queries = heads * (nope + rope) * latent.max(d) + latent * d;
        // The MLP takes some tokens at a time; of what its first products give it holds all where the tokens are few.
        let of_mlp = t.min(wide(LONG_MLP)) * 8 * i + t.min(wide(CHUNK)) * 12 * d;
        let forward = 4 * attention + 4 * mlp + t * 16 * d + of_mlp;
        // Tokens of all streams of hidden states, what is at work on a layer, and what is where the source's forward pass runs
        // beside it.
        let (streamed, working, beside) = match job.settings.method {
            Method::Exact => {
                let made = queries + (rank + rope) * d + heads * (nope + value) * rank + q * d;
                let working = 8 * attention + 16 * made + 12 * queries;
                (0, working, working)
            }
            Method::AttentionAware => {
                let weights = 4 * attention + 4 * mlp + 34 * d * d + 24 * latent * d;
                // Queries and keys of the refits on scores wait for them; what they make of both is gone before the others.
                let seen = t.min(wide(scores::tokens(fit::longest_window(job))));
                let of_source = t * (12 * d + 4 * q) + 4 * seen * (q + kv);
                let refits = t * (12 * d + 8 * q + 12 * rank + 4 * rope);
                let on_scores = t * 12 * d + seen * (8 * d + 28 * heads * (nope + rope));
                let working = weights + of_source + refits.max(on_scores);
                (2 * t, working.max(forward), (working + of_mlp).max(forward))
            }
            Method::Transmla | Method::Care | Method::XEcomla | Method::Mha2mla => {
                let weights = 43 * attention + 4 * mlp + 28 * d * d + t * (6 * d + 6 * kv) + 24 * latent * d;
                let states = 12 * attention + 4 * mlp + t * (16 * d + 8 * q + 6 * kv);
                let working = weights.max(states).max(forward);
                (t, working, working)
            }
        };
        let packed = if streamed == 0 { 0 } else { (4 * i * d).min(PACKED) * 5 / 4 };
        let tokenizer = match streamed {
            0 => 0,
            _ => job.source.files.iter().filter(|f| f.name == "tokenizer.json").map(|f| f.size * TOKENIZER).sum(),
        };
        // Text becomes tokens before a layer is touched.
        let total = |working: u64| BASE + (working + working * SLACK / 100 + packed).max(tokenizer);
        let spilled = total(working);
        Need { held: total(beside), spilled: spilled - (streamed * d * 4).min(spilled - BASE) }
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

/// Gives memory that was freed back to the system, which allocators put off: what is resident should be what is used.
pub(super) fn give_back() {
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
