//! Hostile configs, weight files and indexes.

use std::path::Path;

use serde_json::{Value, json};

use super::{Case, Clean, Refused, Verdict, case};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// `config.json` with `key` spelled as `raw`, which need not be JSON.
fn put(dir: &Path, key: &str, raw: &str) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs_err::read(&path).expect("readable")).expect("JSON");
    config.as_object_mut().expect("an object").remove(key);
    let rest = config.to_string();
    fs_err::write(path, format!("{{\"{key}\":{raw},{}", &rest[1..])).expect("written");
}

fn with(key: &'static str, raw: impl Into<String>, verdict: Verdict) -> Case {
    let raw = raw.into();
    let shown: String = raw.chars().take(40).collect();
    case(format!("{key}: {shown}"), verdict, move |dir| put(dir, key, &raw))
}

fn raw_config(name: &str, verdict: Verdict, bytes: impl Into<Vec<u8>>) -> Case {
    let bytes = bytes.into();
    case(format!("config: {name}"), verdict, move |dir| {
        fs_err::write(dir.join("config.json"), &bytes).expect("written")
    })
}

#[allow(clippy::too_many_lines, reason = "a table")]
pub fn configs() -> Vec<Case> {
    let huge = "1099511627776";
    let mut all = Vec::new();
    let sizes = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"];
    for key in sizes {
        for raw in ["0", "-1", "1.5", "\"64\"", "1e308", "18446744073709551615", "true", "[]", huge, "1000000000"] {
            all.push(with(key, raw, Refused));
        }
    }
    for raw in ["0", "-1", "2.5", "\"x\"", huge, "9223372036854775807", "7"] {
        all.push(with("head_dim", raw, Refused));
        all.push(with("vocab_size", raw, Refused));
    }
    all.extend(["3", "5", "1000"].map(|raw| with("num_key_value_heads", raw, Refused)));
    for raw in ["NaN", "Infinity", "-Infinity", "1e999", "0x10", "01", "+1", ".5", "1e", "'x'", "undefined"] {
        all.push(with("rms_norm_eps", raw, Refused));
    }
    all.extend(["-1", "\"x\"", "[]"].map(|raw| with("rms_norm_eps", raw, Refused)));
    all.extend(["0", "1e300", "5e-324"].map(|raw| with("rms_norm_eps", raw, Clean)));
    all.extend(["0", "-1", "\"x\"", "{}"].map(|raw| with("rope_theta", raw, Refused)));
    all.extend(["1e308", "1e-308", "1", "1e999"].map(|raw| with("rope_theta", raw, Clean)));
    let factors = format!(
        "{{\"rope_type\":\"longrope\",\"short_factor\":[{0}1],\"long_factor\":[{0}1],\"factor\":4}}",
        "1,".repeat(500_000)
    );
    for raw in [
        "[]",
        "\"x\"",
        "7",
        "{\"rope_type\":\"\\u001b[2J\"}",
        "{\"rope_type\":7}",
        "{\"rope_type\":\"yarn\",\"factor\":0}",
        "{\"rope_type\":\"yarn\",\"factor\":-4}",
        "{\"rope_type\":\"yarn\"}",
        "{\"rope_type\":\"linear\",\"factor\":\"x\"}",
        "{\"rope_type\":\"linear\",\"factor\":0}",
        "{\"rope_type\":\"llama3\"}",
        "{\"rope_type\":\"longrope\",\"short_factor\":[],\"long_factor\":[]}",
        "{\"rope_type\":\"longrope\",\"short_factor\":\"x\",\"long_factor\":{}}",
        &factors,
    ] {
        all.push(with("rope_scaling", raw, Refused));
    }
    for raw in [
        "{}",
        "{\"rope_type\":\"yarn\",\"factor\":1e300}",
        "{\"rope_type\":\"yarn\",\"factor\":1e-300,\"original_max_position_embeddings\":0}",
        "{\"rope_type\":\"llama3\",\"factor\":0,\"low_freq_factor\":0,\"high_freq_factor\":0,\
         \"original_max_position_embeddings\":0}",
    ] {
        all.push(with("rope_scaling", raw, Clean));
    }
    for raw in ["0", "-1", "1.5", "\"x\"", "4611686018427387904", "1", "18446744073709551615"] {
        all.push(with("max_position_embeddings", raw, Clean));
        all.push(with("sliding_window", raw, Clean));
        all.push(with("eos_token_id", raw, Clean));
        all.push(with("bos_token_id", raw, Clean));
    }
    let nested = format!("{}1{}", "[".repeat(100), "]".repeat(100));
    let long = format!("[{}1]", "1,".repeat(1_000_000));
    all.push(with("eos_token_id", nested, Clean));
    all.push(with("eos_token_id", long.clone(), Clean));
    all.push(with("layer_types", long.clone(), Clean));
    all.push(with("layer_types", "[\"full_attention\"]", Clean));
    all.push(with("architectures", long, Clean));
    all.extend(["[]", "\"x\"", "{}", "[7]", "null"].map(|raw| with("architectures", raw, Clean)));
    all.push(with("model_type", format!("\"{}\"", "x".repeat(1 << 20)), Refused));
    all.extend(["[]", "7", "null", "\"\"", "\"\\u001b[2J\\u202e\""].map(|raw| with("model_type", raw, Clean)));
    all.extend(["\"yes\"", "7", "null", "[]"].map(|raw| with("tie_word_embeddings", raw, Clean)));
    all.extend(["7", "\"float1\"", "\"\\u001b\"", "[]", "{}"].map(|raw| with("torch_dtype", raw, Clean)));
    all.extend(["7", "\"tanhh\"", "null", "\"\\u202e\""].map(|raw| with("hidden_act", raw, Clean)));
    all.extend(
        ["7", "\"x\"", "{\"quant_method\":[]}", "{\"quant_method\":\"\\u001b\"}", "[]"]
            .map(|raw| with("quantization_config", raw, Clean)),
    );
    all.extend(["7", "\"x\"", "[]", "{}", "{\"text_config\":{}}"].map(|raw| with("text_config", raw, Clean)));
    all.push(with("text_config", format!("{}{}", "{\"text_config\":".repeat(126), "1}".repeat(126)), Clean));

    let sound = fs_err::read(crate::common::models::fixture("pico-trained").join("config.json")).expect("readable");
    let text = String::from_utf8(sound.clone()).expect("text");
    let utf16: Vec<u8> = std::iter::once(0xfeff).chain(text.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    let raws: [(&str, Vec<u8>); 16] = [
        ("BOM", [b"\xef\xbb\xbf".as_slice(), &sound].concat()),
        ("UTF-16", utf16),
        ("latin-1", [&sound[..sound.len() - 2], b",\"x\":\"\xe9\"}"].concat()),
        ("empty", Vec::new()),
        ("blanks", b" \n\t ".to_vec()),
        ("zeros", vec![0; 4096]),
        ("null", b"null".to_vec()),
        ("number", b"1".to_vec()),
        ("brackets", vec![b'['; 1 << 20]),
        ("braces", b"{\"a\":".repeat(1 << 20)),
        ("digits", [b"{\"hidden_size\":", vec![b'9'; 8 << 20].as_slice(), b"}"].concat()),
        ("string", [b"{\"model_type\":\"", vec![b'x'; 8 << 20].as_slice(), b"\"}"].concat()),
        ("cut", sound[..sound.len() / 2].to_vec()),
        ("comment", [b"// no\n".as_slice(), &sound].concat()),
        ("two", [sound.as_slice(), &sound].concat()),
        ("too large", vec![b' '; 17 << 20]),
    ];
    all.extend(raws.into_iter().map(|(name, bytes)| raw_config(name, Refused, bytes)));
    let keys: String = (0..300_000).map(|n| format!("\"k{n}\":{n},")).collect();
    all.push(raw_config("many keys", Clean, format!("{{{keys}{}", &text.trim_start()[1..]).into_bytes()));
    all
}

/// Writes a weight file of this header with `data` bytes after it, as a hole.
fn file(path: &Path, header: &[u8], data: u64) {
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header);
    fs_err::write(path, &start).expect("written");
    fs_err::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("opens")
        .set_len(start.len() as u64 + data)
        .expect("grows");
}

