//! Whole commands: what they print, where, and how they exit.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use insta::assert_snapshot;
use serde_json::Value;

fn gqa2mla(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("gqa2mla"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
    // No network, no logs, one width, whatever the machine says.
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", "/nonexistent").env("COLUMNS", "120");
    command.env_remove("RUST_LOG").env_remove("HF_ENDPOINT").env_remove("HF_TOKEN");
    command
}

fn run(args: &[&str]) -> Output {
    gqa2mla(args).output().expect("the binary starts")
}

/// Exit code, stdout and stderr in one text, with temporary paths named.
fn transcript(args: &[&str], hidden: &[(&Path, &str)]) -> String {
    let out = run(args);
    let mut text = format!(
        "exit: {}\n--- stdout\n{}--- stderr\n{}",
        out.status.code().map_or_else(|| "signal".to_owned(), |c| c.to_string()),
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    for (path, name) in hidden {
        text = text.replace(&path.display().to_string(), name);
    }
    text
}

fn json(args: &[&str]) -> (Option<i32>, Value) {
    let out = run(args);
    let document = serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("stdout of {args:?} is one JSON document ({e}): {out:?}"));
    (out.status.code(), document)
}

/// A folder with only this config.
fn config_folder(config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    fs_err::write(dir.path().join("config.json"), config.to_string()).expect("written");
    dir
}

/// The model that the demo uses.
const TRAINED: &str = "fixtures/pico-trained";

#[test]
fn help_is_short_and_names_every_command() {
    assert_snapshot!("help", transcript(&["-h"], &[]));
}

#[test]
fn reference_in_docs_is_that_of_the_binary() {
    let printed = String::from_utf8(run(&["reference"]).stdout).expect("UTF-8");
    let committed = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
    let committed = fs_err::read_to_string(committed).expect("docs/cli.md");
    assert!(printed == committed, "docs/cli.md is out of date: run `gqa2mla reference > docs/cli.md`");
}

#[test]
fn usage_errors_exit_with_2_and_name_what_is_allowed() {
    let cases: [(&str, &[&str]); 10] = [
        ("negative", &["plan", "m", "--kv-lora-rank", "-5"]),
        ("no_command", &[]),
        ("unknown_method", &["convert", "m", "-o", "x", "--method", "magic"]),
        ("bad_budget", &["convert", "m", "-o", "x", "--kv-budget", "120%"]),
        ("odd_rope", &["plan", "m", "--qk-rope-head-dim", "33"]),
        ("unknown_step", &["plan", "m", "--without", "luck"]),
        ("bad_size", &["plan", "m", "--max-shard-size", "5XB"]),
        ("no_output", &["convert", "m"]),
        ("ignored_option", &["plan", "m", "--method", "transmla", "--refine", "3"]),
        ("overdetermined", &["plan", "m", "--kv-budget", "50%", "--kv-lora-rank", "8", "--qk-rope-head-dim", "8"]),
    ];
    for (name, args) in cases {
        let text = transcript(args, &[]);
        assert!(text.starts_with("exit: 2\n--- stdout\n--- stderr\n"), "{name}: {text}");
        assert_snapshot!(name, text);
    }
}

#[test]
fn a_missing_model_is_unusable_input() {
    assert_snapshot!("missing_model", transcript(&["inspect", "./no/such/folder"], &[]));
}

#[test]
fn an_unknown_family_lists_the_known_ones() {
    let dir = config_folder(&serde_json::json!({ "model_type": "gpt2" }));
    let path = dir.path().display().to_string();
    assert_snapshot!("unknown_family", transcript(&["inspect", &path], &[(dir.path(), "[MODEL]")]));
}

#[test]
fn inspect_shows_a_model_for_people() {
    assert_snapshot!("inspect_qwen2", transcript(&["inspect", "fixtures/pico-qwen2"], &[]));
    assert_snapshot!(
        "inspect_several",
        transcript(&["inspect", "fixtures/pico-llama", "fixtures/pico-deepseek-v3"], &[])
    );
}

#[test]
fn inspect_json_has_the_documented_keys() {
    let (code, one) = json(&["inspect", "fixtures/pico-llama", "--json"]);
    assert_eq!(code, Some(0));
    assert_eq!(one["schema_version"], 1);
    assert_eq!(one["family"], "llama");
    assert_eq!(one["layers"], 2);
    assert_eq!(one["kv_values_per_token_per_layer"], 32);
    assert!(one["targets"].as_array().is_some_and(|t| !t.is_empty()));
    let (_, two) = json(&["--json", "inspect", "fixtures/pico-llama", "fixtures/pico-qwen2"]);
    assert_eq!(two["models"].as_array().map(Vec::len), Some(2));
    assert_eq!(two["models"][1]["qkv_bias"], true);
}

#[test]
fn inspect_needs_no_weights() {
    let config = fs_err::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico-llama/config.json"));
    let config: Value = serde_json::from_slice(&config.expect("a fixture")).expect("JSON");
    let dir = config_folder(&config);
    let (code, alone) = json(&["inspect", "--json", &dir.path().display().to_string()]);
    let (_, whole) = json(&["inspect", "--json", "fixtures/pico-llama"]);
    assert_eq!(code, Some(0));
    assert_eq!(alone["weights_present"], false);
    for key in ["parameters", "weight_bytes", "targets", "kv_bytes_at_max_position"] {
        assert_eq!(alone[key], whole[key], "{key}");
    }
}

#[test]
fn a_model_agrees_with_itself() {
    let (code, v) = json(&["verify", TRAINED, TRAINED, "--json", "--seq-len", "64", "--windows", "2"]);
    assert_eq!(code, Some(0), "{v}");
    for key in ["max_abs_dlogit", "kl_nats_per_token"] {
        assert_eq!(v[key], 0.0, "{key}");
    }
    assert_eq!(v["top1_agreement"], 1.0);
    assert_eq!(v["ppl_source"], v["ppl_converted"]);
    assert_eq!((&v["passed"], &v["tokens"]), (&true.into(), &128.into()));
}

#[test]
fn a_threshold_that_does_not_hold_exits_with_1() {
    let args = ["verify", TRAINED, TRAINED, "--json", "--seq-len", "64", "--windows", "2", "--max-ppl-ratio", "0.5"];
    let (code, v) = json(&args);
    assert_eq!((code, &v["passed"]), (Some(1), &false.into()));
    assert_eq!(v["failed"][0]["measure"], "ppl_ratio");
}

#[test]
fn eval_and_verify_measure_the_same_perplexity() {
    let (code, e) = json(&["eval", TRAINED, "--json", "--seq-len", "64", "--windows", "3", "--every", "2"]);
    let (_, v) = json(&["verify", TRAINED, TRAINED, "--json", "--seq-len", "64", "--windows", "3", "--every", "2"]);
    assert_eq!(code, Some(0));
    assert_eq!(e["perplexity"], v["ppl_source"]);
    assert_eq!(e["tokens"], 3 * 63);
}

#[test]
fn a_text_shorter_than_a_window_is_unusable() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text = dir.path().join("short.txt");
    fs_err::write(&text, "short").expect("written");
    let args = ["eval", TRAINED, "--text", &text.display().to_string()];
    assert_snapshot!("short_text", transcript(&args, &[(dir.path(), "[DIR]")]));
    fs_err::write(&text, [0xff, 0xfe, 0x00]).expect("written");
    assert_eq!(run(&args).status.code(), Some(2), "not UTF-8");
}

