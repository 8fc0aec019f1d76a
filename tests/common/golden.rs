//! The golden logits of a fixture, which `scripts/` makes with stock transformers.

use std::path::Path;

use safetensors::SafeTensors;

/// A sequence of tokens and the logits `[T, V]` of transformers for it, row-major.
pub type Golden = (Vec<u32>, Vec<f32>);

/// Every golden sequence of the fixture in `dir`.
pub fn golden(dir: &Path) -> Vec<Golden> {
    let bytes = fs_err::read(dir.join("golden.safetensors")).expect("golden file");
    let file = SafeTensors::deserialize(&bytes).expect("golden tensors");
    let mut out = Vec::new();
    while let Ok(tokens) = file.tensor(&format!("tokens.{}", out.len())) {
        let logits = file.tensor(&format!("logits.{}", out.len())).expect("logits");
        let tokens = tokens.data().as_chunks::<8>().0.iter().map(|w| i64::from_le_bytes(*w) as u32);
        let logits = logits.data().as_chunks::<4>().0.iter().map(|w| f32::from_le_bytes(*w));
        out.push((tokens.collect(), logits.collect()));
    }
    assert!(!out.is_empty(), "{} has no sequence", dir.display());
    out
}

/// The first two sequences of the fixture in `dir`, without their logits.
pub fn golden_tokens(dir: &Path) -> Vec<Vec<u32>> {
    golden(dir).into_iter().take(2).map(|(tokens, _)| tokens).collect()
}
