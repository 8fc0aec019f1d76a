//! Whole commands: what they print, where, and how they exit.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use insta::assert_snapshot;
use serde_json::Value;

use crate::common::command::gqa2mla;

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
fn check_knows_the_engines() {
    assert_snapshot!("check", transcript(&["check", "fixtures/pico-deepseek-v3-bias"], &[]));
    let (code, all) = json(&["check", "fixtures/pico-deepseek-v3", "--json"]);
    assert_eq!((code, &all["passed"]), (Some(0), &true.into()));
    assert_eq!(all["engines"].as_array().map(Vec::len), Some(8));
    for (model, engine, code) in [
        ("fixtures/pico-deepseek-v3", "transformers-4", 0),
        ("fixtures/pico-youtu", "transformers-4", 1),
        ("fixtures/pico-deepseek-v3-bias", "mistral.rs", 1),
        ("fixtures/pico-deepseek-v3", "transformers", 0),
        ("fixtures/pico-deepseek-v3-bias", "transformers", 0),
        ("fixtures/pico-deepseek-v3-bias", "vllm", 1),
        ("fixtures/pico-deepseek-v3-bias", "llama.cpp", 1),
        ("fixtures/pico-youtu", "vllm", 0),
        ("fixtures/pico-youtu", "sglang", 1),
    ] {
        let (found, document) = json(&["check", model, "--engine", engine, "--json"]);
        assert_eq!(found, Some(code), "{model} {engine}: {document}");
    }
    let out = run(&["check", "fixtures/pico-llama"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("not an MLA model"));
}

#[test]
fn a_family_file_and_a_broken_one() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("mine.toml");
    let config = fs_err::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico-llama/config.json"));
    let mut config: Value = serde_json::from_str(&config.expect("a fixture")).expect("JSON");
    config["model_type"] = "mine".into();
    let model = config_folder(&config);
    let (model, file) = (model.path().display().to_string(), path.display().to_string());
    fs_err::write(&path, "extends = \"llama\"\nmodel_types = [\"mine\"]\n").expect("written");
    let (code, document) = json(&["inspect", &model, "--json", "--family-file", &file]);
    assert_eq!((code, &document["family"]), (Some(0), &"mine".into()));
    fs_err::write(&path, "extends = \"nothing\"\n").expect("written");
    let out = run(&["inspect", &model, "--family-file", &file]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("family description `mine`"), "{out:?}");
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

#[test]
fn generate_streams_text_and_tells_the_speed() {
    let args = ["generate", TRAINED, "--raw", "--prompt", "The ", "--max-tokens", "12", "--ignore-end"];
    let out = run(&args);
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    let (code, document) = json(&[&args[..], &["--json"]].concat());
    assert_eq!(code, Some(0));
    assert_eq!(document["text"].as_str().map(|t| format!("{t}\n")), String::from_utf8(out.stdout).ok());
    assert_eq!((document["tokens"].as_array().map(Vec::len), &document["stop"]), (Some(12), &"max_tokens".into()));
    // The last token is not fed back.
    assert_eq!(document["decode"]["tokens"], 11);
    assert!(String::from_utf8_lossy(&out.stderr).contains("tokens/s"), "{:?}", out.stderr);
    let drawn =
        |seed: &str| json(&[&args[..], &["--json", "--temperature", "1", "--seed", seed]].concat()).1["tokens"].clone();
    assert_eq!(drawn("5"), drawn("5"));
    assert_ne!(drawn("5"), drawn("6"));
}

#[test]
fn a_context_beyond_the_model_is_refused_unless_asked_for() {
    let args = ["generate", TRAINED, "--raw", "--prompt", "The ", "--max-tokens", "100000"];
    let out = run(&args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2));
    assert!(text.contains("positions of the model") && text.contains("--beyond-context"), "{text}");
    let bench = run(&["bench", TRAINED, "--contexts", "100000", "--steps", "1"]);
    assert_eq!(bench.status.code(), Some(2), "{bench:?}");
}

