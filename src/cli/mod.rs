//! The command line: one file per command, each from raw arguments over validated settings to a value shown once.

pub mod exit;
pub mod interrupt;
pub mod output;

mod analyze;
mod bench;
mod check;
mod command_line;
mod compare;
mod completions;
mod convert;
mod demo;
mod devices;
mod distill;
mod eval;
mod export;
mod generate;
mod inspect;
mod measure;
mod method_args;
mod model;
mod options;
pub mod pages;
mod plan;
mod progress;
mod reference;
pub mod resume;
mod rotate;
mod shard;
mod sliced;
mod values;
mod verify;
mod verify_files;

mod xkv;

use std::path::PathBuf;
use std::sync::LazyLock;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use gqa2mla::arch::Family;
use gqa2mla::factor::decompose;

use exit::ExitStatus;
use output::Format;
use progress::Progress;

/// Convert a pretrained GQA/MHA checkpoint to Multi-head Latent Attention (MLA), and prove the result.
///
/// MODEL is a folder in Hugging Face layout (config.json, safetensors weights, tokenizer.json), or a hub id
/// `org/name[@revision]`, which is downloaded; HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.
#[derive(Debug, Parser)]
#[command(
    name = "gqa2mla",
    version,
    propagate_version = true,
    max_term_width = 110,
    after_help = "Exit codes: 0 done; 1 a check did not hold; 2 unusable input or arguments; 3 I/O or resource failure; \
                  130/143 interrupted.\nRUST_LOG sets the log level (for example RUST_LOG=debug)."
)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Print one JSON document on stdout instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Show no progress, warnings or notes; errors still appear
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Threads to compute with [default: all cores]; results do not depend on it
    #[arg(long, value_name = "N", global = true, value_parser = values::threads)]
    threads: Option<usize>,
    /// Description of a family of models that is not built in (docs/families.md); repeatable
    #[arg(long, value_name = "FILE", global = true)]
    family_file: Vec<PathBuf>,
    /// Of a multimodal model, take the language model alone
    #[arg(long, global = true)]
    text_only: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Inspect(inspect::InspectArgs),
    Check(check::CheckArgs),
    Plan(plan::PlanArgs),
    Convert(convert::ConvertArgs),
    Distill(distill::DistillArgs),
    Export(export::ExportArgs),
    Rotate(rotate::RotateArgs),
    Shard(shard::ShardArgs),
    Verify(verify::VerifyArgs),
    VerifyFiles(verify_files::VerifyFilesArgs),
    Eval(eval::EvalArgs),
    Generate(generate::GenerateArgs),
    Bench(bench::BenchArgs),
    Analyze(analyze::AnalyzeArgs),
    Compare(compare::CompareArgs),
    Demo(demo::DemoArgs),
    Devices(devices::DevicesArgs),
    Completions(completions::CompletionsArgs),
    /// Print this command line's reference as Markdown
    #[command(hide = true)]
    Reference,
}

/// What every command gets besides its own arguments.
pub struct Context {
    /// How results are shown.
    pub format: Format,
    /// Where the library reports to.
    pub progress: Progress,
    /// How configs are read.
    pub reading: Reading,
}

/// How a model's config is read.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// Families besides the embedded ones.
    pub families: Vec<Family>,
    /// Whether to take the language model out of a multimodal one.
    pub text_only: bool,
}

impl Reading {
    fn new(files: &[PathBuf], text_only: bool) -> anyhow::Result<Self> {
        let family = |path: &PathBuf| -> anyhow::Result<Family> {
            let name = path.file_stem().map_or_else(|| "family".into(), |s| s.to_string_lossy().into_owned());
            Ok(Family::parse(&name, &fs_err::read_to_string(path)?)?)
        };
        Ok(Self { families: files.iter().map(family).collect::<anyhow::Result<_>>()?, text_only })
    }
}

impl Context {
    /// Take the progress bar away, then show a result on stdout.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn show<T: serde::Serialize>(&self, document: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        self.progress.finish();
        output::show(self.format, document, text)
    }
}

