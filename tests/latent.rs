//! Turning and sharing out latents, judged by the reference runtime (`scripts/check_rotation.py` loads rotations in stock
//! transformers).

#[path = "common/golden.rs"]
mod golden;
#[path = "common/models.rs"]
mod models;

use std::path::Path;

use golden::golden_tokens;
use gqa2mla::arch::{Architecture, check_tensors};
use gqa2mla::convert::{CalibrationSettings, ConvertSettings, OutputDtype, TargetKind, convert};
use gqa2mla::latent::{
    LatentWeights, RotateSettings, RotationReport, ShardReport, ShardSettings, Sharing, Transform, latent_moments,
    latent_windows, refitted_ranks, rotate, shard,
};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, DeviceChoice, LayerTensors, Model};
use gqa2mla::source::ModelSource;
use gqa2mla::verify::{Comparison, SharedOut, SlicedComparison, compare, compare_sliced, windows_from_text};
use gqa2mla::write::{Leftover, verify_manifest};
use models::fixture;
use safetensors::SafeTensors;
use serde_json::Value;

/// What two exact models may differ by: the f32 rounding of a few hundred products each (see tests/convert.rs).
const ROUNDING: f64 = 1.3e-4;

const NATIVE: [&str; 5] =
    ["pico-deepseek-v3", "pico-deepseek-v3-bias", "pico-deepseek-v2", "pico-youtu", "pico-minicpm3"];

fn open(dir: &Path) -> (ModelSource, Architecture) {
    let (source, arch) = models::open(dir);
    check_tensors(&arch, &source.tensors).expect("config and tensors agree");
    (source, arch)
}

fn settings(transform: Transform, slices: usize) -> RotateSettings {
    RotateSettings {
        transform,
        slices,
        calibration: CalibrationSettings { samples: 24, seq_len: 128, ..CalibrationSettings::default() },
        dtype: None,
        device: DeviceChoice::Cpu,
        max_shard_bytes: 5_000_000_000,
        overwrite: false,
        leftover: Leftover::Refuse,
    }
}

fn turn(from: &Path, to: &Path, settings: &RotateSettings) -> Result<RotationReport, String> {
    let (source, arch) = open(from);
    rotate(&source, &arch, settings, to, &|_| Vec::new(), &Silent).map_err(|e| e.to_string())
}

fn shard_to(from: &Path, to: &Path, sharing: Sharing) -> Result<ShardReport, String> {
    let (source, arch) = open(from);
    let settings = ShardSettings {
        sharing,
        calibrate: false,
        refit: false,
        calibration: CalibrationSettings { samples: 24, seq_len: 128, ..CalibrationSettings::default() },
        device: DeviceChoice::Cpu,
        overwrite: false,
    };
    shard(&source, &arch, &settings, to, &Silent).map_err(|e| e.to_string())
}

fn side_by_side(from: &Path, to: &Path, windows: &[Vec<u32>]) -> Comparison {
    let ((s, sa), (c, ca)) = (open(from), open(to));
    compare(&Model::new(&s, &sa, &Cpu), &Model::new(&c, &ca, &Cpu), windows, &Silent).expect("both models run")
}

/// The trained fixture at half its cache, written for `target`.
fn converted(to: &Path, target: TargetKind) {
    let (source, arch) = open(&fixture("pico-trained"));
    let calibration = CalibrationSettings { samples: 32, seq_len: 128, ..CalibrationSettings::default() };
    let settings = ConvertSettings { target, calibration, ..ConvertSettings::default() };
    convert(&source, &arch, &settings, to, &|_| Vec::new(), &Silent).expect("converts");
}

fn heldout(source: &ModelSource, seq_len: usize, count: usize) -> Vec<Vec<u32>> {
    let tokens = source.tokenizer().expect("tokenizer").encode(gqa2mla::calibrate::bundled_heldout()).expect("encodes");
    windows_from_text(&tokens, seq_len, 1, Some(count))
}

/// Bytes of every tensor of a model, by name.
fn tensor_bytes(dir: &Path) -> std::collections::BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let (source, _) = open(dir);
    let one = |name: &str| {
        let view = source.tensors.view(name).expect("reads");
        (name.to_owned(), (view.shape.to_vec(), view.bytes.to_vec()))
    };
    source.tensors.names().map(one).collect()
}

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
    for target in [TargetKind::DeepseekV3, TargetKind::Minicpm3, TargetKind::HfRemote] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let from = dir.path().join("mla");
        converted(&from, target);
        let windows = heldout(&open(&from).0, 128, 4);
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
            assert_eq!(to.join("modeling_gqa2mla.py").exists(), target == TargetKind::HfRemote);
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

fn share(name: &Path, cases: &[SharedOut], windows: &[Vec<u32>], prefill: usize, calibrate: bool) -> SlicedComparison {
    let (source, arch) = open(name);
    let moments = calibrate.then(|| {
        let settings = CalibrationSettings { samples: 32, seq_len: 128, ..CalibrationSettings::default() };
        let rank = arch.mla().expect("MLA").kv_lora_rank;
        let text = latent_windows(&source, &arch, &settings, rank).expect("text");
        latent_moments(&source, &arch, &Cpu, &text, &Silent).expect("moments")
    });
    let model = Model::new(&source, &arch, &Cpu);
    compare_sliced(&model, (&model, &source), cases, moments.as_deref(), (windows, prefill), &Silent).expect("runs")
}

