//! The command that makes a conversion again, in one form whatever was typed.

use gqa2mla::convert::ConvertSettings;

/// A `convert` command with the options of `settings` that are not defaults. Folders are left out but for their last
/// part, and so is everything that does not change the output: model cards are published, and the same inputs and
/// settings give the same bytes.
pub fn command_line(model: &str, settings: &ConvertSettings) -> String {
    let mut words: Vec<String> = vec!["gqa2mla".into(), "convert".into(), short(model), "-o".into(), "OUTPUT".into()];
    for (option, value) in settings.arguments() {
        words.push(format!("--{option}"));
        if !value.is_empty() {
            words.push(quoted(&value));
        }
    }
    words.join(" ")
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