/// The header of the sound weight file, changed; the data become zeros.
fn header(dir: &Path, change: impl Fn(&mut serde_json::Map<String, Value>)) {
    let path = dir.join(WEIGHTS);
    let bytes = fs_err::read(&path).expect("readable");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
    let mut map: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
    map.remove("__metadata__");
    change(&mut map);
    // What was changed gets room of its own, one tensor after the other.
    let mut end = 0_u64;
    for tensor in map.values_mut() {
        let size = |name: &str| match name {
            "F64" | "I64" | "U64" | "C64" => 8,
            "F32" | "I32" | "U32" => 4,
            "F16" | "BF16" | "I16" | "U16" => 2,
            _ => 1,
        };
        let dtype = tensor["dtype"].as_str().map_or(1, size);
        let values: u64 = tensor["shape"].as_array().expect("a shape").iter().filter_map(Value::as_u64).product();
        tensor["data_offsets"] = json!([end, end + values * dtype]);
        end += values * dtype;
    }
    file(&path, Value::Object(map).to_string().as_bytes(), end);
}

fn reshaped(
    name: &str,
    verdict: Verdict,
    change: impl Fn(&mut serde_json::Map<String, Value>) + Send + Sync + 'static,
) -> Case {
    case(format!("header: {name}"), verdict, move |dir| header(dir, &change))
}

