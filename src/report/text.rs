//! Documents as text for a terminal of a given width.

use std::fmt::Write as _;

use super::engines::{EngineVerdict, Loads};
use super::table::Table;
use super::{Evaluation, InspectedModel, Verification, kv_table, units};
use crate::convert::{ConversionReport, Plan};
use crate::mla::Geometry;

/// Models side by side, then the budgets of each.
pub fn inspect(models: &[InspectedModel], width: usize) -> String {
    let mut headings = vec![""];
    headings.extend(models.iter().map(|m| m.model.as_str()));
    let mut t = Table::new(&headings);
    let mut line = |name: &str, f: &dyn Fn(&InspectedModel) -> String| {
        let cells: Vec<String> = models.iter().map(f).collect();
        if cells.iter().any(|c| !c.is_empty()) {
            t.row(std::iter::once(name.to_owned()).chain(cells));
        }
    };
    line("family", &|m| format!("{} (model_type {})", m.family, m.model_type));
    line("attention", &attention);
    line("hidden size", &|m| m.hidden.to_string());
    line("layers", &|m| m.layers.to_string());
    line("MLP width", &|m| match m.gated_mlp {
        true => m.intermediate.to_string(),
        false => format!("{}, {} without a gate", m.intermediate, m.activation),
    });
    line("experts", &experts);
    line("MTP layers", &|m| match m.mtp_layers {
        0 => String::new(),
        1 => format!("layer {}, not run and not counted here", m.layers),
        n => format!("layers {} to {}, not run and not counted here", m.layers, m.layers + n - 1),
    });
    line("vocabulary", &|m| format!("{}{}", m.vocab, if m.tied_head { ", tied head" } else { "" }));
    line("RoPE", &|m| format!("{}, theta {}", m.rope_type, m.rope_theta));
    line("context", &|m| format!("{} tokens", m.max_position));
    line("sliding window", &|m| m.sliding_window.map_or_else(String::new, |w| format!("{w} tokens")));
    line("attention biases", &biases);
    line("parameters", &|m| match m.active_parameters == m.parameters {
        true => units::count(m.parameters),
        false => format!("{}, {} of them for a token", units::count(m.parameters), units::count(m.active_parameters)),
    });
    line("weights", &|m| {
        let note = if m.weights_present { "" } else { " (from the config: no weights here)" };
        format!("{} in {}{note}", units::bytes(m.weight_bytes), m.weight_dtype)
    });
    line("cache per token and layer", &|m| {
        let one = |values: usize, bytes: u64| format!("{values} values, {} in bf16", units::bytes(bytes));
        let own = one(m.kv_values_per_token_per_layer, m.kv_bytes_per_token_per_layer);
        match &m.gqa_layers {
            None => own,
            Some(g) => {
                let other = one(g.kv_values_per_token_per_layer, g.kv_bytes_per_token_per_layer);
                format!("{own}; {other} in {} GQA layers", g.layers.len())
            }
        }
    });
    line("cache per token", &|m| format!("{} in bf16", units::bytes(m.kv_bytes_per_token)));
    line("cache at full context", &|m| format!("{} in bf16", units::bytes(m.kv_bytes_at_max_position)));
    let mut out = t.render_wrapping(width, 1);
    if models.len() > 1 {
        out.push('\n');
        out += &kv_table::text(models, width);
    }
    for m in models {
        out.push('\n');
        if models.len() > 1 {
            let _ = writeln!(out, "{}", m.model);
        }
        out += &targets(m, width);
    }
    out
}

fn attention(m: &InspectedModel) -> String {
    match (&m.mla, m.kv_heads, m.head_dim) {
        (Some(mla), ..) if m.gqa_layers.is_some() => {
            let kept = m.gqa_layers.as_ref().map_or(0, |g| g.layers.len());
            let share = format!("{} layers MLA, {kept} GQA", m.layers - kept);
            format!("{share}, {} heads: {}", m.heads, widths(&mla.geometry))
        }
        (Some(mla), ..) => format!("MLA, {} heads: {}", m.heads, widths(&mla.geometry)),
        (None, Some(kv), Some(d)) => {
            format!("{}, {} query heads, {kv} key/value heads of {d}", m.attention.to_uppercase(), m.heads)
        }
        _ => m.attention.to_uppercase(),
    }
}

