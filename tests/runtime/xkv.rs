//! Decoding after a prompt whose cache is kept as factors: what must be equal, equals; what is dropped, is gone.

// Figures for the record, shown with --nocapture.
#![allow(clippy::print_stdout)]

use std::process::Output;

use gqa2mla::arch::Architecture;
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model, Resident, RuntimeError, Session, XkvError, XkvSession, XkvSettings};
use gqa2mla::verify::{VerifyError, xkv_perplexity};
use serde_json::Value;

use crate::common::command::gqa2mla;
use crate::common::models::{fixture, open};
use crate::common::xkv::{tokens, widths};

const TRAINED: &str = "pico-trained";
/// The trained fixture, as commands take it.
const FOLDER: &str = "fixtures/pico-trained";
/// Every kind of attention: grouped, multi-query with biases, head norms, norms over all heads, capped scores with windows,
/// part of a head rotated, latents, latents with biases and long factors, latents without a group to share.
const MODELS: [&str; 17] = [
    "pico-trained",
    "pico-llama3",
    "pico-qwen2",
    "pico-qwen3",
    "pico-olmo2",
    "pico-gemma2",
    "pico-phi3",
    "pico-phi3-long",
    "pico-deepseek-v3",
    "pico-deepseek-v3-bias",
    "pico-deepseek-v2",
    "pico-minicpm3",
    "pico-youtu",
    "pico-plm",
    "pico-deepseek-v2-groups",
    "pico-deepseek-v3-moe",
    "pico-deepseek-v3-fp8",
];

/// The largest ranks that a prompt allows.
fn full(arch: &Architecture, prompt: usize, group: usize) -> XkvSettings {
    let (k, v) = widths(arch);
    XkvSettings { rank_k: prompt.min(group * k), rank_v: prompt.min(group * v).max(1), group }
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

/// At full rank nothing is lost but rounding: factors are f32, so rows come back to `2^-24 sqrt(r)` relative, a few times
/// what any product in f32 costs. Two runs of one model that differ only in the order of their sums agree to about as much;
/// through a few layers and a head with logits of order one to ten that is below 1e-3 by a wide margin, while a wrong
/// position, norm or head moves logits by more than 1e-2.
#[test]
fn at_full_rank_decoding_equals_the_exact_cache() {
    for name in MODELS {
        let (source, arch) = open(&fixture(name));
        let resident = Resident::load(Model::new(&source, &arch, &Cpu)).expect("loads");
        let text = tokens(40, arch.vocab);
        for group in 1..=arch.layers.min(3) {
            for prompt in [12, 29] {
                let settings = full(&arch, prompt, group);
                let mut exact = Session::new(&resident, text.len()).expect("fits");
                let mut xkv = XkvSession::new(&resident, settings, text.len(), false).expect("fits");
                let first = largest(
                    &exact.prefill(&text[..prompt]).expect("runs"),
                    &xkv.prefill(&text[..prompt]).expect("runs"),
                );
                assert_eq!(first, 0.0, "{name}: the prefill is exact");
                let mut worst = 0f32;
                for &token in &text[prompt..prompt + 5] {
                    worst = worst.max(largest(&exact.step(token).expect("runs"), &xkv.step(token).expect("runs")));
                }
                // Several rows at once, as a second prompt.
                let rest = &text[prompt + 5..];
                worst = worst.max(largest(&exact.prefill(rest).expect("runs"), &xkv.prefill(rest).expect("runs")));
                println!("{name}, groups of {group}, prompt of {prompt}: {worst}");
                assert!(worst < 1e-4, "{name}, groups of {group}, prompt of {prompt}: {worst}");
            }
        }
    }
}

/// The layer-by-layer evaluation and a session that decodes token by token are the same function.
#[test]
fn the_evaluation_is_what_a_session_would_do() {
    for (name, settings) in [
        ("pico-trained", XkvSettings { rank_k: 10, rank_v: 14, group: 3 }),
        ("pico-deepseek-v3", XkvSettings { rank_k: 6, rank_v: 0, group: 2 }),
    ] {
        let (source, arch) = open(&fixture(name));
        let model = Model::new(&source, &arch, &Cpu);
        let (prompt, length) = (24, 40);
        let all = tokens(2 * length, arch.vocab);
        let windows: Vec<Vec<u32>> = all.chunks(length).map(<[u32]>::to_vec).collect();
        let found = xkv_perplexity(&model, &windows, prompt, &settings, &Silent).expect("runs");
        let resident = Resident::load(model).expect("loads");
        let (mut exact, mut compressed) = (0.0, 0.0);
        let nll = |row: &[f32], token: u32| {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            sum.ln() - f64::from(row[token as usize])
        };
        for window in &windows {
            let mut session = Session::new(&resident, length).expect("fits");
            let mut xkv = XkvSession::new(&resident, settings, length, false).expect("fits");
            session.prefill(&window[..prompt]).expect("runs");
            xkv.prefill(&window[..prompt]).expect("runs");
            for pair in window[prompt..].windows(2) {
                exact += nll(&session.step(pair[0]).expect("runs"), pair[1]);
                compressed += nll(&xkv.step(pair[0]).expect("runs"), pair[1]);
            }
        }
        let predicted = (2 * (length - prompt - 1)) as f64;
        assert_eq!((found.exact.tokens, found.compressed.tokens, found.prompt_tokens), (30, 30, prompt));
        // Logits of order ten in f32, summed another way.
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-4, "{name}: {a} {b}");
        close(found.exact.nll_nats_per_token, exact / predicted);
        close(found.compressed.nll_nats_per_token, compressed / predicted);
        assert!((exact - compressed).abs() > 1e-3, "{name}: low ranks show");
    }
}

