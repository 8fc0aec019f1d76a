//! Which splits of the cache padding to kernels and blocks of FP8 allow (docs/targets.md, sections 7 and 8).

use super::fp8::BLOCK;
use super::{Padding, TargetSpec};
use crate::error::ConvertError;
use crate::mla::Split;

/// A spec with the first of the splits that are possible.
#[derive(Debug, Clone)]
pub struct Fitted {
    /// The spec; without padding where no kernel is wide enough and none was asked for.
    pub spec: TargetSpec,
    /// Splits that are possible, at least one.
    pub splits: Vec<Split>,
    /// Decisions taken for the user, one sentence each.
    pub decisions: Vec<String>,
}

/// Keep the `splits` that padding and FP8 blocks allow, of at least one. Padding that no kernel is wide enough for is refused if
/// it was asked for (`insist`), and else left out.
///
/// # Errors
/// [`ConvertError::Refused`] where no split is left.
pub fn fit(spec: TargetSpec, splits: Vec<Split>, insist: bool) -> Result<Fitted, ConvertError> {
    let mut fitted = Fitted { spec, splits, decisions: Vec::new() };
    if fitted.spec.padding == Padding::Kernels {
        fitted.pad_to_kernels(insist)?;
    }
    if fitted.spec.storage.is_fp8() {
        fitted.align_to_blocks()?;
    }
    fitted.spec = fitted.spec.with_split(fitted.splits[0]);
    fitted.decisions.extend(growth(&fitted.spec));
    Ok(fitted)
}

impl TargetSpec {
    /// The spec with another split.
    #[must_use]
    pub fn with_split(&self, split: Split) -> Self {
        Self { geometry: self.geometry.with_split(split), ..self.clone() }
    }
}

impl Fitted {
    /// Keep the splits that some kernel is wide enough for.
    fn pad_to_kernels(&mut self, insist: bool) -> Result<(), ConvertError> {
        let spec = &self.spec;
        let held = |split: &Split| spec.with_split(*split).kernel_shape().is_some();
        let fit: Vec<Split> = self.splits.iter().copied().filter(held).collect();
        if !fit.is_empty() {
            self.splits = fit;
            return Ok(());
        }
        let g = &spec.unpadded();
        let message = format!(
            "no kernel holds heads of {} + {} and {} values with a latent of {}",
            g.qk_nope_head_dim, g.qk_rope_head_dim, g.v_head_dim, g.kv_lora_rank
        );
        if insist {
            return Err(ConvertError::refused(
                message,
                "kernels take heads up to 192 + 64 and 256 values, on a stock grid a rotated width that divides 64, and \
                 latents up to 512: choose smaller widths, or `--pad none`",
            ));
        }
        self.decisions.push(format!("{message}: nothing is padded"));
        self.spec.padding = Padding::None;
        Ok(())
    }

    /// Keep the splits whose latent shares no block with the rotated key.
    fn align_to_blocks(&mut self) -> Result<(), ConvertError> {
        let spec = &self.spec;
        let rank = |split: &Split| spec.with_split(*split).output().kv_lora_rank;
        let first = rank(&self.splits[0]);
        self.splits.retain(|split| rank(split).is_multiple_of(BLOCK));
        if !self.splits.is_empty() {
            return Ok(());
        }
        Err(ConvertError::refused(
            format!(
                "a latent of {first} values shares an FP8 block of {BLOCK} rows with the rotated key, whose weights are \
                 2^20 times as large: the latent would be rounded to zero"
            ),
            format!("choose a kv_lora_rank that is a multiple of {BLOCK}, or `--pad kernels`"),
        ))
    }
}

/// What padding does to the widths and the cache, if anything.
fn growth(spec: &TargetSpec) -> Option<String> {
    let (g, to) = (spec.unpadded(), spec.output());
    let cached = |g: &crate::mla::Geometry| g.kv_lora_rank + g.qk_rope_head_dim;
    (to != g).then(|| {
        format!(
            "padded with zeros to kernels: heads {} + {} / {} become {} + {} / {}, the cache grows from {} to {} values \
             ({} more bytes per token and layer in bf16)",
            g.qk_nope_head_dim,
            g.qk_rope_head_dim,
            g.v_head_dim,
            to.qk_nope_head_dim,
            to.qk_rope_head_dim,
            to.v_head_dim,
            cached(&g),
            cached(&to),
            2 * (cached(&to) - cached(&g))
        )
    })
}
