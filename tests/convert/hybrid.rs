//! Models some of whose layers keep the source's attention.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use gqa2mla::arch::Architecture;
use gqa2mla::convert::{
    CalibrationSettings, ConvertSettings, LayerCount, MethodChoice, MlaLayers, OutputDtype, Profile, convert, plan,
};
use gqa2mla::methods::mha2mla::Mha2mla;
use gqa2mla::methods::x_ecomla::XEcomla;
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model, Resident, Session};
use gqa2mla::target::classes::{deepseek_v3, remote};
use gqa2mla::write::{Leftover, verify_manifest};

use super::StopAt;
use crate::common::copies::copy_folder;
use crate::common::judge::{ROUNDING, converted, side_by_side};
use crate::common::models::{fixture, method, open};

fn settings(method: impl Into<MethodChoice>, layers: MlaLayers) -> ConvertSettings {
    let calibration = CalibrationSettings { samples: 8, seq_len: 64, ..CalibrationSettings::default() };
    ConvertSettings {
        method: method.into(),
        calibration,
        mla_layers: Some(layers),
        dtype: Some(OutputDtype::F32),
        ..ConvertSettings::default()
    }
}

fn list(layers: &[usize]) -> MlaLayers {
    MlaLayers::List(layers.iter().map(|l| (*l, *l)).collect())
}

fn tokens() -> Vec<Vec<u32>> {
    vec![(0..50).map(|i| (i * 13 + i / 7) % 97).collect()]
}

#[test]
fn a_hybrid_whose_mla_layers_lose_nothing_is_its_source() {
    // Phi-3 with twelve of a head's sixteen values turned: MHA2MLA keeps all of them, and at full rank the rest as well.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    copy_folder(&fixture("pico-phi3"), &from);
    fs_err::copy(fixture("pico-trained").join("tokenizer.json"), from.join("tokenizer.json")).expect("copied");
    // Bytes that the small vocabulary has.
    let text = dir.path().join("text.txt");
    fs_err::write(&text, "THE RIVER BENDS TWICE BEFORE 1900 AND 1950. ".repeat(40)).expect("written");
    let mut s = settings(method("mha2mla"), list(&[1]));
    s.calibration.files = vec![text];
    (s.kv_lora_rank, s.qk_rope_head_dim, s.force) = (Some(40), Some(24), true);
    let report = converted(&from, &to, &s).expect("converts");
    assert!(report.layers[0].kept && !report.layers[1].kept);
    assert!(report.layers[1].calibration_error < 1e-6, "{:?}", report.layers);
    let c = side_by_side(&from, &to, &tokens());
    assert!(c.max_abs_dlogit < ROUNDING && c.cached_vs_full_max_abs_dlogit < ROUNDING, "{c:?}");
}

#[test]
fn kept_layers_are_the_sources_bit_for_bit_and_cache_what_they_cached() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for method in MethodChoice::all().into_iter().filter(|m| m.compresses()) {
        let to = dir.path().join(method.name());
        let report =
            converted(&fixture("pico-trained"), &to, &settings(method.clone(), list(&[0, 3]))).expect("converts");
        assert_eq!(report.target, remote::TARGET);
        assert_eq!(report.mla_layers, [0, 3]);
        assert_eq!(report.cache_values_per_token, 2 * report.cache_values_per_token_per_layer + 2 * 128);
        let ((source, _), (made, arch)) = (open(&fixture("pico-trained")), open(&to));
        for layer in [1, 2] {
            for role in ["q", "k", "v", "o"] {
                let name = format!("model.layers.{layer}.self_attn.{role}_proj.weight");
                let both = [&source, &made].map(|m| m.tensors.view(&name).expect("there").to_f32());
                assert_eq!(both[0], both[1], "{method}: {name}");
            }
        }
        assert_eq!(arch.cache_values_per_token(), report.cache_values_per_token);
        let resident = Resident::load(Model::new(&made, &arch, &Cpu)).expect("loads");
        let session = Session::new(&resident, 10).expect("opens");
        assert_eq!(session.cache_bytes(), 10 * 4 * report.cache_values_per_token);
        let c = side_by_side(&fixture("pico-trained"), &to, &tokens());
        assert!(c.ppl_converted.is_finite() && c.cached_vs_full_max_abs_dlogit < 2e-4, "{method}: {c:?}");
        assert!(verify_manifest(&to).expect("a manifest").is_clean());
    }
}

#[test]
fn chosen_layers_are_written_as_if_they_had_been_named() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let auto = settings(method("x-ecomla"), MlaLayers::Auto(LayerCount::Count(2)));
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let chosen = converted(&fixture("pico-trained"), &a, &auto).expect("converts").mla_layers;
    assert_eq!(chosen.len(), 2);
    let (source, arch) = open(&fixture("pico-trained"));
    let planned = plan(&source, &arch, &auto, false, &Silent).expect("plans");
    assert_eq!(planned.mla_layers, chosen);
    converted(&fixture("pico-trained"), &b, &settings(method("x-ecomla"), list(&chosen))).expect("converts");
    let bytes = |dir: &Path, file: &str| fs_err::read(dir.join(file)).expect("readable");
    for file in ["model.safetensors", "config.json"] {
        assert!(bytes(&a, file) == bytes(&b, file), "{file}");
    }
    // Half of the layers where no number is given, all where all are named.
    let half = settings(method("x-ecomla"), "auto".parse().expect("a choice"));
    assert_eq!(plan(&source, &arch, &half, false, &Silent).expect("plans").mla_layers.len(), 2);
    let all = plan(&source, &arch, &settings(method("x-ecomla"), list(&[0, 1, 2, 3])), false, &Silent).expect("plans");
    assert_eq!(all.mla_layers, [0, 1, 2, 3]);
}