#[test]
fn one_rank_is_the_whole_model_and_prompts_are_not_sliced() {
    for name in NATIVE {
        let windows = golden_tokens(&fixture(name));
        let mut cases = Vec::new();
        for transform in [Transform::None, Transform::Hadamard] {
            for (ranks, shared_rms) in [(1, false), (1, true), (2, false), (2, true)] {
                let sharing = Sharing { ranks, shared_rms, logit_scale: 1.0 };
                cases.push(SharedOut { transform, sharing, refitted: None });
            }
        }
        for prefill in [0, 3] {
            let found = share(&fixture(name), &cases, &windows, prefill, false);
            for (case, f) in cases.iter().zip(&found.cases) {
                if case.sharing.ranks == 1 {
                    assert!(f.max_abs_dlogit_whole <= ROUNDING, "{name} {case:?}: {f:?}");
                } else {
                    // Slicing is an approximation: a run that changed nothing would not have sliced.
                    assert!(f.max_abs_dlogit_whole > 10.0 * ROUNDING, "{name} {case:?}: {f:?}");
                }
                // All tokens at once, and one by one over a cache per rank.
                assert!(f.against_source.cached_vs_full_max_abs_dlogit <= ROUNDING, "{name} {case:?}: {f:?}");
                let (source, arch) = open(&fixture(name));
                drop(source);
                let mla = arch.mla().expect("MLA");
                assert_eq!(f.cache_values_per_rank, mla.kv_lora_rank / case.sharing.ranks + mla.qk_rope_head_dim);
                assert_eq!(f.allocated_bytes_per_token, 4.0 * f.cache_values_per_rank as f64);
            }
        }
    }
}

#[test]
fn a_prompt_is_run_whole() {
    // The first token behind a prompt of all but it sees only latents that whole attention made: in the first layer its
    // slices attend to them, in the ones above too. With everything prefilled nothing differs.
    let name = "pico-deepseek-v3";
    let (source, arch) = open(&fixture(name));
    let windows = golden_tokens(&fixture(name));
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let model = Model::new(&source, &arch, &Cpu);
    let (start, _) = model.start(&windows).expect("tokens");
    let tensors = LayerTensors::load(&source, &arch, 0).expect("a layer");
    let weights = LatentWeights::of(&tensors.attention).expect("MLA");
    let layer = model.layer(0).expect("a layer");
    let shape = arch.mla().expect("MLA");
    let sharing = Sharing { ranks: 2, shared_rms: true, logit_scale: 1.0 };
    let ranks = layer.ranks(weights.ranks(shape, &sharing, None), true).expect("fits");
    let (mut whole, mut prompt, mut last) = (start.clone(), start.clone(), start);
    layer.forward(&mut whole, &lengths).expect("runs");
    layer.forward_sliced(&mut prompt, &lengths, usize::MAX, &ranks).expect("runs");
    let apart = |a: &ndarray::Array2<f32>, rows: std::ops::Range<usize>| {
        let rows = ndarray::s![rows, ..];
        (&a.slice(rows) - &whole.slice(rows)).iter().fold(0.0_f32, |m, d| m.max(d.abs()))
    };
    assert!(apart(&prompt, 0..prompt.nrows()) <= 1e-5);
    layer.forward_sliced(&mut last, &lengths, lengths[0] - 1, &ranks).expect("runs");
    assert!(apart(&last, 0..lengths[0] - 1) <= 1e-5);
    assert!(apart(&last, lengths[0] - 1..lengths[0]) > 1e-4);
}

