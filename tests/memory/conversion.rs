//! How much memory a conversion takes: counted by the allocator within this process, measured by the system for the
//! binary. The checkpoints are sparse files whose weights read as zeros; what is done with them is the same.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use gqa2mla::convert::{CalibrationSettings, ConvertSettings, MethodChoice, convert, plan};
use gqa2mla::observe::Silent;
use serde_json::{Value, json};

use super::peak::{HELD, PEAK, alone};
use crate::common::models::{fixture, method, open};
use crate::common::products;

/// Shape of a model in the layout of Llama.
#[derive(Debug, Clone, Copy)]
struct Shape {
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate: usize,
    vocab: usize,
    layers: usize,
}

const SMALL: Shape =
    Shape { hidden: 512, heads: 8, kv_heads: 2, head_dim: 64, intermediate: 4096, vocab: 2048, layers: 3 };

/// Writes a checkpoint of zeros that takes no room on the disk; returns the bytes of its weights.
fn checkpoint(dir: &Path, s: Shape) -> u64 {
    fs_err::create_dir_all(dir).expect("made");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": s.hidden, "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim, "intermediate_size": s.intermediate, "vocab_size": s.vocab,
        "num_hidden_layers": s.layers, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false,
    });
    fs_err::write(dir.join("config.json"), config.to_string()).expect("written");
    let tokenizer = fixture("pico-trained").join("tokenizer.json");
    fs_err::copy(tokenizer, dir.join("tokenizer.json")).expect("copied");
    let (d, q, kv, i) = (s.hidden, s.heads * s.head_dim, s.kv_heads * s.head_dim, s.intermediate);
    let mut shards = vec![vec![("model.embed_tokens.weight".to_owned(), vec![s.vocab, d])]];
    for n in 0..s.layers {
        let layer = [
            ("input_layernorm", vec![d]),
            ("self_attn.q_proj", vec![q, d]),
            ("self_attn.k_proj", vec![kv, d]),
            ("self_attn.v_proj", vec![kv, d]),
            ("self_attn.o_proj", vec![d, q]),
            ("mlp.gate_proj", vec![i, d]),
            ("mlp.up_proj", vec![i, d]),
            ("mlp.down_proj", vec![d, i]),
            ("post_attention_layernorm", vec![d]),
        ];
        shards.push(layer.map(|(role, shape)| (format!("model.layers.{n}.{role}.weight"), shape)).into());
    }
    shards.push(vec![("model.norm.weight".to_owned(), vec![d]), ("lm_head.weight".to_owned(), vec![s.vocab, d])]);
    let (mut map, mut total) = (serde_json::Map::new(), 0);
    for (n, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", n + 1, shards.len());
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in shard {
            let bytes = 2 * shape.iter().product::<usize>() as u64;
            header.insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes] }));
            map.insert(name.clone(), file.clone().into());
            end += bytes;
        }
        let header = Value::Object(header).to_string();
        let mut start = (header.len() as u64).to_le_bytes().to_vec();
        start.extend(header.into_bytes());
        let path = dir.join(file);
        fs_err::write(&path, &start).expect("written");
        let file = fs_err::OpenOptions::new().write(true).open(&path).expect("opens");
        file.set_len(start.len() as u64 + end).expect("grows");
        total += end;
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    fs_err::write(dir.join("model.safetensors.index.json"), index.to_string()).expect("written");
    total
}

fn settings(method: MethodChoice) -> ConvertSettings {
    ConvertSettings {
        kv_lora_rank: method.compresses().then_some(64),
        qk_rope_head_dim: method.compresses().then_some(32),
        calibration: CalibrationSettings { samples: 8, seq_len: 128, ..CalibrationSettings::default() },
        force: true,
        method,
        ..ConvertSettings::default()
    }
}

/// Bytes on the heap at the peak of a conversion, beyond those before it, and what the plan says of memory.
fn peak(shape: Shape, settings: &ConvertSettings) -> (u64, u64) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("model");
    checkpoint(&from, shape);
    let (source, arch) = open(&from);
    let planned = plan(&source, &arch, settings, false, &Silent).expect("plans").peak_memory_bytes;
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    convert(&source, &arch, settings, &dir.path().join("out"), &|_| Vec::new(), &Silent).expect("converts");
    ((PEAK.load(Ordering::Relaxed) - before) as u64, planned)
}

