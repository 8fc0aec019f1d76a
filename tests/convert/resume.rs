//! Runs that are stopped, and the runs that go on with them: the output is absent or whole, and the bytes are those of a run
//! that nothing stopped.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use gqa2mla::arch::Architecture;
use gqa2mla::convert::{Budget, CalibrationSettings, ConvertError, ConvertSettings, MethodChoice, convert, plan};
use gqa2mla::methods::attention_aware::AttentionAware;
use gqa2mla::observe::{Event, Observer, Silent};
use gqa2mla::source::{ModelSource, OpenOptions};
use gqa2mla::write::{Leftover, WriteError, verify_manifest};

use super::StopAt;
use crate::common::models::{fixture, method, open};
use crate::common::random::split_mix;

fn trained() -> PathBuf {
    fixture("pico-trained")
}

fn settings(method: impl Into<MethodChoice>) -> ConvertSettings {
    let method = method.into();
    ConvertSettings {
        kv_budget: method.compresses().then_some(Budget::Percent(50.0)),
        // Several shards, so that marks lie in and between them.
        max_shard_bytes: 300_000,
        calibration: CalibrationSettings { samples: 8, seq_len: 64, ..CalibrationSettings::default() },
        method,
        ..ConvertSettings::default()
    }
}

fn run(from: &Path, to: &Path, settings: &ConvertSettings, observer: &dyn Observer) -> Result<(), Box<ConvertError>> {
    let (source, arch) = open(from);
    convert(&source, &arch, settings, to, &|_| Vec::new(), observer).map(|_| ()).map_err(Box::new)
}

fn stopped(to: &Path, settings: &ConvertSettings, done: u64) -> PathBuf {
    let result = catch_unwind(AssertUnwindSafe(|| run(&trained(), to, settings, &StopAt(done))));
    assert!(result.is_err(), "it ran to its end");
    assert!(!to.exists(), "a stopped run published");
    leftover(to).expect("its work is kept")
}

/// The staging folder for an output.
fn leftover(to: &Path) -> Option<PathBuf> {
    let prefix = format!(".{}.partial-", to.file_name()?.to_str()?);
    let entries = fs_err::read_dir(to.parent()?).ok()?;
    entries
        .flatten()
        .map(|e| e.path())
        .find(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(&prefix)))
}

fn resuming(settings: &ConvertSettings) -> ConvertSettings {
    ConvertSettings { leftover: Leftover::Resume, ..settings.clone() }
}

fn manifest(to: &Path) -> String {
    assert!(verify_manifest(to).expect("a manifest").is_clean());
    fs_err::read_to_string(to.join("manifest.json")).expect("a manifest")
}

/// Nothing but the output lies beside it.
fn is_alone(to: &Path) -> bool {
    fs_err::read_dir(to.parent().expect("a parent")).expect("readable").count() == 1
}

#[test]
fn whatever_the_method_and_the_layer_the_bytes_are_the_same() {
    for method in MethodChoice::all() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let s = settings(method.clone());
        let whole = dir.path().join("whole/out");
        fs_err::create_dir(dir.path().join("whole")).expect("made");
        run(&trained(), &whole, &s, &Silent).expect("converts");
        for done in 0..=4 {
            let parent = dir.path().join(format!("{done}"));
            fs_err::create_dir(&parent).expect("made");
            let to = parent.join("out");
            stopped(&to, &s, done);
            run(&trained(), &to, &resuming(&s), &Silent).unwrap_or_else(|e| panic!("{method} at {done}: {e}"));
            assert_eq!(manifest(&to), manifest(&whole), "{method} stopped after {done} layers");
            assert!(is_alone(&to));
        }
    }
}

#[test]
fn a_run_may_be_stopped_behind_every_layer() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let s = settings(AttentionAware { refine: 2, ..AttentionAware::default() });
    let whole = dir.path().join("whole");
    run(&trained(), &whole, &s, &Silent).expect("converts");
    fs_err::create_dir(dir.path().join("b")).expect("made");
    let to = dir.path().join("b/out");
    stopped(&to, &s, 0);
    for done in 1..=4 {
        stopped(&to, &resuming(&s), done);
    }
    run(&trained(), &to, &resuming(&s), &Silent).expect("resumes");
    assert_eq!(manifest(&to), manifest(&whole));
    assert!(is_alone(&to));
}

