//! `gqa2mla generate`

use std::io::Read as _;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use gqa2mla::observe::{Event, Observer};
use gqa2mla::report::{CompressedPrompt, GenerationReport, Rate, SCHEMA_VERSION};
use gqa2mla::runtime::{
    Backend, Decode, Generation, Model, Resident, RuntimeError, Sampler, Session, SessionSize, XkvSession, generate,
};
use gqa2mla::source::{ChatTemplate, Message, TextStream, Tokenizer, end_tokens};

use super::devices::DeviceOption;
use super::exit::ExitStatus;
use super::model::{self, OpenModel};
use super::output::{self, Format};
use super::xkv::{self, XkvOption};
use super::{Context, interrupt, values};

/// Tokens generated when the user does not say.
const MAX_TOKENS: usize = 256;
/// Largest prompt file.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

/// Generate text with a model, GQA or MLA; an MLA model decodes from its latent cache.
///
/// The text goes to stdout as it comes, the speed to stderr. Where the model has a chat template, the prompt is the
/// user's turn of a conversation, unless --raw is given. On a processor, bf16 and f32 weights are used in place, in their
/// files.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Model folder or hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    prompt: PromptOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    length: LengthOptions,
    #[command(flatten)]
    xkv: XkvOption,
    #[command(flatten)]
    device: DeviceOption,
}

