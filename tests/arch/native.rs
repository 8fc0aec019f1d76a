//! Models that were trained with latent attention: what `inspect` says of them, what is read past, how experts are held,
//! and what is refused. Their logits are held to transformers' in `tests/runtime/golden.rs`.

use std::path::{Path, PathBuf};
use std::process::Output;

use gqa2mla::arch::{Architecture, check_tensors};
use gqa2mla::report::engines::{Facts, Loads, judge};
use insta::assert_snapshot;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::common::command::gqa2mla;
use crate::common::golden::{Golden, golden};
use crate::common::models::{fixture, open};

fn run(within: &Path, args: &[&str]) -> Output {
    gqa2mla(args).current_dir(within).env_remove("COLUMNS").output().expect("starts")
}

/// `config.json` of a fixture with some keys changed; null takes a key away.
fn changed(name: &str, change: &[(&str, Value)]) -> Value {
    let mut config = open(&fixture(name)).0.config;
    let map = config.as_object_mut().expect("an object");
    for (key, value) in change {
        map.remove(*key);
        if !value.is_null() {
            map.insert((*key).to_owned(), value.clone());
        }
    }
    config
}

/// The published shapes of the models in table 1 of arXiv 2505.09343.
fn published() -> [(&'static str, Value); 3] {
    let deepseek = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "auto_map": { "AutoConfig": "c.C" },
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3,
        "norm_topk_prob": true, "scoring_func": "sigmoid", "hidden_act": "silu", "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": false, "attention_bias": false,
        "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096
        },
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
        },
    });
    let qwen = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 8192,
        "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "hidden_act": "silu", "max_position_embeddings": 131072, "max_window_layers": 80, "sliding_window": 131072,
        "use_sliding_window": false, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    });
    let llama = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 16384,
        "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
        "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        },
    });
    [("DeepSeek-V3", deepseek), ("Qwen2.5-72B", qwen), ("Llama-3.1-405B", llama)]
}

/// Folders that hold these configs and nothing else.
fn folders(configs: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, config) in configs {
        fs_err::create_dir(dir.path().join(name)).expect("made");
        fs_err::write(dir.path().join(name).join("config.json"), config.to_string()).expect("written");
    }
    dir
}

#[test]
fn the_cache_table_of_the_deepseek_report_comes_out() {
    let dir = folders(&published());
    let names = published().map(|(name, _)| name);
    let out = run(dir.path(), &[&["inspect", "--json"], &names[..]].concat());
    let document: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let rows = document["kv_table"].as_array().expect("a table");
    let bytes: Vec<u64> = rows.iter().filter_map(|r| r["bytes_per_token"].as_u64()).collect();
    // Kilobytes of the paper's table are of 1000 bytes.
    assert_eq!(bytes, [70_272, 327_680, 516_096]);
    for (row, ratio) in rows.iter().zip([1.0, 4.663, 7.344]) {
        let found = row["ratio_to_first"].as_f64().expect("a number");
        assert!((found - ratio).abs() < 1e-3, "{row}");
    }
    // 671 and 37 billion, as the report says; the layer that predicts a further token is not counted.
    let v3 = &document["models"][0];
    let billions = |key: &str| v3[key].as_f64().expect("a number") / 1e9;
    assert!((billions("parameters") - 671.0).abs() < 0.5, "{}", v3["parameters"]);
    assert!((billions("active_parameters") - 37.0).abs() < 1.0, "{}", v3["active_parameters"]);
    assert_eq!((&v3["mtp_layers"], &v3["experts"]["groups_per_token"]), (&json!(1), &json!(4)));
    let out = run(dir.path(), &[&["inspect"], &names[..]].concat());
    let text = String::from_utf8(out.stdout).expect("text");
    // The engines' part is that of other snapshots.
    let tables: String = text.split("\nDeepSeek-V3\n").next().expect("a part").to_owned();
    assert_snapshot!("kv_table", tables);
}

#[test]
fn a_source_and_its_conversion_stand_side_by_side() {
    let of = |name: &str| fixture(name).display().to_string();
    let out = run(Path::new("."), &["inspect", "--json", &of("pico-llama3"), &of("pico-deepseek-v3-moe")]);
    let document: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    for (row, model) in
        document["kv_table"].as_array().expect("rows").iter().zip(["pico-llama3", "pico-deepseek-v3-moe"])
    {
        let (_, arch) = open(&fixture(model));
        let bytes = (2 * arch.layers * arch.cache_values()) as u64;
        assert_eq!(row["bytes_per_token"].as_u64(), Some(bytes));
    }
}

