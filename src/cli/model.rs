//! From what the user named to a checked model.

use anyhow::Context as _;
use gqa2mla::arch::{Architecture, check_tensors};
use gqa2mla::observe::Observer;
use gqa2mla::source::{ModelSource, OpenOptions};

/// A model whose config is understood and whose tensors are what the config implies.
pub struct OpenModel {
    pub source: ModelSource,
    pub arch: Architecture,
}

/// Open and check a model.
///
/// # Errors
/// Anything that makes it unusable; the message names the model.
pub fn open(spec: &str, observer: &dyn Observer) -> anyhow::Result<OpenModel> {
    let unusable = || format!("cannot use model `{spec}`");
    let source = ModelSource::open(spec, &OpenOptions::default(), observer).with_context(unusable)?;
    let arch = Architecture::from_config(&source.config).with_context(unusable)?;
    check_tensors(&arch, &source.tensors).with_context(unusable)?;
    Ok(OpenModel { source, arch })
}

/// Open a model that can be converted: not MLA already.
///
/// # Errors
/// As [`open`].
pub fn open_convertible(spec: &str, observer: &dyn Observer) -> anyhow::Result<OpenModel> {
    let model = open(spec, observer)?;
    if model.arch.mla().is_some() {
        anyhow::bail!("`{spec}` is an MLA model already\n\nhint: give the GQA checkpoint it was made from");
    }
    Ok(model)
}
