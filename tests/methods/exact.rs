//! Method `exact`: the source's attention in an MLA container.

use gqa2mla::convert::{ConvertSettings, OutputDtype, RopeGrid, plan};
use gqa2mla::observe::Silent;

use super::settings;
use crate::common::copies::changed;
use crate::common::golden::golden_tokens;
use crate::common::judge::{ROUNDING, converted, side_by_side};
use crate::common::models::{fixture, method, open};

#[test]
fn exact_loses_nothing_on_any_family() {
    for name in ["pico-llama", "pico-llama3", "pico-mistral", "pico-qwen2", "pico-mha", "pico-trained"] {
        for dtype in [None, Some(OutputDtype::F32)] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let to = dir.path().join("out");
            let report = converted(&fixture(name), &to, &ConvertSettings { dtype, ..settings(method("exact")) });
            let report = report.unwrap_or_else(|e| panic!("{name}: {e}"));
            // Two more: the constant by which the latent norm is neutralised, and a zero that makes the width even.
            assert_eq!(report.cache_values_per_token_per_layer, report.source_cache_values_per_token_per_layer + 2);
            let tokens = golden_tokens(&fixture(name));
            for window in &tokens {
                let c = side_by_side(&fixture(name), &to, std::slice::from_ref(window));
                assert!(c.max_abs_dlogit < ROUNDING, "{name} {dtype:?}: {c:?}");
                assert_eq!(c.top1_agreement, 1.0, "{name} {dtype:?}");
                assert!(c.cached_vs_full_max_abs_dlogit < ROUNDING, "{name} {dtype:?}: {c:?}");
            }
        }
    }
}

#[test]
fn a_plan_says_that_frequencies_are_on_no_stock_grid() {
    // With several KV heads each frequency is there several times, which only LongRoPE factors express.
    for name in ["pico-llama", "pico-mha", "pico-trained"] {
        let (source, arch) = open(&fixture(name));
        let made = plan(&source, &arch, &settings(method("exact")), false, &Silent).expect("a plan");
        assert_eq!(made.rope_grid, RopeGrid::Free, "{name}");
    }
}

#[test]
fn exact_stays_exact_where_the_source_scales_its_scores() {
    // YaRN's attention factor is no power of two: folded queries must not be rounded to bf16.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let yarn = serde_json::json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128 });
    let from = changed("pico-trained", dir.path(), |c| drop(c.insert("rope_scaling".into(), yarn.clone())), &[]);
    let to = dir.path().join("out");
    converted(&from, &to, &settings(method("exact"))).expect("converts");
    let c = side_by_side(&from, &to, &golden_tokens(&fixture("pico-trained")));
    assert!(c.max_abs_dlogit < ROUNDING && c.top1_agreement == 1.0, "{c:?}");
}
