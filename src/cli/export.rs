//! `gqa2mla export`

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gqa2mla::export::{self, ExportReport, ExportSettings};
use gqa2mla::report;
use gqa2mla::target::{OutputDtype, Padding, Profile, Target, TargetChoice};
use gqa2mla::write::Leftover;

use super::command_line::quoted;
use super::exit::ExitStatus;
use super::output::width;
use super::{Context, model, values};

/// Write an MLA model for another class, dtype or padding; it computes what it did.
///
/// For what training leaves: convert, train the folder with any trainer, export it, serve it. Takes conversions of this tool,
/// trained further or not, and models of its classes from elsewhere. What the class cannot hold is refused with the reason. A
/// latent norm that does something, and norms of queries and keys, stay with their class: there only `--dtype` applies.
/// `gqa2mla verify MLA_DIR OUT` proves the result.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// MLA model: folder or hub id `org/name[@revision]`
    #[arg(value_name = "MLA_DIR")]
    model: String,
    /// Folder to write
    #[arg(long, short, value_name = "DIR", help_heading = "Output")]
    output: PathBuf,
    /// Class to write for [default: the folder's own, where it can be written]
    #[arg(long, value_name = "CLASS", help_heading = "Output", value_parser = class())]
    target: Option<Target>,
    /// faithful: whatever the model has, for transformers' code; portable: for engines' own classes, without biases and on the
    /// stock RoPE grid, padded to the widths of kernels
    #[arg(long, value_name = "PROFILE", default_value = "faithful", help_heading = "Output", value_parser = profile())]
    profile: Profile,
    /// Zero-padding of widths: kernels or none [default: kernels in the portable profile]
    #[arg(long, value_name = "WHERE", help_heading = "Output", value_parser = padding())]
    pad: Option<Padding>,
    /// Dtype of all weights: bf16, f16, f32 or fp8 [default: as they are; what changes in f32 where bf16 would round it]
    #[arg(long, value_name = "DTYPE", help_heading = "Output", value_parser = dtype())]
    dtype: Option<OutputDtype>,
    /// Largest weight file; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024
    #[arg(long, value_name = "SIZE", default_value = "5GB", help_heading = "Output", value_parser = values::size)]
    max_shard_size: u64,
    /// Replace an existing output folder
    #[arg(long, help_heading = "Output")]
    overwrite: bool,
}

/// A parser that takes one of `all` by its name.
fn one_of<T: Copy + Send + Sync + 'static>(
    all: &'static [T],
    name: fn(&T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.iter().map(name).collect::<Vec<_>>())
        .try_map(move |s| all.iter().find(|t| name(t) == s).copied().ok_or("none of them"))
}

fn class() -> impl TypedValueParser<Value = Target> {
    let names = TargetChoice::all().filter(|choice| *choice != TargetChoice::Auto).map(TargetChoice::name);
    PossibleValuesParser::new(names.collect::<Vec<_>>())
        .try_map(|name| Target::named(&name).ok_or("no class of that name"))
}

fn profile() -> impl TypedValueParser<Value = Profile> {
    one_of(&[Profile::Faithful, Profile::Portable], |profile| match profile {
        Profile::Faithful => "faithful",
        Profile::Portable => "portable",
    })
}

fn padding() -> impl TypedValueParser<Value = Padding> {
    one_of(&[Padding::Kernels, Padding::None], |padding| match padding {
        Padding::Kernels => "kernels",
        Padding::None => "none",
    })
}

fn dtype() -> impl TypedValueParser<Value = OutputDtype> {
    one_of(&OutputDtype::ALL, |dtype| dtype.name())
}

impl ExportArgs {
    /// Run the command.
    ///
    /// # Errors
    /// Whatever stopped it; then nothing is published.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let settings = ExportSettings {
            target: self.target,
            profile: self.profile,
            pad: self.pad,
            dtype: self.dtype,
            max_shard_bytes: self.max_shard_size,
            overwrite: self.overwrite,
            leftover: Leftover::Refuse,
        };
        let model = model::open(&self.model, context)?;
        let command = command(&self.model, &settings);
        let extras = |r: &ExportReport| vec![("README.md".to_owned(), report::export::note(r, &command).into_bytes())];
        let done = export::export(&model.source, &model.arch, &settings, &self.output, &extras, &context.progress)?;
        context.show(&done, |r| report::export::text(r, width()))?;
        Ok(ExitStatus::Done)
    }
}

/// The command that makes the folder again; of paths only the last part, since the note is published.
fn command(model: &str, s: &ExportSettings) -> String {
    let folder = std::path::Path::new(model);
    let model = match folder.file_name().filter(|_| folder.exists()) {
        Some(name) => name.to_string_lossy().into_owned(),
        None => model.to_owned(),
    };
    let mut out = format!("gqa2mla export {} -o OUTPUT", quoted(&model));
    if let Some(target) = s.target {
        out += &format!(" --target {target}");
    }
    if s.profile == Profile::Portable {
        out += " --profile portable";
    }
    match s.pad {
        Some(Padding::Kernels) => out += " --pad kernels",
        Some(Padding::None) => out += " --pad none",
        None => {}
    }
    if let Some(dtype) = s.dtype {
        out += &format!(" --dtype {}", dtype.name());
    }
    out
}
