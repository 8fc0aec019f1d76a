#![allow(missing_docs, unused)]
use std::path::Path;

use super::*;
use crate::arch::{ArchError, Architecture};
use crate::observe::Observer;
use crate::source::{ModelSource, SourceError};
use crate::write::WriteError;

pub type Extras<'a> = &'a dyn Fn(&ConversionReport) -> Vec<(String, Vec<u8>)>;

#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error(transparent)]
    Arch(#[from] ArchError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("conversion is not part of this build")]
    Stub,
}

pub fn plan(
    s: &ModelSource,
    a: &Architecture,
    c: &ConvertSettings,
    predict: bool,
    o: &dyn Observer,
) -> Result<Plan, ConvertError> {
    Err(ConvertError::Stub)
}

pub fn convert(
    s: &ModelSource,
    a: &Architecture,
    c: &ConvertSettings,
    output: &Path,
    e: Extras<'_>,
    o: &dyn Observer,
) -> Result<ConversionReport, ConvertError> {
    Err(ConvertError::Stub)
}
