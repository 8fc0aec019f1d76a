//! Rounding to the dtype that is stored, and refusing what does not survive it.

use crate::error::ConvertError;
use crate::source::{Dtype, TensorView};
use crate::target::encode;

/// `values` of the output tensor `name` as `dtype` stores them, if all of them are finite there.
///
/// # Errors
/// [`ConvertError::Produced`] for NaN, infinity, and what is infinite in f32, in which models are computed;
/// [`ConvertError::Refused`] for a value that only a wider dtype holds.
pub(super) fn rounded(name: &str, values: &[f64], dtype: Dtype) -> Result<Vec<u8>, ConvertError> {
    let largest = check_finite(name, values)?;
    // Rounding keeps the order of values: if the largest stays finite, all do.
    let stored = encode(&[largest], dtype);
    let stored = TensorView { name, dtype, shape: &[1], bytes: stored.into() }.to_f64();
    if stored.iter().any(|v| !v.is_finite()) {
        return Err(ConvertError::Refused {
            message: format!("output tensor `{name}`: its largest value, {largest:e}, is beyond what {dtype} holds"),
            hint: Some("choose a wider `--dtype`".to_owned()),
        });
    }
    Ok(encode(values, dtype))
}

/// The largest magnitude among `values` of the output tensor `name`, all of which are finite in f32.
///
/// # Errors
/// [`ConvertError::Produced`].
pub(super) fn check_finite(name: &str, values: &[f64]) -> Result<f64, ConvertError> {
    let largest = values.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    if values.iter().any(|v| !v.is_finite()) || largest > f64::from(f32::MAX) {
        return Err(ConvertError::Produced { name: name.to_owned() });
    }
    Ok(largest)
}
