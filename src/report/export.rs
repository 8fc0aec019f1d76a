//! What `export` did, as text and as the note in an exported folder.

use super::card::{fenced, inline, short_name};
use super::table::Table;
use super::units;
use crate::export::{EXPORT_FILE, ExportReport, Route};

/// For the terminal.
pub fn text(r: &ExportReport, width: usize) -> String {
    let mut t = Table::pairs();
    t.row(["output", &r.output.display().to_string()]);
    t.row(["class", &format!("{} (was {})", r.class, r.source_class)]);
    t.row(["written", written(r)]);
    t.row(["widths", &widths(r)]);
    t.row(["cache", &cache(r)]);
    if r.norm_error > 0.0 {
        t.row(["norm", &norm(r)]);
    }
    for (i, d) in r.decisions.iter().enumerate() {
        t.row([if i == 0 { "decided" } else { "" }, d]);
    }
    t.render(width)
}

fn written(r: &ExportReport) -> &'static str {
    match r.route {
        Route::Rewritten => "attention for the class, everything else as it was",
        Route::Cast => "every weight as it was, in another dtype",
    }
}

fn widths(r: &ExportReport) -> String {
    let g = r.geometry;
    let queries = g.q_lora_rank.map_or_else(String::new, |rank| format!(", q_lora_rank {rank}"));
    format!(
        "kv_lora_rank {}, heads of {} + {} and {} values{queries}",
        g.kv_lora_rank, g.qk_nope_head_dim, g.qk_rope_head_dim, g.v_head_dim
    )
}

fn cache(r: &ExportReport) -> String {
    format!(
        "{} values per token and layer (was {})",
        r.cache_values_per_token_per_layer, r.source_cache_values_per_token_per_layer
    )
}

fn norm(r: &ExportReport) -> String {
    format!("the norm of latents was the identity to {} and is folded away", units::figure(r.norm_error))
}

/// `README.md` of an exported folder.
pub fn note(r: &ExportReport, command: &str) -> String {
    let name = inline(short_name(&r.source));
    let mut out = format!("# {name} as {}\n\n", inline(&r.class));
    out += &format!(
        "The MLA model `{name}` written for the class `{}` by `gqa2mla` {}. It computes what `{name}` computes, to the rounding \
         of its dtypes. `gqa2mla verify {name} OUTPUT` compares the two.\n\n",
        inline(&r.class),
        inline(&r.tool_version)
    );
    out += &format!("{}; {}.\n\n", widths(r), cache(r));
    out += &format!("```sh\n{}\n```\n\n", fenced(command));
    for d in &r.decisions {
        out += &format!("- {}\n", inline(d));
    }
    out += &format!("\n`{EXPORT_FILE}` holds settings and figures; `manifest.json` the hash of every file.\n");
    out
}
