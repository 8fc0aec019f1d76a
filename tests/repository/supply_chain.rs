//! What is built upon: the policy of `deny.toml` held against what Cargo resolves, in seconds.
//! `cargo deny check` reads the same file and knows advisories too; `.ci/run` runs it where it is installed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use super::source_text::collect;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// `cargo metadata` of exactly what the lock file says, for every platform. What other platforms need and this one never
/// built has to be downloaded first; where that cannot be, the packages of this platform are looked at.
fn metadata() -> Value {
    let platform = format!("--filter-platform={}", host());
    let run = |more: &[&str]| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        Command::new(cargo)
            .args(["metadata", "--format-version", "1", "--locked", "--all-features"])
            .args(more)
            .current_dir(root())
            .output()
            .expect("cargo runs")
    };
    let mut out = run(&[]);
    if !out.status.success() {
        out = run(&["--offline", &platform]);
    }
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("JSON")
}

/// The platform that the compiler builds for.
fn host() -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let out = Command::new(rustc).arg("-vV").output().expect("rustc runs");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.lines().find_map(|l| l.strip_prefix("host: ")).expect("a host").to_owned()
}

fn toml(file: &str) -> toml::Table {
    fs_err::read_to_string(root().join(file)).expect("readable").parse().expect("TOML")
}

/// Packages that the graph of this one reaches.
fn packages(metadata: &Value) -> Vec<&Value> {
    metadata["packages"].as_array().expect("a list").iter().collect()
}

fn label(package: &Value) -> String {
    format!("{} {}", package["name"].as_str().unwrap_or("?"), package["version"].as_str().unwrap_or("?"))
}

/// Whether an SPDX expression can be met with the licences in `allowed`.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words: Vec<String> = Vec::new();
    for word in spaced.split_whitespace() {
        match words.last_mut() {
            // `Apache-2.0 WITH LLVM-exception` is one licence.
            Some(last) if word == "WITH" || last.ends_with(" WITH") => {
                last.push(' ');
                last.push_str(word);
            }
            _ => words.push(word.to_owned()),
        }
    }
    let mut rest = words.as_slice();
    either(&mut rest, allowed) && rest.is_empty()
}

fn either(words: &mut &[String], allowed: &BTreeSet<String>) -> bool {
    let mut out = both(words, allowed);
    while words.first().is_some_and(|w| w == "OR") {
        *words = &words[1..];
        out |= both(words, allowed);
    }
    out
}

fn both(words: &mut &[String], allowed: &BTreeSet<String>) -> bool {
    let mut out = one(words, allowed);
    while words.first().is_some_and(|w| w == "AND") {
        *words = &words[1..];
        out &= one(words, allowed);
    }
    out
}

fn one(words: &mut &[String], allowed: &BTreeSet<String>) -> bool {
    let Some((first, rest)) = words.split_first() else { return false };
    *words = rest;
    if first != "(" {
        return allowed.contains(first);
    }
    let out = either(words, allowed);
    let closed = words.first().is_some_and(|w| w == ")");
    *words = words.get(1..).unwrap_or_default();
    out && closed
}

#[test]
fn expressions_are_read_as_spdx_says() {
    let allowed: BTreeSet<String> = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).into();
    for good in [
        "MIT",
        "MIT OR GPL-3.0",
        "GPL-3.0 OR (MIT AND Apache-2.0)",
        "MIT/GPL-2.0",
        "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
    ] {
        assert!(satisfied(good, &allowed), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR GPL-3.0) AND GPL-3.0", "", "(MIT", "Apache-2.0 WITH Other"] {
        assert!(!satisfied(bad, &allowed), "{bad}");
    }
}

