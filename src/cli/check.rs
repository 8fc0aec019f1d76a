//! `gqa2mla check`

use std::path::Path;

use anyhow::Context as _;
use clap::Args;
use clap::builder::PossibleValuesParser;
use gqa2mla::report::Check;
use gqa2mla::report::engines::{ENGINE_NAMES, Facts};
use gqa2mla::source::{ModelSource, OpenOptions};

use super::Context;
use super::exit::ExitStatus;
use super::inspect::config_alone;
use super::output::width;

/// Say which engines run an MLA folder right, and what to change where one does not.
///
/// Takes any MLA checkpoint, also of other tools: the rules read its config.json, the names of its tensors and the size of the
/// latent's weights. Exit code 1 where the named engine would not load it or would run it wrongly, without an engine where
/// none runs it right; 0 where the class is not known here.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Model folder or hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    /// Engine to judge for
    #[arg(long, value_name = "ENGINE", default_value = "all", value_parser = PossibleValuesParser::new(ENGINE_NAMES.into_iter().chain(["all"])))]
    engine: String,
}

impl CheckArgs {
    /// Run the command.
    ///
    /// # Errors
    /// A folder that cannot be read, or is no MLA model.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let unusable = || format!("cannot check `{}`", self.model);
        let (facts, weights) = match config_alone(Path::new(&self.model)).with_context(unusable)? {
            Some(config) => (Facts::read(&config, None).with_context(unusable)?, false),
            None => {
                let mut options = OpenOptions::default();
                options.allow_quantised = true;
                let source = ModelSource::open(&self.model, &options, &context.progress).with_context(unusable)?;
                let mut facts = Facts::read(&source.config, Some(&source.tensors)).with_context(unusable)?;
                facts.sentencepiece = is_sentencepiece(&source.dir);
                (facts, true)
            }
        };
        let engine = (self.engine != "all").then_some(self.engine.as_str());
        let check = Check::new(&self.model, &facts, weights, engine);
        context.show(&check, |c| c.text(width()))?;
        Ok(if check.passed { ExitStatus::Done } else { ExitStatus::CheckFailed })
    }
}

/// Whether the tokenizer falls back to bytes, as SentencePiece's do and byte-level BPE never has to.
fn is_sentencepiece(dir: &Path) -> bool {
    const LARGEST: u64 = 256 << 20;
    let path = dir.join("tokenizer.json");
    if fs_err::metadata(&path).map_or(u64::MAX, |m| m.len()) > LARGEST {
        return false;
    }
    let value: Option<serde_json::Value> = fs_err::read(&path).ok().and_then(|b| serde_json::from_slice(&b).ok());
    value.is_some_and(|v| v["model"]["byte_fallback"] == true || v["model"]["type"] == "Unigram")
}
