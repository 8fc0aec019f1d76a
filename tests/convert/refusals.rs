//! What a conversion refuses, by name and before it writes, and what is odd and converts.

use gqa2mla::arch::Architecture;
use gqa2mla::convert::{Budget, ConvertSettings};

use gqa2mla::methods::transmla::{FreqFold, Rorope};

use super::settings;
use crate::common::copies::{changed, copy_folder};
use crate::common::judge::{converted, heldout, side_by_side};
use crate::common::models::{fixture, method, open};

#[test]
fn what_cannot_be_right_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let aware = |f: &dyn Fn(&mut ConvertSettings)| {
        let mut s = settings(method("attention-aware"));
        f(&mut s);
        s
    };
    let cases: Vec<(&str, ConvertSettings)> = vec![
        ("nothing is saved", aware(&|s| s.kv_budget = Some(Budget::Percent(100.0)))),
        ("cannot be made", aware(&|s| (s.qk_rope_head_dim, s.kv_lora_rank) = (Some(7), Some(40)))),
        ("cannot be made", aware(&|s| (s.qk_rope_head_dim, s.kv_lora_rank) = (Some(16), Some(4000)))),
        ("no split", aware(&|s| s.kv_budget = Some(Budget::Values(2)))),
        (
            "give at most two of the three",
            aware(&|s| {
                (s.qk_rope_head_dim, s.kv_lora_rank, s.kv_budget) = (Some(16), Some(16), Some(Budget::Values(40)));
            }),
        ),
        ("calib-seq-len", aware(&|s| s.calibration.seq_len = 1)),
        ("q_lora_rank 9999", ConvertSettings { q_lora_rank: Some(9999), ..settings(method("transmla")) }),
        ("samples 0", aware(&|s| s.calibration.samples = 0)),
        ("too short", aware(&|s| (s.calibration.samples, s.calibration.seq_len) = (1, 16))),
        ("takes no --kv-budget", ConvertSettings { kv_lora_rank: Some(8), ..settings(method("exact")) }),
        (
            "freqfold 3",
            ConvertSettings {
                kv_budget: Some(Budget::Percent(50.0)),
                ..settings(Rorope { freqfold: FreqFold::Fixed(3), ..Rorope::default() })
            },
        ),
    ];
    for (expected, s) in cases {
        let error = converted(&fixture("pico-trained"), &to, &s).expect_err(expected);
        assert!(expected.split('|').any(|e| error.contains(e)), "expected `{expected}`, found: {error}");
        assert_eq!(fs_err::read_dir(dir.path()).expect("readable").count(), 0, "something was left behind: {error}");
    }
}

#[test]
fn degenerate_layers_convert_by_every_method() {
    for zeroed in
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "input_layernorm.weight"]
    {
        for method in [method("attention-aware"), method("care"), method("transmla")] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let from = changed("pico-trained", dir.path(), |_| (), &[&format!("model.layers.0.{zeroed}")]);
            let to = dir.path().join("out");
            let s = ConvertSettings { kv_budget: Some(Budget::Percent(50.0)), ..settings(method.clone()) };
            converted(&from, &to, &s).unwrap_or_else(|e| panic!("{method}, {zeroed}: {e}"));
            let c = side_by_side(&from, &to, &heldout(64, 2));
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
    copy_folder(&fixture("pico-mistral"), &from);
    let (source, _) = open(&from);
    let info = source.tensors.get("model.layers.1.self_attn.v_proj.weight").expect("there");
    let at = info.begin as usize + 4 * 5;
    drop(source);
    let path = from.join("model.safetensors");
    let mut bytes = fs_err::read(&path).expect("readable");
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs_err::write(&path, bytes).expect("written");
    let error = converted(&from, &to, &settings(method("exact"))).expect_err("refused");
    assert!(error.contains("model.layers.1.self_attn.v_proj.weight") && error.contains("[0, 5]"), "{error}");
    assert!(!to.exists());
}
