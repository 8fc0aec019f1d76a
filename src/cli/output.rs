//! The one place that writes to stdout and stderr.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use serde::Serialize;

/// How a command's result is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Text for people.
    Human,
    /// One JSON document.
    Json,
}

/// Width of lines: `COLUMNS` where a shell exports it, else 120, which the tables of this tool fit.
pub fn width() -> usize {
    const DEFAULT: usize = 120;
    std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()).filter(|w| *w >= 40).unwrap_or(DEFAULT)
}

/// Show a result on stdout: `text` for people, `document` for scripts.
///
/// # Errors
/// When stdout cannot be written.
pub fn show<T: Serialize>(format: Format, document: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
    match format {
        Format::Human => print(&text(document)),
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(document)?)),
    }
}

/// Write a document and its plot as `<name>.json` and `<name>.svg` into a folder, which is made where it is not there.
///
/// # Errors
/// Files that cannot be written.
pub fn write_with_plot<T: Serialize>(dir: &Path, name: &str, document: &T, svg: &str) -> anyhow::Result<()> {
    write_with_plots(dir, name, document, &[(format!("{name}.svg"), svg.to_owned())])
}

/// Write a document as `<name>.json` and plots under their own file names into a folder, which is made where it is not
/// there.
///
/// # Errors
/// Files that cannot be written.
pub fn write_with_plots<T: Serialize>(
    dir: &Path,
    name: &str,
    document: &T,
    plots: &[(String, String)],
) -> anyhow::Result<()> {
    fs_err::create_dir_all(dir)?;
    fs_err::write(dir.join(format!("{name}.json")), format!("{}\n", serde_json::to_string_pretty(document)?))?;
    for (file, svg) in plots {
        fs_err::write(dir.join(file), svg)?;
    }
    Ok(())
}

/// Write text to stdout as it is, escaped where a terminal would obey it.
///
/// # Errors
/// When stdout cannot be written.
pub fn print(text: &str) -> anyhow::Result<()> {
    let stdout = io::stdout();
    let safe = if stdout.is_terminal() { escape(text) } else { text.to_owned() };
    let mut lock = stdout.lock();
    lock.write_all(safe.as_bytes())?;
    lock.flush()?;
    Ok(())
}

/// Write bytes to stdout.
///
/// # Errors
/// When stdout cannot be written.
pub fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut lock = io::stdout().lock();
    lock.write_all(bytes)?;
    lock.flush()?;
    Ok(())
}

/// Longest message, in characters: names in files may be megabytes long.
const LONGEST: usize = 8000;

/// A `label: message` line on stderr, escaped where a terminal would obey it: logs are read in terminals too. A stderr that
/// is gone is nobody's loss.
pub fn message(label: Label, text: &str) {
    let stderr = io::stderr();
    let terminal = stderr.is_terminal();
    let text = escape(&shorten(text));
    let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let _ = writeln!(stderr.lock(), "{} {text}", label.text(colour));
}

/// What a line on stderr is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Label {
    Error,
    Warning,
    Note,
    Hint,
}

impl Label {
    fn text(self, colour: bool) -> String {
        let (name, code) = match self {
            Label::Error => ("error:", 31),
            Label::Warning => ("warning:", 33),
            Label::Note => ("note:", 36),
            Label::Hint => ("hint:", 32),
        };
        if colour { format!("\x1b[1;{code}m{name}\x1b[0m") } else { name.to_owned() }
    }
}

/// Report an error: what failed and why on the `error:` line, then the hints of all links of the chain.
pub fn error(error: &anyhow::Error) {
    let (text, hints) = explain(error);
    message(Label::Error, &text);
    for hint in hints {
        message(Label::Hint, &hint);
    }
}

/// The chain as one text, and its hints. Messages carry a hint after a blank line; one that repeats its cause is not
/// repeated here.
fn explain(error: &anyhow::Error) -> (String, Vec<String>) {
    let mut text = String::new();
    let mut hints: Vec<String> = Vec::new();
    for link in error.chain() {
        let whole = link.to_string();
        let mut parts = whole.split("\n\nhint: ");
        let body = parts.next().unwrap_or_default().trim_end().to_owned();
        for hint in parts.map(|h| h.trim_end().to_owned()) {
            if !hints.contains(&hint) {
                hints.push(hint);
            }
        }
        if text.contains(&body) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&body);
    }
    (text, hints)
}

/// The beginning and the end of a text that is longer than anybody reads.
fn shorten(text: &str) -> std::borrow::Cow<'_, str> {
    let length = text.chars().count();
    if length <= LONGEST {
        return text.into();
    }
    let cut = |skip: usize| text.chars().skip(skip).take(LONGEST / 2).collect::<String>();
    let (start, end) = (cut(0), cut(length - LONGEST / 2));
    format!("{start} [... {} characters ...] {end}", length - LONGEST / 2 * 2).into()
}

/// Make text harmless for a terminal: control characters (but for newlines and tabs) and characters that reorder the
/// text around them appear as `\u{..}`.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let reorders =
            matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if reorders || (c.is_control() && c != '\n' && c != '\t') {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_spelled_out() {
        assert_eq!(escape("a\x1b[31m\u{202e}b\nc\u{9b}"), "a\\u{1b}[31m\\u{202e}b\nc\\u{9b}");
        assert_eq!(escape("zażółć gęślą 日本語"), "zażółć gęślą 日本語");
    }

    #[test]
    fn long_messages_lose_their_middle() {
        let text = format!("{}{}", "a".repeat(1 << 20), "é".repeat(LONGEST));
        let short = shorten(&text);
        assert!(short.len() < 3 * LONGEST && short.starts_with("aaa") && short.ends_with("ééé"));
        assert!(short.contains("[... 1048576 characters ...]"), "{}", &short[3990..4100]);
        assert_eq!(shorten("short"), "short");
    }

    #[test]
    fn hints_follow_the_whole_chain_once() {
        let inner: Result<(), _> = Err(anyhow::anyhow!("no shard\n\nhint: download it"));
        let e = inner.context("cannot open `m`\n\nhint: download it").expect_err("an error");
        assert_eq!(explain(&e), ("cannot open `m`: no shard".to_owned(), vec!["download it".to_owned()]));
    }
}
