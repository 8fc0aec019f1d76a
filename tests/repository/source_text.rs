//! The sources of this package as words and marks, without comments, literals and tests: as much of Rust as rules about
//! names need.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A word or a mark, and the line it stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub text: String,
    pub line: usize,
}

/// A source file.
#[derive(Debug)]
pub struct SourceFile {
    /// From the root of the repository, with `/`.
    pub path: String,
    /// Names of the modules from the crate's root to this file; empty for a root.
    pub module: Vec<String>,
    /// What is compiled outside tests.
    pub tokens: Vec<Token>,
    /// Modules below this one that are compiled in tests only.
    test_modules: Vec<Vec<String>>,
}

impl SourceFile {
    pub fn new(path: &str, text: &str) -> Self {
        let inside = path.strip_prefix("src/").unwrap_or(path).trim_end_matches(".rs");
        let inside = inside.strip_suffix("/mod").unwrap_or(inside);
        let root = matches!(inside, "lib" | "main");
        let module: Vec<String> = inside.split('/').filter(|_| !root).map(str::to_owned).collect();
        let (tokens, test_modules) = without_tests(tokens(text));
        let test_modules = test_modules.into_iter().map(|m| module.iter().cloned().chain([m]).collect()).collect();
        Self { path: path.to_owned(), module, tokens, test_modules }
    }

    /// The texts of `count` tokens from `at` on; fewer at the end.
    pub fn texts(&self, at: usize, count: usize) -> Vec<&str> {
        self.tokens.iter().skip(at).take(count).map(|t| t.text.as_str()).collect()
    }
}

/// Every file of `src/` that is compiled outside tests, in order.
pub fn sources() -> Vec<SourceFile> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    collect(&root.join("src"), &mut paths);
    paths.sort();
    let read = |path: &PathBuf| {
        let name = path.strip_prefix(root).expect("inside").to_str().expect("UTF-8").replace('\\', "/");
        SourceFile::new(&name, &fs_err::read_to_string(path).expect("readable"))
    };
    outside_tests(paths.iter().map(read).collect())
}

/// Files that are not within a module which is compiled in tests only.
pub fn outside_tests(mut files: Vec<SourceFile>) -> Vec<SourceFile> {
    let tests: BTreeSet<Vec<String>> = files.iter().flat_map(|f| f.test_modules.iter().cloned()).collect();
    files.retain(|f| !tests.iter().any(|t| f.module.starts_with(t)));
    files
}

