//! From what the user named to a checked model.

use anyhow::Context as _;
use gqa2mla::arch::{Architecture, check_tensors, language_config};
use gqa2mla::observe::{Event, Observer as _};
use gqa2mla::source::{ModelSource, OpenOptions};

use super::Context;

/// A model whose config is understood and whose tensors are what the config implies.
pub struct OpenModel {
    pub source: ModelSource,
    pub arch: Architecture,
}

/// Open and check a model.
///
/// # Errors
/// Anything that makes it unusable; the message names the model.
pub fn open(spec: &str, context: &Context) -> anyhow::Result<OpenModel> {
    let unusable = || format!("cannot use model `{spec}`");
    let mut source = ModelSource::open(spec, &OpenOptions::default(), &context.progress).with_context(unusable)?;
    let arch = understand(&mut source, context).with_context(unusable)?;
    if source.tensors.names().any(|name| arch.names.is_past(name)) {
        let note = format!("`{spec}` stores layers that predict further tokens (MTP): they are read past and not run");
        context.progress.event(Event::Note(note));
    }
    Ok(OpenModel { source, arch })
}

/// Interpret the config as the global options say, and check the tensors against it. With `--text-only`, the config of a
/// multimodal model becomes that of its language model.
///
/// # Errors
/// [`gqa2mla::arch::ArchError`].
pub fn understand(source: &mut ModelSource, context: &Context) -> anyhow::Result<Architecture> {
    let inner = if context.reading.text_only { language_config(&source.config) } else { None };
    let wrapped = inner.is_some();
    if let Some(config) = inner {
        source.config = config;
    }
    let mut arch = Architecture::from_config_with(&source.config, &context.reading.families)?;
    if wrapped {
        arch.look_inside(&source.tensors)?;
    }
    check_tensors(&arch, &source.tensors)?;
    Ok(arch)
}

/// Open a model that can be converted: not MLA already.
///
/// # Errors
/// As [`open`].
pub fn open_convertible(spec: &str, context: &Context) -> anyhow::Result<OpenModel> {
    let model = open(spec, context)?;
    if model.arch.mla().is_some() {
        anyhow::bail!(
            "`{spec}` is an MLA model already\n\nhint: give the GQA checkpoint it was made from; one that was trained as MLA needs \
             no conversion: `inspect`, `check`, `eval`, `generate` and `bench` take it as it is, `rotate` and `shard` turn and \
             share out its latents"
        );
    }
    Ok(model)
}
