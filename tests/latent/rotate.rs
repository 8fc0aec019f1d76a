//! Rotated latents (`scripts/check_rotation.py` loads rotations in stock transformers).

use gqa2mla::convert::OutputDtype;
use gqa2mla::latent::{RotateSettings, Sharing, Transform};
use gqa2mla::target::classes::{deepseek_v3, minicpm3, remote};
use gqa2mla::write::verify_manifest;

use super::{NATIVE, converted, settings, shard_to, tensor_bytes, turn};
use crate::common::golden::golden_tokens;
use crate::common::judge::{ROUNDING, heldout, side_by_side};
use crate::common::models::fixture;

#[test]
fn native_models_compute_the_same_with_turned_latents() {
    for name in NATIVE {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let to = dir.path().join("out");
        let report = turn(&fixture(name), &to, &settings(Transform::Hadamard, 2)).expect(name);
        assert_eq!(report.cache_values_per_rank, report.kv_lora_rank / 2 + report.qk_rope_head_dim);
        let c = side_by_side(&fixture(name), &to, &golden_tokens(&fixture(name)));
        assert!(c.max_abs_dlogit <= ROUNDING, "{name}: {c:?}");
        // Everything that does not touch the latent is there bit for bit, and what does is not.
        let (before, after) = (tensor_bytes(&fixture(name)), tensor_bytes(&to));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (tensor, was) in &before {
            let touched = ["kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"].iter().any(|t| tensor.contains(t));
            assert!(touched || after[tensor] == *was, "{name}: {tensor}");
            if tensor.contains("kv_b_proj") {
                assert_ne!(after[tensor], *was, "{name}: {tensor}");
            }
        }
        assert!(verify_manifest(&to).expect("a manifest").is_clean());
    }
}

#[test]
fn conversions_compute_the_same_with_turned_latents() {
    for target in [deepseek_v3::TARGET, minicpm3::TARGET, remote::TARGET] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let from = dir.path().join("mla");
        converted(&from, target);
        let windows = heldout(128, 4);
        for transform in Transform::ALL {
            let to = dir.path().join(transform.name());
            let report = turn(&from, &to, &settings(transform, 2)).expect("turns");
            let c = side_by_side(&from, &to, &windows);
            assert!(c.max_abs_dlogit <= ROUNDING, "{target:?} {transform}: {c:?}");
            if transform == Transform::None {
                assert_eq!(tensor_bytes(&from), tensor_bytes(&to));
            }
            if transform == Transform::Pca {
                for layer in &report.layers {
                    assert!((layer.slice_energy.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{layer:?}");
                }
            }
            assert_eq!(to.join("modeling_gqa2mla.py").exists(), target == remote::TARGET);
        }
    }
}

#[test]
fn rounding_to_bf16_is_asked_for_and_the_fold_is_repeatable() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let name = "pico-deepseek-v3";
    let bf16 = RotateSettings { dtype: Some(OutputDtype::Bf16), ..settings(Transform::Hadamard, 1) };
    turn(&fixture(name), &dir.path().join("bf16"), &bf16).expect("turns");
    let c = side_by_side(&fixture(name), &dir.path().join("bf16"), &golden_tokens(&fixture(name)));
    assert!(c.max_abs_dlogit > ROUNDING && c.max_abs_dlogit < 0.5, "{c:?}");
    for out in ["a", "b"] {
        turn(&fixture(name), &dir.path().join(out), &settings(Transform::Hadamard, 1)).expect("turns");
    }
    for file in ["model.safetensors", "rotation.json", "manifest.json"] {
        let read = |out: &str| fs_err::read(dir.path().join(out).join(file)).expect("written");
        assert_eq!(read("a"), read("b"), "{file}");
    }
}

#[test]
fn what_cannot_be_turned_or_shared_out_is_a_sentence_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let sharing = |ranks| Sharing { ranks, shared_rms: false, logit_scale: 1.0 };
    let native = fixture("pico-deepseek-v3");
    let faults = [
        turn(&fixture("pico-llama"), &to, &settings(Transform::Hadamard, 1)).expect_err("GQA"),
        shard_to(&fixture("pico-llama"), &to, sharing(2)).expect_err("GQA"),
        turn(&native, &to, &settings(Transform::Hadamard, 7)).expect_err("7 of 24"),
        turn(&native, &to, &settings(Transform::Hadamard, 0)).expect_err("none"),
        shard_to(&native, &to, sharing(48)).expect_err("48 of 24"),
        turn(&native, &native.join("inside"), &settings(Transform::Hadamard, 1)).expect_err("within the source"),
        turn(&native, &to, &RotateSettings { dtype: Some(OutputDtype::F16), ..settings(Transform::Hadamard, 1) })
            .expect_err("f16"),
        // There is no tokenizer to calibrate with.
        turn(&native, &to, &settings(Transform::Pca, 2)).expect_err("no tokenizer"),
    ];
    for fault in &faults {
        assert!(fault.contains("hint: ") || fault.contains("tokenizer"), "{fault}");
    }
    assert!(faults[0].contains("grouped-query") && faults[2].contains("7 slices do not divide a latent of 24"));
    assert!(fs_err::read_dir(dir.path()).expect("readable").next().is_none(), "nothing is left");
}
