//! Folders that somebody made to do harm, or that a tool left broken: every command on each of them.
//!
//! Whatever is in a folder, a command ends by itself with one of its exit codes, without a panic, within 1 GiB of address
//! space and 5 s of processor time, and where it refuses it leaves nothing behind. The limits are the system's
//! (`ulimit`), so that one which does not hold ends the command by a signal, however busy the machine is.

// Figures for the record, shown with --nocapture.
#![allow(clippy::print_stdout)]

mod converted;
mod files;
mod model;
mod tokenizer;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::common::copies::copy_folder;
use crate::common::models::fixture;
use crate::common::products;

/// Address space a command gets, beyond what matrix products set aside.
const KILOBYTES: u64 = 1 << 20;
/// Processor time a command gets.
const SECONDS: u64 = 5;
/// A command that waits for something that never comes. Far above `SECONDS`: the machine may be busy.
const HANGS: Duration = Duration::from_secs(120);

/// What has to come of a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Nothing can be converted or run.
    Refused,
    /// A clean end, whatever it says.
    Clean,
    /// As if nothing were wrong.
    Fine,
}
use Verdict::{Clean, Fine, Refused};

/// A name, what is done to a sound folder, and what has to come of it.
struct Case {
    name: String,
    damage: Box<dyn Fn(&Path) + Send + Sync>,
    verdict: Verdict,
}

fn case(name: impl Into<String>, verdict: Verdict, damage: impl Fn(&Path) + Send + Sync + 'static) -> Case {
    Case { name: name.into(), damage: Box::new(damage), verdict }
}

/// A command: how it is called, and whether it needs all of the model.
struct Call {
    name: &'static str,
    args: Vec<String>,
    /// Whether a folder that is `Refused` has to make it fail.
    strict: bool,
}

fn call(name: &'static str, strict: bool, args: &[&str]) -> Call {
    Call { name, args: args.iter().map(|a| (*a).to_owned()).collect(), strict }
}

const CALIBRATION: [&str; 4] = ["--calib-samples", "4", "--calib-seq-len", "64"];
const TEXT: [&str; 4] = ["--windows", "1", "--seq-len", "32"];
const CPU: [&str; 2] = ["--device", "cpu"];

/// Every command on `model`; `sound` is a model that nothing is wrong with.
fn calls(model: &str, sound: &str, out: &str) -> Vec<Call> {
    let with = |first: &[&str], more: &[&[&str]]| -> Vec<String> {
        first.iter().chain(more.iter().copied().flatten()).map(|a| (*a).to_owned()).collect()
    };
    let calibrated = |name, strict, args: Vec<String>| Call { name, args, strict };
    vec![
        call("inspect", false, &["inspect", model]),
        call("check", false, &["check", model]),
        calibrated("plan", true, with(&["plan", model], &[&CALIBRATION])),
        call("exact", true, &["convert", model, "-o", out, "--method", "exact"]),
        calibrated("convert", true, with(&["convert", model, "-o", out], &[&CALIBRATION])),
        calibrated("verify", true, with(&["verify", sound, model], &[&TEXT, &CPU])),
        call("verify-files", true, &["verify-files", model]),
        calibrated("eval", true, with(&["eval", model], &[&TEXT, &CPU])),
        calibrated("generate", true, with(&["generate", model, "-p", "One two", "--max-tokens", "2"], &[&CPU])),
        calibrated("bench", true, with(&["bench", model, "--contexts", "8", "--steps", "1"], &[&CPU])),
        calibrated(
            "compare",
            true,
            with(&["compare", model, "--methods", "transmla", "-o", out], &[&CALIBRATION, &TEXT]),
        ),
    ]
}

/// How a command ended.
struct End {
    /// `None`: by a signal.
    code: Option<i32>,
    stderr: String,
}