fn shards(name: &str, verdict: Verdict, index: impl Into<String>) -> Case {
    let index = index.into();
    case(format!("index: {name}"), verdict, move |dir| {
        fs_err::rename(dir.join(WEIGHTS), dir.join("model-00001-of-00001.safetensors")).expect("renamed");
        fs_err::write(dir.join(INDEX), &index).expect("written");
    })
}

#[allow(clippy::too_many_lines, reason = "a table")]
pub fn weights() -> Vec<Case> {
    let mut all = Vec::new();
    for dtype in [
        "F64",
        "F32",
        "F16",
        "BF16",
        "I64",
        "I32",
        "I16",
        "I8",
        "U64",
        "U32",
        "U16",
        "U8",
        "BOOL",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
        "F4",
        "F6_E2M3",
        "C64",
        "",
        "\u{1b}[2J",
        "f32",
    ] {
        let verdict = if matches!(dtype, "F64" | "F32" | "F16" | "BF16") { Clean } else { Refused };
        all.push(reshaped(&format!("all {dtype}"), verdict, move |map| {
            map.values_mut().for_each(|t| t["dtype"] = dtype.into());
        }));
    }
    all.push(reshaped("all of no dimension", Refused, |map| map.values_mut().for_each(|t| t["shape"] = json!([]))));
    all.push(reshaped("all empty", Refused, |map| map.values_mut().for_each(|t| t["shape"] = json!([0]))));
    all.push(reshaped("all flat", Refused, |map| {
        for t in map.values_mut() {
            let values: u64 = t["shape"].as_array().expect("a shape").iter().filter_map(Value::as_u64).product();
            t["shape"] = json!([values]);
        }
    }));
    all.push(reshaped("all transposed", Refused, |map| {
        map.values_mut().for_each(|t| t["shape"].as_array_mut().expect("a shape").reverse());
        map.insert("model.norm.weight".to_owned(), json!({"dtype": "F32", "shape": [64, 1]}));
    }));
    all.push(reshaped("one missing", Refused, |map| {
        map.remove("model.layers.1.self_attn.k_proj.weight").expect("there");
    }));
    all.push(reshaped("nothing in it", Refused, serde_json::Map::clear));
    all.push(reshaped("a terabyte more", Clean, |map| {
        map.insert("extra".to_owned(), json!({"dtype": "BF16", "shape": [1 << 20, 1 << 19]}));
    }));
    all.push(reshaped("an exabyte more", Refused, |map| {
        map.insert("extra".to_owned(), json!({"dtype": "BF16", "shape": [1_u64 << 30, 1_u64 << 40, 1 << 20]}));
    }));
    all.push(reshaped("a hundred thousand more", Clean, |map| {
        for n in 0..100_000 {
            map.insert(format!("extra.{n}.weight"), json!({"dtype": "BF16", "shape": []}));
        }
    }));
    for name in ["../../x", "a\u{1b}[2J", "\u{202e}weight", "\u{feff}", " ", "model.layers.99999999999999999999.x"] {
        let named = name.to_owned();
        all.push(reshaped(&format!("named {name:?}"), Clean, move |map| {
            map.insert(named.clone(), json!({"dtype": "BF16", "shape": [2]}));
        }));
    }
    all.push(reshaped("a name of a megabyte", Refused, |map| {
        map.insert("x".repeat(1 << 20), json!({"dtype": "BF16", "shape": [2]}));
    }));
    let claims = |name: &str, bytes: Vec<u8>, length: u64| {
        case(format!("weights: {name}"), Refused, move |dir| {
            fs_err::write(dir.join(WEIGHTS), &bytes).expect("written");
            let file = fs_err::OpenOptions::new().write(true).open(dir.join(WEIGHTS)).expect("opens");
            file.set_len(length.max(bytes.len() as u64)).expect("grows");
        })
    };
    all.push(claims("empty", Vec::new(), 0));
    all.push(claims("seven bytes", vec![0; 7], 0));
    all.push(claims("a header of nothing", vec![0; 8], 0));
    all.push(claims("a terabyte of zeros", Vec::new(), 1 << 40));
    all.push(claims("a header of 100 MB of zeros", 100_000_000_u64.to_le_bytes().to_vec(), 1 << 30));
    all.push(claims("a header of 100 MB and a byte", 100_000_001_u64.to_le_bytes().to_vec(), 1 << 30));
    all.push(claims("a header beyond all", u64::MAX.to_le_bytes().to_vec(), 1 << 30));
    all.push(claims("a zip", b"PK\x03\x04\x14\x00\x00\x00\x08\x00archive/data.pkl".to_vec(), 4096));
    all.push(claims("a page", b"<html><body>Sign in</body></html>".to_vec(), 0));

    let one = "model-00001-of-00001.safetensors";
    let map = |entries: String| format!("{{\"metadata\":{{}},\"weight_map\":{{{entries}}}}}");
    let many: String = (0..1_000_000).map(|n| format!("\"t{n}\":\"{one}\",")).collect();
    all.push(shards("a million entries", Refused, map(format!("{many}\"t\":\"{one}\""))));
    let files: String = (0..100_000).map(|n| format!("\"t{n}\":\"model-{n}.safetensors\",")).collect();
    all.push(shards("a hundred thousand files", Refused, map(format!("{files}\"t\":\"{one}\""))));
    for (name, value) in [
        ("number", "7"),
        ("null", "null"),
        ("list", "[]"),
        ("outside", "\"../model.safetensors\""),
        ("absolute", "\"/etc/passwd\""),
        ("config", "\"config.json\""),
        ("folder", "\".\""),
        ("other case", "\"MODEL-00001-of-00001.safetensors\""),
        ("right to left", "\"\\u202emodel.safetensors\""),
        ("escape", "\"\\u001b[2J.safetensors\""),
        ("surrogate", "\"\\ud800.safetensors\""),
        ("emoji", "\"\\ud83d\\ude00.safetensors\""),
        ("long", &format!("\"{}.safetensors\"", "x".repeat(100_000))),
    ] {
        all.push(shards(&format!("a file that is {name}"), Refused, map(format!("\"lm_head.weight\":{value}"))));
    }
    for text in ["", "null", "[]", "{\"weight_map\":[]}", "{\"weight_map\":7}", "\u{feff}{}", "{\"weight_map\":{\"a\":"]
    {
        all.push(shards(&format!("{text:?}"), Refused, text));
    }
    all.push(shards("deep", Refused, "{\"weight_map\":".repeat(1 << 20)));
    // Beside the single file, which wins over an index that is none.
    all.push(case("index: beside the single file", Clean, |dir| {
        fs_err::write(dir.join(INDEX), "nothing").expect("written");
    }));
    all.push(case("two weight files", Refused, |dir| {
        fs_err::rename(dir.join(WEIGHTS), dir.join("a.safetensors")).expect("renamed");
        fs_err::copy(dir.join("a.safetensors"), dir.join("b.safetensors")).expect("copied");
    }));
    all
}