fn experts(m: &InspectedModel) -> String {
    let Some(e) = &m.experts else { return String::new() };
    let shared = if e.shared_width == 0 { String::new() } else { format!(", beside one of {}", e.shared_width) };
    let groups = match (e.groups, e.groups_per_token) {
        (Some(groups), Some(kept)) => format!(" in {kept} of {groups} groups"),
        _ => String::new(),
    };
    let bias = if e.choice_bias { " and a bias" } else { "" };
    format!(
        "{} of {} of width {}{groups}{shared}, in {} layers, by {}{bias}",
        e.per_token, e.routed, e.width, e.layers, e.scoring
    )
}

fn biases(m: &InspectedModel) -> String {
    match (m.qkv_bias, m.out_bias) {
        (true, true) => "q, k, v, o",
        (true, false) => "q, k, v",
        (false, true) => "o",
        (false, false) => "none",
    }
    .to_owned()
}

fn targets(m: &InspectedModel, width: usize) -> String {
    let Some(first) = m.targets.first() else { return String::new() };
    let names: Vec<&str> = first.engines.iter().map(|e| e.engine).collect();
    // Long engine names do not fit a heading: the part in brackets goes into the notes.
    let short = |name: &str| match name.split_once(" (") {
        Some((engine, _)) => format!("{engine} (tf)"),
        None => name.to_owned(),
    };
    let mut headings: Vec<String> =
        ["budget", "grid", ">latent + rope", ">cache", ">of source", ">per token"].map(String::from).into();
    headings.extend(names.iter().map(|n| short(n)));
    let mut t = Table::new(&headings.iter().map(String::as_str).collect::<Vec<_>>());
    let mut reasons: Vec<&str> = Vec::new();
    for o in &m.targets {
        let mut row = vec![
            o.budget.clone(),
            o.rope_grid.to_owned(),
            format!("{} + {}", o.geometry.kv_lora_rank, o.geometry.qk_rope_head_dim),
            o.cache_values_per_token_per_layer.to_string(),
            format!("{:.1}%", o.cache_percent),
            units::bytes(o.cache_bytes_per_token),
        ];
        row.extend(o.engines.iter().map(|e| mark(e, &mut reasons)));
        t.row(row);
    }
    let mut out = t.render(width);
    let mut notes = Table::pairs();
    for (i, reason) in reasons.iter().enumerate() {
        notes.row([format!("[{}]", i + 1), (*reason).to_owned()]);
    }
    if names.iter().any(|n| short(n) != *n) {
        notes.row(["(tf)", "with --model-impl transformers: the engine runs transformers' code on its own attention"]);
    }
    if m.mla.is_none() {
        notes.row(["grid", "free: any RoPE frequencies and biases, loses least; stock: the config's own frequencies"]);
    }
    if !notes.is_empty() {
        out.push('\n');
        out += &notes.render(width);
    }
    out
}

/// `yes`, `if [1]`, `no [2]`: the word and the numbers of its reasons.
fn mark(e: &EngineVerdict, reasons: &mut Vec<&'static str>) -> String {
    if e.loads == Loads::Yes {
        return e.loads.word().to_owned();
    }
    let numbers: Vec<String> = e
        .reasons
        .iter()
        .map(|r| {
            let at = reasons.iter().position(|known| known == r).unwrap_or_else(|| {
                reasons.push(r);
                reasons.len() - 1
            });
            (at + 1).to_string()
        })
        .collect();
    format!("{} [{}]", e.loads.word(), numbers.join(","))
}

