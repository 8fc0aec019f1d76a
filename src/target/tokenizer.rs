//! Tokenizer files of an output, so that `AutoTokenizer` gives the ids there that it gives for the source.
//!
//! Which class transformers loads a tokenizer with depends on its version, on `model_type` and on `tokenizer_class`; some
//! classes of transformers 5 rebuild the tokenizer from vocabulary and merges by rules of their own and leave out what
//! `tokenizer.json` says. A conversion has another `model_type` than its source, so the same files may be read
//! differently. Where that would change ids:
//!
//! - `tokenizer_class` names the class that the source's `model_type` stood for;
//! - `tokenizer.VERSION.json`, listed in `fast_tokenizer_files`, is what transformers from that version on makes of the
//!   source. `tokenizer.json` stays as it is: other programs, and transformers 4, read it as it stands.
//!
//! Read in transformers 4.57.6 to 5.24.0 (`models/auto/tokenization_auto.py`); `scripts/engines/check_tokenizers.py` holds
//! it to what several versions do.

use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Name of the class that loads a `tokenizer.json` as it stands, in every version.
const GENERIC: &str = "PreTrainedTokenizerFast";

/// Split of Qwen2's class, before bytes.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A class of transformers 5 that rebuilds what it loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Gpt2,
    Qwen2,
    Llama,
    Gemma,
}

/// How transformers reads the source's `tokenizer.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    AsItStands,
    By(Class),
}

/// What to write beside, or in place of, the tokenizer files of the source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizerFiles {
    /// Names and contents; `tokenizer_config.json` replaces the source's.
    pub files: Vec<(String, Vec<u8>)>,
    /// Why, where a file is written for some versions.
    pub note: Option<String>,
}

/// Tokenizer files of a conversion for `AutoTokenizer` to give the source's ids. `model_type` is the source's, `remote`
/// whether the output's class is none of transformers', `config` the source's `tokenizer_config.json`, `tokenizer` its
/// `tokenizer.json`. Files that are not understood are left to be copied as they are.
pub fn tokenizer_files(model_type: &str, remote: bool, config: Option<&[u8]>, tokenizer: &[u8]) -> TokenizerFiles {
    let config: Map<String, Value> = match config.map(serde_json::from_slice) {
        None => Map::new(),
        Some(Ok(map)) => map,
        Some(Err(_)) => return TokenizerFiles::default(),
    };
    let Ok(outline) = serde_json::from_slice::<Outline>(tokenizer) else { return TokenizerFiles::default() };
    // Code of its own, or versions already told apart: nothing here knows better.
    if ["auto_map", "fast_tokenizer_files"].iter().any(|key| config.contains_key(*key)) {
        return TokenizerFiles::default();
    }
    let stored = config.get("tokenizer_class").and_then(Value::as_str).map(str::to_owned);
    let (class, readings) = readings(model_type, stored.as_deref(), outline.is_byte_level());
    let mut written = config.clone();
    if let Some(class) = class.or(remote.then_some(GENERIC).filter(|_| stored.is_none())) {
        written.insert("tokenizer_class".into(), class.into());
        if class == GENERIC && !written.contains_key("model_input_names") {
            // Transformers 4 adds `token_type_ids` else, which language models refuse.
            written.insert("model_input_names".into(), json!(["input_ids", "attention_mask"]));
        }
    }
    if let Some((_, Reading::By(class))) = readings.last() {
        class.set_defaults(&mut written, &outline);
    }
    let mut out = TokenizerFiles::default();
    let mut now = Reading::AsItStands;
    for (version, reading) in readings {
        let changes = |r: Reading| matches!(r, Reading::By(class) if outline.changes(class, &config));
        let then = if changes(reading) { reading } else { Reading::AsItStands };
        if then == now {
            continue;
        }
        now = then;
        let content = match then {
            Reading::AsItStands => Some(tokenizer.to_vec()),
            Reading::By(class) => rebuilt(tokenizer, class, &config),
        };
        let Some(content) = content else { return TokenizerFiles::default() };
        if let Reading::By(class) = then {
            out.note = Some(format!(
                "transformers {version} and newer tokenises the source by the rules of its class {}, not as tokenizer.json says: \
                 tokenizer.{version}.json keeps the output at that",
                class.name()
            ));
        }
        out.files.push((format!("tokenizer.{version}.json"), content));
    }
    if !out.files.is_empty() {
        let mut names = vec!["tokenizer.json".to_owned()];
        names.extend(out.files.iter().map(|(name, _)| name.clone()));
        written.insert("fast_tokenizer_files".into(), names.into());
    }
    if written != config {
        let mut bytes = serde_json::to_vec_pretty(&written).unwrap_or_default();
        bytes.push(b'\n');
        out.files.push(("tokenizer_config.json".into(), bytes));
    }
    out
}

