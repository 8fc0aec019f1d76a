//! `gqa2mla completions`

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::exit::ExitStatus;
use super::output::print_bytes;

/// Print a completion script for a shell on stdout.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Shell to complete in
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

impl CompletionsArgs {
    /// Run the command.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn execute(self) -> anyhow::Result<ExitStatus> {
        // Into memory first: clap_complete panics where stdout is closed early.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), "gqa2mla", &mut script);
        print_bytes(&script)?;
        Ok(ExitStatus::Done)
    }
}