#[test]
fn the_heap_does_not_grow_with_the_layers() {
    let _alone = alone();
    for method in [method("exact"), method("care"), method("attention-aware")] {
        let mut s = settings(method.clone());
        if method.mixes_window_lengths() {
            // What runs beside the factorisation makes the peak a matter of time: it only has to stay within the plan. One
            // byte less allows for nothing beside it.
            let (many, planned) = peak(Shape { layers: 12, ..SMALL }, &s);
            assert!(many < planned, "{method}: {many} bytes, planned {planned}");
            s.max_memory = Some(planned - 1);
        }
        let (few, planned) = peak(SMALL, &s);
        let (many, of_many) = peak(Shape { layers: 12, ..SMALL }, &s);
        println!("{method}: heap {few} with 3 layers, {many} with 12, planned {planned} and {of_many}");
        assert_eq!(planned, of_many, "{method}: what is planned depends on the number of layers");
        // Names, plans and reports of layers are a few kilobytes each.
        assert!(many < few + few / 50 + 9 * 64_000, "{method}: {few} bytes with 3 layers, {many} with 12");
        assert!(many < planned, "{method}: {many} bytes, planned {planned}");
    }
}

#[test]
fn large_tensors_are_not_held() {
    let _alone = alone();
    // An embedding and an output head of 512 MB each.
    let shape = Shape { vocab: 1 << 19, hidden: 512, ..SMALL };
    let (heap, _) = peak(shape, &settings(method("exact")));
    println!("exact, tensors of 512 MB: heap {heap}");
    assert!(heap < 200_000_000, "{heap}");
}

/// The binary, under a limit of `kilobytes` on its address space, which counts whatever it maps or reserves.
fn limited(kilobytes: u64, args: &[&str]) -> std::process::Output {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("ulimit -v {kilobytes}; exec \"$0\" \"$@\""));
    shell.arg(assert_cmd::cargo::cargo_bin!("gqa2mla")).args(args).env("HF_HUB_OFFLINE", "1");
    shell.output().expect("starts")
}

/// Bytes that the files of a folder take on the disk.
fn on_disk(dir: &Path) -> u64 {
    fs_err::read_dir(dir).expect("readable").flatten().map(|e| blocks(&e.path())).sum()
}

/// Converts a sparse checkpoint under a limit. Returns its size, the resident peak and what was planned.
fn under_a_limit(shape: Shape, gigabytes: u64, options: &[&str]) -> (u64, u64, u64) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("model");
    let total = checkpoint(&from, shape);
    let (from, to) = (from.display().to_string(), dir.path().join("out").display().to_string());
    let common = [&["--json", "-q", "--threads", "2"], options].concat();
    let document = |args: &[&str]| -> Value {
        // Two workers, the main thread, and a product within a product.
        let out = limited((gigabytes << 20) + (products::reserved(4) >> 10), args);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).expect("JSON")
    };
    let started = std::time::Instant::now();
    let planned = document(&[&["plan", &from, "--quick"], &common[..]].concat())["peak_memory_bytes"].as_u64();
    let rss = document(&[&["convert", &from, "-o", &to], &common[..]].concat())["peak_rss_bytes"].as_u64();
    let (planned, rss) = (planned.expect("a figure"), rss.expect("a figure"));
    // What was a hole is one: the disk of whoever runs this need not hold the model.
    let written = on_disk(Path::new(&to));
    assert!(total < 1 << 30 || written < total / 4, "{written} of {total} bytes were written");
    println!("{total} bytes of weights, {options:?}: planned {planned}, resident {rss}, {:.1?}", started.elapsed());
    (total, rss, planned)
}

#[cfg(target_os = "linux")]
#[test]
fn a_checkpoint_larger_than_memory_is_converted() {
    let _alone = alone();
    let shape = Shape { hidden: 1024, heads: 8, intermediate: 32_768, vocab: 32_000, layers: 16, ..SMALL };
    let (total, rss, planned) = under_a_limit(shape, 1, &["--method", "exact"]);
    assert!(total > 3 << 30, "{total}");
    assert!(rss as f64 <= 1.1 * planned as f64, "resident {rss}, planned {planned}");
}

