//! How the sources are laid out: few binaries of tests, and functions that can be read whole.

use std::path::Path;

use super::source_text::{SourceFile, collect};

/// Binaries of tests. Each links the whole library: a new one needs a reason that is none of these binaries', and a line in
/// `tests/README.md`.
const BINARIES: [&str; 5] = ["devices", "fuzz", "heap", "in_place", "suite"];

#[test]
fn tests_are_in_the_suite_unless_they_need_a_process_of_their_own() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let readme = fs_err::read_to_string(dir.join("README.md")).expect("readable");
    let mut found = Vec::new();
    for path in fs_err::read_dir(&dir).expect("readable").flatten().map(|e| e.path()) {
        // What Cargo makes a binary of.
        if path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").exists() {
            found.push(path.file_stem().and_then(|n| n.to_str()).expect("UTF-8").to_owned());
        }
    }
    found.sort();
    assert_eq!(found, BINARIES, "put tests into a folder of tests/ and name it in tests/suite.rs");
    for name in BINARIES {
        assert!(readme.contains(&format!("`{name}`")), "tests/README.md does not say why `{name}` is a binary");
    }
}

#[test]
fn long_functions_say_why() {
    // Clippy counts (`too_many_lines`, clippy.toml); here: that it does, and that an exception has a reason.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |file: &str| fs_err::read_to_string(root.join(file)).expect("readable");
    assert!(read("Cargo.toml").contains("too_many_lines = \"warn\""));
    assert!(read("clippy.toml").contains("too-many-lines-threshold = 80"));
    let mut paths = Vec::new();
    collect(&root.join("src"), &mut paths);
    collect(&root.join("tests"), &mut paths);
    for path in paths {
        let text = fs_err::read_to_string(&path).expect("readable");
        let without = exceptions_without_reason(&text);
        assert!(without.is_empty(), "{}: lines {without:?}: a long function needs a `reason`", path.display());
    }
}

/// Lines that switch the lint off and do not say why.
fn exceptions_without_reason(text: &str) -> Vec<usize> {
    let file = SourceFile::new("src/lib.rs", text);
    let at = |i: &usize| file.tokens[*i].text == "too_many_lines";
    let reason = |i: &usize| matches!(file.texts(i + 1, 4)[..], [",", "reason", "=", why] if why.len() > 1);
    let lines = (0..file.tokens.len()).filter(at).filter(|i| !reason(i));
    lines.map(|i| file.tokens[i].line).collect()
}

#[test]
fn an_exception_without_a_reason_is_found() {
    let text = "#[allow(clippy::too_many_lines, reason = \"a table\")]\nfn f() {}\n#[allow(clippy::too_many_lines)]\nfn g() {}";
    assert_eq!(exceptions_without_reason(text), [3]);
}
