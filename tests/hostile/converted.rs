//! Hostile manifests, reports and configs of MLA models.

use serde_json::{Value, json};

use super::{Case, Clean, case};

/// A file of a conversion that holds this.
fn written(file: &'static str, name: &str, bytes: impl Into<Vec<u8>>) -> Case {
    let bytes = bytes.into();
    case(format!("{file}: {name}"), Clean, move |dir| fs_err::write(dir.join(file), &bytes).expect("written"))
}

fn manifest(name: &str, files: &Value) -> Case {
    written("manifest.json", name, json!({"version": 1, "files": files}).to_string())
}

fn config(key: &'static str, value: Value) -> Case {
    case(format!("{key}: {value}"), Clean, move |dir| {
        let path = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs_err::read(&path).expect("readable")).expect("JSON");
        config[key] = value.clone();
        fs_err::write(path, config.to_string()).expect("written");
    })
}

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for file in ["manifest.json", "conversion.json"] {
        for (name, text) in
            [("empty", ""), ("null", "null"), ("list", "[]"), ("BOM", "\u{feff}{}"), ("NaN", "{\"a\":NaN}")]
        {
            all.push(written(file, name, text));
        }
        all.push(written(file, "deep", b"{\"files\":".repeat(1 << 20)));
        all.push(written(file, "large", vec![b' '; 40 << 20]));
        all.push(case(format!("{file}: a folder"), Clean, move |dir| {
            fs_err::remove_file(dir.join(file)).expect("removed");
            fs_err::create_dir(dir.join(file)).expect("made");
        }));
        all.push(case(format!("{file}: a pipe"), Clean, move |dir| {
            fs_err::remove_file(dir.join(file)).expect("removed");
            assert!(std::process::Command::new("mkfifo").arg(dir.join(file)).status().expect("mkfifo").success());
        }));
    }
    let entry = json!({"bytes": 1, "sha256": "00"});
    for name in ["../config.json", "/etc/passwd", "", ".", "a/b", "\u{1b}[2J", "\u{202e}x", "x\0"] {
        all.push(manifest(&format!("{name:?}"), &json!({name: entry})));
    }
    for bytes in [json!(-1), json!(u64::MAX), json!(1e300), json!("1"), Value::Null] {
        all.push(manifest(&format!("a size of {bytes}"), &json!({"config.json": {"bytes": bytes, "sha256": "00"}})));
    }
    for hash in [json!(""), json!("zz"), json!(7), json!("0".repeat(1 << 20)), json!("\u{1b}[2J")] {
        let name = hash.to_string().chars().take(20).collect::<String>();
        all.push(manifest(&format!("a hash {name}"), &json!({"config.json": {"bytes": 1, "sha256": hash}})));
    }
    let many: serde_json::Map<_, _> = (0..200_000).map(|n| (format!("{n}"), entry.clone())).collect();
    all.push(manifest("many files", &many.into()));
    for key in ["kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank"] {
        for value in [json!(0), json!(-1), json!(1_u64 << 40), json!(7), json!(1.5), json!("x"), Value::Null] {
            all.push(config(key, value));
        }
    }
    for key in ["first_k_dense_replace", "n_routed_experts", "moe_layer_freq", "num_experts_per_tok", "n_group"] {
        for value in [json!(1_u64 << 40), json!(-1), json!("x")] {
            all.push(config(key, value));
        }
    }
    all
}
