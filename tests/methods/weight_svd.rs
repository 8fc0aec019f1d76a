//! Both methods that factorise weights, X-EcoMLA and MHA2MLA, on whole models.

use gqa2mla::convert::{Budget, CalibrationSettings, ConvertSettings, MethodChoice, OutputDtype, Target};
use gqa2mla::methods::mha2mla::Mha2mla;
use gqa2mla::methods::partial_rope::PartialRope;
use gqa2mla::methods::x_ecomla::XEcomla;
use gqa2mla::target::classes::{deepseek_v3, remote};

use crate::common::copies::copy_folder;
use crate::common::judge::{converted, heldout, side_by_side};
use crate::common::models::{fixture, method, open};

pub fn settings(method: impl Into<MethodChoice>) -> ConvertSettings {
    let calibration = CalibrationSettings { samples: 4, seq_len: 128, ..CalibrationSettings::default() };
    ConvertSettings {
        method: method.into(),
        calibration,
        dtype: Some(OutputDtype::F32),
        force: true,
        ..ConvertSettings::default()
    }
}

#[test]
fn every_rule_writes_a_model_whose_slots_turn_as_the_source() {
    let (_, source) = open(&fixture("pico-trained"));
    for rule in PartialRope::ALL {
        let partial_rope = Some(rule);
        let (x, m) = (XEcomla { partial_rope, ..XEcomla::default() }, Mha2mla { partial_rope, ..Mha2mla::default() });
        for method in [MethodChoice::from(x), MethodChoice::from(m)] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let to = dir.path().join("out");
            let s = ConvertSettings { kv_budget: Some(Budget::Percent(50.0)), ..settings(method.clone()) };
            let report = converted(&fixture("pico-trained"), &to, &s).expect("converts");
            assert_eq!(report.cache_values_per_token_per_layer, 64);
            for f in &report.rope_frequencies {
                assert!(
                    source.rope.inv_freq.iter().any(|own| (own / f - 1.0).abs() < 1e-6),
                    "{method}, {}",
                    rule.name()
                );
            }
            let c = side_by_side(&fixture("pico-trained"), &to, &heldout(64, 2));
            assert!(c.ppl_converted.is_finite() && c.cached_vs_full_max_abs_dlogit < 2e-4, "{method}: {c:?}");
        }
    }
}

#[test]
fn biases_and_norms_and_partial_rotation_are_carried() {
    // Random weights: what counts is that the written model is the one that was measured.
    for (name, method) in [
        ("pico-qwen2", method("x-ecomla")),
        ("pico-qwen2", method("mha2mla")),
        ("pico-qwen3", method("x-ecomla")),
        ("pico-phi3", method("mha2mla")),
        ("pico-phi3", method("x-ecomla")),
    ] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (stock, remote) = (dir.path().join("stock"), dir.path().join("remote"));
        let from = dir.path().join("from");
        copy_folder(&fixture(name), &from);
        fs_err::copy(fixture("pico-trained").join("tokenizer.json"), from.join("tokenizer.json")).expect("copied");
        // Bytes that the small vocabularies have.
        let text = dir.path().join("text.txt");
        fs_err::write(&text, "THE RIVER BENDS TWICE BEFORE 1900 AND 1950. ".repeat(60)).expect("written");
        let s = |target: Target| {
            let mut s = ConvertSettings { target: target.into(), ..settings(method.clone()) };
            s.calibration.files = vec![text.clone()];
            s
        };
        converted(&from, &remote, &s(remote::TARGET)).unwrap_or_else(|e| panic!("{name}: {e}"));
        // A stock class takes one value of the latent for the constant that neutralises its norm.
        let shape = *open(&remote).1.mla().expect("an MLA model");
        let (rope, rank) = (Some(shape.qk_rope_head_dim), Some(shape.kv_lora_rank + 1));
        let wider = ConvertSettings { qk_rope_head_dim: rope, kv_lora_rank: rank, ..s(deepseek_v3::TARGET) };
        converted(&from, &stock, &wider).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tokens: Vec<u32> = (0..40).map(|i| i * 5 % 60).collect();
        let c = side_by_side(&stock, &remote, &[tokens]);
        assert!(c.max_abs_dlogit < 2e-4, "{name}, {method}: {c:?}");
    }
}

#[test]
fn what_is_impossible_is_said_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let with = |method: MethodChoice, f: &dyn Fn(&mut ConvertSettings)| {
        let mut s = ConvertSettings { force: false, ..settings(method) };
        f(&mut s);
        s
    };
    let x = |f: &dyn Fn(&mut ConvertSettings)| with(XEcomla::default().into(), f);
    let m = |f: &dyn Fn(&mut ConvertSettings)| with(Mha2mla::default().into(), f);
    let energies = |kv_energy, q_energy| XEcomla { kv_energy, q_energy, ..XEcomla::default() }.into();
    let cases: Vec<(&str, ConvertSettings)> = vec![
        ("--kv-energy 1.5 is no share", with(energies(Some(1.5), None), &|_| ())),
        ("--q-energy 0 is no share", with(energies(None, Some(0.0)), &|_| ())),
        ("--kv-energy NaN is no share", with(energies(Some(f64::NAN), None), &|_| ())),
        ("finds the ranks", with(energies(Some(0.9), None), &|s| s.kv_lora_rank = Some(64))),
        ("finds the ranks", with(energies(None, Some(0.9)), &|s| s.q_lora_rank = Some(64))),
        ("rank 128 at most", x(&|s| (s.kv_lora_rank, s.qk_rope_head_dim) = (Some(129), Some(8)))),
        ("rank 112 at most", m(&|s| (s.kv_lora_rank, s.qk_rope_head_dim) = (Some(113), Some(16)))),
        ("q_lora_rank 129 is larger", x(&|s| s.q_lora_rank = Some(129))),
        ("--q-lora-rank", m(&|s| s.q_lora_rank = Some(64))),
        ("qk_rope_head_dim 12 cannot", m(&|s| s.qk_rope_head_dim = Some(12))),
        ("qk_rope_head_dim 16 cannot", x(&|s| s.qk_rope_head_dim = Some(16))),
        ("nothing is saved", with(energies(Some(1.0), None), &|_| ())),
        (
            "stock grid",
            with(XEcomla { partial_rope: Some(PartialRope::High), ..XEcomla::default() }.into(), &|s| {
                s.profile = Some(gqa2mla::convert::Profile::Portable);
            }),
        ),
    ];
    for (expected, s) in cases {
        let error = converted(&fixture("pico-trained"), &to, &s).expect_err(expected);
        assert!(error.contains(expected), "expected `{expected}`, found: {error}");
        assert!(error.contains("hint: "), "{error}");
        assert_eq!(fs_err::read_dir(dir.path()).expect("readable").count(), 0, "something was left behind: {error}");
    }
}