#[test]
fn text_in_json_lines_is_that_of_its_field() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text: String = (0..200).map(|n| format!("Line {n} of a text with \"quotes\".\n")).collect();
    let lines: Vec<_> = text.lines().map(|l| serde_json::json!({ "id": 7, "text": l }).to_string()).collect();
    let (plain, rows) = (dir.path().join("a.txt"), dir.path().join("a.jsonl"));
    fs_err::write(&plain, text.trim_end()).expect("written");
    fs_err::write(&rows, lines.join("\n")).expect("written");
    let perplexity = |path: &Path| {
        let path = path.display().to_string();
        let (code, e) = json(&["eval", TRAINED, "--json", "--text", &path, "--seq-len", "64", "--windows", "4"]);
        assert_eq!(code, Some(0));
        e["perplexity"].clone()
    };
    assert_eq!(perplexity(&plain), perplexity(&rows));
    let out = run(&["eval", TRAINED, "--text", "/no/such/text"]);
    assert!(String::from_utf8_lossy(&out.stderr).starts_with("error: cannot read the text `/no/such/text`"), "{out:?}");
}

#[test]
fn files_are_checked_against_the_manifest() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let path = to.display().to_string();
    let out = run(&["convert", "fixtures/pico-trained", "-o", &path, "--method", "exact", "-q"]);
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert!(!to.join("golden.json").exists(), "not one of the model's files");
    let (code, v) = json(&["verify-files", &path, "--json"]);
    assert_eq!((code, &v["passed"]), (Some(0), &true.into()));
    let mut weights = fs_err::read(to.join("model.safetensors")).expect("readable");
    *weights.last_mut().expect("bytes") ^= 1;
    fs_err::write(to.join("model.safetensors"), weights).expect("written");
    fs_err::remove_file(to.join("tokenizer.json")).expect("removed");
    fs_err::write(to.join("stranger\u{202e}.txt"), "").expect("written");
    let (code, v) = json(&["verify-files", &path, "--json"]);
    assert_eq!((code, &v["passed"]), (Some(1), &false.into()));
    assert_eq!(v["differing"], serde_json::json!(["model.safetensors"]));
    assert_eq!(v["missing"], serde_json::json!(["tokenizer.json"]));
    let text = String::from_utf8(run(&["verify-files", &path]).stdout).expect("UTF-8");
    for line in ["model.safetensors: differs", "tokenizer.json: missing", ": not in the manifest", "3 of 8 files"] {
        assert!(text.contains(line), "expected `{line}`:\n{text}");
    }
    assert_eq!(run(&["verify-files", "fixtures/pico-llama"]).status.code(), Some(2), "no manifest");
    assert_eq!(run(&["verify-files", "/no/such/folder"]).status.code(), Some(2));
}