/// What to go on from, how far, and where to stop.
#[derive(Debug, Clone, Copy)]
struct Text<'a> {
    prompt: &'a [u32],
    max_tokens: usize,
    ends: &'a [u32],
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Prompt")]
struct PromptOptions {
    /// What to go on from, or to answer
    #[arg(long, short, value_name = "TEXT", conflicts_with = "prompt_file", required_unless_present = "prompt_file")]
    prompt: Option<String>,
    /// Read the prompt from a file, or from stdin (`-`)
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// First turn of the conversation, for models that take one
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Give the prompt to the model as it is, without chat template
    #[arg(long)]
    raw: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingOptions {
    /// Divides the logits before tokens are drawn; 0: always the likeliest token
    #[arg(long, value_name = "X", default_value = "0", value_parser = values::limit)]
    temperature: f64,
    /// Draw from the likeliest tokens that hold this share of the probability
    #[arg(long, value_name = "SHARE", default_value = "1", value_parser = values::share)]
    top_p: f64,
    /// Seed of the draws: same seed, same text
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Length")]
struct LengthOptions {
    /// Tokens to generate at most [default: 256, or what the model has positions for]
    #[arg(long, value_name = "N", value_parser = values::positive)]
    max_tokens: Option<usize>,
    /// Go on after the token that ends a text
    #[arg(long)]
    ignore_end: bool,
    /// Allow more tokens than the model has positions; what comes is rarely text
    #[arg(long)]
    beyond_context: bool,
}

impl GenerateArgs {
    /// Run the command.
    ///
    /// # Errors
    /// A model, template or prompt that cannot be used, a context that is too long.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let model = model::open(&self.model, context)?;
        let tokenizer = model.source.tokenizer()?;
        let prompt = self.tokens(&model, &tokenizer)?;
        let max_tokens = self.length.tokens(prompt.len(), model.arch.max_position)?;
        let ends = if self.length.ignore_end { Vec::new() } else { end_tokens(&model.source)? };
        let text = Text { prompt: &prompt, max_tokens, ends: &ends };
        let report = self.run(&model, &tokenizer, text, context)?;
        match context.format {
            Format::Json => context.show(&report, |_| String::new())?,
            Format::Human => {
                output::print("\n")?;
                context.progress.event(Event::Note(report.summary()));
            }
        }
        Ok(ExitStatus::Done)
    }

    /// Load the model where it is to run, and decode.
    fn run(
        &self,
        model: &OpenModel,
        tokenizer: &Tokenizer,
        text: Text<'_>,
        context: &Context,
    ) -> anyhow::Result<GenerationReport> {
        let failed = || format!("cannot generate with `{}`", self.model);
        let capacity = text.prompt.len() + text.max_tokens;
        let beyond_context = self.length.beyond_context;
        let load = Event::Phase { name: "load", steps: None };
        if let Some(settings) = self.xkv.xkv {
            let cpu = self.device.cpu(xkv::OPTION)?;
            xkv::notes(&settings, &model.arch, context);
            settings.check(&model.arch, text.prompt.len()).map_err(RuntimeError::from).with_context(failed)?;
            context.progress.event(load);
            let resident =
                Resident::load(Model::new(&model.source, &model.arch, &cpu).in_place()).with_context(failed)?;
            let mut session = XkvSession::new(&resident, settings, capacity, beyond_context).with_context(failed)?;
            let mut report = self.decode(&mut session, tokenizer, text, context)?;
            let prompt_cache_bytes = session.prompt_bytes();
            xkv::judge(prompt_cache_bytes, context);
            report.xkv = Some(CompressedPrompt { settings, prompt_cache_bytes });
            return Ok(GenerationReport {
                device: cpu.name().to_owned(),
                cache_bytes: session.cache_bytes(),
                ..report
            });
        }
        let device = self.device.open(context)?;
        context.progress.event(load);
        let resident =
            Resident::load(Model::new(&model.source, &model.arch, &device).in_place()).with_context(failed)?;
        let size = SessionSize { sequences: 1, capacity, beyond_context };
        let mut session = Session::with(&resident, size).with_context(failed)?;
        let report = self.decode(&mut session, tokenizer, text, context)?;
        Ok(GenerationReport { device: device.name().to_owned(), cache_bytes: session.cache_bytes(), ..report })
    }

    /// Decode and show; the device and the cache are for the caller to tell.
    fn decode(
        &self,
        session: &mut impl Decode,
        tokenizer: &Tokenizer,
        Text { prompt, max_tokens, ends }: Text<'_>,
        context: &Context,
    ) -> anyhow::Result<GenerationReport> {
        let mut sampler = Sampler::new(self.sampling.temperature, self.sampling.top_p, self.sampling.seed);
        context.progress.event(Event::Phase { name: "prefill", steps: None });
        let mut stream = TextStream::new(tokenizer);
        let mut text = String::new();
        let mut failure = None;
        let mut first = true;
        let generation: Generation = generate(session, prompt, max_tokens, ends, &mut sampler, |token| {
            interrupt::unwind_if_asked();
            if std::mem::take(&mut first) {
                context.progress.finish();
            }
            match stream.push(token).map_err(anyhow::Error::from).and_then(|piece| show(context, piece, &mut text)) {
                Ok(()) => ControlFlow::Continue(()),
                Err(e) => {
                    failure = Some(e);
                    ControlFlow::Break(())
                }
            }
        })
        .with_context(|| format!("cannot generate with `{}`", self.model))?;
        context.progress.finish();
        if let Some(e) = failure {
            return Err(e);
        }
        show(context, stream.finish()?, &mut text)?;
        Ok(GenerationReport {
            schema_version: SCHEMA_VERSION,
            model: self.model.clone(),
            device: String::new(),
            text,
            stop: generation.stop,
            prefill: Rate::new(prompt.len(), generation.prefill_seconds),
            decode: Rate::new(generation.steps, generation.decode_seconds),
            tokens: generation.tokens,
            cache_bytes: 0,
            xkv: None,
        })
    }

    /// Token ids of what the model is given.
    fn tokens(&self, model: &OpenModel, tokenizer: &Tokenizer) -> anyhow::Result<Vec<u32>> {
        let prompt = self.prompt.text()?;
        let template = if self.prompt.raw { None } else { ChatTemplate::from_dir(&model.source.dir)? };
        let ids = match template {
            Some(template) => {
                let turn = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
                let system = self.prompt.system.iter().map(|s| turn("system", s));
                let talk: Vec<Message> = system.chain([turn("user", &prompt)]).collect();
                tokenizer.encode_with(&template.render(&talk)?, false)?
            }
            None if self.prompt.system.is_some() => {
                bail!("`{}` has no chat template for --system\n\nhint: put the text before the prompt", self.model)
            }
            None => tokenizer.encode(&prompt)?,
        };
        if ids.is_empty() {
            bail!("the prompt is empty, and the tokenizer adds no token of its own");
        }
        Ok(ids)
    }
}

/// Add a piece of text, and show it unless stdout is for one document.
fn show(context: &Context, piece: String, text: &mut String) -> anyhow::Result<()> {
    if context.format == Format::Human && !piece.is_empty() {
        output::print(&piece)?;
    }
    text.push_str(&piece);
    Ok(())
}

impl PromptOptions {
    fn text(&self) -> anyhow::Result<String> {
        let Some(path) = &self.prompt_file else { return Ok(self.prompt.clone().unwrap_or_default()) };
        let stdin = path.as_os_str() == "-";
        let input: Box<dyn std::io::Read> =
            if stdin { Box::new(std::io::stdin()) } else { Box::new(fs_err::File::open(path)?) };
        let mut bytes = Vec::new();
        input.take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_PROMPT_BYTES {
            bail!("the prompt `{}` has more than {MAX_PROMPT_BYTES} bytes", path.display());
        }
        String::from_utf8(bytes).with_context(|| format!("the prompt `{}` is not UTF-8 text", path.display()))
    }
}

impl LengthOptions {
    /// How many tokens to generate after `prompt` ones.
    fn tokens(&self, prompt: usize, max_position: usize) -> anyhow::Result<usize> {
        let left = max_position.saturating_sub(prompt);
        let wanted = self.max_tokens.unwrap_or(if left == 0 { MAX_TOKENS } else { MAX_TOKENS.min(left) });
        if wanted > left && !self.beyond_context {
            bail!(
                "the prompt has {prompt} tokens, {wanted} more would pass the {max_position} positions of the model\n\n\
                 hint: shorten the prompt, lower --max-tokens, or use --beyond-context"
            );
        }
        Ok(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_beyond_the_context_is_refused_unless_asked_for() {
        let length = |max_tokens, beyond_context| LengthOptions { max_tokens, ignore_end: false, beyond_context };
        assert_eq!(length(None, false).tokens(10, 8192).expect("fits"), MAX_TOKENS);
        assert_eq!(length(None, false).tokens(250, 256).expect("cut"), 6);
        assert!(length(Some(7), false).tokens(250, 256).is_err());
        assert_eq!(length(Some(7), true).tokens(250, 256).expect("asked for"), 7);
        assert!(length(None, false).tokens(256, 256).is_err());
    }
}
