//! Every target class: what it holds, what it refuses, and what it writes.

use gqa2mla::convert::{CalibrationSettings, ConvertSettings, OutputDtype, Padding, Profile, Target, TargetChoice};
use gqa2mla::report::engines::{Facts, Loads, judge};
use gqa2mla::source::Dtype;
use gqa2mla::target::classes::{CLASSES, deepseek_v2, deepseek_v3, remote};
use gqa2mla::target::fp8;

use crate::common::golden::golden_tokens;
use crate::common::judge::{ROUNDING, converted, worst_window};
use crate::common::models::{fixture, method, open};

/// Every class holds a dense model.
const DENSE: &[Target] = CLASSES;

fn exact(target: impl Into<TargetChoice>) -> ConvertSettings {
    ConvertSettings { method: method("exact"), target: target.into(), ..ConvertSettings::default() }
}

fn aware() -> ConvertSettings {
    let calibration = CalibrationSettings { samples: 24, seq_len: 96, ..CalibrationSettings::default() };
    ConvertSettings { calibration, kv_lora_rank: Some(48), qk_rope_head_dim: Some(24), ..ConvertSettings::default() }
}

#[test]
fn exact_loses_nothing_in_any_target_that_holds_the_source() {
    let cases: [(&str, &[Target]); 12] = [
        ("pico-llama", DENSE),
        ("pico-llama3", DENSE),
        ("pico-qwen2", DENSE),
        ("pico-phi3", DENSE),
        ("pico-phi3-long", DENSE),
        ("pico-granite", DENSE),
        ("pico-qwen3", &[remote::TARGET]),
        ("pico-gemma2", &[remote::TARGET]),
        ("pico-olmo2", &[remote::TARGET]),
        ("pico-mixtral", &[remote::TARGET, deepseek_v2::TARGET]),
        ("pico-qwen2-moe", &[remote::TARGET]),
        ("pico-qwen3-moe", &[remote::TARGET]),
    ];
    for (name, targets) in cases {
        for target in DENSE.iter().copied() {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let to = dir.path().join("out");
            match (targets.contains(&target), converted(&fixture(name), &to, &exact(target))) {
                (true, Ok(report)) => {
                    assert_eq!(report.target, target);
                    let c = worst_window(&fixture(name), &to, &golden_tokens(&fixture(name)));
                    assert!(c.max_abs_dlogit < ROUNDING, "{name} {target:?}: {c:?}");
                    assert!(c.cached_vs_full_max_abs_dlogit < ROUNDING, "{name} {target:?}: {c:?}");
                    assert_eq!(to.join("modeling_gqa2mla.py").exists(), target == remote::TARGET);
                }
                (true, Err(e)) => panic!("{name} {target:?}: {e}"),
                (false, Ok(_)) => panic!("{name} {target:?} was taken"),
                (false, Err(e)) => {
                    assert!(e.contains(target.name()) && e.contains("hint:"), "{name}: {e}");
                    assert!(!to.exists());
                }
            }
        }
        // What `auto` picks holds the source, and transformers' verdict on it is not a no.
        let dir = tempfile::tempdir().expect("a temporary folder");
        let to = dir.path().join("out");
        let report = converted(&fixture(name), &to, &exact(TargetChoice::Auto)).expect("auto finds a target");
        assert!(targets.contains(&report.target), "{name}: {:?}", report.target);
        let (source, _) = open(&to);
        let facts = Facts::read(&source.config, Some(&source.tensors)).expect("an MLA folder");
        let verdict = &judge(&facts)[0];
        assert!(verdict.engine == "transformers" && verdict.loads != Loads::No, "{name}: {verdict:?}");
    }
}

#[test]
fn experts_are_copied_bit_for_bit() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    converted(&fixture("pico-mixtral"), &to, &exact(remote::TARGET)).expect("converts");
    let ((a, _), (b, _)) = (open(&fixture("pico-mixtral")), open(&to));
    for (from, into) in
        [("gate", "gate"), ("experts.3.w1", "experts.3.gate_proj"), ("experts.0.w2", "experts.0.down_proj")]
    {
        let stored = a.tensors.view(&format!("model.layers.1.block_sparse_moe.{from}.weight")).expect("there");
        let written = b.tensors.view(&format!("model.layers.1.mlp.{into}.weight")).expect("there");
        assert_eq!((stored.dtype, &stored.bytes), (written.dtype, &written.bytes), "{from}");
    }
}

