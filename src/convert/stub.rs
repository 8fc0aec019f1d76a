#![allow(missing_docs, unused)]
use std::path::Path;

use super::*;
use crate::arch::Architecture;
use crate::observe::Observer;
use crate::source::ModelSource;

#[derive(Debug, thiserror::Error)]
#[error("conversion is not part of this build")]
pub struct ConvertError;

pub fn plan(s: &ModelSource, a: &Architecture, c: &ConvertSettings, o: &dyn Observer) -> Result<Plan, ConvertError> {
    Err(ConvertError)
}

pub fn convert(
    s: &ModelSource,
    a: &Architecture,
    c: &ConvertSettings,
    output: &Path,
    o: &dyn Observer,
) -> Result<ConversionReport, ConvertError> {
    Err(ConvertError)
}