fn run(args: &[String]) -> Result<End, String> {
    let mut shell = Command::new("sh");
    // Two workers, the main thread, and a product within a product.
    let kilobytes = KILOBYTES + (products::reserved(4) >> 10);
    shell.arg("-c").arg(format!("ulimit -v {kilobytes}; ulimit -t {SECONDS}; exec \"$0\" \"$@\" --threads 2"));
    shell.arg(assert_cmd::cargo::cargo_bin!("gqa2mla")).args(args).current_dir("/");
    shell.env("HF_HUB_OFFLINE", "1").env("HF_HOME", "/nonexistent").env_remove("RUST_LOG");
    let mut child = shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts");
    let mut pipe = child.stderr.take().expect("a pipe");
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = std::io::Read::read_to_end(&mut pipe, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("known") {
            break status;
        }
        if start.elapsed() > HANGS {
            let _ = child.kill();
            let _ = child.wait();
            return Err("it hangs".to_owned());
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    Ok(End { code: status.code(), stderr: reader.join().expect("read") })
}

/// What is wrong with how a command ended.
fn judge(end: Result<End, String>, verdict: Verdict, strict: bool) -> Result<(), String> {
    let End { code, stderr } = end?;
    let start: String = stderr.chars().take(600).collect();
    match code {
        None => return Err(format!("ended by a signal: {start}")),
        Some(0) if verdict == Refused && strict => return Err("accepted".to_owned()),
        Some(0 | 1) => {}
        Some(_) if verdict == Fine => return Err(format!("refused: {start}")),
        Some(2 | 3) if stderr.contains("error:") => {}
        Some(n) => return Err(format!("exit code {n}: {start}")),
    }
    if stderr.contains("panicked") {
        return Err(format!("a panic: {start}"));
    }
    // Names in files may be long; what is said about them is not.
    if stderr.len() > 20_000 {
        return Err(format!("{} bytes of messages: {start}", stderr.len()));
    }
    if stderr.chars().any(|c| c == '\u{1b}' || c == '\u{202e}') {
        return Err(format!("what a terminal would obey: {start:?}"));
    }
    Ok(())
}

/// Runs `calls` on every case of a damaged copy of `base`; tells everything that went wrong at once.
fn try_all(base: &Path, cases: &[Case], calls: fn(&str, &str, &str) -> Vec<Call>) {
    let (next, tried) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let faults = std::sync::Mutex::new(Vec::new());
    let only = std::env::var("GQA2MLA_HOSTILE").ok();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if only.as_ref().is_some_and(|o| !case.name.contains(o)) {
                        continue;
                    }
                    let dir = tempfile::tempdir().expect("a temporary folder");
                    let model = dir.path().join("model");
                    copy_folder(base, &model);
                    (case.damage)(&model);
                    fs_err::create_dir(dir.path().join("to")).expect("made");
                    let out = dir.path().join("to/out");
                    let [model, out] = [model, out].map(|p| p.display().to_string());
                    let sound = fixture("pico-trained").display().to_string();
                    for call in calls(&model, &sound, &out) {
                        let began = Instant::now();
                        let judged = run(&call.args).and_then(|end| {
                            let refused = end.code.is_none_or(|c| c > 1);
                            judge(Ok(end), case.verdict, call.strict)?;
                            let left: Vec<_> =
                                fs_err::read_dir(dir.path().join("to")).expect("readable").flatten().collect();
                            if refused && !left.is_empty() { Err(format!("left {left:?}")) } else { Ok(()) }
                        });
                        tried.fetch_add(1, Ordering::Relaxed);
                        if began.elapsed() > Duration::from_secs(2) {
                            println!("{}, {}: {:.1?}", case.name, call.name, began.elapsed());
                        }
                        if let Err(fault) = judged {
                            faults.lock().expect("whole").push(format!("{}, {}: {fault}", case.name, call.name));
                        }
                        let _ = fs_err::remove_dir_all(&out);
                    }
                }
            });
        }
    });
    println!("{} folders, {} commands, {:.1?}", cases.len(), tried.into_inner(), start.elapsed());
    let faults = faults.into_inner().expect("whole");
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

/// A sound folder comes through, so that the limits are none that nothing could keep.
#[test]
fn a_sound_folder_is_fine_with_every_command() {
    let no_manifest = |model: &str, sound: &str, out: &str| {
        let mut all = calls(model, sound, out);
        // A source has no manifest, and is no MLA model.
        all.retain(|c| !matches!(c.name, "verify-files" | "check"));
        all
    };
    try_all(&fixture("pico-trained"), &[case("sound", Fine, |_| {})], no_manifest);
}

/// A conversion by method exact.
#[test]
fn converted_models() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let base = dir.path().join("converted");
    let from = fixture("pico-trained");
    let args = ["convert", &from.display().to_string(), "-o", &base.display().to_string(), "--method", "exact"];
    let end = run(&args.map(str::to_owned)).expect("ends");
    assert_eq!(end.code, Some(0), "{}", end.stderr);
    try_all(&base, &converted::cases(), calls);
}

#[test]
fn configs() {
    try_all(&fixture("pico-trained"), &model::configs(), calls);
}

#[test]
fn weights() {
    try_all(&fixture("pico-trained"), &model::weights(), calls);
}

#[test]
fn tokenizers_and_templates() {
    try_all(&fixture("pico-trained"), &tokenizer::cases(), calls);
}

#[test]
fn files_that_are_none() {
    try_all(&fixture("pico-trained"), &files::cases(), calls);
}