/// With the ranks that the prompt allows the perplexity is the exact one; lower ranks cost, and bytes shrink.
#[test]
fn rank_buys_perplexity() {
    let (source, arch) = open(&fixture(TRAINED));
    let model = Model::new(&source, &arch, &Cpu);
    let text = gqa2mla::calibrate::bundled_heldout();
    let ids = source.tokenizer().expect("has one").encode(text).expect("encodes");
    let windows: Vec<Vec<u32>> = ids.chunks_exact(192).take(4).map(<[u32]>::to_vec).collect();
    let run = |settings: &XkvSettings| xkv_perplexity(&model, &windows, 128, settings, &Silent).expect("runs");
    let whole = run(&full(&arch, 128, 2));
    let excess = |e: &gqa2mla::verify::XkvEvaluation| e.compressed.nll_nats_per_token - e.exact.nll_nats_per_token;
    assert!(excess(&whole).abs() < 1e-5, "{}", excess(&whole));
    let costs: Vec<f64> = [40, 12, 2].map(|r| excess(&run(&XkvSettings { rank_k: r, rank_v: r, group: 2 }))).into();
    println!("excess at ranks 40, 12, 2: {costs:?}");
    assert!(costs[0] < costs[1] && costs[1] < costs[2] && costs[2] > 0.01, "{costs:?}");
}

#[test]
fn what_is_not_possible_is_refused() {
    let (source, arch) = open(&fixture(TRAINED));
    let resident = Resident::load(Model::new(&source, &arch, &Cpu)).expect("loads");
    let text = tokens(30, arch.vocab);
    let refused = |rank_k, rank_v, group| {
        let settings = XkvSettings { rank_k, rank_v, group };
        let session = XkvSession::new(&resident, settings, 64, false);
        session.and_then(|mut s| s.prefill(&text)).expect_err("refused")
    };
    for group in [0, 5, usize::MAX] {
        let error = refused(4, 4, group);
        assert!(matches!(error, RuntimeError::Xkv(XkvError::Group { layers: 4, .. })), "{error}");
    }
    for (k, v, what) in [(31, 4, "rank_k"), (4, 31, "rank_v"), (0, 4, "rank_k"), (4, 0, "rank_v")] {
        let error = refused(k, v, 2);
        assert!(matches!(error, RuntimeError::Xkv(XkvError::Rank { what: w, .. }) if w == what), "{error}");
        assert!(error.to_string().contains("hint: "), "{error}");
    }
    let settings = XkvSettings { rank_k: 4, rank_v: 4, group: 2 };
    let long = XkvSession::new(&resident, settings, 100_000, false);
    assert!(matches!(long, Err(RuntimeError::ContextTooLong { .. })));
    let mut session = XkvSession::new(&resident, settings, 31, false).expect("fits");
    assert!(matches!(session.prefill(&[]), Err(RuntimeError::NoTokens)));
    session.prefill(&text).expect("runs");
    session.step(1).expect("there is room for one");
    assert!(matches!(session.step(1), Err(RuntimeError::ContextTooLong { length: 32, max: 31 })));
    let model = Model::new(&source, &arch, &Cpu);
    for prompt in [0, 29, 30, 1000] {
        let found = xkv_perplexity(&model, std::slice::from_ref(&text), prompt, &settings, &Silent);
        assert!(matches!(found, Err(VerifyError::Prompt { window: 30, .. })), "{prompt}");
    }
    assert!(matches!(xkv_perplexity(&model, &[], 3, &settings, &Silent), Err(VerifyError::TooShort { .. })));
}

