//! What engines' own classes do not run, whatever the class is called (docs/targets.md, sections 3 and 5).

use super::{RopeGrid, Target};
use crate::arch::{Activation, Architecture, GqaShape};
use crate::error::ConvertError;

/// RoPE schemes of a source that engines' own classes have, or have an approximation of.
const SCHEMES: [&str; 3] = ["default", "llama3", "yarn"];

/// Refuse what no engine's own class runs, before it is written for them. `shape`: the source's attention; `off_grid`: why the
/// method's frequencies do not lie on the stock grid; `grid`: the frequencies that were asked for.
///
/// # Errors
/// [`ConvertError::Refused`].
pub fn check_portable(
    class: Target,
    arch: &Architecture,
    shape: &GqaShape,
    off_grid: Option<String>,
    grid: Option<RopeGrid>,
) -> Result<(), ConvertError> {
    let why = if !class.is_portable() {
        format!("the target `{class}` is not a class that engines have of their own")
    } else if shape.qkv_bias || shape.out_bias {
        "the source has biases in its attention, which engines' own classes skip without a word".to_owned()
    } else if !SCHEMES.contains(&arch.rope.kind.as_str()) {
        format!("the source's RoPE is scaled by `{}`, which engines' own classes replace by YaRN", arch.rope.kind)
    } else if shape.rotary_dim != shape.head_dim {
        "the source rotates only part of a head, whose frequencies are on no stock grid".to_owned()
    } else if let Some(why) = off_grid {
        why
    } else if grid == Some(RopeGrid::Free) {
        "`--rope-grid free` needs LongRoPE factors".to_owned()
    } else if arch.activation != Activation::Silu {
        format!("the activation `{}` is not SiLU", arch.activation.name())
    } else {
        return Ok(());
    };
    Err(ConvertError::refused(
        format!("the portable profile cannot hold this model: {why}"),
        "`--profile faithful` keeps it, for transformers and vLLM's transformers backend",
    ))
}
