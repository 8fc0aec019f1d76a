//! Memory of a model with many experts. The heap, counted within this process, holds one expert where experts are read as
//! tokens go to them, and next to nothing where weights are used in place.

use std::path::Path;
use std::sync::atomic::Ordering;

use gqa2mla::arch::Architecture;
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model, Resident, Session};
use serde_json::{Value, json};

use super::peak::{HELD, PEAK, alone};
use crate::common::models::open;

/// A DeepSeek-V3 of zeros in one sparse file: its weights take no room on the disk.
fn checkpoint(dir: &Path, experts: usize, layers: usize) {
    let config = json!({
        "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "hidden_act": "silu", "vocab_size": 64,
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": experts,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 32, "q_lora_rank": null, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "qk_nope_head_dim": 16, "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_layer_freq": 1, "first_k_dense_replace": 0, "norm_topk_prob": true,
        "scoring_func": "sigmoid", "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false,
    });
    fs_err::write(dir.join("config.json"), config.to_string()).expect("written");
    let arch = Architecture::from_config(&config).expect("is understood");
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for t in arch.expected_tensors() {
        let bytes = 2 * t.shape.iter().product::<usize>() as u64;
        header.insert(t.name, json!({ "dtype": "BF16", "shape": t.shape, "data_offsets": [end, end + bytes] }));
        end += bytes;
    }
    let header = Value::Object(header).to_string();
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header.into_bytes());
    let path = dir.join("model.safetensors");
    fs_err::write(&path, &start).expect("written");
    let file = fs_err::OpenOptions::new().write(true).open(&path).expect("opens");
    file.set_len(start.len() as u64 + end).expect("grows");
}

/// Bytes on the heap at the peak of a forward pass, beyond those before it. Experts beyond `limit` bytes are streamed.
fn peak(experts: usize, layers: usize, limit: u64) -> u64 {
    let dir = tempfile::tempdir().expect("a temporary folder");
    checkpoint(dir.path(), experts, layers);
    let (source, arch) = open(dir.path());
    let model = Model::new(&source, &arch, &Cpu).with_held_experts(limit);
    // Buffers that matrix products keep from the first one on are not the model's.
    model.with_held_experts(0).final_hidden(&[(0..32).collect()], &Silent).expect("runs");
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    model.final_hidden(&[(0..32).collect()], &Silent).expect("runs");
    (PEAK.load(Ordering::Relaxed) - before) as u64
}

#[test]
fn one_expert_is_held_however_many_there_are() {
    alone_on_one_thread(compare);
}

/// Runs a test by itself and on one thread, which keeps one buffer for matrix products: with more, a later product may be
/// the first of its thread.
fn alone_on_one_thread(test: fn()) {
    let _alone = alone();
    rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool").install(test);
}

fn compare() {
    // In f32.
    let expert = 4 * 3 * 256 * 128;
    let (few, many, deep) = (peak(8, 2, 0), peak(256, 2, 0), peak(256, 6, 0));
    println!("streamed: heap {few} with 8 experts, {many} with 256, {deep} in three times the layers");
    // What grows is the router, a row of 256 f32 per expert, and a bias and a list of tokens for each.
    let router = (256 - 8) * (4 * 256 + 100);
    assert!(many < few + router, "{few} bytes with 8 experts, {many} with 256");
    assert!(deep < many + many / 20, "{many} bytes with 2 layers, {deep} with 6");
    let held = peak(256, 2, u64::MAX);
    println!("held: {held}, one expert: {expert}");
    // One layer's experts, not two layers'.
    assert!((256 * expert..2 * 256 * expert).contains(&held), "{held}");
    assert!(many < held / 20, "{many} streamed, {held} held");
}

/// Resident memory of this process that is no page of a file, in bytes.
#[cfg(target_os = "linux")]
fn anonymous() -> u64 {
    let status = fs_err::read_to_string("/proc/self/status").expect("readable");
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("a kernel that tells");
    1024 * line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
}

/// Both counted: what the allocator gave, and what the system says the process has of its own.
#[cfg(target_os = "linux")]
#[test]
fn a_model_in_place_takes_a_fraction_of_its_file() {
    alone_on_one_thread(run_in_place);
}

#[cfg(target_os = "linux")]
fn run_in_place() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    checkpoint(dir.path(), 256, 8);
    let (source, arch) = open(dir.path());
    let file = source.tensors.total_bytes();
    assert!(file > 400_000_000, "{file}");
    let model = Model::new(&source, &arch, &Cpu).in_place();
    model.final_hidden(&[(0..40).collect()], &Silent).expect("runs");
    let (heap, own) = (HELD.load(Ordering::Relaxed), anonymous());
    PEAK.store(heap, Ordering::Relaxed);
    let resident = Resident::load(model).expect("loads");
    // Many rows and few.
    resident.logits(&[(0..40).collect()]).expect("runs");
    let mut session = Session::new(&resident, 8).expect("fits");
    session.prefill(&[1, 2, 3]).expect("runs");
    session.step(4).expect("runs");
    let heap = (PEAK.load(Ordering::Relaxed) - heap) as u64;
    let own = anonymous().saturating_sub(own);
    println!("{file} bytes of weights in place: heap {heap} at most, anonymous memory {own} more");
    assert!(heap < file / 20, "{heap} of {file}");
    assert!(own < file / 20, "{own} of {file}");
}