#[test]
fn layers_that_predict_further_tokens_are_read_past_only_where_the_config_names_them() {
    let (source, arch) = open(&fixture("pico-deepseek-v3-moe"));
    assert_eq!(arch.mtp_layers, 1);
    check_tensors(&arch, &source.tensors).expect("they are read past");
    assert!(source.tensors.names().any(|n| arch.names.is_past(n)));
    // Layer 3 is past the end; 30 would be another layer's.
    assert!(!arch.names.is_past("model.layers.30.enorm.weight") && !arch.names.is_past("model.layers.2.mlp"));
    let config = changed("pico-deepseek-v3-moe", &[("num_nextn_predict_layers", json!(0))]);
    let none = Architecture::from_config(&config).expect("is understood");
    let error = check_tensors(&none, &source.tensors).expect_err("nothing implies them").to_string();
    assert!(error.contains("model.layers.3.eh_proj.weight"), "{error}");
}

#[test]
fn kimi_k2_is_deepseek_v3_under_another_name() {
    let config = changed("pico-deepseek-v3-moe", &[("model_type", json!("kimi_k2"))]);
    let arch = Architecture::from_config(&config).expect("is understood");
    let (source, v3) = open(&fixture("pico-deepseek-v3-moe"));
    assert_eq!((arch.expected_tensors(), arch.moe), (v3.expected_tensors(), v3.moe));
    let verdicts = judge(&Facts::read(&config, Some(&source.tensors)).expect("an MLA folder"));
    assert!(verdicts[0].changes[0].contains("deepseek_v3"), "{:?}", verdicts[0]);
    // Code that a folder brings does not keep engines from their own classes.
    let v3 = changed("pico-deepseek-v3-moe", &[("auto_map", json!({ "AutoConfig": "x.Y" }))]);
    let verdicts = judge(&Facts::read(&v3, Some(&source.tensors)).expect("an MLA folder"));
    assert_eq!(verdicts[0].loads, Loads::Yes, "{:?}", verdicts[0]);
    // mistral.rs takes values as wide as queries, which the fixture's are not.
    // A layer that predicts further tokens is stored with it.
    let refused = ["MLX-LM", "mistral.rs"];
    assert!(verdicts.iter().all(|v| (v.loads == Loads::No) == refused.contains(&v.engine)), "{verdicts:?}");
}

#[test]
fn plm_runs_in_llama_cpp_alone() {
    let (source, _) = open(&fixture("pico-plm"));
    let verdicts = judge(&Facts::read(&source.config, Some(&source.tensors)).expect("an MLA folder"));
    for v in verdicts {
        assert_eq!(v.loads != Loads::No, v.engine == "llama.cpp", "{v:?}");
    }
}

/// The fixture without one of its tensors.
fn without(name: &str, tensor: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    fs_err::copy(fixture(name).join("config.json"), dir.path().join("config.json")).expect("copied");
    let bytes = fs_err::read(fixture(name).join("model.safetensors")).expect("read");
    let file = SafeTensors::deserialize(&bytes).expect("tensors");
    let kept = file.tensors().into_iter().filter(|(n, _)| n != tensor);
    let bytes = safetensors::serialize(kept, None).expect("serialises");
    fs_err::write(dir.path().join("model.safetensors"), bytes).expect("written");
    dir
}