#[test]
fn every_licence_is_one_that_the_policy_allows() {
    let policy = toml("deny.toml");
    let allowed = policy["licenses"]["allow"].as_array().expect("a list");
    let allowed: BTreeSet<String> = allowed.iter().filter_map(|l| l.as_str().map(str::to_owned)).collect();
    let metadata = metadata();
    let bad: Vec<String> = packages(&metadata)
        .into_iter()
        .filter(|p| !p["license"].as_str().is_some_and(|l| satisfied(l, &allowed)))
        .map(|p| format!("{}: {}", label(p), p["license"]))
        .collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn everything_comes_from_the_registry_with_a_checksum() {
    let lock = toml("Cargo.lock");
    let mut bad = Vec::new();
    for package in lock["package"].as_array().expect("a list") {
        let name = package["name"].as_str().unwrap_or("?");
        let source = package.get("source").and_then(toml::Value::as_str);
        let good = match source {
            None => name == env!("CARGO_PKG_NAME"),
            Some(s) => {
                s == "registry+https://github.com/rust-lang/crates.io-index"
                    && package.get("checksum").and_then(toml::Value::as_str).is_some_and(|c| c.len() == 64)
            }
        };
        if !good {
            bad.push(format!("{name}: {source:?}"));
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn nothing_is_asked_for_at_any_version() {
    let manifest = toml("Cargo.toml");
    let platforms = manifest["target"].as_table().expect("a table").values();
    let own = ["dependencies", "dev-dependencies"].map(|table| &manifest[table]);
    for table in own.into_iter().chain(platforms.map(|p| &p["dependencies"])) {
        for (name, wanted) in table.as_table().expect("a table") {
            let version = wanted.as_str().or_else(|| wanted.get("version").and_then(toml::Value::as_str));
            assert!(version.is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit())), "{name}: {version:?}");
        }
    }
}

/// The compiler that `rust-version` promises can build every dependency; clippy's `incompatible_msrv` watches our own code.
#[test]
fn no_dependency_needs_a_newer_compiler_than_is_promised() {
    let version = |text: &str| -> Vec<u64> {
        // `1.89` is `1.89.0`.
        let mut parts: Vec<u64> = text.split('.').filter_map(|p| p.parse().ok()).collect();
        parts.resize(3, 0);
        parts
    };
    let ours = version(env!("CARGO_PKG_RUST_VERSION"));
    assert!(ours[0] > 0, "rust-version is stated");
    let metadata = metadata();
    let bad: BTreeMap<String, String> = packages(&metadata)
        .into_iter()
        .filter_map(|p| Some((label(p), p["rust_version"].as_str()?.to_owned())))
        .filter(|(_, needs)| version(needs) > ours)
        .collect();
    assert!(bad.is_empty(), "newer than {}: {bad:#?}", env!("CARGO_PKG_RUST_VERSION"));
}

#[test]
fn unsafe_code_says_why_it_is_sound() {
    // Clippy checks every block (`undocumented_unsafe_blocks`); here: that the lint is on, and where such code may be.
    let manifest = fs_err::read_to_string(root().join("Cargo.toml")).expect("readable");
    assert!(manifest.contains("undocumented_unsafe_blocks = \"warn\""));
    assert!(manifest.contains("unsafe_op_in_unsafe_fn = \"warn\""));
    let mut files = Vec::new();
    collect(&root().join("src"), &mut files);
    let of: Vec<String> = files
        .iter()
        .filter(|f| {
            let text = fs_err::read_to_string(f).expect("readable");
            text.lines().any(|l| !l.trim_start().starts_with("//") && l.contains("unsafe {"))
        })
        .map(|f| f.strip_prefix(root()).expect("within").display().to_string())
        .collect();
    let known = [
        "src/cli/devices.rs",
        "src/cli/interrupt.rs",
        "src/cli/pages.rs",
        "src/plan/memory.rs",
        "src/source/map.rs",
        "src/source/map/fault.rs",
        "src/factor/decompose/lapack.rs",
        "src/factor/linalg.rs",
    ];
    let new: Vec<_> = of.iter().filter(|f| !known.contains(&f.as_str()) && !f.starts_with("src/runtime/")).collect();
    assert!(new.is_empty(), "unsafe code outside {known:?} and the device runtimes: {new:?}");
}
