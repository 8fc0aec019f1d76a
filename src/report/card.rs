//! The model card of a converted checkpoint.

use minijinja::{Environment, UndefinedBehavior, Value, context, syntax::SyntaxConfig};

use super::table::Table;
use super::{Verification, units};
use crate::convert::ConversionReport;

const TEMPLATE: &str = include_str!("card.md.j2");

/// `README.md` of an output folder: front matter for the hub, the exact `command`, the geometry, the verdict where the
/// output was verified, and how to load it.
///
/// # Panics
/// If the embedded template is broken, which the tests of this module rule out.
pub fn card(report: &ConversionReport, command: &str, verdict: Option<&Verification>) -> String {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    let source_total = report.source_cache_values_per_token_per_layer * report.layers.len().max(1);
    let ratio = report.cache_values_per_token as f64 / source_total as f64;
    let method = &report.settings.method;
    let values = context! {
        // Only a hub id names a base model; a folder's path is nobody's business.
        base_model => hub_id(&report.source).map(yaml),
        title => inline(short_name(&report.source)),
        source => inline(hub_id(&report.source).unwrap_or_else(|| short_name(&report.source))),
        revision => report.source_revision.as_deref().map(inline),
        method => inline(&report.method),
        exact => !method.compresses(),
        from_weights => method.factorises_weights_alone(),
        remote => report.target.brings_code(),
        scaled_down => report.latent_norm.is_some_and(|norm| !norm.needs_bias()),
        code => report.target.files().iter().map(|(name, _)| inline(name)).collect::<Vec<_>>().join(", "),
        command => fenced(command),
        tool_version => inline(&report.tool_version),
        geometry => geometry(report).markdown(),
        cache => report.cache_values_per_token_per_layer,
        kept => report.layers.len() - report.mla_layers.len(),
        converted => report.mla_layers.len(),
        source_cache => report.source_cache_values_per_token_per_layer,
        percent => units::percent(ratio),
        calibration_error => units::percent(report.calibration_error),
        calibration_tokens => report.calibration_tokens,
        decisions => report.decisions.iter().map(|d| inline(d)).collect::<Vec<_>>(),
        verdict => verdict.map_or(Value::from(()), |v| Value::from(measured(v).markdown())),
        passed => verdict.is_some_and(|v| v.passed),
        tokens => verdict.map_or(0, |v| v.figures.tokens),
        text => verdict.map_or_else(String::new, |v| inline(&v.text)),
    };
    let text = env.render_str(TEMPLATE, values).expect("the embedded template renders every report");
    tidy(&text)
}