#[test]
fn rank_files_hold_what_the_runtime_runs_and_add_up_to_the_model() {
    for (name, shared_rms) in [("pico-deepseek-v3-bias", false), ("pico-deepseek-v3", true), ("pico-youtu", false)] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let to = dir.path().join("out");
        let ranks = 2;
        let sharing = Sharing { ranks, shared_rms, logit_scale: 1.0 };
        let report = shard_to(&fixture(name), &to, sharing).expect("shards");
        assert!(verify_manifest(&to).expect("a manifest").is_clean());
        let stored: Value =
            serde_json::from_slice(&fs_err::read(to.join("tpla.json")).expect("written")).expect("JSON");
        assert_eq!(stored["ranks"].as_array().map(Vec::len), Some(ranks));
        let (source, arch) = open(&fixture(name));
        let shape = arch.mla().expect("MLA");
        let whole = tensor_bytes(&fixture(name));
        let files: Vec<Vec<u8>> =
            report.ranks.iter().map(|r| fs_err::read(to.join(&r.file)).expect("a rank's file")).collect();
        let parts: Vec<SafeTensors<'_>> =
            files.iter().map(|f| SafeTensors::deserialize(f).expect("safetensors")).collect();
        for (tensor, (dims, bytes)) in &whole {
            let views: Vec<_> = parts.iter().map(|p| p.tensor(tensor).expect("on every rank")).collect();
            let of = |end: &str| tensor.ends_with(end);
            let size = 4;
            if of("kv_b_proj.weight") || of("down_proj.weight") {
                // Columns side by side.
                let rows = dims[0];
                let joined: Vec<u8> = (0..rows)
                    .flat_map(|i| {
                        views.iter().flat_map(move |v| {
                            let width = v.shape()[1] * size;
                            v.data()[i * width..(i + 1) * width].to_vec()
                        })
                    })
                    .collect();
                assert_eq!(&joined, bytes, "{tensor}");
            } else if of("gate_proj.weight") || of("up_proj.weight") {
                assert_eq!(&views.iter().flat_map(|v| v.data().to_vec()).collect::<Vec<_>>(), bytes, "{tensor}");
            } else if of("kv_a_proj_with_mqa.weight") && !shared_rms {
                let row = dims[1] * size;
                let slice = shape.kv_lora_rank / ranks * row;
                let joined: Vec<u8> = views.iter().flat_map(|v| v.data()[..slice].to_vec()).collect();
                assert_eq!(&joined, &bytes[..shape.kv_lora_rank * row], "{tensor}");
                for v in &views {
                    assert_eq!(&v.data()[slice..], &bytes[shape.kv_lora_rank * row..], "{tensor}: the rotated key");
                }
            } else if of("o_proj.bias") {
                assert_eq!(views[0].data(), &bytes[..]);
                assert!(views[1].data().iter().all(|b| *b == 0), "{tensor} is added once");
            } else if shared_rms || !tensor.contains("kv_a") {
                assert!(views.iter().all(|v| v.data() == &bytes[..]), "{tensor} is whole on every rank");
            }
        }
        // The runtime's own ranks are these tensors.
        let tensors = LayerTensors::load(&source, &arch, 0).expect("a layer");
        let own = LatentWeights::of(&tensors.attention).expect("MLA").ranks(shape, &sharing, None);
        for (rank, part) in own.iter().zip(&parts) {
            let view = part.tensor(&format!("{}.weight", arch.names.layer(0).role("kv_b"))).expect("kv_b");
            let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            assert_eq!(rank.kv_b.iter().copied().collect::<Vec<_>>(), values);
        }
    }
}

#[test]
fn fitted_rank_files_hold_what_verify_runs_and_one_rank_has_nothing_to_fit() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (mla, from) = (dir.path().join("mla"), dir.path().join("turned"));
    converted(&mla, TargetKind::DeepseekV3);
    turn(&mla, &from, &settings(Transform::Hadamard, 2)).expect("turns");
    let (source, arch) = open(&from);
    let calibration = CalibrationSettings { samples: 24, seq_len: 128, ..CalibrationSettings::default() };
    let shape = arch.mla().expect("MLA");
    let text = latent_windows(&source, &arch, &calibration, shape.kv_lora_rank).expect("text");
    let moments = latent_moments(&source, &arch, &Cpu, &text, &Silent).expect("moments");
    let fitted = |ranks: usize| {
        let sharing = Sharing { ranks, shared_rms: false, logit_scale: 1.0 };
        let how = (Transform::None, &sharing);
        refitted_ranks(&source, &arch, &Cpu, (&text, &moments), how, &Silent).expect("fits")
    };
    let tensors = LayerTensors::load(&source, &arch, 0).expect("a layer");
    let weights = LatentWeights::of(&tensors.attention).expect("MLA");
    assert_eq!(fitted(1)[0][0].kv_b, weights.kv_b.mapv(|v| v as f32), "one rank has nothing to fit");

    let sharing = Sharing { ranks: 2, shared_rms: false, logit_scale: 1.0 };
    let own = fitted(2);
    let settings = ShardSettings {
        sharing,
        calibrate: false,
        refit: true,
        calibration,
        device: DeviceChoice::Cpu,
        overwrite: false,
    };
    let to = dir.path().join("ranks");
    let report = shard(&source, &arch, &settings, &to, &Silent).expect("shards");
    for (t, entry) in report.ranks.iter().enumerate() {
        let bytes = fs_err::read(to.join(&entry.file)).expect("a rank's file");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        for (layer, ranks) in own.iter().enumerate() {
            let name = format!("{}.weight", arch.names.layer(layer).role("kv_b"));
            let view = file.tensor(&name).expect("kv_b");
            let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            assert_eq!(ranks[t].kv_b.iter().copied().collect::<Vec<_>>(), values, "rank {t}, layer {layer}");
        }
    }
    // Fitting is worth something on text it has not seen.
    let windows = heldout(&source, 128, 4);
    let model = Model::new(&source, &arch, &Cpu);
    let case = |refitted| SharedOut { transform: Transform::None, sharing, refitted };
    let cases = [case(None), case(Some(own))];
    let found =
        compare_sliced(&model, (&model, &source), &cases, Some(&moments), (&windows, 64), &Silent).expect("runs");
    let kl: Vec<f64> = found.cases.iter().map(|c| c.kl_whole_nats_per_token).collect();
    assert!(kl[1] < kl[0], "{kl:?}");
}
