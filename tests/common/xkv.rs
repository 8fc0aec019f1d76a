//! Prompts and widths for tests of caches that are kept as factors.

use gqa2mla::arch::Architecture;

/// Ids without a pattern.
pub fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 7919 + 13 + i * i % 31) % vocab) as u32).collect()
}

/// Widths of keys (latents) and, of GQA, values in one layer.
pub fn widths(arch: &Architecture) -> (usize, usize) {
    match (arch.gqa(), arch.mla()) {
        (Some(a), _) => (a.kv_heads * a.head_dim, a.kv_heads * a.head_dim),
        (_, Some(a)) => (a.kv_lora_rank, 0),
        _ => unreachable!("attention is one of the two"),
    }
}
