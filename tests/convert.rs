//! Whole conversions on the fixtures, judged by the reference runtime.

#[path = "common/golden.rs"]
mod golden;
#[path = "common/models.rs"]
mod models;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use golden::golden_tokens;
use gqa2mla::arch::Architecture;
use gqa2mla::convert::{
    Budget, CalibrationSettings, ConversionReport, ConvertError, ConvertSettings, FreqFold, Method, OutputDtype,
    RopeGrid, convert, plan,
};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model};
use gqa2mla::source::ModelSource;
use gqa2mla::verify::{Comparison, compare, windows_from_text};
use models::{fixture, open};

fn settings(method: Method) -> ConvertSettings {
    let calibration = CalibrationSettings { samples: 48, seq_len: 128, ..CalibrationSettings::default() };
    ConvertSettings { method, calibration, ..ConvertSettings::default() }
}

fn run(from: &Path, to: &Path, settings: &ConvertSettings) -> Result<ConversionReport, Box<ConvertError>> {
    let (source, arch) = open(from);
    convert(&source, &arch, settings, to, &|_| Vec::new(), &Silent).map_err(Box::new)
}

fn heldout(source: &ModelSource, seq_len: usize, count: usize) -> Vec<Vec<u32>> {
    let text = gqa2mla::calibrate::bundled_heldout();
    let tokens = source.tokenizer().expect("tokenizer").encode(text).expect("encodes");
    windows_from_text(&tokens, seq_len, 1, Some(count))
}

fn side_by_side(from: &Path, to: &Path, windows: &[Vec<u32>]) -> Comparison {
    let ((s, sa), (c, ca)) = (open(from), open(to));
    compare(&Model::new(&s, &sa, &Cpu), &Model::new(&c, &ca, &Cpu), windows, &Silent).expect("both models run")
}

/// Trained pico at a budget, and how it does on held-out text.
fn trained(settings: &ConvertSettings) -> (ConversionReport, Comparison) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let report = run(&fixture("pico-trained"), &to, settings).expect("converts");
    let (source, _) = open(&fixture("pico-trained"));
    let comparison = side_by_side(&fixture("pico-trained"), &to, &heldout(&source, 128, 24));
    (report, comparison)
}

#[test]
fn exact_loses_nothing_on_any_family() {
    for name in ["pico-llama", "pico-llama3", "pico-mistral", "pico-qwen2", "pico-mha", "pico-trained"] {
        for dtype in [None, Some(OutputDtype::F32)] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let to = dir.path().join("out");
            let report = run(&fixture(name), &to, &ConvertSettings { dtype, ..settings(Method::Exact) });
            let report = report.unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(report.cache_values_per_token_per_layer, report.source_cache_values_per_token_per_layer);
            let tokens = golden_tokens(&fixture(name));
            for window in &tokens {
                let c = side_by_side(&fixture(name), &to, std::slice::from_ref(window));
                // Both models carry the f32 rounding of a few hundred products; stock f32 is within 1.3e-5 of f64 on these
                // models, and two such errors plus the refolded weights' own rounding stay below ten times that.
                assert!(c.max_abs_dlogit < 1.3e-4, "{name} {dtype:?}: {c:?}");
                assert_eq!(c.top1_agreement, 1.0, "{name} {dtype:?}");
                assert!(c.cached_vs_full_max_abs_dlogit < 1.3e-4, "{name} {dtype:?}: {c:?}");
            }
        }
    }
}

#[test]
fn with_every_slot_and_full_rank_attention_aware_is_exact() {
    // g d = 64 rotated values hold every key, 64 latents every value: nothing is left to approximate, and the refits have
    // nothing to correct.
    let steps = gqa2mla::convert::Steps { output_refit: false, ..Default::default() };
    let (_, c) = trained(&ConvertSettings {
        qk_rope_head_dim: Some(64),
        kv_lora_rank: Some(64),
        dtype: Some(OutputDtype::F32),
        force: true,
        steps,
        ..settings(Method::AttentionAware)
    });
    assert!(c.kl_nats_per_token < 1e-5, "{c:?}");
    assert!((c.ppl_converted / c.ppl_source - 1.0).abs() < 1e-4, "{c:?}");
}