/// At most one empty line in a row, and a newline at the end: what branches of the template leave is not seen.
fn tidy(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 1);
    let mut empty = 0;
    for line in text.trim_end().lines() {
        empty = if line.is_empty() { empty + 1 } else { 0 };
        if empty < 2 {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

fn geometry(r: &ConversionReport) -> Table {
    let g = &r.geometry;
    let mut t = Table::new(&["width", ">value"]);
    // Who looks at a cache meets a value that never changes.
    let constant = r.latent_norm.is_some_and(|norm| norm.needs_bias());
    let rank = if constant { "`kv_lora_rank`, one of them constant" } else { "`kv_lora_rank`" };
    t.row([rank, &g.kv_lora_rank.to_string()]);
    t.row(["`q_lora_rank`", &g.q_lora_rank.map_or_else(|| "none".to_owned(), |q| q.to_string())]);
    t.row(["`qk_nope_head_dim`", &g.qk_nope_head_dim.to_string()]);
    t.row(["`qk_rope_head_dim`", &g.qk_rope_head_dim.to_string()]);
    t.row(["`v_head_dim`", &g.v_head_dim.to_string()]);
    t.row(["layers", &r.layers.len().to_string()]);
    t
}

fn measured(v: &Verification) -> Table {
    let mut t = Table::new(&["figure", ">value"]);
    t.row(["perplexity of the source", &units::figure(v.figures.ppl_source)]);
    t.row(["perplexity of this model", &units::figure(v.figures.ppl_converted)]);
    t.row(["KL(source ‖ this model), nats per token", &units::figure(v.figures.kl_nats_per_token)]);
    t.row(["same likeliest token", &units::percent(v.figures.top1_agreement)]);
    t.row(["largest logit difference", &units::figure(v.figures.max_abs_dlogit)]);
    t
}

/// `org/name` without its revision; `None` for anything that looks like a path.
fn hub_id(source: &str) -> Option<&str> {
    let id = source.split('@').next().unwrap_or(source);
    let ok = |s: &str| {
        !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let (org, name) = id.split_once('/')?;
    (ok(org) && ok(name) && !std::path::Path::new(source).exists()).then_some(id)
}

/// Last component of a path or hub id.
pub(super) fn short_name(source: &str) -> &str {
    source.trim_end_matches('/').rsplit('/').next().filter(|s| !s.is_empty()).unwrap_or("model")
}

/// A double-quoted YAML scalar: JSON strings are YAML.
fn yaml(s: &str) -> String {
    serde_json::Value::from(s).to_string()
}

/// One line of Markdown that opens no markup of its own.
pub(super) fn inline(s: &str) -> String {
    s.chars()
        .map(|c| match c {
            '`' => '\'',
            '<' | '>' => '\'',
            c if c.is_control() => ' ',
            c => c,
        })
        .collect()
}

/// Text that cannot close the code fence around it.
pub(super) fn fenced(s: &str) -> String {
    s.lines().map(|l| if l.trim_start().starts_with("```") { "" } else { l }).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::methods::{ConvertSettings, MethodChoice};
    use crate::mla::Geometry;

    fn report(method: &MethodChoice, source: &str) -> ConversionReport {
        ConversionReport {
            schema_version: 1,
            tool_version: "0.0.0".into(),
            output: "out".into(),
            source: source.into(),
            source_revision: None,
            source_fingerprint: BTreeMap::new(),
            method: method.name().into(),
            settings: ConvertSettings { method: method.clone(), ..ConvertSettings::default() },
            target: crate::target::classes::deepseek_v3::TARGET,
            decisions: vec!["split 128 + 64 `searched`".into()],
            geometry: Geometry {
                kv_lora_rank: 128,
                q_lora_rank: None,
                qk_nope_head_dim: 64,
                qk_rope_head_dim: 64,
                v_head_dim: 64,
            },
            latent_norm: None,
            cache_values_per_token_per_layer: 192,
            source_cache_values_per_token_per_layer: 384,
            cache_values_per_token: 192,
            mla_layers: Vec::new(),
            rope_frequencies: vec![1.0],
            layers: Vec::new(),
            calibration_error: 0.05,
            predicted_error: 0.05,
            calibration_tokens: 32768,
            peak_rss_bytes: 1,
            seconds: BTreeMap::new(),
        }
    }

    #[test]
    fn every_branch_of_the_template_renders() {
        let verdict = crate::report::verification::tests::verification(Default::default());
        for method in &MethodChoice::all() {
            for source in ["org/some-model@main", "/data/some-model/"] {
                for v in [None, Some(&verdict)] {
                    let mut r = report(method, source);
                    r.source_revision = v.map(|_| "0123abc".to_owned());
                    let text = card(&r, "gqa2mla convert x -o y", v);
                    assert!(text.starts_with("---\nlibrary_name: transformers\n"), "{text}");
                    assert_eq!(text.contains("base_model: \"org/some-model\""), source.starts_with("org"), "{text}");
                    assert!(!text.contains("/data"), "a local path is not published: {text}");
                    assert_eq!(text.contains("perplexity of this model"), v.is_some());
                    assert!(text.contains("192 values") && text.contains("gqa2mla convert x -o y"));
                    assert!(text.ends_with('\n') && !text.contains("\n\n\n"), "{text}");
                }
            }
        }
    }

    #[test]
    fn names_cannot_break_out_of_the_card() {
        let hostile = report(&MethodChoice::default(), "a\n---\nlicense: mit\n`<script>`");
        let text = card(&hostile, "gqa2mla convert x\n```\n# free", None);
        assert!(!text.contains("\nlicense: mit"), "{text}");
        assert!(!text.contains("<script>"));
        assert_eq!(text.matches("\n```").count() % 2, 0);
    }
}