/// The class to write, `None` for the stored one, and from which version of transformers on the source is read how; before
/// the first of them it is read as it stands. Minor versions have two digits: transformers sorts the names as text.
fn readings(
    model_type: &str,
    stored: Option<&str>,
    byte_level: bool,
) -> (Option<&'static str>, Vec<(&'static str, Reading)>) {
    let stored = stored.map(|s| s.strip_suffix("Fast").unwrap_or(s));
    let own = match model_type {
        t if t.starts_with("qwen2") || t.starts_with("qwen3") => Some(Class::Qwen2),
        "gemma2" => Some(Class::Gemma),
        // Registered with no class of their own, whatever the tokenizer's config says.
        "mistral" | "mixtral" | "phi3" | "olmo2" => return (stored.is_some().then_some(GENERIC), Vec::new()),
        "granite" => {
            let until = [("5.00.0", Reading::By(Class::Gpt2)), ("5.09.0", Reading::AsItStands)];
            let gpt2 = stored.is_none_or(|s| s == Class::Gpt2.name());
            return (stored.is_some().then_some(GENERIC), if gpt2 { until.to_vec() } else { Vec::new() });
        }
        _ => None,
    };
    match (own, stored.and_then(Class::named)) {
        (Some(own), class) if stored.is_none() || class == Some(own) => {
            (stored.is_none().then_some(own.name()), vec![("5.00.0", Reading::By(own))])
        }
        // Its registered class is taken whatever the tokenizer's config says.
        (Some(own), _) if model_type == "qwen2" => (Some(own.name()), vec![("5.08.0", Reading::By(own))]),
        (Some(_), Some(class)) => (None, vec![("5.08.0", Reading::By(class))]),
        // What that class makes of bytes is of no use, so later versions read the file.
        (None, Some(Class::Llama)) if byte_level => (None, Vec::new()),
        (None, Some(class)) => (None, vec![("5.03.0", Reading::By(class))]),
        (_, None) => (None, Vec::new()),
    }
}

/// A `tokenizer.json` without its vocabulary.
#[derive(Debug, Deserialize)]
struct Outline {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    added_tokens: Vec<Added>,
    model: ModelOutline,
}

#[derive(Debug, Deserialize)]
struct Added {
    content: String,
}

#[derive(Debug, Default, Deserialize)]
struct ModelOutline {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    fuse_unk: Option<bool>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
}

impl Outline {
    fn is_byte_level(&self) -> bool {
        steps(&self.pre_tokenizer, "pretokenizers").iter().any(|s| s["type"] == "ByteLevel")
    }

    /// Whether `class` splits or merges otherwise than the file. Only pair merging is rebuilt in these classes.
    fn changes(&self, class: Class, config: &Map<String, Value>) -> bool {
        if self.model.kind.as_deref() != Some("BPE") {
            return false;
        }
        let parts = class.parts(config);
        let model = &self.model;
        let flags = [model.byte_fallback, model.ignore_merges].map(|f| f.unwrap_or(false));
        let theirs = ["byte_fallback", "ignore_merges"].map(|key| parts.model[key] == true);
        // Without bytes to fall back on, nothing is unknown to a vocabulary of bytes.
        let fuse = flags[0] && model.fuse_unk.unwrap_or(false) != (parts.model["fuse_unk"] == true);
        flags != theirs
            || fuse
            || steps(&self.normalizer, "normalizers") != steps(&parts.normalizer, "normalizers")
            || steps(&self.pre_tokenizer, "pretokenizers") != steps(&parts.pre_tokenizer, "pretokenizers")
    }
}

/// The steps of a sequence, or the one step, without what bears on offsets only.
fn steps(part: &Value, list: &str) -> Vec<Value> {
    let all = match part {
        Value::Null => Vec::new(),
        part if part["type"] == "Sequence" => part[list].as_array().cloned().unwrap_or_default(),
        part => vec![part.clone()],
    };
    let plain = |mut step: Value| {
        if let Some(map) = step.as_object_mut() {
            map.remove("trim_offsets");
            // What a step is where it does not say.
            if map.get("type").is_some_and(|t| t == "ByteLevel") {
                map.entry("use_regex").or_insert(true.into());
            }
        }
        step
    };
    all.into_iter().map(plain).collect()
}

/// What a class puts in place of what the file says.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Map<String, Value>,
}

impl Class {
    const ALL: [Self; 4] = [Self::Gpt2, Self::Qwen2, Self::Llama, Self::Gemma];

    fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "GPT2Tokenizer",
            Self::Qwen2 => "Qwen2Tokenizer",
            Self::Llama => "LlamaTokenizer",
            Self::Gemma => "GemmaTokenizer",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.name() == name)
    }

    fn parts(self, config: &Map<String, Value>) -> Parts {
        let flag = |key: &str, default: bool| config.get(key).and_then(Value::as_bool).unwrap_or(default);
        let bytes = |regex: bool| {
            let space = flag("add_prefix_space", false);
            json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": regex})
        };
        let from_bytes =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let space = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let mut pieces = vec![space, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        let model = |fallback: bool, affix: Value, unknown: Value| {
            let map = json!({
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": affix,
                "end_of_word_suffix": affix, "fuse_unk": fallback, "byte_fallback": fallback, "ignore_merges": false,
            });
            map.as_object().cloned().unwrap_or_default()
        };
        match self {
            Self::Gpt2 => Parts {
                normalizer: Value::Null,
                pre_tokenizer: bytes(true),
                decoder: from_bytes,
                model: model(false, "".into(), Value::Null),
            },
            Self::Qwen2 => {
                let split = json!({
                    "type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false
                });
                Parts {
                    normalizer: json!({"type": "NFC"}),
                    pre_tokenizer: json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]}),
                    decoder: from_bytes,
                    model: model(false, "".into(), Value::Null),
                }
            }
            Self::Llama => {
                let space = flag("add_prefix_space", true);
                let scheme = match (space, flag("legacy", false)) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                };
                if space {
                    pieces.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
                }
                Parts {
                    normalizer: Value::Null,
                    pre_tokenizer: json!({
                        "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false
                    }),
                    decoder: json!({"type": "Sequence", "decoders": pieces}),
                    model: model(true, Value::Null, Value::Null),
                }
            }
            Self::Gemma => Parts {
                normalizer: json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
                pre_tokenizer: json!({
                    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false
                }),
                decoder: json!({"type": "Sequence", "decoders": pieces}),
                model: model(true, Value::Null, config.get("unk_token").cloned().unwrap_or_else(|| "<unk>".into())),
            },
        }
    }

    /// Special tokens that the class has where the config does not name them, as far as the file knows them.
    fn set_defaults(self, config: &mut Map<String, Value>, outline: &Outline) {
        let end = "<|endoftext|>";
        let defaults: &[(&str, &str)] = match self {
            Self::Gpt2 => &[("unk_token", end), ("bos_token", end), ("eos_token", end)],
            Self::Qwen2 => &[("unk_token", end), ("eos_token", end), ("pad_token", end)],
            Self::Llama => &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")],
            Self::Gemma => {
                &[("unk_token", "<unk>"), ("bos_token", "<bos>"), ("eos_token", "<eos>"), ("pad_token", "<pad>")]
            }
        };
        for (key, token) in defaults {
            if !config.contains_key(*key) && outline.added_tokens.iter().any(|a| a.content == *token) {
                config.insert((*key).to_owned(), (*token).into());
            }
        }
    }
}

