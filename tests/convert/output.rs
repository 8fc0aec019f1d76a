//! What a conversion writes: the bytes, the plan that tells them, the figures in its report.

use std::collections::BTreeMap;

use gqa2mla::convert::{Budget, ConvertSettings, MethodChoice, OutputDtype, RopeGrid, convert, plan};
use gqa2mla::methods::attention_aware::AttentionAware;
use gqa2mla::methods::transmla::{FreqFold, Rorope};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model};

use super::settings;
use crate::common::judge::{converted, heldout};
use crate::common::models::{fixture, method, open};

#[test]
fn the_calibration_error_is_the_error_on_other_text() {
    // TransMLA refits nothing, so each layer's error on other text is that of the calibration text, up to what separates
    // two samples of text.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let s = ConvertSettings {
        qk_rope_head_dim: Some(16),
        kv_lora_rank: Some(48),
        dtype: Some(OutputDtype::F32),
        ..settings(Rorope { freqfold: FreqFold::Fixed(1), ..Rorope::default() })
    };
    let report = converted(&fixture("pico-trained"), &to, &s).expect("converts");
    let ((source, sa), (made, ca)) = (open(&fixture("pico-trained")), open(&to));
    let (model, other) = (Model::new(&source, &sa, &Cpu), Model::new(&made, &ca, &Cpu));
    let windows = heldout(128, 24);
    let (mut hidden, lengths) = model.start(&windows).expect("embeds");
    let (mut predicted, mut measured) = (0.0, 0.0);
    for layer in 0..sa.layers {
        let (a, b) = (model.layer(layer).expect("loads"), other.layer(layer).expect("loads"));
        let x = a.attention_input(hidden.view()).expect("runs");
        let want = a.attention_output(x.view(), &lengths).expect("runs");
        // The converted stream would be scaled where its norms had another epsilon.
        assert_eq!(sa.norm_eps, ca.norm_eps);
        let got = b.attention_output(x.view(), &lengths).expect("runs");
        let error = gqa2mla::calibrate::relative_error(got.view(), want.view());
        predicted += report.layers[layer].calibration_error;
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
        max_shard_bytes: 300_000,
        ..settings(AttentionAware { refine: 2, ..AttentionAware::default() })
    };
    let mut manifests = BTreeMap::new();
    for threads in [1, 2, 5] {
        let to = dir.path().join(format!("out-{threads}"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| converted(&fixture("pico-trained"), &to, &s)).expect("converts");
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
        ..settings(method("attention-aware"))
    };
    converted(&fixture("pico-trained"), &to, &s).expect("converts");
    let (source, arch) = open(&to);
    assert!(source.config["rope_scaling"].is_null());
    assert_eq!(source.config["attention_bias"], false);
    assert!(source.tensors.names().all(|n| !n.ends_with(".bias")));
    assert!(!arch.mla().expect("MLA").bias);
}

#[test]
fn plan_tells_what_convert_writes() {
    for method in MethodChoice::all() {
        let s = settings(method.clone());
        let (source, arch) = open(&fixture("pico-trained"));
        let planned = plan(&source, &arch, &s, true, &Silent).expect("plans");
        let dir = tempfile::tempdir().expect("a temporary folder");
        let to = dir.path().join("out");
        let report = convert(&source, &arch, &s, &to, &|_| Vec::new(), &Silent).expect("converts");
        assert_eq!(planned.geometry, report.geometry);
        let (written, _) = open(&to);
        let mut names: Vec<_> = planned.tensors.iter().map(|(n, d, s)| (n.clone(), d.clone(), s.clone())).collect();
        names.sort();
        let found: Vec<_> =
            written.tensors.iter().map(|(n, t)| (n.to_owned(), t.dtype.to_string(), t.shape.clone())).collect();
        assert_eq!(names, found, "{method}");
        assert_eq!(planned.predicted_error.is_some(), method.compresses());
    }
}
