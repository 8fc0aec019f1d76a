//! A folder in another dtype, and otherwise as it is.

use std::collections::BTreeSet;

use super::ExportSettings;
use crate::arch::{Architecture, Part, SCALE_SUFFIX};
use crate::error::ConvertError;
use crate::source::{Dtype, ModelSource};
use crate::target::{Cut, Emit, Origin, OutputDtype};
use crate::write::PlannedTensor;

/// The dtype that the weights are cast to. `why`: what keeps the folder from being rewritten.
///
/// # Errors
/// [`ConvertError::Refused`] where something other than a dtype was asked for, or nothing.
pub(super) fn dtype(settings: &ExportSettings, same_class: bool, why: &str) -> Result<Dtype, ConvertError> {
    let refused = |what: &str| {
        ConvertError::refused(
            format!("{what}: {why}"),
            "its own class holds it: give `--dtype bf16`, `f16` or `f32` alone, which casts every weight",
        )
    };
    if !same_class {
        return Err(refused("the model cannot be written for another class"));
    }
    if settings.pad == Some(crate::target::Padding::Kernels) || settings.profile == crate::target::Profile::Portable {
        return Err(refused("the model cannot be padded or written for other engines"));
    }
    match settings.dtype {
        Some(OutputDtype::Bf16) => Ok(Dtype::BF16),
        Some(OutputDtype::F16) => Ok(Dtype::F16),
        Some(OutputDtype::F32) => Ok(Dtype::F32),
        Some(OutputDtype::Fp8) => Err(refused("the model cannot be quantised to FP8 by `export`")),
        None => Err(refused("there is nothing to do")),
    }
}

/// Every tensor of the folder, those of numbers in `dtype`; FP8 is widened and its scales left out.
pub(super) fn emission(source: &ModelSource, arch: &Architecture, dtype: Dtype) -> Vec<Emit> {
    let expected: Vec<String> = arch.expected_tensors().into_iter().map(|t| t.name).collect();
    let known: BTreeSet<&str> = expected.iter().map(String::as_str).collect();
    let more = source.tensors.in_file_order().map(|(name, _)| name).filter(|name| !known.contains(name));
    let mut out = Vec::new();
    for name in expected.iter().map(String::as_str).chain(more) {
        let Some(info) = source.tensors.get(name) else { continue };
        let of = name.strip_suffix(SCALE_SUFFIX).and_then(|of| source.tensors.get(of));
        if of.is_some_and(|t| t.dtype == Dtype::F8_E4M3) {
            continue;
        }
        let number = matches!(info.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F8_E4M3);
        let (dtype, from) = match number {
            true if info.dtype == Dtype::F8_E4M3 => (dtype, Origin::Widened(Part::whole(name))),
            true => (dtype, Origin::Source { part: Part::whole(name), scale: 1.0, offset: 0.0 }),
            false => (info.dtype, Origin::Stored { name: name.to_owned(), cut: Cut::Whole }),
        };
        out.push(Emit { planned: PlannedTensor { name: name.to_owned(), dtype, shape: info.shape.clone() }, from });
    }
    out
}
