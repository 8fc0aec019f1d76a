//! Method `attention-aware`, beside the others it is measured against.

use gqa2mla::convert::{Budget, ConvertSettings, MethodChoice, OutputDtype};
use gqa2mla::methods::attention_aware::{AttentionAware, Step, Steps};
use gqa2mla::target::classes::remote;

use super::{settings, trained};
use crate::common::models::method;

#[test]
fn with_every_slot_and_full_rank_attention_aware_is_exact() {
    // g d = 64 rotated values hold every key, 64 latents every value: nothing is left to approximate, and the refits have
    // nothing to correct. The class has no norm of latents, which
    // would take one for a constant.
    let steps = Steps::default().without(Step::OutputRefit);
    let (_, c) = trained(&ConvertSettings {
        qk_rope_head_dim: Some(64),
        kv_lora_rank: Some(64),
        target: remote::TARGET.into(),
        dtype: Some(OutputDtype::F32),
        force: true,
        ..settings(AttentionAware { steps, ..AttentionAware::default() })
    });
    assert!(c.kl_nats_per_token < 1e-5, "{c:?}");
    assert!((c.ppl_converted / c.ppl_source - 1.0).abs() < 1e-4, "{c:?}");
}

#[test]
fn more_rank_loses_less_and_the_aware_method_loses_least() {
    let at = |method: MethodChoice, values: usize| {
        let s = ConvertSettings {
            kv_budget: Some(Budget::Values(values)),
            dtype: Some(OutputDtype::F32),
            ..settings(method)
        };
        let (report, c) = trained(&s);
        assert_eq!(report.cache_values_per_token_per_layer, values);
        (c.ppl_converted / c.ppl_source).ln()
    };
    let (aware, care, transmla) =
        (at(method("attention-aware"), 48), at(method("care"), 48), at(method("transmla"), 48));
    assert!(aware < 0.5 * transmla && aware < 0.5 * care, "{aware} {care} {transmla}");
    assert!(at(method("attention-aware"), 80) < aware);
    assert!(at(method("transmla"), 80) < transmla);
}

#[test]
fn each_step_can_be_switched_off_and_the_two_largest_are_worth_their_while() {
    let base = ConvertSettings {
        qk_rope_head_dim: Some(16),
        kv_lora_rank: Some(32),
        dtype: Some(OutputDtype::F32),
        ..settings(method("attention-aware"))
    };
    let kl = |s: &ConvertSettings| trained(s).1.kl_nats_per_token;
    let full = kl(&base);
    for (name, method) in base.method.ablations() {
        let without = kl(&ConvertSettings { method, ..base.clone() });
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
        ..settings(method("attention-aware"))
    };
    let plain = trained(&base).1;
    let (report, refined) =
        trained(&ConvertSettings { method: AttentionAware { refine: 40, ..AttentionAware::default() }.into(), ..base });
    assert!(report.layers.iter().any(|l| l.notes.iter().any(|n| n.starts_with("refined"))), "{:?}", report.layers);
    assert!(refined.kl_nats_per_token < plain.kl_nats_per_token, "{refined:?} {plain:?}");
}
