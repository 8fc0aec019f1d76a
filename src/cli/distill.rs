//! `gqa2mla distill`

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gqa2mla::distill::{self, DistillReport, DistillSettings, Train};
use gqa2mla::report::distillation;
use gqa2mla::write::Leftover;

use super::command_line::quoted;
use super::exit::ExitStatus;
use super::output::width;
use super::{Context, model, values};

/// Train a conversion until it predicts what its source predicts; writes it anew in the same class, geometry and dtypes.
///
/// The loss is KL(source || student) over the whole vocabulary. Of every text some windows are held out and never trained
/// on: the state that is best on them is written, and none of the texts gets worse on them than it was. Where nothing gets
/// better, the output is the input. Takes any MLA folder with plain MLPs, of this tool or native, and its source. Runs on
/// the CPU, in f32; tensors that are not trained are copied bit for bit. The folder gets distill.json (the curve, figures
/// per text) and a section in its model card.
#[derive(Debug, Args)]
pub struct DistillArgs {
    /// The model that was converted: folder or hub id `org/name[@revision]`
    #[arg(value_name = "SOURCE")]
    source: String,
    /// Its conversion: folder or hub id
    #[arg(value_name = "MLA_DIR")]
    student: String,
    /// Tokens to train on; text that has fewer is read again
    #[arg(long, value_name = "N", default_value_t = DistillSettings::default().tokens, value_parser = values::positive)]
    tokens: usize,
    /// What is trained: attention; attention+norms: also the gains of norms that act; all: also the MLPs. Embedding and
    /// output head stay
    #[arg(long, value_name = "WHAT", default_value = "attention", value_parser = train())]
    train: Train,
    /// Tokens of a step, at least, in whole windows
    #[arg(long, value_name = "TOKENS", default_value_t = DistillSettings::default().batch_tokens,
          value_parser = values::positive)]
    batch_tokens: usize,
    /// How far a full step moves weights, as a share of the root mean square of their kind
    #[arg(long, value_name = "SHARE", default_value_t = DistillSettings::default().step_size,
          value_parser = values::positive_number)]
    step_size: f64,
    /// Seed of what is held out and of the order of windows
    #[arg(long, value_name = "SEED", default_value_t = DistillSettings::default().seed)]
    seed: u64,
    /// Text to train on, UTF-8 .txt or .jsonl (field `text`); repeatable: some of each is held out [default: built-in text]
    #[arg(long, value_name = "FILE", help_heading = "Text")]
    calib: Vec<PathBuf>,
    /// Tokens of the longest windows; half of the text is in such, most of the rest in windows of a quarter
    #[arg(long, value_name = "TOKENS", default_value_t = DistillSettings::default().seq_len,
          value_parser = values::positive, help_heading = "Text")]
    seq_len: usize,
    /// Folder to write
    #[arg(long, short, value_name = "DIR", help_heading = "Output")]
    output: PathBuf,
    /// Largest weight file; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = values::size, help_heading = "Output")]
    max_shard_size: u64,
    /// Replace an existing output folder
    #[arg(long, help_heading = "Output")]
    overwrite: bool,
}

/// Parser of what is trained.
fn train() -> impl TypedValueParser<Value = Train> {
    PossibleValuesParser::new(Train::ALL.map(Train::name))
        .map(|s| Train::ALL.into_iter().find(|t| t.name() == s).unwrap_or(Train::Attention))
}

impl DistillArgs {
    /// Run the command.
    ///
    /// # Errors
    /// Whatever stopped it; then nothing is published.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        let settings = DistillSettings {
            tokens: self.tokens,
            train: self.train,
            files: self.calib.clone(),
            seq_len: self.seq_len,
            batch_tokens: self.batch_tokens,
            step_size: self.step_size,
            seed: self.seed,
            max_shard_bytes: self.max_shard_size,
            overwrite: self.overwrite,
            leftover: Leftover::Refuse,
        };
        let (source, student) = (model::open(&self.source, context)?, model::open(&self.student, context)?);
        let command = command(&self.source, &self.student, &settings);
        let card = fs_err::read_to_string(student.source.dir.join("README.md")).ok();
        let extras = |r: &DistillReport| {
            vec![("README.md".to_owned(), distillation::card(card.as_deref(), r, &command).into_bytes())]
        };
        let report = distill::distill(
            (&source.source, &source.arch),
            (&student.source, &student.arch),
            &settings,
            &self.output,
            &extras,
            &context.progress,
        )?;
        context.show(&report, |r| distillation::text(r, width()))?;
        Ok(ExitStatus::Done)
    }
}

/// The command that makes the folder again; of paths only the last part, since the card is published.
fn command(source: &str, student: &str, s: &DistillSettings) -> String {
    let last = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let name = |model: &str| {
        let folder = Path::new(model);
        if folder.exists() { last(folder) } else { model.to_owned() }
    };
    let mut out = format!("gqa2mla distill {} {} -o OUTPUT", quoted(&name(source)), quoted(&name(student)));
    out += &format!(" --tokens {} --train {}", s.tokens, s.train);
    for file in &s.files {
        out += &format!(" --calib {}", quoted(&last(file)));
    }
    out + &format!(
        " --seq-len {} --batch-tokens {} --step-size {} --seed {}",
        s.seq_len, s.batch_tokens, s.step_size, s.seed
    )
}
