//! `config.json`: reading it, and refusing checkpoints whose weights are quantised.

use std::path::Path;

use fs_err as fs;
use serde_json::Value;

use super::path::read_small;
use super::{SourceError, TensorDirectory};

/// Largest `config.json` read. Real ones are a few kB; some carry label maps of a few MB.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Reads `config.json` of `dir`, which must be a JSON object.
pub(super) fn read_config(dir: &Path) -> Result<Value, SourceError> {
    let path = dir.join("config.json");
    if fs::symlink_metadata(&path).is_err() {
        return Err(SourceError::NoConfig { dir: dir.to_owned() });
    }
    let content = read_small(dir, "config.json", MAX_CONFIG_BYTES)?;
    parse(&content).map_err(|reason| SourceError::Config { path, reason })
}

/// Reads the content of a `config.json`.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn parse(content: &[u8]) -> Result<Value, String> {
    let value: Value = serde_json::from_slice(content).map_err(|e| format!("not JSON: {e}"))?;
    if value.is_object() { Ok(value) } else { Err("expected a JSON object".to_owned()) }
}

/// Whether the config declares FP8 in blocks of 128 x 128, as DeepSeek-V3 stores it, which is read like any other dtype.
fn is_block_fp8(config: &Value) -> bool {
    let Some(q) = config.get("quantization_config") else { return false };
    let block = q.get("weight_block_size").and_then(Value::as_array);
    let square = block.is_some_and(|b| b.len() == 2 && b.iter().all(|n| n.as_u64() == Some(128)));
    q.get("quant_method").and_then(Value::as_str) == Some("fp8") && square
}

/// Refuses quantised weights, told by the config or, where the config is silent, by the names of the tensors. Block-scaled
/// FP8 is read.
pub(crate) fn refuse_quantised(config: &Value, tensors: &TensorDirectory) -> Result<(), SourceError> {
    let text = config.get("text_config");
    if is_block_fp8(config) || text.is_some_and(is_block_fp8) {
        return Ok(());
    }
    let found = [Some(config), text].into_iter().flatten().find_map(declared_method);
    let Some(method) = found.or_else(|| tensors.names().find_map(method_of_name)) else {
        return Ok(());
    };
    let hint = match method.as_str() {
        "fp8" | "fbgemm_fp8" => "of FP8, only blocks of 128 x 128 (DeepSeek-V3's) are read: use the bf16 release",
        "mxfp4" => "use the bf16 release, or load it with transformers and `dequantize=True` and save it again",
        _ => "give the checkpoint it was quantised from; quantise after the conversion",
    };
    Err(SourceError::Quantised { method, hint: hint.to_owned() })
}

fn declared_method(config: &Value) -> Option<String> {
    let q = ["quantization_config", "compression_config"].iter().find_map(|k| config.get(*k))?;
    if q.is_null() {
        return None;
    }
    let named = q.get("quant_method").or_else(|| q.get("quant_algo")).and_then(Value::as_str);
    let bits = ["load_in_4bit", "load_in_8bit"].iter().any(|k| q.get(*k) == Some(&Value::Bool(true)));
    Some(named.map_or_else(|| if bits { "bitsandbytes" } else { "unnamed method" }.to_owned(), clean))
}

/// A method name fit for a message.
fn clean(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(40).collect::<String>().to_ascii_lowercase()
}

/// The method that a tensor name gives away.
fn method_of_name(name: &str) -> Option<String> {
    const MARKS: [(&str, &str); 8] = [
        (".qweight", "gptq or awq"),
        (".qzeros", "gptq or awq"),
        (".weight_scale_inv", "fp8"),
        (".weight_packed", "compressed-tensors"),
        (".weight_scale", "fp8 or compressed-tensors"),
        (".SCB", "bitsandbytes"),
        (".absmax", "bitsandbytes"),
        ("_blocks", "mxfp4"),
    ];
    MARKS.iter().find(|(mark, _)| name.ends_with(mark)).map(|(_, method)| (*method).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn methods_are_named() {
        for (config, method) in [
            (json!({"quantization_config": {"quant_method": "gptq"}}), Some("gptq")),
            (json!({"quantization_config": {"load_in_4bit": true}}), Some("bitsandbytes")),
            (json!({"text_config": {"quantization_config": {"quant_method": "FP8"}}}), Some("fp8")),
            (json!({"quantization_config": {}}), Some("unnamed method")),
            (json!({"quantization_config": null}), None),
            (json!({}), None),
        ] {
            let result = refuse_quantised(&config, &TensorDirectory::default());
            match (result, method) {
                (Ok(()), None) => {}
                (Err(SourceError::Quantised { method, .. }), Some(m)) => assert_eq!(method, m),
                (r, _) => panic!("{config}: {r:?}"),
            }
        }
        assert_eq!(method_of_name("model.layers.0.self_attn.q_proj.qweight").as_deref(), Some("gptq or awq"));
        assert_eq!(method_of_name("model.layers.0.self_attn.q_proj.weight"), None);
    }
}
