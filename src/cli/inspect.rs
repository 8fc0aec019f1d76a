//! `gqa2mla inspect`

use std::path::Path;

use anyhow::Context as _;
use clap::Args;
use gqa2mla::arch::{Architecture, language_config};
use gqa2mla::report::{InspectedModel, KvRow, SCHEMA_VERSION, text};
use gqa2mla::source::{Dtype, ModelSource, OpenOptions, SourceError};

use super::exit::ExitStatus;
use super::output::{Format, width};
use super::{Context, model};

/// Show what models are, what their caches cost, and which engines would load them as MLA.
///
/// For a GQA model: possible cache budgets, and for each whether stock transformers, vLLM, SGLang, llama.cpp and MLX-LM
/// would load the conversion, and why not. For an MLA model: the same for the model as it is. Several models are also
/// compared by the bytes that a token takes in their caches. A folder that holds only a config.json is inspected from that.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Model folders or hub ids `org/name[@revision]`
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<String>,
}

impl InspectArgs {
    /// Run the command.
    ///
    /// # Errors
    /// A model that cannot be read.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let models = self.models.iter().map(|m| inspect(m, context)).collect::<anyhow::Result<Vec<_>>>()?;
        match (context.format, models.as_slice()) {
            (Format::Human, _) | (Format::Json, [_]) => {
                let one = models.first().context("no model given")?;
                context.show(one, |_| text::inspect(&models, width()))?;
            }
            (Format::Json, several) => {
                let table = KvRow::table(several);
                let document =
                    serde_json::json!({ "schema_version": SCHEMA_VERSION, "models": several, "kv_table": table });
                context.show(&document, |_| String::new())?;
            }
        }
        Ok(ExitStatus::Done)
    }
}

fn inspect(spec: &str, context: &Context) -> anyhow::Result<InspectedModel> {
    let unusable = || format!("cannot inspect `{spec}`");
    if let Some(config) = config_alone(Path::new(spec)).with_context(unusable)? {
        let inner = if context.reading.text_only { language_config(&config) } else { None };
        let arch = Architecture::from_config_with(&inner.unwrap_or(config), &context.reading.families);
        let arch = arch.with_context(unusable)?;
        return Ok(InspectedModel::new(spec, &arch, None));
    }
    let mut source = ModelSource::open(spec, &OpenOptions::default(), &context.progress).with_context(unusable)?;
    let arch = model::understand(&mut source, context).with_context(unusable)?;
    let dtype = source.tensors.get(&arch.names.embed).map_or(Dtype::BF16, |t| t.dtype);
    Ok(InspectedModel::new(spec, &arch, Some((source.tensors.total_bytes(), dtype))))
}

/// The config of a folder that has one and no weight file, nor an index that promises some.
pub fn config_alone(dir: &Path) -> anyhow::Result<Option<serde_json::Value>> {
    const MAX_CONFIG_BYTES: u64 = 16 << 20;
    let path = dir.join("config.json");
    if !path.is_file() {
        return Ok(None);
    }
    for entry in fs_err::read_dir(dir)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
            return Ok(None);
        }
    }
    let config = |reason: String| SourceError::Config { path: path.clone(), reason };
    if fs_err::metadata(&path)?.len() > MAX_CONFIG_BYTES {
        return Err(config("larger than any config".to_owned()).into());
    }
    let value = serde_json::from_slice(&fs_err::read(&path)?).map_err(|e| config(format!("not JSON: {e}")))?;
    Ok(Some(value))
}
