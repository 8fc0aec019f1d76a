//! Hostile tokenizers, chat templates and generation settings.

use std::path::Path;

use serde_json::{Value, json};

use super::{Case, Clean, Refused, Verdict, case};

const TOKENIZER: &str = "tokenizer.json";

fn written(file: &'static str, name: &str, verdict: Verdict, bytes: impl Into<Vec<u8>>) -> Case {
    let bytes = bytes.into();
    case(format!("{file}: {name}"), verdict, move |dir| fs_err::write(dir.join(file), &bytes).expect("written"))
}

fn changed(name: impl Into<String>, change: impl Fn(&mut Value) + Send + Sync + 'static) -> Case {
    case(format!("tokenizer: {}", name.into()), Clean, move |dir| edit(dir, &change))
}

fn edit(dir: &Path, change: impl Fn(&mut Value)) {
    let path = dir.join(TOKENIZER);
    let mut value: Value = serde_json::from_slice(&fs_err::read(&path).expect("readable")).expect("JSON");
    change(&mut value);
    fs_err::write(path, value.to_string()).expect("written");
}

/// A chat template in `tokenizer_config.json`.
fn template(name: &str, text: &str) -> Case {
    let bytes = json!({"chat_template": text, "eos_token": "</s>"}).to_string();
    written("tokenizer_config.json", name, Clean, bytes)
}