fn command(args: &[&str]) -> Output {
    gqa2mla(args).output().expect("the binary starts")
}

#[test]
fn eval_and_generate_take_the_option() {
    let eval = ["eval", FOLDER, "--json", "--seq-len", "128", "--windows", "2", "--xkv", "20,30,2"];
    let out = command(&eval);
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    let document: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!((&document["schema_version"], &document["prompt_tokens"]), (&1.into(), &64.into()));
    // Two groups of two layers of 64: (20 + 30) (64 + 128) values each.
    assert_eq!(document["prompt_cache_bytes"]["compressed"], 4 * 2 * 50 * 192);
    assert_eq!(document["prompt_cache_bytes"]["exact"], 4 * 4 * 64 * 128);
    assert_eq!((&document["tokens"], &document["exact"]["tokens"]), (&126.into(), &126.into()));
    let (x, e) = (document["perplexity"].as_f64(), document["exact"]["perplexity"].as_f64());
    assert!(x > e && e.is_some_and(|p| p > 1.0), "{document}");

    let prompt = "The cache of a long prompt is what decoding reads again and again, so it is worth to make it small.";
    let generate = ["generate", FOLDER, "--raw", "--prompt", prompt, "--max-tokens", "6", "--ignore-end", "--json"];
    let exact: Value = serde_json::from_slice(&command(&generate).stdout).expect("JSON");
    assert!(exact.get("xkv").is_none());
    let whole = command(&[&generate[..], &["--xkv", "64,64,1"]].concat());
    let whole: Value = serde_json::from_slice(&whole.stdout).expect("JSON");
    assert_eq!(whole["tokens"], exact["tokens"], "full rank decodes the same text");
    let small = command(&[&generate[..], &["--xkv", "8,12,4", "-q"]].concat());
    let small: Value = serde_json::from_slice(&small.stdout).expect("JSON");
    let bytes = |d: &Value, key: &str| d["xkv"]["prompt_cache_bytes"][key].as_u64().expect("a number");
    assert!(bytes(&small, "compressed") * 4 < bytes(&small, "exact"), "{small}");
    assert!(small["cache_bytes"].as_u64() < exact["cache_bytes"].as_u64());
    assert_eq!(small["xkv"]["group"], 4);
}

#[test]
fn bad_options_are_sentences() {
    let eval = ["eval", FOLDER, "--seq-len", "128", "--windows", "1"];
    for (more, says) in [
        (&["--xkv", "65,9,1"][..], "rank_k 65: a prompt of 64 tokens and 1 layers of width 64 allow 1 to 64"),
        (&["--xkv", "9,9,0"], "groups of 0 layers: the model has 4"),
        (&["--xkv", "9,9,5"], "groups of 5 layers: the model has 4"),
        (&["--xkv", "9,9"], "expected three integers"),
        (&["--xkv", "9,9,2", "--xkv-prompt", "127"], "a prompt of 127 tokens in windows of 128"),
        (&["--xkv", "9,9,2", "--xkv-prompt", "8"], "the prompt is too short for this rank"),
        (&["--xkv", "9,9,2", "--device", "gpu"], "use `--device cpu`"),
        (&["--xkv-prompt", "8"], "--xkv"),
    ] {
        let out = command(&[&eval[..], more].concat());
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{more:?}: {text}");
        let plain: String = text.replace("hint: ", "");
        assert!(out.stdout.is_empty() && plain.contains(says), "{more:?}: {text}");
    }
    let short = ["generate", FOLDER, "--raw", "--prompt", "Hi", "--xkv", "9,9,2"];
    let out = command(&short);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{text}");
    assert!(text.contains("too short for this rank"), "{text}");
}
