//! What `rotate` and `shard` did, as text and as the note in a rotated folder.

use super::card::{fenced, inline, short_name};
use super::table::Table;
use super::units;
use crate::latent::{RotationReport, ShardReport};

/// For the terminal.
pub fn text(r: &RotationReport, width: usize) -> String {
    let mut t = Table::pairs();
    t.row(["output", &r.output.display().to_string()]);
    t.row(["transform", &format!("{}: {}", r.settings.transform, r.construction)]);
    t.row(["slices", &format!("{}: {}", r.settings.slices, r.order)]);
    t.row(["cache", &cache(r)]);
    if let Some(spread) = energies(r) {
        t.row(["energy", &spread]);
    }
    if r.calibration_tokens > 0 {
        t.row(["calibration", &format!("{} tokens", r.calibration_tokens)]);
    }
    for (i, d) in r.decisions.iter().enumerate() {
        t.row([if i == 0 { "decided" } else { "" }, d]);
    }
    t.render(width)
}

fn cache(r: &RotationReport) -> String {
    let (rank, rope, slices) = (r.kv_lora_rank, r.qk_rope_head_dim, r.settings.slices);
    let whole = rank + rope;
    let one = r.cache_values_per_rank;
    format!(
        "{whole} values per token and layer; sliced over {slices}: {one} on each rank ({} of the whole)",
        units::percent(one as f64 / whole as f64)
    )
}

/// Smallest and largest share of a slice over all layers.
fn energies(r: &RotationReport) -> Option<String> {
    let all = || r.layers.iter().flat_map(|l| l.slice_energy.iter().copied());
    let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    (most > 0.0 && r.settings.slices > 1)
        .then(|| format!("a slice holds {} to {} of what a layer reads", units::percent(least), units::percent(most)))
}

/// `README.md` of a rotated folder.
pub fn note(r: &RotationReport, command: &str) -> String {
    let mut out = format!("# {}, latents rotated\n\n", inline(short_name(&r.source)));
    out += &format!(
        "The MLA model `{}` with a matrix folded into the weights around its latents ({}: {}), by `gqa2mla` \
         {}. The model computes what it did before, to rounding; every other tensor is as it was. It loads wherever the \
         model did. Tensors in f32 keep their digits where the model is loaded in f32.\n\n",
        inline(short_name(&r.source)),
        r.settings.transform,
        inline(&r.construction),
        inline(&r.tool_version)
    );
    out += &format!("Slices for tensor-parallel decoding: {}. {}\n\n", inline(&r.order), cache(r));
    out += &format!("```sh\n{}\n```\n\n", fenced(command));
    for d in &r.decisions {
        out += &format!("- {}\n", inline(d));
    }
    out += "\n`rotation.json` holds settings and figures by layer; `manifest.json` the hash of every file.\n";
    out
}

/// What `shard` did, for the terminal.
pub fn shards(r: &ShardReport, width: usize) -> String {
    let mut t = Table::pairs();
    t.row(["output", &r.output.display().to_string()]);
    t.row(["transform", &r.transform]);
    t.row(["slices", &r.order]);
    let rms = if r.settings.sharing.shared_rms { "the whole latent's" } else { "the slice's own" };
    t.row(["norm", &format!("by {rms} root mean square; scores of a slice times {}", r.settings.sharing.logit_scale)]);
    for rank in &r.ranks {
        let (begin, last) = (rank.latent_begin, rank.latent_end - 1);
        t.row([
            format!("rank {}", rank.rank),
            format!("{}  latent {begin} to {last}, {}", rank.file, units::bytes(rank.weight_bytes)),
        ]);
    }
    let share = units::percent(r.cache_values_per_rank as f64 / r.cache_values as f64);
    t.row([
        "cache",
        &format!("{} values per token and layer on a rank, {share} of {}", r.cache_values_per_rank, r.cache_values),
    ]);
    t.render(width)
}