fn widths(g: &Geometry) -> String {
    let q = g.q_lora_rank.map_or_else(String::new, |q| format!(", query latent {q}"));
    format!(
        "latent {} + rope {}, per head nope {} and value {}{q}",
        g.kv_lora_rank, g.qk_rope_head_dim, g.qk_nope_head_dim, g.v_head_dim
    )
}

/// `converted` of `layers` have `new` values per token, the others `old`.
fn cache(new: usize, old: usize, converted: usize, layers: usize) -> String {
    let kept = layers - converted;
    if kept > 0 {
        let share = (converted * new + kept * old) as f64 / (layers * old) as f64;
        return format!(
            "{new} values per token in {converted} MLA layers, {old} in {kept} others: {} of the source's",
            units::percent(share)
        );
    }
    format!("{new} values per token and layer, {} of the source's {old}", units::percent(new as f64 / old as f64))
}

/// What `convert` would do.
pub fn plan(p: &Plan, width: usize) -> String {
    let mut t = Table::pairs();
    t.row(["source", &format!("{} ({}, {} layers)", p.source, p.family, p.layers)]);
    t.row(["method", p.settings.method.name()]);
    t.row(["target", p.settings.target.name()]);
    t.row(["geometry", &widths(&p.geometry)]);
    let (new, old) = (p.cache_values_per_token_per_layer, p.source_cache_values_per_token_per_layer);
    t.row(["cache", &cache(new, old, p.mla_layers.len(), p.layers)]);
    if let Some(e) = p.predicted_error {
        t.row(["predicted error", &format!("{} of a layer's attention output", units::percent(e))]);
    }
    if p.calibration_tokens > 0 {
        t.row(["calibration", &format!("{} tokens", p.calibration_tokens)]);
    }
    t.row(["output", &format!("{} tensors, {}", p.tensors.len(), units::bytes(p.output_bytes))]);
    for (i, (name, size)) in p.shards.iter().enumerate() {
        t.row([if i == 0 { "shards" } else { "" }, &format!("{name}  {}", units::bytes(*size))]);
    }
    t.row(["peak memory", &units::bytes(p.peak_memory_bytes)]);
    t.row(["time", &format!("about {}", units::seconds(p.estimated_seconds))]);
    for (i, (engine, verdict)) in p.engines.iter().enumerate() {
        t.row([if i == 0 { "loads in" } else { "" }, &format!("{engine} - {verdict}")]);
    }
    decisions(&mut t, &p.decisions);
    t.row(["nothing written", "this is a plan"]);
    t.render(width)
}

fn decisions(t: &mut Table, sentences: &[String]) {
    for (i, d) in sentences.iter().enumerate() {
        t.row([if i == 0 { "decided" } else { "" }, d]);
    }
}

/// What `convert` did.
pub fn conversion(r: &ConversionReport, width: usize) -> String {
    let mut t = Table::pairs();
    t.row(["output", &r.output.display().to_string()]);
    t.row(["method", &r.method]);
    t.row(["geometry", &widths(&r.geometry)]);
    let (new, old) = (r.cache_values_per_token_per_layer, r.source_cache_values_per_token_per_layer);
    t.row(["cache", &cache(new, old, r.mla_layers.len(), r.layers.len())]);
    if let Some(worst) = r.layers.iter().max_by(|a, b| a.calibration_error.total_cmp(&b.calibration_error)) {
        let mean = units::percent(r.calibration_error);
        let most = units::percent(worst.calibration_error);
        t.row([
            "calibration error",
            &format!("{mean} of a layer's attention output, at most {most} (layer {})", worst.layer),
        ]);
        let errors: Vec<f64> = r.layers.iter().map(|l| l.calibration_error).collect();
        t.row(["by layer", &bars(&errors)]);
    }
    if r.calibration_tokens > 0 {
        t.row(["calibration", &format!("{} tokens", r.calibration_tokens)]);
    }
    let total = r.seconds.get("total").copied().unwrap_or_default();
    let phases = r.seconds.iter().filter(|(name, _)| *name != "total");
    let phases: Vec<String> = phases.map(|(name, s)| format!("{name} {}", units::seconds(*s))).collect();
    t.row(["time", &format!("{} ({})", units::seconds(total), phases.join(", "))]);
    t.row(["peak memory", &units::bytes(r.peak_rss_bytes)]);
    decisions(&mut t, &r.decisions);
    for layer in &r.layers {
        for note in &layer.notes {
            t.row(["note", &format!("layer {}: {note}", layer.layer)]);
        }
    }
    t.render(width)
}

