//! `gqa2mla reference`: `docs/cli.md`, from the tree that parses.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command, CommandFactory as _};

use super::exit::ExitStatus;
use super::output;

/// Print the reference.
///
/// # Errors
/// When stdout cannot be written.
pub fn execute() -> anyhow::Result<ExitStatus> {
    output::print(&reference())?;
    Ok(ExitStatus::Done)
}

fn reference() -> String {
    let mut root = super::Cli::command();
    root.build();
    let mut out =
        "# Command line\n\n<!-- Made by `gqa2mla reference > docs/cli.md`; a test compares the two. -->\n\n".to_owned();
    out += &about(&root);
    let visible: Vec<&Command> =
        root.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help").collect();
    for command in &visible {
        let _ = writeln!(out, "- [`{0}`](#gqa2mla-{0}): {1}", command.get_name(), one_line(command));
    }
    out.push_str("\n## Global options\n\n");
    let globals: Vec<&Arg> = root.get_arguments().filter(|a| a.is_global_set()).collect();
    for arg in &globals {
        out += &option(arg);
    }
    for command in visible {
        let _ = write!(out, "\n## gqa2mla {}\n\n", command.get_name());
        out += &about(command);
        let _ = write!(out, "```text\n{}\n```\n", usage(command));
        let mut heading = String::new();
        for arg in
            command.get_arguments().filter(|a| !a.is_global_set() && a.get_id() != "help" && a.get_id() != "version")
        {
            let of = match arg.get_help_heading() {
                Some(h) => h.to_owned(),
                None if arg.is_positional() => "Arguments".to_owned(),
                None => "Options".to_owned(),
            };
            if of != heading {
                let _ = write!(out, "\n### {of}\n\n");
                heading = of;
            }
            out += &option(arg);
        }
    }
    out.push_str(EXIT_CODES);
    out
}

const EXIT_CODES: &str = "
## Exit codes

| code | meaning |
| ---: | --- |
| 0 | done |
| 1 | a check did not hold (`verify`, `convert --verify`, `demo`), or a method of `compare` failed |
| 2 | unusable input or arguments |
| 3 | an I/O or resource failure: disk, memory, permissions, network |
| 130, 143 | interrupted by SIGINT or SIGTERM; nothing was published |

Results go to stdout, everything else to stderr. With `--json`, stdout holds one document with a `schema_version`; keys
are only ever added within a version. A reader that closes the pipe early ends the command quietly.
";

fn about(command: &Command) -> String {
    let text = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
    format!("{}\n\n", text.trim())
}

fn one_line(command: &Command) -> String {
    command.get_about().map(ToString::to_string).unwrap_or_default()
}

fn usage(command: &Command) -> String {
    let text = command.clone().render_usage().to_string();
    text.trim_start_matches("Usage: ").trim().to_owned()
}

fn option(arg: &Arg) -> String {
    let value = arg.get_value_names().map(|n| n.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
    let mut name = match (arg.get_short(), arg.get_long()) {
        (Some(s), Some(l)) => format!("-{s}, --{l}"),
        (None, Some(l)) => format!("--{l}"),
        (Some(s), None) => format!("-{s}"),
        (None, None) => String::new(),
    };
    let takes = !matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::Help | ArgAction::Version);
    if let Some(v) = value.filter(|_| takes) {
        let space = if name.is_empty() { "" } else { " " };
        let _ = write!(name, "{space}{}", if space.is_empty() { v } else { format!("<{v}>") });
    }
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut line = format!("- `{name}`: {}", help.replace('\n', " "));
    if takes {
        let possible: Vec<String> = arg.get_possible_values().iter().map(|p| format!("`{}`", p.get_name())).collect();
        if !possible.is_empty() {
            let _ = write!(line, " (one of {})", possible.join(", "));
        }
        let defaults: Vec<String> = arg.get_default_values().iter().map(|v| v.to_string_lossy().into_owned()).collect();
        if !defaults.is_empty() {
            let _ = write!(line, " [default: {}]", defaults.join(","));
        }
    }
    line.push('\n');
    line
}
