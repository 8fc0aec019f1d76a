//! Distilled folders, judged by the reference runtime.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gqa2mla::convert::{Budget, CalibrationSettings, ConvertSettings, OutputDtype, Padding, Profile, Target};
use gqa2mla::distill::{DistillReport, DistillSettings, Train, distill};
use gqa2mla::observe::Silent;
use gqa2mla::target::classes::{deepseek_v3, remote};
use gqa2mla::write::verify_manifest;

use crate::common::judge::{self, side_by_side};
use crate::common::models::{fixture, open};

fn settings() -> DistillSettings {
    DistillSettings { tokens: 16384, seq_len: 128, batch_tokens: 512, step_size: 3e-3, ..DistillSettings::default() }
}

fn train(source: &Path, from: &Path, to: &Path, settings: &DistillSettings) -> Result<DistillReport, String> {
    let ((source, source_arch), (student, arch)) = (open(source), open(from));
    let pair = ((&source, &source_arch), (&student, &arch));
    distill(pair.0, pair.1, settings, to, &|_| Vec::new(), &Silent).map_err(|e| e.to_string())
}

/// The trained fixture at half its cache.
fn converted(to: &Path, target: Target, profile: Profile, dtype: OutputDtype) {
    let calibration = CalibrationSettings { samples: 32, seq_len: 128, ..CalibrationSettings::default() };
    let settings = ConvertSettings {
        target: target.into(),
        profile: Some(profile),
        // Kernels want more than this model has.
        pad: Some(Padding::None),
        dtype: Some(dtype),
        kv_budget: Some(Budget::Percent(50.0)),
        calibration,
        ..ConvertSettings::default()
    };
    judge::converted(&fixture("pico-trained"), to, &settings).expect("converts");
}

type Bytes = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

/// Dtype, shape and bytes of every tensor of a model, by name.
fn tensor_bytes(dir: &Path) -> Bytes {
    let (source, _) = open(dir);
    let one = |name: &str| {
        let view = source.tensors.view(name).expect("reads");
        (name.to_owned(), (view.dtype.to_string(), view.shape.to_vec(), view.bytes.to_vec()))
    };
    source.tensors.names().map(one).collect()
}

/// Held-out windows of the distillation's own text: what `distill` reports is measured on them.
fn held_out_kl(source: &Path, of: &Path, report: &DistillReport) -> f64 {
    let (opened, _) = open(source);
    let tokens =
        opened.tokenizer().expect("a tokenizer").encode(gqa2mla::calibrate::bundled_calibration()).expect("encodes");
    let seq_len = report.seq_len;
    let windows: Vec<Vec<u32>> =
        report.texts[0].held_out_windows.iter().map(|w| tokens[w * seq_len..(w + 1) * seq_len].to_vec()).collect();
    side_by_side(source, of, &windows).kl_nats_per_token
}

/// What may change of a folder that was trained with `train`.
fn may_change(name: &str, train: Train) -> bool {
    let attention =
        ["q_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"].iter().any(|t| name.contains(t));
    let norms = name.contains("layernorm") || name == "model.norm.weight";
    let latent = name.contains("kv_a_layernorm") || name.contains("q_a_layernorm");
    attention || train != Train::Attention && norms && !latent || train == Train::All && name.contains(".mlp.")
}

/// A conversion, and its folder under a name of its own.
fn form(dir: &Path, name: &str) -> PathBuf {
    let to = dir.join(name);
    match name {
        "constant" => converted(&to, deepseek_v3::TARGET, Profile::Faithful, OutputDtype::Bf16),
        "tiny-rows" => converted(&to, deepseek_v3::TARGET, Profile::Portable, OutputDtype::F32),
        _ => converted(&to, remote::TARGET, Profile::Faithful, OutputDtype::F32),
    }
    to
}

#[test]
fn a_conversion_gets_nearer_to_its_source_in_the_form_it_has() {
    for (name, what) in [("constant", Train::Attention), ("tiny-rows", Train::Norms), ("no-norm", Train::All)] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (from, to) = (form(dir.path(), name), dir.path().join("out"));
        let report =
            train(&fixture("pico-trained"), &from, &to, &DistillSettings { train: what, ..settings() }).expect(name);
        assert!(report.best_step > 0 && report.kl_after < 0.9 * report.kl_before, "{name}: {report:?}");
        for text in &report.texts {
            assert!(text.kl_after <= text.kl_before && text.held_out_tokens > 0, "{text:?}");
        }
        // What is reported is what the written folder does, and what the folder before it did.
        for (folder, kl) in [(&from, report.kl_before), (&to, report.kl_after)] {
            let measured = held_out_kl(&fixture("pico-trained"), folder, &report);
            assert!((measured / kl - 1.0).abs() < 1e-3, "{name}: {measured} {kl}");
        }
        let (before, after) = (tensor_bytes(&from), tensor_bytes(&to));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (tensor, was) in &before {
            let is = &after[tensor];
            assert_eq!((&is.0, &is.1), (&was.0, &was.1), "{name}: {tensor}");
            assert_eq!(is.2 != was.2, may_change(tensor, what), "{name}: {tensor}");
        }
        let config = |dir: &Path| -> serde_json::Value {
            serde_json::from_slice(&fs_err::read(dir.join("config.json")).expect("readable")).expect("JSON")
        };
        assert_eq!(config(&from), config(&to));
        assert!(verify_manifest(&to).expect("a manifest").is_clean());
        assert!(to.join("distill.json").exists() && to.join("conversion.json").exists());
        // A constant in the latent is still one, so that what knows of it takes the folder.
        let (source, arch) = open(&to);
        for layer in 0..arch.layers {
            let (old, old_arch) = open(&from);
            let load = |source, arch| gqa2mla::latent::LatentWeights::load(source, arch, layer).expect("reads");
            assert_eq!(load(&source, &arch).gain, load(&old, &old_arch).gain, "{name}");
        }
    }
}