#[test]
fn what_cannot_be_is_told_and_nothing_is_written() {
    for (change, expected) in [
        (("n_group", json!(5)), "`n_group` is 5, expected a divisor of n_routed_experts (12)"),
        (("topk_group", json!(9)), "`topk_group` is 9, expected at most n_group (4)"),
        (("num_experts_per_tok", json!(99)), "`num_experts_per_tok` is 99, expected at most n_routed_experts (12)"),
        (("topk_method", json!("magic")), "`topk_method` is \"magic\", expected one of"),
        (("scoring_func", json!("tanh")), "`scoring_func` is \"tanh\", expected one of"),
    ] {
        let dir = folders(&[("m", changed("pico-deepseek-v3-moe", std::slice::from_ref(&change)))]);
        let out = run(dir.path(), &["inspect", "m"]);
        let error = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{error}");
        assert!(error.contains(expected), "{error}");
    }
    let bias = "model.layers.2.mlp.gate.e_score_correction_bias";
    let dir = without("pico-deepseek-v3-moe", bias);
    let out = run(dir.path(), &["inspect", "."]);
    let error = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{error}");
    assert!(error.contains(&format!("tensor `{bias}` [12] is missing")), "{error}");
    for name in ["pico-deepseek-v3-moe", "pico-deepseek-v2-groups", "pico-plm"] {
        let out = run(dir.path(), &["convert", &fixture(name).display().to_string(), "-o", "out"]);
        let error = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{error}");
        assert!(error.contains("is an MLA model already") && error.contains("`eval`"), "{error}");
        assert!(!dir.path().join("out").exists());
    }
}

/// The fixture with a tokenizer whose words are `w0`, `w1`, ..., and a text of its first golden sequence.
fn speaking(name: &str) -> (tempfile::TempDir, PathBuf, String) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for file in ["config.json", "model.safetensors"] {
        fs_err::copy(fixture(name).join(file), dir.path().join(file)).expect("copied");
    }
    let vocab: serde_json::Map<String, Value> =
        (0..open(&fixture(name)).1.vocab).map(|i| (format!("w{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" }
    });
    fs_err::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).expect("written");
    let (tokens, _) = first_golden(name);
    let words: Vec<String> = tokens.iter().map(|t| format!("w{t}")).collect();
    let text = dir.path().join("text.txt");
    fs_err::write(&text, words.join(" ")).expect("written");
    (dir, text, words.join(" "))
}

/// The first golden sequence.
fn first_golden(name: &str) -> Golden {
    golden(&fixture(name)).swap_remove(0)
}

/// Mean negative log-likelihood of every token but the first, in nats.
fn golden_nll(name: &str) -> f64 {
    let (tokens, logits) = first_golden(name);
    let vocab = logits.len() / tokens.len();
    let rows = logits.chunks(vocab).zip(&tokens[1..]);
    let nll: f64 = rows
        .map(|(row, next)| {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            sum.ln() - f64::from(row[*next as usize])
        })
        .sum();
    nll / (tokens.len() - 1) as f64
}

#[test]
fn every_command_that_runs_models_takes_them() {
    for name in
        ["pico-deepseek-v2-groups", "pico-deepseek-v3-moe", "pico-deepseek-v3-fp8", "pico-minicpm3-long", "pico-plm"]
    {
        let (dir, text, prompt) = speaking(name);
        let text = text.display().to_string();
        let document = |args: &[&str]| -> (Value, String) {
            let out = run(dir.path(), &[&["--json"], args].concat());
            let error = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(out.status.success(), "{name} {args:?}: {error}");
            (serde_json::from_slice(&out.stdout).expect("JSON"), error)
        };
        let window = ["--text", &text, "--seq-len", "37", "--windows", "1"];
        let (eval, notes) = document(&[&["eval", "."], &window[..]].concat());
        let nll = eval["nll_nats_per_token"].as_f64().or(eval["figures"]["nll_nats_per_token"].as_f64());
        let (nll, expected) = (nll.unwrap_or_else(|| panic!("{eval}")), golden_nll(name));
        // The logits of both sides are within 1e-5 of their largest.
        assert!((nll - expected).abs() < 1e-4, "{name}: {nll}, transformers {expected}");
        assert_eq!(notes.contains("(MTP)"), name == "pico-deepseek-v3-moe", "{notes}");
        let (verified, _) = document(&[&["verify", ".", "."], &window[..]].concat());
        assert_eq!(verified["passed"], true, "{verified}");
        // The likeliest token after the prompt, by transformers.
        let (tokens, logits) = first_golden(name);
        let last = &logits[logits.len() / tokens.len() * (tokens.len() - 1)..];
        let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).expect("a token");
        let (generated, _) = document(&["generate", ".", "--raw", "--prompt", &prompt, "--max-tokens", "1"]);
        assert!(generated.to_string().contains(&format!("w{best}\"")), "{name}: {generated}, expected w{best}");
        document(&["bench", ".", "--contexts", "8", "--steps", "1"]);
    }
}
