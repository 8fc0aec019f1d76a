//! The fixtures whose logits are held against another implementation's, and how close they have to be.

use std::path::{Path, PathBuf};

use gqa2mla::arch::Architecture;

/// Folders of all fixtures that have golden logits, in order.
pub fn golden_fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let entries = fs_err::read_dir(&root).expect("readable").map(|entry| entry.expect("readable").path());
    let mut found: Vec<_> = entries.filter(|dir| dir.join("golden.safetensors").exists()).collect();
    found.sort();
    assert!(found.len() >= 5, "{} holds {} fixtures", root.display(), found.len());
    found
}

/// What two f32 implementations may differ by: each layer has about eight roundings in a row, each a sum of up to
/// `widest` terms whose errors add up like a random walk, and both sides err.
pub fn tolerance(arch: &Architecture, scale: f32) -> f32 {
    let widest = arch.hidden.max(arch.intermediate) as f32;
    2.0 * (8 * arch.layers + 2) as f32 * widest.sqrt() * f32::EPSILON * scale
}