#[test]
fn more_rank_loses_less_and_the_aware_method_loses_least() {
    let at = |method: Method, values: usize| {
        let s = ConvertSettings {
            kv_budget: Some(Budget::Values(values)),
            dtype: Some(OutputDtype::F32),
            freqfold: FreqFold::Auto,
            ..settings(method)
        };
        let (report, c) = trained(&s);
        assert_eq!(report.cache_values_per_token_per_layer, values);
        (c.ppl_converted / c.ppl_source).ln()
    };
    let (aware, care, transmla) = (at(Method::AttentionAware, 48), at(Method::Care, 48), at(Method::Transmla, 48));
    assert!(aware < 0.5 * transmla && aware < 0.5 * care, "{aware} {care} {transmla}");
    assert!(at(Method::AttentionAware, 80) < aware);
    assert!(at(Method::Transmla, 80) < transmla);
}

#[test]
fn each_step_can_be_switched_off_and_the_two_largest_are_worth_their_while() {
    let base = ConvertSettings {
        qk_rope_head_dim: Some(16),
        kv_lora_rank: Some(32),
        dtype: Some(OutputDtype::F32),
        ..settings(Method::AttentionAware)
    };
    let kl = |s: &ConvertSettings| trained(s).1.kl_nats_per_token;
    let full = kl(&base);
    for name in gqa2mla::convert::Steps::NAMES {
        let mut s = base.clone();
        assert!(s.steps.disable(name));
        let without = kl(&s);
        assert!(without.is_finite() && without != full, "{name} changes nothing");
        if ["value-refit", "output-refit"].contains(&name) {
            assert!(full < without, "{name}: {full} with, {without} without");
        }
    }
}

#[test]
fn refinement_lowers_the_held_out_error() {
    let base = ConvertSettings {
        qk_rope_head_dim: Some(16),
        kv_lora_rank: Some(24),
        dtype: Some(OutputDtype::F32),
        ..settings(Method::AttentionAware)
    };
    let plain = trained(&base).1;
    let (report, refined) = trained(&ConvertSettings { refine: 40, ..base });
    assert!(report.layers.iter().any(|l| l.notes.iter().any(|n| n.starts_with("refined"))), "{:?}", report.layers);
    assert!(refined.kl_nats_per_token < plain.kl_nats_per_token, "{refined:?} {plain:?}");
}

#[test]
fn the_predicted_error_is_the_measured_one() {
    // TransMLA refits nothing, so each layer's error on other text is that of the calibration text, up to what separates
    // two samples of text.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let s = ConvertSettings {
        qk_rope_head_dim: Some(16),
        kv_lora_rank: Some(48),
        freqfold: FreqFold::Fixed(1),
        dtype: Some(OutputDtype::F32),
        ..settings(Method::Transmla)
    };
    let report = run(&fixture("pico-trained"), &to, &s).expect("converts");
    let ((source, sa), (converted, ca)) = (open(&fixture("pico-trained")), open(&to));
    let (model, other) = (Model::new(&source, &sa, &Cpu), Model::new(&converted, &ca, &Cpu));
    let windows = heldout(&source, 128, 24);
    let (mut hidden, lengths) = model.start(&windows).expect("embeds");
    let (mut predicted, mut measured) = (0.0, 0.0);
    for layer in 0..sa.layers {
        let (a, b) = (model.layer(layer).expect("loads"), other.layer(layer).expect("loads"));
        let x = a.attention_input(hidden.view()).expect("runs");
        let want = a.attention_output(x.view(), &lengths).expect("runs");
        // The converted stream is scaled by sqrt(1e-6 / eps): undo it to compare.
        let got = b.attention_output(x.view(), &lengths).expect("runs") * (sa.norm_eps / 1e-6).sqrt() as f32;
        let error = gqa2mla::calibrate::relative_error(got.view(), want.view());
        predicted += report.layers[layer].predicted_error;
        measured += error;
        a.forward(&mut hidden, &lengths).expect("runs");
    }
    assert!((predicted / measured - 1.0).abs() < 0.2, "predicted {predicted}, measured {measured}");
}

#[test]
fn the_same_inputs_give_the_same_bytes_at_any_thread_count() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let s = ConvertSettings {
        kv_budget: Some(Budget::Percent(50.0)),
        refine: 2,
        max_shard_bytes: 300_000,
        ..settings(Method::AttentionAware)
    };
    let mut manifests = BTreeMap::new();
    for threads in [1, 2, 5] {
        let to = dir.path().join(format!("out-{threads}"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| run(&fixture("pico-trained"), &to, &s)).expect("converts");
        assert!(to.join("model.safetensors.index.json").exists(), "several shards");
        manifests.insert(threads, fs_err::read_to_string(to.join("manifest.json")).expect("manifest"));
    }
    assert_eq!(manifests[&1], manifests[&2]);
    assert_eq!(manifests[&1], manifests[&5]);
}

