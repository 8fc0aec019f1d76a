//! The command that makes a conversion again, in one form whatever was typed.

use gqa2mla::convert::{Budget, ConvertSettings, Padding, Profile, RopeGrid};

/// A `convert` command with the options of `settings` that are not defaults. Folders are left out but for their last
/// part, and so is everything that does not change the output: model cards are published, and the same inputs and
/// settings give the same bytes.
pub fn command_line(model: &str, settings: &ConvertSettings) -> String {
    let d = ConvertSettings::default();
    let s = settings;
    let mut words: Vec<String> = vec!["gqa2mla".into(), "convert".into(), short(model), "-o".into(), "OUTPUT".into()];
    let mut flags: Vec<&str> = Vec::new();
    let mut add = |option: &str, value: Option<String>| {
        if let Some(value) = value {
            words.push(format!("--{option}"));
            words.push(quoted(&value));
        }
    };
    add("method", Some(s.method.name().to_owned()));
    add("kv-budget", s.kv_budget.map(budget));
    add("kv-lora-rank", s.kv_lora_rank.map(|n| n.to_string()));
    add("qk-rope-head-dim", s.qk_rope_head_dim.map(|n| n.to_string()));
    add("q-lora-rank", s.q_lora_rank.map(|n| n.to_string()));
    for (name, value) in s.method.arguments() {
        match value {
            Some(value) => add(name, Some(value)),
            None => flags.push(name),
        }
    }
    add("mla-layers", s.mla_layers.as_ref().map(ToString::to_string));
    let grid = s.rope_grid.map(|g| match g {
        RopeGrid::Free => "free",
        RopeGrid::Stock => "stock",
    });
    add("rope-grid", grid.map(str::to_owned));
    add("target", Some(s.target.name().to_owned()).filter(|_| s.target != d.target));
    let profile = s.profile.map(|p| match p {
        Profile::Portable => "portable",
        Profile::Faithful => "faithful",
    });
    add("profile", profile.map(str::to_owned));
    let pad = s.pad.map(|p| match p {
        Padding::Kernels => "kernels",
        Padding::None => "none",
    });
    add("pad", pad.map(str::to_owned));
    add("dtype", s.dtype.map(|t| t.name().to_owned()));
    let c = &s.calibration;
    for file in &c.files {
        add("calib", file.file_name().map(|n| n.to_string_lossy().into_owned()));
    }
    add("calib-samples", Some(c.samples.to_string()).filter(|_| c.samples != d.calibration.samples));
    add("calib-seq-len", Some(c.seq_len.to_string()).filter(|_| c.seq_len != d.calibration.seq_len));
    add("calib-max-seq-len", c.max_seq_len.map(|n| n.to_string()));
    add("seed", Some(c.seed.to_string()).filter(|_| c.seed != d.calibration.seed));
    add("device", Some(s.device.to_string()).filter(|_| s.device != d.device));
    add("max-shard-size", Some(s.max_shard_bytes.to_string()).filter(|_| s.max_shard_bytes != d.max_shard_bytes));
    add("max-context", s.max_context.map(|n| n.to_string()));
    words.extend(flags.iter().map(|flag| format!("--{flag}")));
    if s.force {
        words.push("--force".to_owned());
    }
    words.join(" ")
}

/// A budget as it is typed.
pub fn budget(budget: Budget) -> String {
    match budget {
        Budget::Values(n) => n.to_string(),
        Budget::Percent(p) => format!("{p}%"),
    }
}

/// A hub id as it is, a folder by its last part.
fn short(model: &str) -> String {
    let folder = std::path::Path::new(model);
    match folder.file_name() {
        Some(name) if folder.exists() => quoted(&name.to_string_lossy()),
        _ => quoted(model),
    }
}

/// A word that a shell reads as this text.
pub fn quoted(s: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./@%+=:,".contains(c);
    if !s.is_empty() && s.chars().all(plain) { s.to_owned() } else { format!("'{}'", s.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_left_out_and_folders_shortened() {
        let d = ConvertSettings::default();
        assert_eq!(command_line("org/name@v1", &d), "gqa2mla convert org/name@v1 -o OUTPUT --method attention-aware");
        assert_eq!(command_line("/tmp", &d), "gqa2mla convert tmp -o OUTPUT --method attention-aware");
        assert_eq!(quoted("a b'c"), "'a b'\\''c'");
    }
}