#[test]
fn a_chat_template_is_used_where_there_is_one() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let trained = Path::new(env!("CARGO_MANIFEST_DIR")).join(TRAINED);
    for file in ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"] {
        fs_err::copy(trained.join(file), dir.path().join(file)).expect("copied");
    }
    let path = dir.path().display().to_string();
    let tokens = |args: &[&str]| {
        let (code, document) =
            json(&[&["generate", path.as_str(), "--json", "--max-tokens", "4", "--ignore-end"], args].concat());
        (code, document["prefill"]["tokens"].as_u64().unwrap_or(0))
    };
    let without = tokens(&["--prompt", "abc"]);
    fs_err::write(
        dir.path().join("chat_template.jinja"),
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' * 9 }}",
    )
    .expect("written");
    let (code, with) = tokens(&["--prompt", "abc"]);
    assert_eq!((code, tokens(&["--prompt", "abc", "--raw"])), (Some(0), without));
    assert!(with > without.1, "{with} {without:?}");
    fs_err::write(dir.path().join("chat_template.jinja"), "{{ raise_exception('no') }}").expect("written");
    let out = run(&["generate", &path, "--prompt", "abc"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("--raw"), "{out:?}");
}

#[test]
fn bench_measures_models_side_by_side() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().display().to_string();
    let mla = "fixtures/pico-deepseek-v3";
    let args = ["bench", TRAINED, mla, "--json", "--contexts", "8,20", "--batches", "1,3", "--steps", "3", "-o", &path];
    let (code, document) = json(&args);
    assert_eq!(code, Some(0), "{document}");
    let rows = document["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 8);
    for row in rows {
        assert!(row["decode"]["tokens_per_second"].as_f64().is_some_and(|x| x > 0.0), "{row}");
        assert_eq!(row["decode_step_seconds"].as_array().map(Vec::len), Some(3));
        // Four steps of room: three measured, one before. Values of f32.
        let tokens = row["batch"].as_u64().unwrap_or(0) * (row["context"].as_u64().unwrap_or(0) + 4);
        assert_eq!(row["cache_tokens"], tokens);
        let (_, model) = json(&["inspect", "--json", row["model"].as_str().expect("a name")]);
        let values =
            model["layers"].as_u64().unwrap_or(0) * model["kv_values_per_token_per_layer"].as_u64().unwrap_or(0);
        assert_eq!(row["cache_bytes"], tokens * values * 4);
    }
    let written = fs_err::read_to_string(dir.path().join("bench.json")).expect("bench.json");
    assert_eq!(serde_json::from_str::<Value>(&written).expect("JSON"), document);
    assert!(fs_err::read_to_string(dir.path().join("bench.svg")).expect("bench.svg").ends_with("</svg>\n"));
}

#[test]
fn devices_lists_the_processor_and_says_why_others_cannot_be_used() {
    let (code, document) = json(&["devices", "--json"]);
    assert_eq!(code, Some(0));
    let devices = document["devices"].as_array().expect("devices");
    assert_eq!((&devices[0]["id"], &devices[0]["unusable"]), (&"cpu".into(), &Value::Null));
    for device in devices {
        // What can be used has a name, what cannot a reason.
        let key = if device["unusable"].is_null() { "name" } else { "unusable" };
        assert!(device[key].as_str().is_some_and(|text| !text.is_empty()), "{device}");
    }
    assert!(devices.iter().any(|d| d["id"] == "cuda"));
    let out = run(&["devices"]);
    assert!(String::from_utf8_lossy(&out.stdout).lines().any(|l| l.contains("not usable: ")), "{out:?}");
}

#[test]
fn a_device_that_is_not_there_is_unusable_input_and_names_what_is() {
    for (device, expected) in [("cuda:7", "cpu: "), ("gpu:99", "--device cpu"), ("abacus", "gqa2mla devices")] {
        let out = run(&["eval", TRAINED, "--device", device]);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{text}");
        assert!(text.contains(expected), "{device}: {text}");
    }
}
