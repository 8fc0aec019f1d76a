//! Families and layouts of checkpoints: what is read as what.

use std::path::Path;

use gqa2mla::arch::{Architecture, Family, check_tensors, language_config};
use gqa2mla::convert::{CalibrationSettings, ConvertSettings, OutputDtype, convert};
use gqa2mla::observe::Silent;
use gqa2mla::source::{ModelSource, OpenOptions};
use gqa2mla::target::classes::deepseek_v3;
use gqa2mla::target::fp8;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::common::golden::golden_tokens;
use crate::common::judge::{ROUNDING, converted, worst_window};
use crate::common::models::{fixture, method, open};

fn exact() -> ConvertSettings {
    ConvertSettings { method: method("exact"), ..ConvertSettings::default() }
}

/// A fixture under another config and other tensor names and bytes.
fn rewritten(
    name: &str,
    to: &Path,
    config: impl Fn(Value) -> Value,
    tensor: impl Fn(&str, &[f64], &[usize]) -> Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)>,
) {
    let (source, _) = open(&fixture(name));
    fs_err::create_dir_all(to).expect("made");
    fs_err::write(to.join("config.json"), config(source.config.clone()).to_string()).expect("written");
    let made: Vec<_> = source
        .tensors
        .names()
        .flat_map(|n| {
            let view = source.tensors.view(n).expect("there");
            tensor(n, &view.to_f64(), view.shape)
        })
        .collect();
    let views = made.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).expect("a tensor")));
    let bytes = safetensors::serialize(views, None).expect("serialises");
    fs_err::write(to.join("model.safetensors"), bytes).expect("written");
}

fn as_f32(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect()
}

#[test]
fn fp8_sources_are_read() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("fp8");
    rewritten(
        "pico-llama",
        &from,
        |mut c| {
            c["quantization_config"] = json!({ "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128] });
            c
        },
        |name, values, shape| {
            if !fp8::is_quantised(name) && !name.ends_with("k_proj.weight") && !name.ends_with("v_proj.weight") {
                return vec![(name.to_owned(), safetensors::Dtype::F32, shape.to_vec(), as_f32(values))];
            }
            let (bytes, scales) = fp8::quantise(values, shape[1]);
            let scales: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            let blocks = shape.iter().map(|n| n.div_ceil(fp8::BLOCK)).collect();
            vec![
                (name.to_owned(), safetensors::Dtype::F8_E4M3, shape.to_vec(), bytes),
                (fp8::scale_name(name), safetensors::Dtype::F32, blocks, scales),
            ]
        },
    );
    let to = dir.path().join("out");
    converted(&from, &to, &ConvertSettings { dtype: Some(OutputDtype::F32), ..exact() }).expect("converts");
    let c = worst_window(&from, &to, &golden_tokens(&fixture("pico-llama")));
    assert!(c.max_abs_dlogit < ROUNDING, "{c:?}");
}

#[test]
fn a_language_model_is_taken_out_of_a_multimodal_one() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("llava");
    rewritten(
        "pico-mistral",
        &from,
        |c| json!({ "model_type": "llava", "text_config": c }),
        |name, values, shape| {
            let inside = (format!("language_model.{name}"), safetensors::Dtype::F32, shape.to_vec(), as_f32(values));
            let vision = (format!("vision_tower.{name}"), safetensors::Dtype::F32, vec![1], as_f32(&[0.5]));
            vec![inside, vision]
        },
    );
    let mut source = ModelSource::open(&from.display().to_string(), &OpenOptions::default(), &Silent).expect("opens");
    source.config = language_config(&source.config).expect("wraps a language model");
    let mut arch = Architecture::from_config(&source.config).expect("is understood");
    arch.look_inside(&source.tensors).expect("is found");
    check_tensors(&arch, &source.tensors).expect("agrees");
    let to = dir.path().join("out");
    convert(&source, &arch, &exact(), &to, &|_| Vec::new(), &Silent).expect("converts");
    let c = worst_window(&fixture("pico-mistral"), &to, &golden_tokens(&fixture("pico-mistral")));
    assert!(c.max_abs_dlogit < ROUNDING, "{c:?}");
}

#[test]
fn a_family_file_reads_what_nobody_knows() {
    let family = Family::parse("mine", "extends = \"llama\"\nmodel_types = [\"mine\"]\n").expect("parses");
    let (source, known) = open(&fixture("pico-llama"));
    let mut config = source.config.clone();
    config["model_type"] = "mine".into();
    assert!(Architecture::from_config(&config).expect_err("unknown").to_string().contains("`mine`"));
    let arch = Architecture::from_config_with(&config, &[family]).expect("is understood");
    assert_eq!(arch.expected_tensors(), known.expected_tensors());
}

#[test]
fn norms_of_heads_become_linear_maps_or_are_refused() {
    // Without a tokenizer nothing can be calibrated on, so the fixture borrows one whose ids it can hold.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("qwen3");
    let (trained, _) = open(&fixture("pico-trained"));
    let vocab = trained.config["vocab_size"].as_u64().expect("a number") as usize;
    rewritten(
        "pico-qwen3",
        &from,
        |mut c| {
            c["vocab_size"] = vocab.into();
            c
        },
        |name, values, shape| {
            let mut shape = shape.to_vec();
            let mut values = values.to_vec();
            if name == "model.embed_tokens.weight" {
                values = (0..vocab * shape[1]).map(|i| values[(i * 7 + i / 97) % values.len()]).collect();
                shape[0] = vocab;
            }
            vec![(name.to_owned(), safetensors::Dtype::F32, shape, as_f32(&values))]
        },
    );
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs_err::copy(fixture("pico-trained").join(file), from.join(file)).expect("copied");
    }
    let to = dir.path().join("out");
    let settings = ConvertSettings {
        calibration: CalibrationSettings { samples: 24, seq_len: 96, ..CalibrationSettings::default() },
        kv_lora_rank: Some(28),
        qk_rope_head_dim: Some(16),
        ..ConvertSettings::default()
    };
    let report = converted(&from, &to, &settings).expect("converts");
    assert_eq!(report.target, deepseek_v3::TARGET);
    assert!(report.decisions.iter().any(|d| d.contains("linear maps")), "{:?}", report.decisions);
    assert!(report.layers.iter().all(|l| l.notes.iter().any(|n| n.contains("R2 per head"))), "{:?}", report.layers);
    let windows: Vec<Vec<u32>> = vec![(0..60).map(|i| (i * 13 % vocab) as u32).collect()];
    let c = worst_window(&from, &to, &windows);
    assert!(c.kl_nats_per_token < 0.5, "{c:?}");
}