#[test]
fn a_stopped_run_goes_on_with_the_layers_and_ranks_that_were_found() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let energy = XEcomla { kv_energy: Some(0.7), q_energy: Some(0.9), ..XEcomla::default() };
    let norm =
        Mha2mla { partial_rope: Some(gqa2mla::methods::partial_rope::PartialRope::TwoNorm), ..Mha2mla::default() };
    let auto = MlaLayers::Auto(LayerCount::Count(3));
    let cases = [
        ConvertSettings { mla_layers: None, ..settings(energy, auto.clone()) },
        settings(energy, auto.clone()),
        settings(norm, auto.clone()),
        settings(method("attention-aware"), auto),
    ];
    for (n, s) in cases.iter().enumerate() {
        let whole = dir.path().join(format!("whole-{n}"));
        converted(&fixture("pico-trained"), &whole, s).expect("converts");
        for done in [0, 2] {
            let to = dir.path().join(format!("out-{n}-{done}"));
            let (source, arch) = open(&fixture("pico-trained"));
            let stop = StopAt(done);
            let result = catch_unwind(AssertUnwindSafe(|| {
                let done = convert(&source, &arch, s, &to, &|_| Vec::new(), &stop);
                done.is_ok()
            }));
            assert!(result.is_err() && !to.exists());
            converted(&fixture("pico-trained"), &to, &ConvertSettings { leftover: Leftover::Resume, ..s.clone() })
                .expect("resumes");
            let manifest = |dir: &Path| fs_err::read_to_string(dir.join("manifest.json")).expect("readable");
            assert_eq!(manifest(&to), manifest(&whole), "case {n} stopped after {done} layers");
        }
    }
}

#[test]
fn what_cannot_be_is_said_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let x = XEcomla::default();
    let cases = [
        ("names 4, the model has layers 0 to 3", settings(x, list(&[0, 4]))),
        ("names 2-9, the model has layers 0 to 3", settings(x, MlaLayers::List(vec![(2, 9)]))),
        ("more layers than the model's 4", settings(x, MlaLayers::Auto(LayerCount::Count(5)))),
        ("takes no --mla-layers", settings(method("exact"), list(&[0]))),
        ("one kind of attention", ConvertSettings { target: deepseek_v3::TARGET.into(), ..settings(x, list(&[0])) }),
        ("portable profile", ConvertSettings { profile: Some(Profile::Portable), ..settings(x, list(&[0])) }),
    ];
    for (expected, s) in cases {
        let error = converted(&fixture("pico-trained"), &to, &s).expect_err(expected);
        assert!(error.contains(expected) && error.contains("hint: "), "expected `{expected}`, found: {error}");
        assert_eq!(fs_err::read_dir(dir.path()).expect("readable").count(), 0, "{error}");
    }
    // A config that names layers the model does not have.
    converted(&fixture("pico-trained"), &to, &settings(x, list(&[0]))).expect("converts");
    let (source, _) = open(&to);
    for (key, value) in
        [("layers", serde_json::json!([9])), ("rotary_dim", 18.into()), ("num_key_value_heads", 3.into())]
    {
        let mut config = source.config.clone();
        config["gqa"][key] = value;
        let error = Architecture::from_config(&config).expect_err(key).to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn what_needs_a_latent_in_every_layer_refuses_hybrids() {
    use gqa2mla::analyze::{AnalyzeSettings, analyze};
    use gqa2mla::latent::{RotateSettings, ShardSettings, Sharing, Transform, need_mla, rotate, shard};
    use gqa2mla::runtime::DeviceChoice;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (from, to) = (dir.path().join("hybrid"), dir.path().join("out"));
    converted(&fixture("pico-trained"), &from, &settings(method("x-ecomla"), list(&[0, 2]))).expect("converts");
    let (source, arch) = open(&from);
    let turned = RotateSettings {
        transform: Transform::Hadamard,
        slices: 2,
        calibration: CalibrationSettings::default(),
        dtype: None,
        device: DeviceChoice::Cpu,
        max_shard_bytes: 5_000_000_000,
        overwrite: false,
        leftover: Leftover::Refuse,
    };
    let shared = ShardSettings {
        sharing: Sharing { ranks: 2, shared_rms: false, logit_scale: 1.0 },
        calibrate: false,
        refit: false,
        calibration: CalibrationSettings::default(),
        device: DeviceChoice::Cpu,
        overwrite: false,
    };
    let model = Model::new(&source, &arch, &Cpu);
    let faults = [
        rotate(&source, &arch, &turned, &to, &|_| Vec::new(), &Silent).expect_err("rotate").to_string(),
        shard(&source, &arch, &shared, &to, &Silent).expect_err("shard").to_string(),
        // What `verify --tp` asks first.
        need_mla(&source, &arch).expect_err("verify --tp").to_string(),
    ];
    for fault in &faults {
        assert!(fault.contains("has grouped-query attention in some of its layers, which have no latent"), "{fault}");
        assert!(fault.contains("hint: convert all layers (`gqa2mla convert` without `--mla-layers`)"), "{fault}");
    }
    let fault = analyze(&model, &tokens(), &AnalyzeSettings { groups: vec![1], align_rank: None }, &Silent)
        .expect_err("analyze")
        .to_string();
    let xkv: gqa2mla::runtime::XkvSettings = "8,8,1".parse().expect("three integers");
    for fault in [fault, xkv.check(&arch, 32).expect_err("--xkv").to_string()] {
        assert!(fault.contains("hint: "), "{fault}");
    }
    assert!(!to.exists(), "nothing is written");
}
