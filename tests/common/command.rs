//! The binary as a user calls it.

use std::process::Command;

/// The binary with these arguments in the root of the repository: no network, no logs, one width, whatever the machine
/// says.
pub fn gqa2mla(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("gqa2mla"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", "/nonexistent").env("COLUMNS", "120");
    command.env_remove("RUST_LOG").env_remove("HF_ENDPOINT").env_remove("HF_TOKEN");
    command
}
