//! Names of methods stand in `src/methods/`, names of classes in `src/target/`, and nowhere else: neither as a path to a room nor
//! as a literal.

use gqa2mla::methods::METHODS;
use gqa2mla::target::TargetChoice;

use super::source_text::{SourceFile, sources};

/// Rooms whose literals are not about targets: `model_type`s of models that are read, and of engines' classes.
const MODEL_TYPES: [&str; 2] = ["arch", "report"];
/// A literal that reads as a method's name and is something else: caches that are not compressed.
const OTHER: (&str, &str) = ("src/report/xkv.rs", "exact");

/// Where a name stands outside its room.
fn outside(files: &[SourceFile]) -> Vec<String> {
    let methods: Vec<&str> = METHODS.iter().map(|entry| entry.name).collect();
    let rooms: Vec<String> = methods.iter().map(|name| name.replace('-', "_")).collect();
    let classes: Vec<&str> = TargetChoice::all().filter(|c| *c != TargetChoice::Auto).map(TargetChoice::name).collect();
    let mut out = Vec::new();
    for file in files {
        let room = file.module.first().map(String::as_str).unwrap_or_default();
        for (at, token) in file.tokens.iter().enumerate() {
            let literal = token.text.strip_prefix('"');
            let method = room != "methods"
                && (literal.is_some_and(|name| methods.contains(&name) && (file.path.as_str(), name) != OTHER)
                    || matches!(file.texts(at, 3)[..], ["methods", "::", name] if rooms.iter().any(|r| r == name)));
            let class = room != "target"
                && (literal.is_some_and(|name| classes.contains(&name)) && !MODEL_TYPES.contains(&room)
                    || file.texts(at, 3) == ["target", "::", "classes"]);
            if method || class {
                out.push(format!("{}:{}: {}", file.path, token.line, file.texts(at, 3).join(" ")));
            }
        }
    }
    out
}

#[test]
fn no_method_or_target_is_named_outside_its_room() {
    let found = outside(&sources());
    assert!(
        found.is_empty(),
        "{}\nhint: ask the method or the class what it does (`Method`, `Class`), or put the name into its registry",
        found.join("\n")
    );
}

#[test]
fn names_that_are_put_in_are_seen() {
    let of = |path: &str, text: &str| outside(&[SourceFile::new(path, text)]).len();
    for (path, text) in [
        ("src/convert/run.rs", "fn f(m: &str) -> bool { m == \"exact\" }"),
        ("src/plan/check.rs", "use crate::methods::x_ecomla;"),
        ("src/cli/demo.rs", "fn f() { MethodChoice::named(\"care\"); }"),
        ("src/plan/check.rs", "fn f() { Target::named(\"hf-remote\"); }"),
        ("src/latent/shard.rs", "use crate::target::classes;"),
        ("src/methods/care/mod.rs", "const C: &str = \"deepseek_v3\";"),
    ] {
        assert_eq!(of(path, text), 1, "{path}: {text}");
    }
    for (path, text) in [
        ("src/methods/exact/mod.rs", "const N: &str = \"exact\";"),
        ("src/target/classes/remote.rs", "const N: &str = \"hf-remote\";"),
        ("src/arch/family.rs", "const N: &str = \"deepseek_v3\";"),
        ("src/convert/run.rs", "// exact\n#[cfg(test)] mod tests { use crate::methods::exact; }"),
        ("src/convert/run.rs", "use crate::methods::Method; fn f() { \"an exact copy\"; }"),
    ] {
        assert_eq!(of(path, text), 0, "{path}: {text}");
    }
}