/// The same with attention-aware: survey, streams, moments and refits, one layer of 200 MB after the other.
#[cfg(target_os = "linux")]
#[test]
fn a_checkpoint_larger_than_memory_is_converted_by_attention_aware() {
    let _alone = alone();
    let shape = Shape { hidden: 512, heads: 8, intermediate: 65_536, vocab: 32_000, layers: 8, ..SMALL };
    let (total, rss, planned) = under_a_limit(shape, 1, &AWARE);
    assert!(total > 3 << 29, "{total}");
    assert!(rss as f64 <= 1.1 * planned as f64, "resident {rss}, planned {planned}");
}

/// Calibration on few tokens: what a layer weighs is what matters here.
#[cfg(target_os = "linux")]
const AWARE: [&str; 8] =
    ["--kv-lora-rank", "32", "--qk-rope-head-dim", "32", "--calib-samples", "4", "--calib-seq-len", "64"];

/// By hand: `cargo test --release --test heap -- --ignored --nocapture`. Takes minutes, and no room on a file system
/// with holes.
#[cfg(target_os = "linux")]
fn thirty_gigabytes(shape: Shape, options: &[&str]) {
    let (total, rss, planned) = under_a_limit(shape, 4, options);
    assert!(total > 30_000_000_000, "{total}");
    assert!(rss as f64 <= 1.1 * planned as f64, "resident {rss}, planned {planned}");
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "takes minutes"]
fn thirty_gigabytes_are_converted_within_four() {
    let shape = Shape { hidden: 2048, heads: 16, intermediate: 65_536, vocab: 32_000, layers: 38, ..SMALL };
    thirty_gigabytes(shape, &["--method", "exact"]);
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "takes minutes"]
fn thirty_gigabytes_are_converted_within_four_by_attention_aware() {
    let shape = Shape { hidden: 1024, heads: 16, intermediate: 65_536, vocab: 32_000, layers: 76, ..SMALL };
    thirty_gigabytes(shape, &AWARE);
}

/// What the plan says against what the system measured, for models whose activations or whose weights weigh most.
#[cfg(target_os = "linux")]
#[test]
fn the_plan_is_right_about_memory() {
    let _alone = alone();
    let wide = Shape { hidden: 1024, heads: 16, kv_heads: 4, intermediate: 16_384, layers: 2, ..SMALL };
    let flat = Shape { hidden: 256, heads: 4, intermediate: 256, layers: 2, ..SMALL };
    let few = ["--kv-lora-rank", "64", "--qk-rope-head-dim", "32", "--calib-samples", "8", "--calib-seq-len", "64"];
    let many = ["--kv-lora-rank", "64", "--qk-rope-head-dim", "32", "--calib-samples", "220", "--calib-seq-len", "256"];
    // An MLP whose activations weigh more than all else.
    let fat = Shape { hidden: 256, heads: 4, intermediate: 32_768, layers: 2, ..SMALL };
    let some = ["--kv-lora-rank", "64", "--qk-rope-head-dim", "32", "--calib-samples", "4", "--calib-seq-len", "256"];
    for (shape, options) in [(wide, &few), (flat, &many), (fat, &some)] {
        for method in ["attention-aware", "care"] {
            let (_, rss, planned) = under_a_limit(shape, 8, &[&["--method", method], &options[..]].concat());
            let share = rss as f64 / planned as f64;
            assert!((0.7..=1.1).contains(&share), "{method}, {shape:?}: resident {rss}, planned {planned}");
        }
    }
}

#[test]
fn the_folder_of_a_test_is_sparse() {
    let _alone = alone();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path: PathBuf = dir.path().join("m");
    let total = checkpoint(&path, Shape { vocab: 1 << 16, ..SMALL });
    let held = on_disk(&path);
    assert!(held < total / 10, "{held} of {total} bytes are on the disk: the other tests here would fill it");
}

#[cfg(unix)]
fn blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    512 * fs_err::metadata(path).expect("known").blocks()
}

#[cfg(not(unix))]
fn blocks(_: &Path) -> u64 {
    0
}
