//! MLA folders written for another class, dtype or padding, judged by the reference runtime.

use std::path::Path;

use gqa2mla::convert::{CalibrationSettings, ConvertSettings, OutputDtype};
use gqa2mla::export::{ExportReport, ExportSettings, Route, export};
use gqa2mla::observe::Silent;
use gqa2mla::source::Dtype;
use gqa2mla::target::classes::{deepseek_v2, deepseek_v3, minicpm3, remote, youtu};
use gqa2mla::target::{LatentNorm, Padding, Profile, Target};
use gqa2mla::write::{Leftover, verify_manifest};

use crate::common::copies::rewritten;
use crate::common::golden::golden_tokens;
use crate::common::judge::{self, ROUNDING, heldout, side_by_side};
use crate::common::models::{fixture, method, open};

/// All weights in f32, so that only what is computed differs.
fn settings(target: Option<Target>) -> ExportSettings {
    ExportSettings {
        target,
        profile: Profile::Faithful,
        pad: None,
        dtype: Some(OutputDtype::F32),
        max_shard_bytes: 5_000_000_000,
        overwrite: false,
        leftover: Leftover::Refuse,
    }
}

fn exported(from: &Path, to: &Path, settings: &ExportSettings) -> Result<ExportReport, String> {
    let (source, arch) = open(from);
    export(&source, &arch, settings, to, &|_| Vec::new(), &Silent).map_err(|e| e.to_string())
}

/// A fixture at half its cache.
fn convert(name: &str, to: &Path, more: impl Fn(&mut ConvertSettings)) {
    let calibration = CalibrationSettings { samples: 24, seq_len: 128, ..CalibrationSettings::default() };
    let mut settings = ConvertSettings { calibration, dtype: Some(OutputDtype::F32), ..ConvertSettings::default() };
    more(&mut settings);
    judge::converted(&fixture(name), to, &settings).expect("converts");
}

#[test]
fn every_class_of_ours_is_written_from_every_other() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let classes = [deepseek_v3::TARGET, youtu::TARGET, minicpm3::TARGET, remote::TARGET];
    let windows = heldout(128, 2);
    for from in classes {
        let start = dir.path().join(from.name());
        convert("pico-trained", &start, |s| s.target = from.into());
        for to in classes {
            let out = dir.path().join(format!("{}-{}", from.name(), to.name()));
            let report = exported(&start, &out, &settings(Some(to))).unwrap_or_else(|e| panic!("{from} {to}: {e}"));
            assert_eq!((report.route, report.class.as_str()), (Route::Rewritten, to.model_type()));
            let c = side_by_side(&start, &out, &windows);
            assert!(c.max_abs_dlogit <= ROUNDING, "{from} {to}: {c:?}");
            // A constant takes one value, of which there is at most one more to make the width even.
            let (new, old) = (report.cache_values_per_token_per_layer, report.source_cache_values_per_token_per_layer);
            assert!(new <= old + 2, "{from} {to}: {new} {old}");
            assert!(verify_manifest(&out).expect("a manifest").is_clean());
            assert_eq!(out.join("modeling_gqa2mla.py").exists(), to == remote::TARGET);
        }
    }
}

#[test]
fn an_export_and_its_export_back_have_the_same_widths() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
    convert("pico-trained", &a, |_| {});
    exported(&a, &b, &settings(Some(remote::TARGET))).expect("exports");
    let report = exported(&b, &c, &settings(Some(deepseek_v3::TARGET))).expect("exports");
    let shape = *open(&a).1.mla().expect("an MLA model");
    assert_eq!(report.geometry.kv_lora_rank, shape.kv_lora_rank.next_multiple_of(2));
    assert_eq!(report.geometry.qk_rope_head_dim, shape.qk_rope_head_dim);
    assert_eq!(report.geometry.qk_nope_head_dim, shape.qk_nope_head_dim);
}

#[test]
fn small_rows_become_a_constant_and_then_survive_f16() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (small, large) = (dir.path().join("small"), dir.path().join("large"));
    let portable = |s: &mut ConvertSettings| {
        s.profile = Some(Profile::Portable);
        s.method = method("transmla");
        s.force = true;
    };
    convert("pico-trained", &small, portable);
    let half = ExportSettings { dtype: Some(OutputDtype::F16), ..settings(Some(deepseek_v3::TARGET)) };
    let report = exported(&small, &large, &half).expect("exports");
    assert!(matches!(report.latent_norm, Some(LatentNorm::Constant { .. })), "{report:?}");
    // Padding to kernels is cut off again.
    assert!(report.geometry.kv_lora_rank < 256 && report.geometry.qk_rope_head_dim < 64, "{:?}", report.geometry);
    let (source, _) = open(&large);
    assert!(source.tensors.iter().all(|(_, t)| t.dtype == Dtype::F16));
    let c = side_by_side(&small, &large, &heldout(128, 4));
    // f16 rounds by 2^-11; without the constant all latents would be zero.
    assert!(c.kl_nats_per_token < 1e-4, "{c:?}");
    // The other way, back to kernels.
    let again = dir.path().join("again");
    let kernels = ExportSettings { profile: Profile::Portable, ..settings(Some(deepseek_v3::TARGET)) };
    let report = exported(&large, &again, &kernels).expect("exports");
    assert_eq!((report.geometry.kv_lora_rank, report.geometry.qk_rope_head_dim), (256, 64));
    assert_eq!(report.latent_norm, Some(LatentNorm::TinyRows));
    let c = side_by_side(&large, &again, &heldout(128, 4));
    assert!(c.max_abs_dlogit <= ROUNDING, "{c:?}");
}

