//! Names of methods stand in `src/methods/`, names of targets in `src/target/`, and nowhere else.
//!
//! `names.txt` beside this file says how many are left in each file. Counts may only fall;
//! `GQA2MLA_RENEW_NAMES=1 cargo test --test suite names` writes those of the sources, unless there are more in all.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::source_text::{SourceFile, sources};

/// An enum each of whose variants has a room.
struct Named {
    name: &'static str,
    room: &'static str,
    /// Variants that are nothing of the room: choices that are still to be made.
    open: &'static [&'static str],
}

const NAMED: [Named; 2] = [
    Named { name: "Method", room: "methods", open: &[] },
    Named { name: "TargetKind", room: "target", open: &["Auto"] },
];

/// By name and file: how often one of its variants is written.
type Counts = BTreeMap<(String, String), usize>;

/// The variants of the enum `name`, and the file that defines it.
fn variants<'a>(files: &'a [SourceFile], name: &str) -> Option<(&'a str, Vec<&'a str>)> {
    for file in files {
        let defined = (0..file.tokens.len()).find(|i| file.texts(*i, 3) == ["enum", name, "{"]);
        let Some(start) = defined else { continue };
        let (mut out, mut depth, mut before) = (Vec::new(), 0, "");
        for token in &file.tokens[start + 2..] {
            let text = token.text.as_str();
            match text {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth -= 1,
                // Behind an attribute too.
                _ if depth == 1 && matches!(before, "{" | "," | "]") && text != "#" && text != "," => out.push(text),
                _ => {}
            }
            if depth == 0 {
                return Some((&file.path, out));
            }
            before = text;
        }
    }
    None
}

/// What stands outside its room.
fn outside(files: &[SourceFile]) -> Counts {
    let mut out = Counts::new();
    for named in NAMED {
        let (home, variants) = variants(files, named.name).unwrap_or_else(|| panic!("there is no enum {}", named.name));
        assert!(variants.len() > 3, "{}: {variants:?}", named.name);
        for file in files.iter().filter(|f| f.module.first().is_none_or(|room| room != named.room)) {
            let own = file.path == home;
            let named_at = |at: usize| match file.texts(at, 3)[..] {
                [name, "::", word] if name == named.name || (own && name == "Self") => {
                    // Several at once are no better than one.
                    ["{", "*"].contains(&word) || (variants.contains(&word) && !named.open.contains(&word))
                }
                _ => false,
            };
            let count = (0..file.tokens.len()).filter(|at| named_at(*at)).count();
            if count > 0 {
                out.insert((named.name.to_owned(), file.path.clone()), count);
            }
        }
    }
    out
}

fn table() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/repository/names.txt")
}

/// A line for each: name, count, file.
fn parse(text: &str) -> Counts {
    let line = |line: &str| {
        let [name, count, file] = line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("odd line: {line}") };
        ((name.to_owned(), file.to_owned()), count.parse().expect("a count"))
    };
    text.lines().filter(|l| !l.starts_with('#')).map(line).collect()
}

#[test]
fn no_method_or_target_is_named_outside_its_room() {
    let (found, allowed) = (outside(&sources()), parse(&fs_err::read_to_string(table()).expect("readable")));
    let total = |c: &Counts| c.values().sum::<usize>();
    if std::env::var_os("GQA2MLA_RENEW_NAMES").is_some() {
        assert!(total(&found) <= total(&allowed), "{} names, {} allowed", total(&found), total(&allowed));
        let lines = found.iter().map(|((name, file), count)| format!("{name:<10} {count:>3} {file}\n"));
        let head = "# Names of methods and targets outside their rooms: see names.rs.\n".to_owned();
        fs_err::write(table(), lines.fold(head, |text, line| text + &line)).expect("written");
        return;
    }
    let mut differences = Vec::new();
    for key in found.keys().chain(allowed.keys()) {
        let (now, before) = (found.get(key).unwrap_or(&0), allowed.get(key).unwrap_or(&0));
        if now != before {
            differences.push(format!("{}: {now} of {}, names.txt has {before}", key.1, key.0));
        }
    }
    differences.sort();
    differences.dedup();
    assert!(
        differences.is_empty(),
        "{}\nhint: a method's name belongs in src/methods/, a target's in src/target/; if there are fewer in all, renew the \
         table: GQA2MLA_RENEW_NAMES=1 cargo test --release --test suite names",
        differences.join("\n")
    );
}

#[test]
fn names_are_counted_where_they_are_code() {
    let files = [
        ("src/convert/kind.rs", "enum Method { #[default] A, B(u8), C { x: u8 }, D } fn f(m: Method) { Self::A; m }"),
        ("src/target/mod.rs", "enum TargetKind { Auto, V2, V3, Remote } fn f() { TargetKind::V3; }"),
        ("src/methods/mod.rs", "fn f() { Method::A; TargetKind::V2; }"),
        (
            "src/x.rs",
            "// Method::A\nuse m::Method::{A, B}; fn f() { Method::C; Method::ALL; Self::A; TargetKind::Auto; }",
        ),
        ("src/y.rs", "#[cfg(test)] mod tests { fn f() { Method::A; } } fn g() { \"Method::A\"; }"),
    ];
    let files: Vec<SourceFile> = files.iter().map(|(path, text)| SourceFile::new(path, text)).collect();
    let of = |name: &str| variants(&files, name).expect("defined").1;
    assert_eq!((of("Method"), of("TargetKind")), (vec!["A", "B", "C", "D"], vec!["Auto", "V2", "V3", "Remote"]));
    let expected = "Method 1 src/convert/kind.rs\nMethod 2 src/x.rs\nTargetKind 1 src/methods/mod.rs";
    assert_eq!(outside(&files), parse(expected));
}