/// One bar per value, the highest value full height; nothing for values that are not finite.
fn bars(values: &[f64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let top = values.iter().copied().filter(|v| v.is_finite()).fold(0.0, f64::max);
    let bar = |v: &f64| match v {
        v if !v.is_finite() => ' ',
        _ if top <= 0.0 => BARS[0],
        v => BARS[((v / top * 8.0).ceil() as usize).clamp(1, 8) - 1],
    };
    values.iter().map(bar).collect()
}

/// How close two models are.
pub fn verification(v: &Verification, width: usize) -> String {
    let mut t = Table::new(&["figure", ">value", ">limit"]);
    let limit = |l: Option<f64>, sign: &str| l.map_or_else(|| "-".to_owned(), |l| format!("{sign} {l}"));
    let (f, l) = (&v.figures, &v.thresholds);
    t.row(["perplexity of the source".to_owned(), units::figure(f.ppl_source), "-".to_owned()]);
    t.row(["perplexity of the conversion".to_owned(), units::figure(f.ppl_converted), "-".to_owned()]);
    let ratio = f.ppl_converted / f.ppl_source;
    t.row(["ratio of perplexities".to_owned(), format!("{ratio:.4}"), limit(l.ppl_ratio, "<=")]);
    t.row(["excess, nats per token".to_owned(), format!("{:.4}", v.excess()), "-".to_owned()]);
    t.row(["KL(source || conversion), nats".to_owned(), units::figure(f.kl_nats_per_token), limit(l.kl, "<=")]);
    t.row(["same likeliest token".to_owned(), units::percent(f.top1_agreement), limit(l.top1, ">=")]);
    t.row(["largest logit difference".to_owned(), units::figure(f.max_abs_dlogit), limit(l.max_abs_dlogit, "<=")]);
    t.row([
        "cached against full decoding".to_owned(),
        units::figure(f.cached_vs_full_max_abs_dlogit),
        limit(l.cached_vs_full, "<="),
    ]);
    let mut out = t.render(width);
    let windows = format!("{} windows of {}, {}", f.windows, v.seq_len, v.text);
    let _ = writeln!(out, "\n{} tokens ({windows}); limits: {}", f.tokens, v.thresholds_from);
    for failure in &v.failed {
        let _ = writeln!(out, "failed: {} is {}, limit {}", failure.measure, failure.found, failure.allowed);
    }
    let _ = writeln!(out, "{}", if v.passed { "passed" } else { "NOT PASSED" });
    out
}

/// Perplexity of one model.
pub fn evaluation(e: &Evaluation) -> String {
    format!(
        "perplexity {:.4}  ({:.4} nats per token, {} tokens in {} windows of {}, {})\n",
        e.figures.perplexity, e.figures.nll_nats_per_token, e.figures.tokens, e.figures.windows, e.seq_len, e.text
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::Thresholds;

    #[test]
    fn bars_grow_with_their_values() {
        assert_eq!(bars(&[0.0, 0.5, 1.0, f64::NAN]), "▁▄█ ");
        assert_eq!(bars(&[0.0, 0.0]), "▁▁");
    }

    #[test]
    fn a_failed_verdict_says_so_and_why() {
        let limits = Thresholds { max_abs_dlogit: Some(1e-9), ..Thresholds::default() };
        let text = verification(&crate::report::verification::tests::verification(limits), 80);
        assert!(text.contains("failed: max_abs_dlogit"), "{text}");
        assert!(text.ends_with("NOT PASSED\n"));
    }
}