#[test]
fn padding_to_kernels_changes_nothing_but_widths() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (i, base) in [
        aware(),
        ConvertSettings { profile: Some(Profile::Portable), qk_rope_head_dim: Some(16), ..aware() },
        exact(TargetChoice::Auto),
    ]
    .into_iter()
    .enumerate()
    {
        let (plain, padded) = (dir.path().join(format!("plain-{i}")), dir.path().join(format!("padded-{i}")));
        let s = ConvertSettings { dtype: Some(OutputDtype::F32), force: true, ..base };
        let from = fixture("pico-trained");
        // The constant of the latent lies in the padding, where there is some.
        let kv_lora_rank = s.kv_lora_rank.map(|rank| rank + usize::from(s.profile.is_none()));
        converted(&from, &plain, &ConvertSettings { pad: Some(Padding::None), kv_lora_rank, ..s.clone() })
            .expect("converts");
        let report =
            converted(&from, &padded, &ConvertSettings { pad: Some(Padding::Kernels), ..s }).expect("converts");
        let g = report.geometry;
        assert_eq!((g.kv_lora_rank, g.qk_rope_head_dim, g.v_head_dim), (256, 64, 128));
        assert!(report.decisions.iter().any(|d| d.contains("padded") && d.contains("bytes")), "{:?}", report.decisions);
        let c = worst_window(&plain, &padded, &golden_tokens(&fixture("pico-trained")));
        assert!(c.max_abs_dlogit < ROUNDING, "{c:?}");
    }
}

#[test]
fn the_portable_profile_is_what_every_engine_runs() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let s = ConvertSettings { profile: Some(Profile::Portable), qk_rope_head_dim: Some(16), force: true, ..aware() };
    converted(&fixture("pico-trained"), &to, &s).expect("converts");
    let (source, _) = open(&to);
    let facts = Facts::read(&source.config, Some(&source.tensors)).expect("an MLA folder");
    assert!(judge(&facts).iter().all(|v| v.loads != Loads::No), "{:?}", judge(&facts));
    // Biases have no place there.
    let error = converted(
        &fixture("pico-qwen2"),
        &dir.path().join("no"),
        &ConvertSettings { method: method("exact"), ..s.clone() },
    );
    let error = error.expect_err("exact takes no widths, or the profile no biases");
    assert!(error.contains("hint:"), "{error}");
    let error = converted(
        &fixture("pico-qwen2"),
        &dir.path().join("no"),
        &ConvertSettings { profile: Some(Profile::Portable), ..exact(TargetChoice::Auto) },
    );
    assert!(error.expect_err("biases").contains("biases"), "biases are named");
}

#[test]
fn fp8_is_within_the_format_s_error_and_reads_back() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (wide, narrow) = (dir.path().join("bf16"), dir.path().join("fp8"));
    let s = ConvertSettings { pad: Some(Padding::Kernels), force: true, ..aware() };
    let from = fixture("pico-trained");
    converted(&from, &wide, &ConvertSettings { dtype: Some(OutputDtype::Bf16), ..s.clone() }).expect("converts");
    converted(&from, &narrow, &ConvertSettings { dtype: Some(OutputDtype::Fp8), ..s }).expect("converts");
    let (source, _) = open(&narrow);
    assert_eq!(source.config["quantization_config"]["quant_method"], "fp8");
    let name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight";
    assert_eq!(source.tensors.get(name).expect("there").dtype, Dtype::F8_E4M3);
    assert_eq!(source.tensors.get(&fp8::scale_name(name)).expect("there").dtype, Dtype::F32);
    // Each weight is off by at most 2^-4 of itself, 2^-5 on average: about that share of each layer's output.
    let c = worst_window(&wide, &narrow, &golden_tokens(&fixture("pico-trained")));
    assert!(c.kl_nats_per_token < 0.02, "{c:?}");
    // A latent that shares a block with the rotated key would vanish.
    let error = converted(&from, &dir.path().join("no"), &ConvertSettings { dtype: Some(OutputDtype::Fp8), ..aware() });
    assert!(error.expect_err("48 latents").contains("share"), "the block is named");
}

#[test]
fn every_profile_of_a_target_holds_f16() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let half = |target: Target| ConvertSettings { dtype: Some(OutputDtype::F16), ..exact(target) };
    for target in CLASSES.iter().copied().filter(|class| class.norms_latents() && class.is_portable()) {
        let s = |dtype| ConvertSettings {
            profile: Some(Profile::Portable),
            pad: Some(Padding::None),
            target: target.into(),
            dtype: Some(dtype),
            method: method("transmla"),
            qk_rope_head_dim: Some(16),
            ..aware()
        };
        let (wide, narrow) =
            (dir.path().join(format!("{target}-f32")), dir.path().join(format!("{target}-portable-f16")));
        converted(&fixture("pico-trained"), &wide, &s(OutputDtype::F32)).expect("converts");
        converted(&fixture("pico-trained"), &narrow, &s(OutputDtype::F16)).expect("converts");
        let c = worst_window(&wide, &narrow, &golden_tokens(&fixture("pico-trained")));
        // Eleven bits in every weight; rows that f16 rounded to zero would cost whole nats.
        assert!(c.kl_nats_per_token < 1e-5, "{target}: {c:?}");
    }
    for target in [deepseek_v3::TARGET, remote::TARGET] {
        let to = dir.path().join(target.name());
        converted(&fixture("pico-llama"), &to, &half(target)).expect("no weight is tiny");
        let c = worst_window(&fixture("pico-llama"), &to, &golden_tokens(&fixture("pico-llama")));
        // Eleven bits in every weight of two layers.
        assert!(c.max_abs_dlogit < 0.05, "{target}: {c:?}");
    }
}