#[test]
fn a_norm_of_latents_that_acts_is_trained_through() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = form(dir.path(), "tiny-rows");
    // Rows of ordinary size: now the norm makes every latent as long as any other.
    let (source, arch) = open(&from);
    let rank = arch.mla().expect("MLA").kv_lora_rank;
    let path = from.join("model.safetensors");
    let mut bytes = fs_err::read(&path).expect("readable");
    for layer in 0..arch.layers {
        let info =
            |name: &str| source.tensors.get(&format!("model.layers.{layer}.self_attn.{name}.weight")).expect("there");
        let mut each = |name: &str, rows: usize, f: &dyn Fn(f32) -> f32| {
            let info = info(name);
            let row = info.shape.get(1).map_or(4, |n| 4 * n);
            let all = &mut bytes[info.begin as usize..info.begin as usize + rows * row];
            for value in all.chunks_exact_mut(4) {
                let v = f(f32::from_le_bytes(value.try_into().expect("four bytes")));
                value.copy_from_slice(&v.to_le_bytes());
            }
        };
        each("kv_a_proj_with_mqa", rank, &|v| v * 2.0_f32.powi(21));
        each("kv_a_layernorm", rank, &|_| 1.0);
    }
    drop(source);
    fs_err::write(&path, bytes).expect("written");
    let to = dir.path().join("out");
    let report = train(&fixture("pico-trained"), &from, &to, &DistillSettings { train: Train::Norms, ..settings() })
        .expect("trains");
    assert!(report.kl_after < 0.9 * report.kl_before, "{report:?}");
    let measured = held_out_kl(&fixture("pico-trained"), &to, &report);
    assert!((measured / report.kl_after - 1.0).abs() < 1e-3, "{measured} {}", report.kl_after);
    let (before, after) = (tensor_bytes(&from), tensor_bytes(&to));
    for (tensor, was) in &before {
        let trained = may_change(tensor, Train::Norms) || tensor.contains("kv_a_layernorm");
        assert_eq!(after[tensor] != *was, trained, "{tensor}");
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = form(dir.path(), "constant");
    let settings = DistillSettings { tokens: 1024, ..settings() };
    let on = |threads: usize| {
        let to = dir.path().join(format!("on{threads}"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| train(&fixture("pico-trained"), &from, &to, &settings)).expect("trains");
        ["model.safetensors", "distill.json", "manifest.json"].map(|file| fs_err::read(to.join(file)).expect("written"))
    };
    assert!(on(1) == on(2));
}

#[test]
fn what_is_exact_stays_as_it_is() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (from, to) = (dir.path().join("mla"), dir.path().join("out"));
    let exact = crate::common::models::method("exact");
    let settings_ = ConvertSettings { method: exact, target: remote::TARGET.into(), ..ConvertSettings::default() };
    judge::converted(&fixture("pico-trained"), &from, &settings_).expect("converts");
    // Steps so large that they destroy it, among them such that overflow.
    for step_size in [1e-3, 10.0, 1e30] {
        let settings = DistillSettings { tokens: 4096, step_size, overwrite: true, ..settings() };
        let report = train(&fixture("pico-trained"), &from, &to, &settings).expect("ends");
        assert!(report.kl_before.abs() < 1e-5 && report.kl_after <= report.kl_before, "{report:?}");
        assert!(report.curve.first().is_some_and(|point| point.loss.abs() < 1e-5), "{:?}", report.curve);
        if step_size > 1.0 {
            assert_eq!(report.best_step, 0);
            assert_eq!(tensor_bytes(&from), tensor_bytes(&to));
            // It was noticed, and said.
            assert!(!report.decisions.is_empty(), "{report:?}");
        }
    }
}

#[test]
fn what_cannot_be_distilled_is_a_sentence_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let from = form(dir.path(), "constant");
    let short = dir.path().join("short.txt");
    fs_err::write(&short, "Too short to hold anything out.").expect("written");
    let trained = fixture("pico-trained");
    let run = |source: &Path, from: &Path, settings: &DistillSettings| {
        train(source, from, &to, settings).expect_err("cannot be distilled")
    };
    let other = DistillSettings { files: vec![short], ..settings() };
    let faults = [
        (run(&trained, &trained, &settings()), "grouped-query"),
        (run(&fixture("pico-llama"), &from, &settings()), "in the vocabulary"),
        (run(&trained, &fixture("pico-deepseek-v3-moe"), &settings()), "experts"),
        (run(&trained, &fixture("pico-deepseek-v3-fp8"), &settings()), "FP8"),
        (run(&trained, &from, &other), "too short"),
        (run(&trained, &from, &DistillSettings { seq_len: 1, ..settings() }), "less than two tokens"),
    ];
    for (fault, why) in &faults {
        assert!(fault.contains("hint: ") && fault.contains(why), "{fault}");
    }
    assert!(!to.exists());
}
