//! Method `attention-aware`, beside the others it is measured against.

use gqa2mla::convert::{Budget, ConvertSettings, FreqFold, Method, OutputDtype};

use super::{settings, trained};

#[test]
fn with_every_slot_and_full_rank_attention_aware_is_exact() {
    // g d = 64 rotated values hold every key, 64 latents every value: nothing is left to approximate, and the refits have
    // nothing to correct.
    let steps = gqa2mla::convert::Steps { output_refit: false, ..Default::default() };
    let (_, c) = trained(&ConvertSettings {
        qk_rope_head_dim: Some(64),
        kv_lora_rank: Some(64),
        dtype: Some(OutputDtype::F32),
        force: true,
        steps,
        ..settings(Method::AttentionAware)
    });
    assert!(c.kl_nats_per_token < 1e-5, "{c:?}");
    assert!((c.ppl_converted / c.ppl_source - 1.0).abs() < 1e-4, "{c:?}");
}

#[test]
fn more_rank_loses_less_and_the_aware_method_loses_least() {
    let at = |method: Method, values: usize| {
        let s = ConvertSettings {
            kv_budget: Some(Budget::Values(values)),
            dtype: Some(OutputDtype::F32),
            freqfold: FreqFold::Auto,
            ..settings(method)
        };
        let (report, c) = trained(&s);
        assert_eq!(report.cache_values_per_token_per_layer, values);
        (c.ppl_converted / c.ppl_source).ln()
    };
    let (aware, care, transmla) = (at(Method::AttentionAware, 48), at(Method::Care, 48), at(Method::Transmla, 48));
    assert!(aware < 0.5 * transmla && aware < 0.5 * care, "{aware} {care} {transmla}");
    assert!(at(Method::AttentionAware, 80) < aware);
    assert!(at(Method::Transmla, 80) < transmla);
}

#[test]
fn each_step_can_be_switched_off_and_the_two_largest_are_worth_their_while() {
    let base = ConvertSettings {
        qk_rope_head_dim: Some(16),
        kv_lora_rank: Some(32),
        dtype: Some(OutputDtype::F32),
        ..settings(Method::AttentionAware)
    };
    let kl = |s: &ConvertSettings| trained(s).1.kl_nats_per_token;
    let full = kl(&base);
    for name in gqa2mla::convert::Steps::NAMES {
        let mut s = base.clone();
        assert!(s.steps.disable(name));
        let without = kl(&s);
        assert!(without.is_finite() && without != full, "{name} changes nothing");
        if ["value-refit", "output-refit"].contains(&name) {
            assert!(full < without, "{name}: {full} with, {without} without");
        }
    }
}

#[test]
fn refinement_lowers_the_held_out_error() {
    let base = ConvertSettings {
        qk_rope_head_dim: Some(16),
        kv_lora_rank: Some(24),
        dtype: Some(OutputDtype::F32),
        ..settings(Method::AttentionAware)
    };
    let plain = trained(&base).1;
    let (report, refined) = trained(&ConvertSettings { refine: 40, ..base });
    assert!(report.layers.iter().any(|l| l.notes.iter().any(|n| n.starts_with("refined"))), "{:?}", report.layers);
    assert!(refined.kl_nats_per_token < plain.kl_nats_per_token, "{refined:?} {plain:?}");
}