#[test]
fn the_stock_grid_needs_neither_biases_nor_free_frequencies() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let s = ConvertSettings {
        qk_rope_head_dim: Some(16),
        kv_lora_rank: Some(48),
        rope_grid: Some(RopeGrid::Stock),
        ..settings(Method::AttentionAware)
    };
    run(&fixture("pico-trained"), &to, &s).expect("converts");
    let (source, arch) = open(&to);
    assert!(source.config["rope_scaling"].is_null());
    assert_eq!(source.config["attention_bias"], false);
    assert!(source.tensors.names().all(|n| !n.ends_with(".bias")));
    assert!(!arch.mla().expect("MLA").bias);
}

#[test]
fn plan_tells_what_convert_writes() {
    for method in Method::ALL {
        let s = settings(method);
        let (source, arch) = open(&fixture("pico-trained"));
        let planned = plan(&source, &arch, &s, true, &Silent).expect("plans");
        let dir = tempfile::tempdir().expect("a temporary folder");
        let to = dir.path().join("out");
        let report = convert(&source, &arch, &s, &to, &|_| Vec::new(), &Silent).expect("converts");
        assert_eq!(planned.geometry, report.geometry);
        let (written, _) = open(&to);
        let mut names: Vec<_> = planned.tensors.iter().map(|(n, d, s)| (n.as_str(), d.clone(), s.clone())).collect();
        names.sort();
        let found: Vec<_> = written.tensors.iter().map(|(n, t)| (n, t.dtype.to_string(), t.shape.clone())).collect();
        assert_eq!(names, found, "{method}");
        assert_eq!(planned.predicted_error.is_some(), method != Method::Exact);
    }
}

#[test]
fn what_cannot_be_right_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let aware = |f: &dyn Fn(&mut ConvertSettings)| {
        let mut s = settings(Method::AttentionAware);
        f(&mut s);
        s
    };
    let cases: Vec<(&str, ConvertSettings)> = vec![
        ("nothing is saved", aware(&|s| s.kv_budget = Some(Budget::Percent(100.0)))),
        ("cannot be made", aware(&|s| (s.qk_rope_head_dim, s.kv_lora_rank) = (Some(7), Some(40)))),
        ("cannot be made", aware(&|s| (s.qk_rope_head_dim, s.kv_lora_rank) = (Some(16), Some(4000)))),
        ("no split", aware(&|s| s.kv_budget = Some(Budget::Values(2)))),
        (
            "leave one of the three out|asks for",
            aware(&|s| {
                (s.qk_rope_head_dim, s.kv_lora_rank, s.kv_budget) = (Some(16), Some(16), Some(Budget::Values(40)));
            }),
        ),
        ("calib-seq-len", aware(&|s| s.calibration.seq_len = 1)),
        ("q_lora_rank 9999", ConvertSettings { q_lora_rank: Some(9999), ..settings(Method::Transmla) }),
        ("samples 0", aware(&|s| s.calibration.samples = 0)),
        ("too short", aware(&|s| (s.calibration.samples, s.calibration.seq_len) = (1, 16))),
        ("takes no rank", ConvertSettings { kv_lora_rank: Some(8), ..settings(Method::Exact) }),
        (
            "freqfold 3",
            ConvertSettings {
                freqfold: FreqFold::Fixed(3),
                kv_budget: Some(Budget::Percent(50.0)),
                ..settings(Method::Transmla)
            },
        ),
    ];
    for (expected, s) in cases {
        let error = run(&fixture("pico-trained"), &to, &s).expect_err(expected).to_string();
        assert!(expected.split('|').any(|e| error.contains(e)), "expected `{expected}`, found: {error}");
        assert_eq!(fs_err::read_dir(dir.path()).expect("readable").count(), 0, "something was left behind: {error}");
    }
}