#[test]
fn states_that_wait_on_the_disk_change_nothing() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for method in [method("attention-aware"), method("care")] {
        let s = settings(method.clone());
        let whole = dir.path().join(format!("{method}-whole"));
        run(&trained(), &whole, &s, &Silent).expect("converts");
        let source = ModelSource::open(&trained().display().to_string(), &OpenOptions::default(), &Silent);
        let source = source.expect("opens");
        let arch = Architecture::from_config(&source.config).expect("is understood");
        let of = |s: &ConvertSettings| plan(&source, &arch, s, false, &Silent).map_err(Box::new);
        let free = of(&s).expect("plans");
        assert!(!free.spilled);
        // One byte less than all of it: hidden states have to go.
        let tight = ConvertSettings { max_memory: Some(free.peak_memory_bytes - 1), ..s.clone() };
        let planned = of(&tight).expect("plans");
        assert!(planned.spilled && planned.peak_memory_bytes < free.peak_memory_bytes);
        let to = dir.path().join(format!("{method}-tight"));
        run(&trained(), &to, &tight, &Silent).expect("converts");
        assert_eq!(manifest(&to), manifest(&whole), "{method}");
        // Stopped in one way and gone on with in the other: the limit is not part of what is written.
        let to = dir.path().join(format!("{method}-mixed"));
        stopped(&to, &tight, 2);
        run(&trained(), &to, &resuming(&s), &Silent).expect("resumes");
        assert_eq!(manifest(&to), manifest(&whole), "{method}");
        let impossible = ConvertSettings { max_memory: Some(1 << 20), ..s };
        let error = of(&impossible).expect_err("too little").to_string();
        assert!(error.contains("--max-memory") && error.contains("hint:"), "{error}");
    }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs_err::read(path).expect("readable");
    let at = at.min(bytes.len() - 1);
    bytes[at] ^= 0x04;
    fs_err::write(path, bytes).expect("written");
}

#[test]
fn what_was_damaged_meanwhile_is_noticed_and_made_again() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let s = settings(method("attention-aware"));
    let whole = dir.path().join("whole");
    run(&trained(), &whole, &s, &Silent).expect("converts");
    type Damage = (&'static str, &'static dyn Fn(&Path));
    let damages: [Damage; 10] = [
        ("last journal entry", &|root| flip(&root.join("journal"), usize::MAX)),
        ("journal cut", &|root| {
            let bytes = fs_err::read(root.join("journal")).expect("readable");
            fs_err::write(root.join("journal"), &bytes[..bytes.len() - 7]).expect("written");
        }),
        ("first line of the journal", &|root| flip(&root.join("journal"), 80)),
        ("finished shard", &|root| flip(&root.join("model").join(first_shard(root)), 50_000)),
        ("finished shard gone", &|root| {
            fs_err::remove_file(root.join("model").join(first_shard(root))).expect("removed")
        }),
        ("source states", &|root| flip(&root.join("hidden-source-1"), 1000)),
        ("converted states gone", &|root| fs_err::remove_file(root.join("hidden-converted-1")).expect("removed")),
        ("all states", &|root| {
            for name in ["hidden-source-0", "hidden-source-1"] {
                fs_err::write(root.join(name), "").expect("written");
            }
        }),
        ("strangers", &|root| {
            fs_err::write(root.join("model/config.json"), "{}").expect("written");
            fs_err::create_dir(root.join("model/x")).expect("made");
        }),
        ("more written than promised", &|root| {
            let last = shards(root).pop().expect("a shard");
            let path = root.join("model").join(last);
            let mut bytes = fs_err::read(&path).expect("readable");
            bytes.extend([7; 1000]);
            fs_err::write(&path, bytes).expect("written");
        }),
    ];
    for (what, damage) in damages {
        let to = dir.path().join(what.replace(' ', "-"));
        let root = stopped(&to, &s, 3);
        damage(&root);
        match run(&trained(), &to, &resuming(&s), &Silent) {
            Ok(()) => assert_eq!(manifest(&to), manifest(&whole), "{what}"),
            Err(e) => panic!("{what}: {e}"),
        }
    }
}