#[allow(clippy::too_many_lines, reason = "a table")]
pub fn cases() -> Vec<Case> {
    let mut all = vec![
        written(TOKENIZER, "100 MB", Clean, vec![b' '; 100_000_000]),
        written(TOKENIZER, "empty", Clean, ""),
        written(TOKENIZER, "null", Clean, "null"),
        written(TOKENIZER, "BOM", Clean, "\u{feff}{}"),
        written(TOKENIZER, "brackets", Clean, vec![b'['; 1 << 20]),
        written(TOKENIZER, "braces", Clean, b"{\"model\":".repeat(1 << 20)),
        written(TOKENIZER, "a page", Clean, "<!DOCTYPE html><html></html>"),
        written(TOKENIZER, "40 MB of list", Clean, format!("{{\"added_tokens\":[{}1]}}", "1,".repeat(20_000_000))),
    ];
    for (name, value) in [("fixed", json!({"Fixed": 1_u64 << 40})), ("none", json!("BatchLongest"))] {
        all.push(changed(format!("padding {name}"), move |v| {
            v["padding"] = json!({"strategy": value, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "x"});
        }));
    }
    all.push(changed("truncation with a stride beyond its length", |v| {
        v["truncation"] = json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 100});
    }));
    // Each doubles the text.
    let double = |text: &str| json!({"type": "Replace", "pattern": {"Regex": "(?s)(.)"}, "content": text});
    let doubling = json!({"type": "Sequence", "normalizers": vec![double("$1$1$1$1"); 40]});
    all.push(changed("a normaliser that multiplies", move |v| v["normalizer"] = doubling.clone()));
    let grow = json!({"type": "Replace", "pattern": {"String": "e"}, "content": "ee"});
    let growing = json!({"type": "Sequence", "normalizers": vec![grow; 40]});
    all.push(changed("a normaliser that doubles", move |v| v["normalizer"] = growing.clone()));
    let content = "x".repeat(1 << 20);
    all.push(changed("a normaliser that makes megabytes of a letter", move |v| {
        v["normalizer"] = json!({"type": "Replace", "pattern": {"String": "e"}, "content": content});
    }));
    let empty = json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"});
    all.push(changed("a normaliser that replaces nothing", move |v| v["normalizer"] = empty.clone()));
    for (name, pattern) in [
        ("that explodes", "(e|e )*(\\w+\\s?)*$(?=x)"),
        ("that looks back", "(?<=(a|b|c|d|e)*)x"),
        ("with a reference", "(\\w+)\\s\\1*(\\w+)*$"),
        ("of many", "(?:(?:(?:(?:a{1,1000}){1,1000}){1,1000}){1,1000})"),
        ("deep", &format!("{}a{}", "(".repeat(5000), ")".repeat(5000))),
        ("of nothing", ""),
    ] {
        let pattern = pattern.to_owned();
        all.push(changed(format!("a pattern {name}"), move |v| {
            v["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": false});
        }));
    }
    let twice = json!({"type": "Sequence", "decoders":
        vec![json!({"type": "Replace", "pattern": {"String": ""}, "content": "xx"}); 30]});
    all.push(changed("a decoder that multiplies", move |v| v["decoder"] = twice.clone()));
    all.push(changed("a post-processor that adds a hundred thousand tokens", |v| {
        let one = json!({"SpecialToken": {"id": "x", "type_id": 0}});
        let mut single = vec![one; 100_000];
        single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
        v["post_processor"] = json!({"type": "TemplateProcessing", "single": single, "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [1], "tokens": ["x"]}}});
    }));
    for id in [4_294_967_295_u64, 1 << 20, 1 << 40] {
        all.push(changed(format!("a token of id {id}"), move |v| {
            v["added_tokens"] = json!([{"id": id, "content": "e", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}]);
        }));
    }
    all.push(changed("ids beyond the model", |v| {
        if let Some(vocab) = v["model"]["vocab"].as_object_mut() {
            for id in vocab.values_mut() {
                *id = json!(id.as_u64().unwrap_or(0) + 4_000_000_000 - 70_000);
            }
        }
    }));
    all.push(changed("no vocabulary", |v| v["model"]["vocab"] = json!({})));
    all.push(changed("merges of what is not there", |v| v["model"]["merges"] = json!(["q q", "zz zz", "a"])));
    for kind in ["Unigram", "WordPiece", "WordLevel", "Bert", ""] {
        all.push(changed(format!("of type {kind:?}"), move |v| v["model"]["type"] = kind.into()));
    }

    for file in ["tokenizer_config.json", "generation_config.json"] {
        for (name, text) in [
            ("empty", ""),
            ("null", "null"),
            ("list", "[]"),
            ("BOM", "\u{feff}{}"),
            ("cut", "{\"a\":"),
            ("NaN", "{\"temperature\":NaN}"),
            ("page", "<html></html>"),
        ] {
            all.push(written(file, name, Clean, text));
        }
        all.push(written(file, "deep", Clean, b"{\"a\":".repeat(1 << 20)));
        all.push(written(file, "large", Clean, vec![b' '; 17 << 20]));
    }
    for eos in ["-1", "\"x\"", "[[1]]", "1e999", "18446744073709551616", "{}", "[null]", "4294967295"] {
        all.push(written(
            "generation_config.json",
            eos,
            Clean,
            format!("{{\"eos_token_id\":{eos},\"max_length\":-1}}"),
        ));
    }
    for (name, text) in [
        (
            "for ever",
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
        ),
        (
            "that doubles",
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        ),
        (
            "that doubles by +",
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        ),
        (
            "that doubles a list",
            "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        ),
        (
            "that joins",
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        ),
        (
            "that replaces",
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x | replace('x', 'xxxx') %}{% endfor %}",
        ),
        (
            "that replaces as Python",
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x.replace('x', 'xxxx') %}{% endfor %}",
        ),
        (
            "that joins as Python",
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x.join(['a', n.x, n.x]) %}{% endfor %}",
        ),
        ("that repeats", "{{ 'x' * 100000000000 }}"),
        ("that repeats lists", "{{ [1] * 100000000000 }}"),
        ("that pads", "{{ 'x'.ljust(100000000000) }}{{ 'x'.center(100000000000) }}{{ 'x'.zfill(100000000000) }}"),
        ("that indents", "{{ 'x\\nx' | indent(100000000000) }}"),
        ("that formats", "{{ '%100000000000d' | format(1) }}{{ '%.100000000000f' % 1.5 }}"),
        ("that formats as Python", "{{ '{:>100000000000}'.format(1) }}"),
        ("of a long range", "{{ range(100000000000) | list }}"),
        ("of slices", "{{ range(100000) | batch(1) | list | string | length }}"),
        (
            "that blocks",
            "{% set x %}{% for i in range(100000) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endset %}{% for i in range(100000) %}{{ x }}{% endfor %}",
        ),
        ("that calls itself", "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}"),
        ("that recurses", "{% for i in [[1]] recursive %}{{ loop([i]) }}{% endfor %}"),
        ("that includes itself", "{% include 'chat_template' %}"),
        ("that extends itself", "{% extends 'chat_template' %}"),
        ("that imports a file", "{% include '/etc/passwd' %}{% import '../config.json' as c %}"),
        ("that looks for Python", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        ("that prints escapes", "{{ raise_exception('\\x1b[2J\\u202e') }}"),
        ("that divides", "{{ 1 // 0 }}{{ 1 % 0 }}{{ (-9223372036854775807 - 1) // -1 }}"),
        ("that raises", "{{ 9 ** 999999 }}{{ 2 ** -1 }}"),
        ("of nothing", ""),
    ] {
        all.push(template(&format!("a template {name}"), text));
    }
    all.push(template(
        "a template of many brackets",
        &format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)),
    ));
    all.push(template(
        "a template of many lists",
        &format!("{{{{ {}{} }}}}", "[".repeat(100_000), "]".repeat(100_000)),
    ));
    all.push(template("a template of many nots", &format!("{{{{ {}1 }}}}", "not ".repeat(100_000))));
    all.push(template("a template of many minuses", &format!("{{{{ {}1 }}}}", "-".repeat(100_000))));
    all.push(template("a template of many ifs", &"{% if true %}".repeat(100_000)));
    all.push(template("a template of many filters", &format!("{{{{ 1{} }}}}", " | string".repeat(100_000))));
    all.push(template("a template of many sums", &format!("{{{{ 1{} }}}}", " + 1".repeat(100_000))));
    all.push(template("a template of many attributes", &format!("{{{{ messages{} }}}}", "[0]".repeat(100_000))));
    all.push(written("chat_template.jinja", "not UTF-8", Clean, b"\xff\xfe{{ 1 }}".to_vec()));
    all.push(written("chat_template.jinja", "large", Clean, vec![b'x'; 17 << 20]));
    all.push(written("added_tokens.json", "a page", Clean, "<html></html>"));
    all.push(case("no tokenizer", Refused, |dir| {
        fs_err::remove_file(dir.join(TOKENIZER)).expect("removed");
        // What needs none may be done.
        fs_err::remove_file(dir.join("model.safetensors")).expect("removed");
    }));
    all
}