/// `tokenizer` as `class` rebuilds it: vocabulary, merges, added tokens and what is put around a text are the file's.
fn rebuilt(tokenizer: &[u8], class: Class, config: &Map<String, Value>) -> Option<Vec<u8>> {
    let mut file: Map<String, Value> = serde_json::from_slice(tokenizer).ok()?;
    let parts = class.parts(config);
    let model = file.get_mut("model")?.as_object_mut()?;
    model.extend(parts.model);
    file.insert("normalizer".into(), parts.normalizer);
    file.insert("pre_tokenizer".into(), parts.pre_tokenizer);
    file.insert("decoder".into(), parts.decoder);
    serde_json::to_vec(&file).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(pre_tokenizer: Value) -> Vec<u8> {
        serde_json::to_vec(&json!({
            "version": "1.0", "normalizer": null, "pre_tokenizer": pre_tokenizer,
            "added_tokens": [{"id": 2, "content": "<|endoftext|>", "special": true}],
            "post_processor": {"type": "ByteLevel"}, "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]], "byte_fallback": false},
        }))
        .expect("serialises")
    }

    fn bytes(regex: bool) -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": regex})
    }

    fn digits() -> Vec<u8> {
        let digits = json!({"type": "Digits", "individual_digits": true});
        tokenizer(json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]}))
    }

    fn config(class: Option<&str>) -> Vec<u8> {
        let mut map = json!({"eos_token": "<|endoftext|>", "chat_template": "{{ x }}"});
        if let Some(class) = class {
            map["tokenizer_class"] = class.into();
        }
        serde_json::to_vec(&map).expect("serialises")
    }

    fn read(files: &TokenizerFiles, name: &str) -> Value {
        let found = files.files.iter().find(|(n, _)| n == name);
        serde_json::from_slice(&found.unwrap_or_else(|| panic!("no {name} in {files:?}")).1).expect("JSON")
    }

    #[test]
    fn files_that_every_version_reads_alike_are_left_alone() {
        let plain = tokenizer(bytes(true));
        for (model_type, class) in
            [("llama", GENERIC), ("llama", "GPT2Tokenizer"), ("qwen3", GENERIC), ("olmo2", GENERIC)]
        {
            let made = tokenizer_files(model_type, false, Some(&config(Some(class))), &plain);
            let changed = made.files.iter().filter(|(name, _)| name != "tokenizer_config.json").count();
            assert_eq!(changed, 0, "{model_type} {class}: {made:?}");
        }
        // A trainer's code, a file for versions, and what is no JSON.
        for odd in
            [&br#"{"auto_map": {}, "tokenizer_class": "GPT2Tokenizer"}"#[..], br#"{"fast_tokenizer_files": []}"#, b"{"]
        {
            assert_eq!(tokenizer_files("llama", true, Some(odd), &digits()), TokenizerFiles::default());
        }
        assert_eq!(tokenizer_files("llama", true, None, b"[]"), TokenizerFiles::default());
    }

    #[test]
    fn digits_that_a_class_does_not_split_are_not_split_from_its_version_on() {
        let made = tokenizer_files("llama", false, Some(&config(Some("GPT2TokenizerFast"))), &digits());
        assert!(made.note.as_ref().is_some_and(|n| n.contains("GPT2Tokenizer")), "{made:?}");
        let file = read(&made, "tokenizer.5.03.0.json");
        assert_eq!(file["pre_tokenizer"]["type"], "ByteLevel");
        assert_eq!(file["model"]["merges"], json!([["a", "b"]]));
        assert_eq!(file["post_processor"]["type"], "ByteLevel");
        let written = read(&made, "tokenizer_config.json");
        assert_eq!(written["fast_tokenizer_files"], json!(["tokenizer.json", "tokenizer.5.03.0.json"]));
        assert_eq!(written["tokenizer_class"], "GPT2TokenizerFast");
        assert_eq!(written["chat_template"], "{{ x }}");
        // Named, since a class that reads the file as it stands does not know it.
        assert_eq!(written["unk_token"], "<|endoftext|>");
    }

    #[test]
    fn the_class_that_a_model_type_stands_for_is_named() {
        for (stored, version) in [(Some(GENERIC), "5.08.0"), (None, "5.00.0"), (Some("Qwen2Tokenizer"), "5.00.0")] {
            let made = tokenizer_files("qwen2", false, Some(&config(stored)), &digits());
            assert_eq!(read(&made, "tokenizer_config.json")["tokenizer_class"], "Qwen2Tokenizer");
            let file = read(&made, &format!("tokenizer.{version}.json"));
            assert_eq!(file["normalizer"]["type"], "NFC");
            assert_eq!(file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"], QWEN2_SPLIT);
        }
        // The generic class where a model type stands for it, or the output's class is nobody's.
        for (model_type, stored, remote) in [("mistral", Some("LlamaTokenizer"), false), ("llama", None, true)] {
            let made = tokenizer_files(model_type, remote, Some(&config(stored)), &digits());
            let written = read(&made, "tokenizer_config.json");
            assert_eq!(written["tokenizer_class"], GENERIC);
            assert_eq!(written["model_input_names"], json!(["input_ids", "attention_mask"]));
        }
        assert_eq!(tokenizer_files("llama", false, Some(&config(None)), &digits()), TokenizerFiles::default());
    }

    #[test]
    fn versions_that_went_back_get_the_file_back() {
        let made = tokenizer_files("granite", false, Some(&config(Some("GPT2Tokenizer"))), &digits());
        let names: Vec<&str> = made.files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["tokenizer.5.00.0.json", "tokenizer.5.09.0.json", "tokenizer_config.json"]);
        assert_eq!(made.files[1].1, digits());
        let sorted = {
            let mut s = names.clone();
            s.sort_unstable();
            s
        };
        assert_eq!(names, sorted, "transformers takes them in the order of their names");
    }

    #[test]
    fn sentencepiece_files_are_compared_with_their_class() {
        let space = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        let mut file: Value = serde_json::from_slice(&tokenizer(space)).expect("JSON");
        file["model"]["byte_fallback"] = true.into();
        file["model"]["fuse_unk"] = true.into();
        let as_class = serde_json::to_vec(&file).expect("serialises");
        let stored = config(Some("LlamaTokenizer"));
        assert_eq!(tokenizer_files("llama", false, Some(&stored), &as_class), TokenizerFiles::default());
        file["pre_tokenizer"] = Value::Null;
        file["normalizer"] = json!({"type": "Prepend", "prepend": "▁"});
        let old = serde_json::to_vec(&file).expect("serialises");
        let made = tokenizer_files("llama", false, Some(&stored), &old);
        assert_eq!(read(&made, "tokenizer.5.03.0.json")["pre_tokenizer"]["prepend_scheme"], "first");
        // Bytes are nothing for that class.
        assert_eq!(tokenizer_files("llama", false, Some(&stored), &digits()), TokenizerFiles::default());
    }
}