fn shards(root: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(root.join("model")).expect("readable");
    let mut names: Vec<_> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn first_shard(root: &Path) -> String {
    shards(root).remove(0)
}

#[test]
fn another_run_is_not_taken_for_this_one() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("model");
    fs_err::create_dir(&from).expect("made");
    for entry in fs_err::read_dir(trained()).expect("readable").flatten() {
        fs_err::copy(entry.path(), from.join(entry.file_name())).expect("copied");
    }
    let s = settings(method("care"));
    let to = dir.path().join("out");
    let result = catch_unwind(AssertUnwindSafe(|| run(&from, &to, &s, &StopAt(2))));
    assert!(result.is_err());
    let root = leftover(&to).expect("kept");

    // Without a word about it: nothing is done, and the message says what can be.
    match run(&from, &to, &s, &Silent).map_err(|e| *e) {
        Err(ConvertError::Write(e @ WriteError::Unfinished { .. })) => {
            let text = e.to_string();
            assert!(text.contains("--resume") && text.contains("--restart"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    let refused = |s: &ConvertSettings, field: &str| match run(&from, &to, &resuming(s), &Silent).map_err(|e| *e) {
        Err(ConvertError::Write(e @ WriteError::DifferentRun { .. })) => {
            assert!(e.to_string().contains(field), "expected `{field}`: {e}");
        }
        other => panic!("{field}: {other:?}"),
    };
    refused(&ConvertSettings { method: method("transmla"), ..s.clone() }, "setting `method`");
    refused(&ConvertSettings { kv_budget: Some(Budget::Values(48)), ..s.clone() }, "setting `kv_budget");
    let mut other = s.clone();
    other.calibration.seed = 1;
    refused(&other, "calibration");
    other = s.clone();
    other.max_shard_bytes += 1;
    refused(&other, "setting `max_shard_bytes`");
    let config = fs_err::read_to_string(from.join("config.json")).expect("readable");
    fs_err::write(from.join("config.json"), config.replacen('{', "{\"note\": 1,", 1)).expect("written");
    refused(&s, "config.json");
    fs_err::write(from.join("config.json"), &config).expect("written");
    // The same size and header, one weight changed.
    flip(&from.join("model.safetensors"), usize::MAX);
    refused(&s, "model.safetensors");
    assert!(leftover(&to).is_some_and(|r| r == root), "what was refused is still there");
    run(&from, &to, &ConvertSettings { leftover: Leftover::Restart, ..s }, &Silent).expect("begins anew");
    assert!(leftover(&to).is_none());
}

#[test]
fn a_failure_that_would_come_again_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("model");
    fs_err::create_dir(&from).expect("made");
    for entry in fs_err::read_dir(trained()).expect("readable").flatten() {
        fs_err::copy(entry.path(), from.join(entry.file_name())).expect("copied");
    }
    /// Changes the source while it is converted.
    struct Meddle(PathBuf);
    impl Observer for Meddle {
        fn event(&self, event: Event) {
            if matches!(event, Event::Checkpoint { done: 2, .. }) {
                let file = fs_err::OpenOptions::new().append(true).open(&self.0).expect("opens");
                file.set_len(file.metadata().expect("known").len() + 1).expect("grows");
            }
        }
    }
    let to = dir.path().join("out");
    let error =
        run(&from, &to, &settings(method("exact")), &Meddle(from.join("model.safetensors"))).expect_err("changed");
    assert!(error.to_string().contains("changed while it was in use"), "{error}");
    assert!(!to.exists() && leftover(&to).is_none());
}

/// The binary on the fixture, with windows of few tokens.
fn command(to: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("gqa2mla"));
    command.args(["convert", &trained().display().to_string(), "-o", &to.display().to_string()]);
    command.args(["--calib-seq-len", "64"]).args(more);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

#[cfg(unix)]
#[test]
fn killed_at_random_moments_it_is_absent_or_whole_and_ends_the_same() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let whole = dir.path().join("whole");
    let small = ["--calib-samples", "24", "--max-shard-size", "300KB"];
    let resumed_run = [&small[..], &["--resume"]].concat();
    let started = Instant::now();
    assert!(command(&whole, &small).status().expect("starts").success());
    let length = started.elapsed();
    let expected = manifest(&whole);
    let mut seed = 7;
    let (mut kills, mut resumed, mut round) = (0, 0, 0);
    while kills < 20 {
        let to = dir.path().join(format!("out-{round}"));
        round += 1;
        loop {
            let mut child = command(&to, &resumed_run).spawn().expect("starts");
            // The whole length, so that some runs end: the last steps are where the output appears.
            let wait = length.mul_f64((split_mix(&mut seed) % 1000) as f64 / 1000.0);
            std::thread::sleep(wait.max(Duration::from_millis(5)));
            let ended = child.try_wait().expect("known").is_some();
            child.kill().expect("killed");
            let out = child.wait_with_output().expect("ended");
            if String::from_utf8_lossy(&out.stderr).contains("resumed:") {
                resumed += 1;
            }
            kills += usize::from(!ended);
            if to.exists() {
                assert_eq!(manifest(&to), expected, "round {round}, seed 7");
                break;
            }
            assert!(!ended, "it ended without an output: {}", String::from_utf8_lossy(&out.stderr));
        }
        // What a kill right after publishing left goes with the next run.
        let out = command(&to, &[&resumed_run[..], &["--overwrite"]].concat()).output().expect("starts");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(manifest(&to), expected);
        assert!(leftover(&to).is_none());
    }
    assert!(resumed > 0, "no run went on with another");
}

#[cfg(unix)]
#[test]
fn neither_place_nor_locale_nor_threads_change_a_byte_and_the_input_stays_as_it_is() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let contents = || -> Vec<(PathBuf, Vec<u8>, std::time::SystemTime)> {
        let mut files: Vec<_> = fs_err::read_dir(trained()).expect("readable").flatten().map(|e| e.path()).collect();
        files.sort();
        let modified = |p: &Path| fs_err::metadata(p).expect("known").modified().expect("known");
        files.into_iter().map(|p| (p.clone(), fs_err::read(&p).expect("readable"), modified(&p))).collect()
    };
    let before = contents();
    let mut manifests = Vec::new();
    for (n, (locale, zone, threads)) in
        [("C", "UTC", "1"), ("tr_TR.UTF-8", "Asia/Tokyo", "4"), ("de_DE", "America/Caracas", "3")]
            .into_iter()
            .enumerate()
    {
        let to = dir.path().join(format!("a rather long name, {n}"));
        let mut command = command(&to, &["--calib-samples", "24", "--threads", threads]);
        let status = command.env("LC_ALL", locale).env("TZ", zone).current_dir(dir.path()).status();
        assert!(status.expect("starts").success());
        manifests.push(manifest(&to));
    }
    assert!(manifests.windows(2).all(|w| w[0] == w[1]));
    assert!(before == contents(), "the source was touched");
}

#[cfg(target_os = "linux")]
#[test]
fn two_runs_do_not_share_a_folder_even_without_the_lock() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let mut child = command(&to, &["--calib-samples", "256", "--refine", "50"]).spawn().expect("starts");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !leftover(&to).is_some_and(|r| r.join("journal").exists()) {
        assert!(Instant::now() < deadline, "no journal within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    let second = |more: &[&str]| {
        let out = command(&to, more).output().expect("starts");
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let who = format!("process {}", child.id());
    let (code, text) = second(&["--resume"]);
    assert!(code == Some(3) && text.contains(&who) && text.contains(".out.lock"), "{text}");
    // As where links do not work, or somebody removed it: the journal says who writes there.
    fs_err::remove_file(dir.path().join(".out.lock")).expect("removed");
    for more in ["--resume", "--restart"] {
        let (code, text) = second(&[more]);
        assert!(code == Some(3) && text.contains(&who), "{more}: {text}");
    }
    assert!(leftover(&to).is_some(), "a run's folder was taken from it");
    child.kill().expect("killed");
    child.wait().expect("ended");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_can_be_gone_on_with() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let whole = dir.path().join("whole");
    let small = ["--calib-samples", "24"];
    assert!(command(&whole, &small).status().expect("starts").success());
    let bytes = fs_err::metadata(whole.join("model.safetensors")).expect("there").len();
    let to = dir.path().join("out");
    let inner = command(&to, &small);
    let limited = |blocks: u64, more: &[&str]| {
        let mut shell = Command::new("sh");
        // Blocks of 512 bytes in POSIX sh; writing beyond fails as on a full disk.
        shell.arg("-c").arg(format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\""));
        shell.arg(inner.get_program()).args(inner.get_args()).args(more).output().expect("starts")
    };
    // Room for two thirds of the weights.
    let out = limited(bytes * 2 / 3 / 512, &[]);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(3), "{text}");
    assert!(text.contains("is full") && text.contains("--resume"), "{text}");
    assert!(!to.exists() && leftover(&to).is_some(), "{text}");
    // Still full: the same again, and nothing is lost.
    let out = limited(bytes * 2 / 3 / 512, &["--resume"]);
    assert_eq!(out.status.code(), Some(3), "{}", String::from_utf8_lossy(&out.stderr));
    let out = limited(1 << 30, &["--resume"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(String::from_utf8_lossy(&out.stderr).contains("resumed:"));
    assert_eq!(manifest(&to), manifest(&whole));
}

#[cfg(unix)]
#[test]
fn signals_stop_it_and_say_how_to_go_on() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let to = dir.path().join("out");
        // Enough work that the signal meets it, whatever the machine.
        let more = ["--calib-samples", "256", "--refine", "50"];
        let child = command(&to, &more).spawn().expect("starts");
        let deadline = Instant::now() + Duration::from_secs(60);
        // Wait until there is something to go on with.
        while !leftover(&to).is_some_and(|r| r.join("HOW-TO-RESUME.txt").exists()) {
            assert!(Instant::now() < deadline, "no checkpoint within a minute");
            std::thread::sleep(Duration::from_millis(5));
        }
        let sent = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
        assert!(sent.expect("kill").success());
        let out = child.wait_with_output().expect("ends");
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{text}");
        assert!(text.contains("nothing was published") && text.contains("hint: go on with `gqa2mla convert"), "{text}");
        assert!(text.contains("--resume`"), "{text}");
        assert!(!to.exists());
        let note = fs_err::read_to_string(leftover(&to).expect("kept").join("HOW-TO-RESUME.txt")).expect("a note");
        assert!(note.contains("--resume") && note.contains("--refine 50"), "{note}");
    }
}