#[test]
fn padding_is_added_and_cut_off() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (start, wide, narrow) = (dir.path().join("start"), dir.path().join("wide"), dir.path().join("narrow"));
    convert("pico-trained", &start, |_| {});
    let pad = ExportSettings { pad: Some(Padding::Kernels), ..settings(None) };
    let report = exported(&start, &wide, &pad).expect("exports");
    assert_eq!((report.geometry.kv_lora_rank, report.geometry.v_head_dim), (256, 128));
    exported(&wide, &narrow, &settings(None)).expect("exports");
    let windows = heldout(128, 2);
    for to in [&wide, &narrow] {
        let c = side_by_side(&start, to, &windows);
        assert!(c.max_abs_dlogit <= ROUNDING, "{c:?}");
    }
    let widths = |dir: &Path| *open(dir).1.mla().expect("an MLA model");
    assert_eq!(widths(&narrow).qk_rope_head_dim, widths(&start).qk_rope_head_dim);
    assert_eq!(widths(&narrow).v_head_dim, widths(&start).v_head_dim);
}

#[test]
fn biases_go_where_the_class_has_them() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let start = dir.path().join("start");
    convert("pico-qwen2", &start, |s| {
        s.method = method("exact");
        s.target = remote::TARGET.into();
    });
    let tokens = golden_tokens(&fixture("pico-qwen2"));
    for to in [deepseek_v3::TARGET, deepseek_v2::TARGET, minicpm3::TARGET] {
        let out = dir.path().join(to.name());
        exported(&start, &out, &settings(Some(to))).unwrap_or_else(|e| panic!("{to}: {e}"));
        let c = side_by_side(&start, &out, &tokens);
        assert!(c.max_abs_dlogit <= ROUNDING, "{to}: {c:?}");
    }
    let portable = ExportSettings { profile: Profile::Portable, ..settings(Some(deepseek_v3::TARGET)) };
    let refused = exported(&start, &dir.path().join("portable"), &portable).expect_err("has biases");
    assert!(refused.contains("biases") && refused.contains("hint:"), "{refused}");
    assert!(!dir.path().join("portable").exists());
}

#[test]
fn a_norm_that_does_something_stays_with_its_class() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for name in ["pico-deepseek-v3", "pico-deepseek-v3-moe", "pico-deepseek-v2", "pico-minicpm3"] {
        let from = fixture(name);
        let out = dir.path().join(name);
        let report = exported(&from, &out, &settings(None)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((report.route, report.latent_norm), (Route::Cast, None));
        let (source, _) = open(&out);
        assert!(source.tensors.iter().all(|(_, t)| t.dtype == Dtype::F32));
        assert_eq!(source.config["torch_dtype"], "float32");
        let c = side_by_side(&from, &out, &golden_tokens(&from));
        assert!(c.max_abs_dlogit <= ROUNDING, "{name}: {c:?}");
        let refused = exported(&from, &dir.path().join("other"), &settings(Some(remote::TARGET))).expect_err(name);
        assert!(refused.contains("norm of its latents") && refused.contains("hint:"), "{refused}");
        let nothing = ExportSettings { dtype: None, ..settings(None) };
        let refused = exported(&from, &dir.path().join("same"), &nothing).expect_err(name);
        assert!(refused.contains("nothing to do"), "{refused}");
    }
}

#[test]
fn a_model_without_a_latent_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let refused = exported(&fixture("pico-llama"), &dir.path().join("out"), &settings(None)).expect_err("GQA");
    assert!(refused.contains("no latent") && refused.contains("gqa2mla convert"), "{refused}");
}

#[test]
fn what_a_step_of_training_makes_of_a_conversion_is_exported() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (start, moved, out) = (dir.path().join("start"), dir.path().join("moved"), dir.path().join("out"));
    convert("pico-trained", &start, |_| {});
    // As Adam's first step: every number of attention by the same amount, in a direction of its own.
    rewritten(&start, &moved, |name, values| {
        if name.contains("self_attn") {
            let step = |i: usize| if (i * 7 + i / 3) % 5 < 2 { 1e-4 } else { -1e-4 };
            values.iter_mut().enumerate().for_each(|(i, v)| *v += step(i) as f32);
        }
    });
    let windows = heldout(128, 2);
    let before = side_by_side(&start, &moved, &windows);
    assert!(before.max_abs_dlogit > 10.0 * ROUNDING, "the step did nothing: {before:?}");
    for target in [remote::TARGET, deepseek_v3::TARGET] {
        let to = out.join(target.name());
        fs_err::create_dir_all(&out).expect("a folder");
        let report = exported(&moved, &to, &settings(Some(target))).expect("exports");
        let c = side_by_side(&moved, &to, &windows);
        // What the norm does to the moved weights is left out: a part of a thousandth of what the step changed.
        assert!(c.max_abs_dlogit <= ROUNDING + 0.05 * before.max_abs_dlogit, "{target} {report:?}: {c:?}");
    }
}
