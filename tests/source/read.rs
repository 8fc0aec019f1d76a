//! The strict reader: headers, indexes, folders that are no models.

use std::path::{Path, PathBuf};

use gqa2mla::observe::{Event, Silent};
use gqa2mla::source::{Dtype, Header, HeaderError, ModelSource, OpenOptions, SourceError};
use tempfile::TempDir;

use crate::common::checkpoint::{Recorder, open, sample, samples, write};

/// A file with this header and `data` bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.resize(out.len() + data, 0);
    out
}

#[test]
fn malformed_headers_are_refused() {
    let t = |name: &str, dtype: &str, shape: &str, begin: i64, end: i64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let a = t("a", "F32", "[2]", 0, 8);
    let ok = file(&format!("{{{a}}}"), 8);
    assert!(Header::parse(&ok).is_ok());
    let json = |text: String, data| match Header::parse(&file(&text, data)) {
        Err(HeaderError::Json { message }) => message,
        other => panic!("{text}: {other:?}"),
    };
    assert!(json(format!("{{{a},{a}}}"), 8).contains("duplicate key `a`"));
    // The same key spelled with an escape is still the same key.
    assert!(json(format!("{{{a},{}}}", t("\\u0061", "F32", "[2]", 8, 16)), 16).contains("duplicate key `a`"));
    assert!(json(format!("{{{}}}", t("a", "F4", "[2]", 0, 8)), 8).contains("unknown dtype"));
    assert!(json(format!("{{{}}}", t("a", "F32", "[2]", -8, 0)), 8).contains("invalid value"));
    assert!(json(format!("{{{}}}", t("a", "F32", "[-2]", 0, 8)), 8).contains("invalid value"));
    assert!(json(format!("{{{}}}", t("a", "F32", "[2.0]", 0, 8)), 8).contains("invalid type"));
    assert!(json(format!("{{{}}}", t("a\\n", "F32", "[2]", 0, 8)), 8).contains("control character"));
    assert!(json(format!("{{{}}}", t("\\u001b[2J", "F32", "[2]", 0, 8)), 8).contains("control character"));
    assert!(json(format!("{{{}}}", t(&"x".repeat(1025), "F32", "[2]", 0, 8)), 8).contains("longer"));
    assert!(json(format!("{{{}}}", t("", "F32", "[2]", 0, 8)), 8).contains("is empty"));
    assert!(json(format!("{{{}}}", t("a", "F32", &format!("[{}1]", "1,".repeat(99)), 0, 4)), 4).contains("dimensions"));
    assert!(json(r#"{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#.into(), 8).contains("dup"));
    assert!(
        json(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}"#.into(), 8).contains("unknown field")
    );
    assert!(json(r#"{"a":{"dtype":"F32","shape":[2]}}"#.into(), 8).contains("missing field"));
    assert!(json(r#"{"__metadata__":{"a":"1","a":"2"}}"#.into(), 0).contains("duplicate metadata key"));
    assert!(json(r#"{"__metadata__":{"a":1}}"#.into(), 0).contains("invalid type"));
    assert!(json(r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0).contains("duplicate key"));
    assert!(json(format!(" {{{a}}}"), 8).contains("expected a JSON object"));
    assert!(json(format!("{{{a}}} x"), 8).contains("trailing"));
    assert!(json("[]".into(), 0).contains("expected a JSON object"));
    json(format!("{{\"a\":{}", "[".repeat(1 << 20)), 0);
    json(format!("{{\"a\":{}", "{\"a\":".repeat(1 << 20)), 0);

    let b = |begin, end| format!("{{{a},{}}}", t("b", "F32", "[2]", begin, end));
    let contiguous = |text: String, data| {
        let result = Header::parse(&file(&text, data));
        assert!(matches!(result, Err(HeaderError::NotContiguous { .. })), "{text}: {result:?}");
    };
    contiguous(b(12, 20), 20);
    contiguous(b(4, 12), 12);
    contiguous(b(0, 8), 8);
    contiguous(format!("{{{}}}", t("a", "F32", "[2]", 4, 12)), 12);
    assert!(matches!(
        Header::parse(&file(&format!("{{{}}}", t("a", "F32", "[2]", 8, 0)), 8)),
        Err(HeaderError::Reversed { .. })
    ));
    for shape in ["[4294967296,4294967296]", "[4294967296,4294967296,0]", "[9223372036854775807]"] {
        let result = Header::parse(&file(&format!("{{{}}}", t("a", "F32", shape, 0, 0)), 0));
        assert!(matches!(result, Err(HeaderError::Overflow { .. })), "{shape}: {result:?}");
    }
    for (shape, end) in [("[3]", 8), ("[1]", 8), ("[0]", 8), ("[]", 8)] {
        let result = Header::parse(&file(&format!("{{{}}}", t("a", "F32", shape, 0, end)), 8));
        assert!(matches!(result, Err(HeaderError::Size { .. })), "{shape}: {result:?}");
    }
    assert!(matches!(Header::parse(&[&ok[..], b"PK"].concat()), Err(HeaderError::DataLength { .. })));
    for length in [100_000_001, u64::MAX, 1 << 63] {
        let mut bad = ok.clone();
        bad[..8].copy_from_slice(&length.to_le_bytes());
        assert!(matches!(Header::parse(&bad), Err(HeaderError::TooLong { .. })), "{length}");
    }
    let mut not_text = ok.clone();
    not_text[10] = 0xff;
    assert!(matches!(Header::parse(&not_text), Err(HeaderError::Json { .. })));
}

#[test]
fn every_truncation_is_refused_and_no_byte_change_panics() {
    let root = TempDir::new().unwrap();
    let out = root.path().join("out");
    let tensors: Vec<_> = samples().into_iter().filter(|s| s.0.name != "after_odd" && s.0.name != "scalar").collect();
    write(&out, &tensors[..4], 1 << 30, false).unwrap();
    let good = fs_err::read(out.join("model.safetensors")).unwrap();
    let header = Header::parse(&good).unwrap();
    for cut in 0..good.len() {
        assert!(Header::parse(&good[..cut]).is_err(), "cut at {cut}");
    }
    for at in 0..header.data_start as usize {
        for value in [0, b'"', b'{', b'9', good[at] ^ 1, good[at] ^ 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            // Some changes make another valid header; what holds then is that the ranges tile the data.
            if let Ok(h) = Header::parse(&bad) {
                let end = h.tensors.iter().fold(0, |end, (_, t)| {
                    assert_eq!(t.data_offsets.0, end);
                    t.data_offsets.1
                });
                assert_eq!(h.data_start as usize + end, bad.len());
            }
        }
    }
    // Through the whole reader, the file is named.
    fs_err::write(out.join("model.safetensors"), &good[..good.len() - 1]).unwrap();
    let text = open(&out).unwrap_err().to_string();
    assert!(text.contains("model.safetensors") && text.contains("hint:"), "{text}");
}

/// The table in `source/header.rs`: what the crate of the format lets pass. Where a release of it no longer does, the table
/// wants a new line.
#[test]
fn what_the_crate_takes_and_we_do_not() {
    let t = |name: &str, rest: &str| format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]{rest}}}"#);
    let (a, b) = (t("a", ""), r#""b":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[8,8]}"#);
    let lenient = [
        file(&format!(" {{{a}}}"), 8),
        // The same place twice; elsewhere the first would leave a hole.
        file(&format!("{{{a},{a}}}"), 8),
        file(&format!(r#"{{"__metadata__":{{"k":"1","k":"2"}},{a}}}"#), 8),
        file(&format!("{{{}}}", t("a", r#","strides":[1]"#)), 8),
        file(&format!("{{{}}}", t("", "")), 8),
        file(&format!("{{{}}}", t("\\u001b[2J", "")), 8),
        file(&format!("{{{}}}", t(&"x".repeat(1025), "")), 8),
        file(&format!(r#"{{"a":{{"dtype":"F32","shape":[{}2],"data_offsets":[0,8]}}}}"#, "1,".repeat(16)), 8),
        file(r#"{"a":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}"#, 8),
        file(&format!("{{{a},{b}}}"), 8),
    ];
    for bytes in &lenient {
        let text = String::from_utf8_lossy(bytes);
        assert!(safetensors::SafeTensors::deserialize(bytes).is_ok(), "the crate refuses {text}");
        assert!(Header::parse(bytes).is_err(), "{text}");
    }
    // What both refuse, and the crate without a figure.
    let hole = file(&format!(r#"{{{a},"b":{{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}}}"#), 16);
    let crates = safetensors::SafeTensors::deserialize(&hole).unwrap_err().to_string();
    let ours = Header::parse(&hole).unwrap_err().to_string();
    assert!(!crates.contains('8') && ours.contains("begins at byte 12, expected 8"), "{crates} {ours}");
}

proptest::proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), n in 0u64..200) {
        let _ = Header::parse(&bytes);
        if bytes.len() >= 8 {
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            let _ = Header::parse(&bytes);
        }
    }
}

#[test]
fn headers_as_large_as_the_format_allows_are_read_or_refused_at_once() {
    // More tensors than anybody has, in as few bytes as they take; and one name after another that is the same.
    let start = std::time::Instant::now();
    let mut many = String::from("{");
    for n in 0..1_000_001 {
        many += &format!("\"{n:x}\":{{\"dtype\":\"I8\",\"shape\":[],\"data_offsets\":[{n},{}]}},", n + 1);
    }
    many.pop();
    many.push('}');
    assert!(
        matches!(Header::parse(&file(&many, 0)), Err(HeaderError::Json { message }) if message.contains("more than"))
    );
    let deep = format!("{{\"a\":{}", "[".repeat(90_000_000));
    assert!(matches!(Header::parse(&file(&deep, 0)), Err(HeaderError::Json { .. })));
    let numbers = format!("{{\"a\":{{\"shape\":[{}1]", "1,".repeat(40_000_000));
    assert!(matches!(Header::parse(&file(&numbers, 0)), Err(HeaderError::Json { .. })));
    let text = format!("{{\"{}\":", "x".repeat(90_000_000));
    assert!(matches!(Header::parse(&file(&text, 0)), Err(HeaderError::Json { .. })));
    assert!(start.elapsed() < std::time::Duration::from_secs(20), "{:?} for four headers", start.elapsed());
}

/// Two shards with an index, as `write` makes them; returns the folder.
fn sharded(root: &TempDir) -> PathBuf {
    let out = root.path().join("out");
    let tensors = [sample("a", Dtype::F32, &[4]), sample("b", Dtype::F32, &[4]), sample("c", Dtype::F32, &[4])];
    write(&out, &tensors, 32, false).unwrap();
    out
}

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn index_and_shards_must_agree() {
    let root = TempDir::new().unwrap();
    let out = sharded(&root);
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    open(&out).unwrap();
    let problems = |map: serde_json::Value| {
        fs_err::write(out.join(INDEX), serde_json::json!({"weight_map": map}).to_string()).unwrap();
        match open(&out) {
            Err(SourceError::Index { problems, .. }) => problems,
            other => panic!("{other:?}"),
        }
    };
    // All at once: one extra in the index, one in the wrong shard, one unknown to the index, one shard missing.
    let found = problems(serde_json::json!({"a": two, "c": two, "x": one, "y": "model-3.safetensors"}));
    assert_eq!(found.len(), 4, "{found:?}");
    for part in ["`x` is not in", "index says", "`b` of", "`model-3.safetensors` is missing (1 tensors)"] {
        assert!(found.iter().any(|p| p.contains(part)), "{part}: {found:?}");
    }
    // The same shard under two names: every tensor twice.
    fs_err::copy(out.join(one), out.join("copy.safetensors")).unwrap();
    let found = problems(serde_json::json!({"a": one, "b": "copy.safetensors", "c": two}));
    assert!(found.iter().filter(|p| p.contains("is in both")).count() == 2, "{found:?}");
    // Long lists are cut.
    let many: serde_json::Map<_, _> = (0..50).map(|i| (format!("t{i}"), one.into())).collect();
    assert_eq!(problems(many.into()).len(), 20);
}

#[test]
fn index_paths_stay_in_the_folder() {
    let root = TempDir::new().unwrap();
    let out = sharded(&root);
    fs_err::copy(out.join("model-00001-of-00002.safetensors"), root.path().join("x.safetensors")).unwrap();
    for path in
        ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "C:\\x.safetensors", "x\0.safetensors", "", ".."]
    {
        fs_err::write(out.join(INDEX), serde_json::json!({"weight_map": {"a": path}}).to_string()).unwrap();
        let result = open(&out);
        assert!(matches!(result, Err(SourceError::BadIndex { .. })), "{path:?}: {result:?}");
    }
    for text in [r#"{"weight_map": {"a": "b.safetensors", "a": "b.safetensors"}}"#, r#"{"weight_map": {}}"#, "[]", "{"]
    {
        fs_err::write(out.join(INDEX), text).unwrap();
        assert!(matches!(open(&out), Err(SourceError::BadIndex { .. })), "{text}");
    }
    #[cfg(unix)]
    {
        let index = serde_json::json!({"weight_map": {"a": "link.safetensors"}}).to_string();
        fs_err::write(out.join(INDEX), &index).unwrap();
        std::os::unix::fs::symlink("../x.safetensors", out.join("link.safetensors")).unwrap();
        assert!(matches!(open(&out), Err(SourceError::Escapes { .. })));
        // A pipe in place of a shard must be refused without waiting for a writer.
        fs_err::remove_file(out.join("link.safetensors")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(out.join("link.safetensors")).status().unwrap();
        assert!(made.success());
        assert!(matches!(open(&out), Err(SourceError::NotRegular { kind: "a pipe", .. })));
    }
}

#[test]
fn total_size_alone_is_a_warning_with_a_gap_an_error() {
    let root = TempDir::new().unwrap();
    let out = sharded(&root);
    let text = fs_err::read_to_string(out.join(INDEX)).unwrap();
    fs_err::write(out.join(INDEX), text.replace("\"total_size\": 48", "\"total_size\": 99")).unwrap();
    let recorder = Recorder::default();
    ModelSource::open(out.to_str().unwrap(), &OpenOptions::default(), &recorder).unwrap();
    let events = recorder.0.into_inner().unwrap();
    assert!(matches!(&events[..], [Event::Warning(w)] if w.contains("99") && w.contains("48")), "{events:?}");

    let map = serde_json::json!({"c": "model-00002-of-00002.safetensors"});
    let index = serde_json::json!({"metadata": {"total_size": 48}, "weight_map": map});
    fs_err::write(out.join(INDEX), index.to_string()).unwrap();
    let text = open(&out).unwrap_err().to_string();
    assert!(text.contains("`model-00001-of-00002.safetensors` is not mentioned"), "{text}");
}

#[test]
fn what_is_not_a_model_is_named() {
    let root = TempDir::new().unwrap();
    let out = root.path().join("out");
    write(&out, &samples()[..3], 1 << 30, false).unwrap();
    let message = || open(&out).unwrap_err().to_string();
    let config = |text: &str| fs_err::write(out.join("config.json"), text).unwrap();

    config("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n");
    assert!(message().contains("git-lfs pointer"));
    config("<!DOCTYPE html><html></html>");
    assert!(message().contains("HTML page"));
    config("[1]");
    assert!(message().contains("expected a JSON object"));
    config(&format!("{{\"a\":\"{}\"}}", "x".repeat(17 << 20)));
    assert!(matches!(open(&out), Err(SourceError::TooLarge { .. })));
    config(r#"{"quantization_config": {"quant_method": "awq"}}"#);
    assert!(message().contains("quantised (awq)"));
    let options = {
        let mut options = OpenOptions::default();
        options.allow_quantised = true;
        options
    };
    ModelSource::open(out.to_str().unwrap(), &options, &Silent).unwrap();
    config("{}");

    fs_err::write(out.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        .unwrap();
    assert!(message().contains("git-lfs pointer"));
    fs_err::write(out.join("model.safetensors"), "<html><body>404</body></html>").unwrap();
    assert!(message().contains("HTML page"));
    fs_err::write(out.join("model.safetensors"), "").unwrap();
    assert!(message().contains("truncated"));
    fs_err::remove_file(out.join("model.safetensors")).unwrap();
    fs_err::write(out.join("pytorch_model.bin"), "x").unwrap();
    assert!(message().contains("safe_serialization"));
    fs_err::remove_file(out.join("config.json")).unwrap();
    assert!(matches!(open(&out), Err(SourceError::NoConfig { .. })));
    let file = out.join("pytorch_model.bin");
    assert!(matches!(open(&file), Err(SourceError::NotAFolder { .. })));
    assert!(matches!(open(Path::new("no such model")), Err(SourceError::NotFound { .. })));
}

#[test]
fn missing_tensors_name_their_neighbours_and_changed_files_are_noticed() {
    let root = TempDir::new().unwrap();
    let out = root.path().join("out");
    write(&out, &samples()[..3], 1 << 30, false).unwrap();
    let source = open(&out).unwrap();
    match source.tensors.view("model.layers.0.self_attn.v_proj.weight") {
        Err(SourceError::MissingTensor { near, .. }) => {
            assert!(near.contains(&"model.layers.0.self_attn.q_proj.weight".to_owned()), "{near:?}");
        }
        other => panic!("{other:?}"),
    }
    let print = source.fingerprint();
    assert_eq!(print.len(), source.tensors.iter().map(|t| &t.1.file).collect::<std::collections::BTreeSet<_>>().len());
    assert_eq!(print[0].header_sha256.len(), 64);
    let shard = &source.tensors.get("model.embed_tokens.weight").unwrap().file;
    let mut content = fs_err::read(shard).unwrap();
    content.push(0);
    fs_err::write(shard, content).unwrap();
    assert!(matches!(source.check_unchanged(), Err(SourceError::Changed { what: "its size", .. })));
}
