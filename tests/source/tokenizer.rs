//! The tokenizer behaves as `tok(text)` of transformers.

use gqa2mla::source::{SourceError, Tokenizer};

/// A word-level tokenizer with a post-processor that adds `<s>`, and with truncation and padding switched on.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let token = |id: u32, text: &str| {
        serde_json::json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 1,
            "pad_type_id": 0, "pad_token": "<pad>"},
        "added_tokens": [token(0, "<s>"), token(1, "<pad>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "<pad>": 1, "a": 2, "b": 3, "?": 4}, "unk_token": "?"},
    });
    fs_err::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    dir
}

#[test]
fn special_tokens_are_added_and_nothing_is_cut_or_padded() {
    let dir = folder();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("a b a zzz").unwrap(), [0, 2, 3, 2, 4]);
    assert_eq!(tokenizer.encode_with("a b", false).unwrap(), [2, 3]);
    assert_eq!(tokenizer.encode("").unwrap(), [0]);
    assert_eq!(tokenizer.decode(&[0, 2, 3]).unwrap(), "<s> a b");
    assert_eq!(tokenizer.decode_plain(&[0, 2, 3]).unwrap(), "a b");
    assert_eq!(tokenizer.vocab_size(), 5);
    assert_eq!(tokenizer.token_id("<pad>"), Some(1));
}

#[test]
fn unusable_files_are_named_with_a_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let message = || match Tokenizer::from_dir(dir.path()) {
        Err(e @ SourceError::Tokenizer { .. }) => e.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(message().contains("no such file"));
    fs_err::write(dir.path().join("tokenizer.model"), "").unwrap();
    assert!(message().contains("save_pretrained"));
    fs_err::write(dir.path().join("tokenizer.json"), "{").unwrap();
    assert!(message().contains("hint:"));
}
