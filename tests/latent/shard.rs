//! Latents in slices, one for each rank of tensor parallelism (TPLA).

use std::path::Path;

use gqa2mla::convert::CalibrationSettings;
use gqa2mla::latent::{
    LatentWeights, ShardSettings, Sharing, Transform, latent_moments, latent_windows, refitted_ranks, shard,
};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, DeviceChoice, LayerTensors, Model};
use gqa2mla::target::classes::deepseek_v3;
use gqa2mla::verify::{SharedOut, SlicedComparison, compare_sliced};
use gqa2mla::write::verify_manifest;
use safetensors::SafeTensors;
use serde_json::Value;

use super::{NATIVE, converted, settings, shard_to, tensor_bytes, turn};
use crate::common::golden::golden_tokens;
use crate::common::judge::{ROUNDING, heldout};
use crate::common::models::{fixture, open};

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
    // The first token after a prompt of all but it sees only latents that whole attention made: in the first layer its
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
    converted(&mla, deepseek_v3::TARGET);
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
    let windows = heldout(128, 4);
    let model = Model::new(&source, &arch, &Cpu);
    let case = |refitted| SharedOut { transform: Transform::None, sharing, refitted };
    let cases = [case(None), case(Some(own))];
    let found =
        compare_sliced(&model, (&model, &source), &cases, Some(&moments), (&windows, 64), &Silent).expect("runs");
    let kl: Vec<f64> = found.cases.iter().map(|c| c.kl_whole_nats_per_token).collect();
    assert!(kl[1] < kl[0], "{kl:?}");
}