/// Paths of the Rust files below a folder.
pub fn collect(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs_err::read_dir(dir).expect("readable").flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Words, `::` and single marks. A plain string becomes one token, `"` and its text; any other literal the token `"`.
pub fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut out, mut at, mut line) = (Vec::new(), 0, 1);
    while let Some(&c) = chars.get(at) {
        let next = chars.get(at + 1).copied().unwrap_or('\0');
        let start = at;
        let mut token = None;
        match c {
            '/' if next == '/' => at = find(&chars, at, '\n'),
            '/' if next == '*' => at = behind_comment(&chars, at),
            '"' => {
                at = behind_string(&chars, at + 1);
                token = Some(chars[start..at.saturating_sub(1).min(chars.len())].iter().collect());
            }
            // A lifetime has no second quote after its first letter.
            '\'' if next == '\\' || chars.get(at + 2) == Some(&'\'') => {
                at = find(&chars, at + if next == '\\' { 3 } else { 2 }, '\'') + 1;
                token = Some("\"".to_owned());
            }
            _ if word(c) => {
                while chars.get(at).copied().is_some_and(word) {
                    at += 1;
                }
                let name: String = chars[start..at].iter().collect();
                let hashes = chars[at..].iter().take_while(|c| **c == '#').count();
                let quote = chars.get(at + hashes) == Some(&'"');
                if quote && matches!(name.as_str(), "r" | "br" | "cr") {
                    at = behind_raw_string(&chars, at + hashes + 1, hashes);
                    token = Some("\"".to_owned());
                } else if !(quote && hashes == 0 && matches!(name.as_str(), "b" | "c")) {
                    token = Some(name);
                }
            }
            ':' if next == ':' => {
                at += 2;
                token = Some("::".to_owned());
            }
            _ => {
                at += 1;
                token = (!c.is_whitespace()).then(|| c.to_string());
            }
        }
        out.extend(token.map(|text| Token { text, line }));
        line += chars[start..at.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    out
}

fn find(chars: &[char], from: usize, wanted: char) -> usize {
    (from..chars.len()).find(|i| chars[*i] == wanted).unwrap_or(chars.len())
}

fn behind_comment(chars: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn behind_string(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn behind_raw_string(chars: &[char], mut at: usize, hashes: usize) -> usize {
    while at < chars.len() {
        let closes = chars[at] == '"' && chars[at + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
        at += 1;
        if closes {
            return at + hashes;
        }
    }
    at
}

/// The index after the bracket that closes the one at `at`.
fn behind_bracket(tokens: &[Token], at: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(at) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// Takes out items that are compiled in tests only; names those of them that are modules in other files.
fn without_tests(tokens: Vec<Token>) -> (Vec<Token>, Vec<String>) {
    let (mut out, mut modules, mut at) = (Vec::new(), Vec::new(), 0);
    while at < tokens.len() {
        let attribute = tokens[at].text == "#" && tokens.get(at + 1).is_some_and(|t| t.text == "[");
        let end = if attribute { behind_bracket(&tokens, at + 1) } else { at + 1 };
        let words: Vec<&str> = tokens[at..end].iter().map(|t| t.text.as_str()).collect();
        if !attribute || words != ["#", "[", "cfg", "(", "test", ")", "]"] {
            out.extend(tokens[at..end].iter().cloned());
            at = end;
            continue;
        }
        at = end;
        // Further attributes, then an item, which ends with its first braces or a semicolon.
        while at < tokens.len() {
            match tokens[at].text.as_str() {
                "#" | "(" | "[" => at = behind_bracket(&tokens, at + usize::from(tokens[at].text == "#")),
                "{" => {
                    at = behind_bracket(&tokens, at);
                    break;
                }
                ";" => {
                    at += 1;
                    break;
                }
                "mod" if tokens.get(at + 2).is_some_and(|t| t.text == ";") => {
                    modules.push(tokens[at + 1].text.clone());
                    at += 2;
                }
                _ => at += 1,
            }
        }
    }
    (out, modules)
}

#[test]
fn what_is_no_code_is_not_seen() {
    let text = r##"
// crate::comment
/* crate::a /* nested */ crate::b */
const A: &str = "crate::\"string"; const B: char = '"'; const C: u8 = b'\''; fn f<'a>(x: &'a str) {}
const D: &str = r#"crate::"raw""#; const E: &[u8] = b"crate::bytes";
#[cfg(test)]
#[allow(dead_code)]
mod tests { fn g() { crate::tests(); } }
#[cfg(test)]
use crate::only_in_tests;
#[cfg(test)]
mod faults;
fn last() { r#type(); }
"##;
    let strings: Vec<Token> = tokens("f(\"one\", \"\", \"t\\\"wo\")");
    let strings: Vec<&str> = strings.iter().map(|t| t.text.as_str()).filter(|t| t.starts_with('"')).collect();
    assert_eq!(strings, ["\"one", "\"", "\"t\\\"wo"]);
    let file = SourceFile::new("src/a/b.rs", text);
    let texts: Vec<&str> = file.tokens.iter().map(|t| t.text.as_str()).collect();
    assert!(!texts.contains(&"crate") && !texts.contains(&"tests"), "{texts:?}");
    assert_eq!(file.tokens.iter().find(|t| t.text == "last").map(|t| t.line), Some(13));
    assert_eq!(texts[texts.len() - 11..], ["last", "(", ")", "{", "r", "#", "type", "(", ")", ";", "}"][..]);
    let within = SourceFile::new("src/a/b/faults.rs", "use crate::c;");
    let below = SourceFile::new("src/a/b/faults/deep.rs", "use crate::c;");
    let other = SourceFile::new("src/a/mod.rs", "");
    let left = outside_tests(vec![file, within, below, other]);
    assert_eq!(left.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(), ["src/a/b.rs", "src/a/mod.rs"]);
}
