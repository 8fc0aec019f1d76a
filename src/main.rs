//! `gqa2mla`: parse, run, report, exit.

mod cli;

use std::process::ExitCode;

use cli::{exit, interrupt, output, resume};

#[global_allocator]
static ALLOCATOR: cli::pages::Advised = cli::pages::Advised;

fn main() -> ExitCode {
    let cli = match cli::parse() {
        Ok(cli) => cli,
        Err(status) => return status.into(),
    };
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !gqa2mla::source::panics_are_contained() {
            usual(info);
        }
    }));
    let status = match interrupt::catch(|| cli::run(cli)) {
        Ok(Ok(status)) => status,
        // Whoever read our output has seen enough.
        Ok(Err(e)) if exit::is_broken_pipe(&e) => exit::ExitStatus::Done,
        Ok(Err(e)) => {
            output::error(&e);
            exit::classify(&e)
        }
        Err(signal) => {
            output::message(output::Label::Error, "interrupted, nothing was published");
            if let Some(command) = resume::pending() {
                output::message(output::Label::Hint, &format!("go on with `{command}`"));
            }
            exit::ExitStatus::Interrupted(signal)
        }
    };
    status.into()
}
