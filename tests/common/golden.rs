//! The token windows that golden logits belong to.

use std::path::Path;

use safetensors::SafeTensors;

/// The first two windows of the fixture in `dir`.
pub fn golden_tokens(dir: &Path) -> Vec<Vec<u32>> {
    let bytes = fs_err::read(dir.join("golden.safetensors")).expect("golden file");
    let golden = SafeTensors::deserialize(&bytes).expect("golden tensors");
    let one = |n: usize| {
        let view = golden.tensor(&format!("tokens.{n}")).expect("tokens");
        view.data().as_chunks::<8>().0.iter().map(|w| i64::from_le_bytes(*w) as u32).collect()
    };
    (0..2).map(one).collect()
}
