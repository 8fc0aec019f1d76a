//! The tests themselves: few binaries, and names that documents and scripts can rely on.

use std::path::Path;

/// Binaries of tests. Each links the whole library: a new one needs a reason that is none of these binaries', and a line in
/// `tests/README.md`.
const BINARIES: [&str; 4] = ["devices", "fuzz", "heap", "suite"];

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