/// Parse the command line; help, version and usage errors are printed here.
///
/// # Errors
/// The status to exit with at once.
pub fn parse() -> Result<Cli, ExitStatus> {
    let parsed = forgiving(versioned(Cli::command())).try_get_matches().and_then(|m| Cli::from_arg_matches(&m));
    parsed.map_err(|e| {
        let status = if e.use_stderr() { ExitStatus::Unusable } else { ExitStatus::Done };
        // Nobody left to tell.
        let _ = e.print();
        status
    })
}

/// Makes `--version` name the library that decomposes matrices where that is not the one of every build.
fn versioned(command: clap::Command) -> clap::Command {
    static VERSION: LazyLock<Option<String>> = LazyLock::new(|| {
        let library = decompose::reported()?;
        Some(format!("{}\nlinear_algebra: {library}", env!("CARGO_PKG_VERSION")))
    });
    match &*VERSION {
        Some(version) => command.long_version(version.as_str()),
        None => command,
    }
}

/// Takes `-5` after an option for its value, so that the option can say what it expects.
fn forgiving(command: clap::Command) -> clap::Command {
    let takes = |arg: &clap::Arg| !arg.is_positional() && arg.get_action().takes_values();
    let command = command.mut_args(|arg| if takes(&arg) { arg.allow_negative_numbers(true) } else { arg });
    command.mut_subcommands(forgiving)
}

/// Run the command.
///
/// # Errors
/// Whatever made it impossible; [`exit::classify`] knows the exit code.
pub fn run(cli: Cli) -> anyhow::Result<ExitStatus> {
    let Global { json, quiet, threads, family_file, text_only } = cli.global;
    devices::quieten();
    start_logging();
    if let Some(n) = threads {
        rayon::ThreadPoolBuilder::new().num_threads(n).build_global().context("cannot start the threads")?;
    }
    let reading = Reading::new(&family_file, text_only)?;
    let format = if json { Format::Json } else { Format::Human };
    let context = Context { format, progress: Progress::new(quiet), reading };
    match cli.command {
        Command::Inspect(args) => args.execute(&context),
        Command::Check(args) => args.execute(&context),
        Command::Plan(args) => args.execute(&context),
        Command::Convert(args) => args.execute(&context),
        Command::Distill(args) => args.execute(&context),
        Command::Export(args) => args.execute(&context),
        Command::Rotate(args) => args.execute(&context),
        Command::Shard(args) => args.execute(&context),
        Command::Verify(args) => args.execute(&context),
        Command::VerifyFiles(args) => args.execute(&context),
        Command::Eval(args) => args.execute(&context),
        Command::Generate(args) => args.execute(&context),
        Command::Bench(args) => args.execute(&context),
        Command::Analyze(args) => args.execute(&context),
        Command::Compare(args) => args.execute(&context),
        Command::Demo(args) => args.execute(&context),
        Command::Devices(args) => args.execute(&context),
        Command::Completions(args) => args.execute(),
        Command::Reference => reference::execute(),
    }
}

/// Logs are for debugging: what a user should know arrives as events and errors. Off unless RUST_LOG asks.
fn start_logging() {
    let Some(filter) = std::env::var("RUST_LOG").ok().filter(|f| !f.is_empty()) else { return };
    // A second logger is impossible in one process; if it happens the first one stays.
    let _ = env_logger::Builder::new().parse_filters(&without_wire(&filter)).try_init();
}

/// The filter without the lower half of the HTTP client, which prints requests byte by byte with the token in them.
fn without_wire(filter: &str) -> String {
    let (directives, text) = filter.find('/').map_or((filter, ""), |at| filter.split_at(at));
    let kept = directives.split(',').filter(|d| !d.trim().starts_with("ureq_proto"));
    kept.chain(["ureq_proto=off"]).collect::<Vec<_>>().join(",") + text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_tree_is_sound() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn requests_are_not_logged_byte_by_byte() {
        assert_eq!(super::without_wire("trace"), "trace,ureq_proto=off");
        assert_eq!(super::without_wire("info,ureq_proto::util=trace/GET"), "info,ureq_proto=off/GET");
    }
}
