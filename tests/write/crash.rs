//! A run that is killed, or whose disk is full, never shows half a model. The child is this test binary itself.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use gqa2mla::source::Dtype;
use gqa2mla::write::{ShardPlan, StagedWriter, Staging, StagingOptions, WriteError};

use crate::common::checkpoint::{listing, sample, samples, write};

const OUTPUT: &str = "GQA2MLA_TEST_OUTPUT";

/// Not a test of its own: what the child does, told by the environment. Its parent reads the progress on stderr.
#[allow(clippy::print_stderr)]
#[test]
fn child() {
    let Some(output) = std::env::var_os(OUTPUT) else { return };
    let tensors: Vec<_> = (0..64).map(|i| sample(&format!("t{i}"), Dtype::F32, &[64, 1024])).collect();
    let planned: Vec<_> = tensors.iter().map(|t| t.0.clone()).collect();
    let plan = ShardPlan::new(&planned, 1 << 20).unwrap();
    let staging = Staging::create(Path::new(&output), &StagingOptions { overwrite: true, ..Default::default() });
    let mut writer = StagedWriter::new(staging.unwrap(), plan);
    for (tensor, bytes) in &tensors {
        if let Err(e) = writer.write_tensor(&tensor.name, bytes) {
            assert!(matches!(e, WriteError::Full { .. }), "{e:?}");
            assert!(e.to_string().contains("hint:") && e.to_string().contains("model-"), "{e}");
            eprintln!("full");
            return;
        }
        eprintln!("wrote {}", tensor.name);
        if std::env::var_os("GQA2MLA_TEST_HANG").is_some() && tensor.name == "t20" {
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
    }
    writer.finish().unwrap();
}

fn child_command(output: &Path, shell: &str) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{shell} exec \"$0\" --exact write::crash::child --nocapture"));
    command.arg(std::env::current_exe().unwrap()).env(OUTPUT, output).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

#[cfg(target_os = "linux")]
#[test]
fn a_killed_run_leaves_the_output_alone_and_the_next_one_cleans_up() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    write(&out, &samples(), 1 << 30, false).unwrap();
    let before: Vec<_> = listing(&out).iter().map(|n| fs_err::read(out.join(n)).unwrap()).collect();
    let mut child = child_command(&out, "").env("GQA2MLA_TEST_HANG", "1").spawn().unwrap();
    let pid = child.id();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|l| l == "wrote t20"));
    // It is alive: the output is locked, and the message says by whom.
    match write(&out, &samples(), 1 << 30, true) {
        Err(WriteError::Locked { pid: holder, .. }) => assert_eq!(holder, pid),
        other => panic!("{other:?}"),
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(listing(root.path()).len(), 3, "the output, the dead lock and its staging folder");
    assert_eq!(before, listing(&out).iter().map(|n| fs_err::read(out.join(n)).unwrap()).collect::<Vec<_>>());
    write(&out, &samples()[..1], 1 << 30, true).unwrap();
    assert_eq!(listing(root.path()), ["out"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_a_clean_error() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    // A limit of 256 blocks of 512 bytes per file, its signal ignored: writing fails as on a full disk.
    let result = child_command(&out, "trap '' XFSZ; ulimit -f 256;").output().unwrap();
    let text = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success() && text.contains("full"), "{text}");
    assert!(listing(root.path()).is_empty(), "{:?}", listing(root.path()));
}