#[test]
fn an_mla_model_is_not_converted_again() {
    assert_snapshot!("mla_source", transcript(&["plan", "fixtures/pico-deepseek-v3"], &[]));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_a_resource_failure() {
    let full = fs_err::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let mut command = gqa2mla(&["inspect", "fixtures/pico-llama"]);
    let out = command.stdout(full.into_file()).output().expect("the binary starts");
    assert_eq!(out.status.code(), Some(3), "{out:?}");
    assert!(String::from_utf8_lossy(&out.stderr).starts_with("error: "));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child =
        gqa2mla(&["reference"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    drop(child.stdout.take());
    let out = child.wait_with_output().expect("it ends");
    assert_eq!((out.status.code(), out.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn a_folder_needs_no_network_and_a_token_is_never_shown() {
    // Port 9 discards; nothing listens there. Whoever asks it fails.
    let with = |args: &[&str]| {
        let mut command = gqa2mla(args);
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_TOKEN", "hf_do_not_show");
        command.env("RUST_LOG", "trace").env("HF_HUB_DOWNLOAD_TIMEOUT", "20");
        command.output().expect("the binary starts")
    };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out").display().to_string();
    let local = with(&["convert", "fixtures/pico-llama", "-o", &to, "--method", "exact"]);
    assert_eq!(local.status.code(), Some(0), "{local:?}");
    let hub = with(&["inspect", "org/name"]);
    assert_eq!(hub.status.code(), Some(3), "{hub:?}");
    for out in [&local, &hub] {
        let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(!text.contains("hf_do_not_show"), "{text}");
    }
}

#[test]
fn what_reads_stdout_gets_one_document_whatever_goes_to_stderr() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out").display().to_string();
    let (code, v) = json(&["convert", TRAINED, "-o", &to, "--json", "--calib-samples", "16", "--calib-seq-len", "64"]);
    assert_eq!((code, &v["schema_version"]), (Some(0), &1.into()));
    let (code, again) = json(&["plan", TRAINED, "--json", "--quick", "--max-memory", "1TB"]);
    assert_eq!((code, &again["spilled"]), (Some(0), &false.into()));
}

#[test]
fn every_shell_gets_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let out = run(&["completions", shell]);
        assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("kv-budget"), "{shell}");
    }
}