/// A copy of a fixture whose config and tensors were changed.
fn changed(
    name: &str,
    dir: &Path,
    config: impl Fn(&mut serde_json::Map<String, serde_json::Value>),
    zeroed: &[&str],
) -> PathBuf {
    let to = dir.join("changed");
    fs_err::create_dir(&to).expect("made");
    for entry in fs_err::read_dir(fixture(name)).expect("readable").flatten() {
        fs_err::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
    let path = to.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs_err::read(&path).expect("readable")).expect("JSON");
    config(json.as_object_mut().expect("an object"));
    fs_err::write(&path, json.to_string()).expect("written");
    let weights = to.join("model.safetensors");
    let mut bytes = fs_err::read(&weights).expect("readable");
    let (source, _) = open(&fixture(name));
    for tensor in zeroed {
        let info = source.tensors.get(tensor).expect("there");
        bytes[info.begin as usize..info.end as usize].fill(0);
    }
    fs_err::write(&weights, bytes).expect("written");
    to
}

#[test]
fn exact_stays_exact_where_the_source_scales_its_scores() {
    // YaRN's attention factor is no power of two: folded queries must not be rounded to bf16.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let yarn = serde_json::json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128 });
    let from = changed("pico-trained", dir.path(), |c| drop(c.insert("rope_scaling".into(), yarn.clone())), &[]);
    let to = dir.path().join("out");
    run(&from, &to, &settings(Method::Exact)).expect("converts");
    let c = side_by_side(&from, &to, &golden_tokens(&fixture("pico-trained")));
    assert!(c.max_abs_dlogit < 1.3e-4 && c.top1_agreement == 1.0, "{c:?}");
}

#[test]
fn degenerate_layers_convert_by_every_method() {
    for zeroed in
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "input_layernorm.weight"]
    {
        for method in [Method::AttentionAware, Method::Care, Method::Transmla] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let from = changed("pico-trained", dir.path(), |_| (), &[&format!("model.layers.0.{zeroed}")]);
            let to = dir.path().join("out");
            let s = ConvertSettings { kv_budget: Some(Budget::Percent(50.0)), ..settings(method) };
            run(&from, &to, &s).unwrap_or_else(|e| panic!("{method}, {zeroed}: {e}"));
            let (source, _) = open(&from);
            let c = side_by_side(&from, &to, &heldout(&source, 64, 2));
            assert!(c.ppl_converted.is_finite(), "{method}, {zeroed}");
        }
    }
}

#[test]
fn configs_that_no_model_has_are_refused_at_once() {
    let config = |key: &str, value: serde_json::Value| {
        let bytes = fs_err::read(fixture("pico-mistral").join("config.json")).expect("readable");
        let mut json: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        json[key] = value;
        json
    };
    for (key, value) in [
        ("num_hidden_layers", 2_147_483_647_i64.into()),
        ("num_attention_heads", (1_i64 << 30).into()),
        ("head_dim", 2_147_483_646_i64.into()),
        ("rms_norm_eps", 1e30.into()),
        ("rope_scaling", serde_json::json!({ "rope_type": 3 })),
        ("rope_scaling", serde_json::json!({ "rope_type": "linear", "factor": -2.0 })),
    ] {
        let error = Architecture::from_config(&config(key, value)).expect_err(key).to_string();
        assert!(error.contains(key), "{error}");
    }
    // transformers gives Mistral a window of 4096 where the config is silent: not the same as an explicit null.
    let mut silent = config("max_position_embeddings", 8192.into());
    assert_eq!(Architecture::from_config(&silent).expect("valid").gqa().expect("GQA").sliding_window, None);
    silent.as_object_mut().expect("an object").remove("sliding_window");
    assert_eq!(Architecture::from_config(&silent).expect("valid").gqa().expect("GQA").sliding_window, Some(4096));
}

#[test]
fn a_poisoned_weight_is_named_before_anything_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (from, to) = (dir.path().join("in"), dir.path().join("out"));
    fs_err::create_dir(&from).expect("made");
    for entry in fs_err::read_dir(fixture("pico-mistral")).expect("readable").flatten() {
        fs_err::copy(entry.path(), from.join(entry.file_name())).expect("copied");
    }
    let (source, _) = open(&from);
    let info = source.tensors.get("model.layers.1.self_attn.v_proj.weight").expect("there");
    let at = info.begin as usize + 4 * 5;
    drop(source);
    let path = from.join("model.safetensors");
    let mut bytes = fs_err::read(&path).expect("readable");
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs_err::write(&path, bytes).expect("written");
    let error = run(&from, &to, &settings(Method::Exact)).expect_err("refused").to_string();
    assert!(error.contains("model.layers.1.self_attn.v_proj.weight") && error.contains("[0, 5]"), "{error}");
    assert!(!to.exists());
}
