//! Names of methods stand in `src/methods/`, names of target classes in `src/target/`, and nowhere else.
//!
//! A name is used where its module is part of a path (`exact::ENTRY`) or where a string is just the name (`"exact"`); both are
//! how a method or a class would be told from the others. `names.txt` beside this file says how many uses are left in each
//! file, all of them strings that mean something else. Counts may only fall;
//! `GQA2MLA_RENEW_NAMES=1 cargo test --test suite names` writes those of the sources, unless there are more in all.

use std::collections::BTreeMap;
use std::path::PathBuf;

use gqa2mla::methods::METHODS;
use gqa2mla::target::classes::CLASSES;

use super::source_text::{SourceFile, sources};

/// A registry, and the folder that its names belong to.
struct Registry {
    room: &'static str,
    /// Folder of its modules within the crate.
    folder: &'static [&'static str],
    /// The constant that every module of the registry has.
    line: &'static str,
    /// Names on the command line, in JSON and in configs.
    names: Vec<&'static str>,
}

fn registries() -> [Registry; 2] {
    let classes = CLASSES.iter().flat_map(|class| [class.name(), class.id(), class.model_type(), class.architecture()]);
    [
        Registry {
            room: "methods",
            folder: &["methods"],
            line: "ENTRY",
            names: METHODS.iter().map(|method| method.name).collect(),
        },
        Registry { room: "target", folder: &["target", "classes"], line: "TARGET", names: classes.collect() },
    ]
}

/// By room and file: how often one of its names is used.
type Counts = BTreeMap<(String, String), usize>;

impl Registry {
    /// The modules that it lists.
    fn modules<'a>(&self, files: &'a [SourceFile]) -> Vec<&'a str> {
        let depth = self.folder.len();
        let within = files.iter().filter(|f| f.module.len() == depth + 1 && f.module[..depth] == *self.folder);
        let listed = within.filter(|f| (0..f.tokens.len()).any(|at| f.texts(at, 3) == ["pub", "const", self.line]));
        listed.map(|f| f.module[depth].as_str()).collect()
    }

    /// How often a file uses one of its names.
    fn uses(&self, file: &SourceFile, modules: &[&str]) -> usize {
        let text = |at: usize| file.tokens.get(at).map_or("", |t| t.text.as_str());
        let path = |at: usize| modules.contains(&text(at)) && text(at + 1) == "::";
        // Of several at once only what follows their folder is known to be theirs: `classes::{exact, other}`.
        let listed = |at: usize| text(at) == *self.folder.last().expect("a folder") && text(at + 1) == "::";
        let several = |at: usize| {
            let end = (at..file.tokens.len()).find(|i| text(*i) == "}").unwrap_or(file.tokens.len());
            (at + 3..end).filter(|i| modules.contains(&text(*i)) && text(*i + 1) != "::").count()
        };
        let string = |at: usize| text(at).strip_prefix('"').is_some_and(|name| self.names.contains(&name));
        let count = |at: usize| match text(at) {
            _ if path(at) || string(at) => 1,
            _ if listed(at) && text(at + 2) == "{" => several(at),
            _ if listed(at) && text(at + 2) == "*" => 1,
            _ => 0,
        };
        (0..file.tokens.len()).map(count).sum()
    }

    /// What stands outside its room.
    fn outside(&self, files: &[SourceFile]) -> Counts {
        let modules = self.modules(files);
        let other = files.iter().filter(|f| f.module.first().is_none_or(|room| room != self.room));
        let counts = other.map(|f| ((self.room.to_owned(), f.path.clone()), self.uses(f, &modules)));
        counts.filter(|(_, count)| *count > 0).collect()
    }
}

fn table() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/repository/names.txt")
}

/// A line for each: room, count, file.
fn parse(text: &str) -> Counts {
    let line = |line: &str| {
        let [name, count, file] = line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("odd line: {line}") };
        ((name.to_owned(), file.to_owned()), count.parse().expect("a count"))
    };
    text.lines().filter(|l| !l.starts_with('#')).map(line).collect()
}

#[test]
fn every_name_of_a_registry_has_a_module() {
    let files = sources();
    for registry in registries() {
        let modules = registry.modules(&files);
        let lines = if registry.room == "methods" { METHODS.len() } else { CLASSES.len() };
        assert_eq!(modules.len(), lines, "{}: {modules:?}", registry.room);
    }
}

#[test]
fn no_method_or_target_is_named_outside_its_room() {
    let files = sources();
    let found: Counts = registries().iter().flat_map(|registry| registry.outside(&files)).collect();
    let allowed = parse(&fs_err::read_to_string(table()).expect("readable"));
    let total = |c: &Counts| c.values().sum::<usize>();
    if std::env::var_os("GQA2MLA_RENEW_NAMES").is_some() {
        assert!(total(&found) <= total(&allowed), "{} names, {} allowed", total(&found), total(&allowed));
        let lines = found.iter().map(|((name, file), count)| format!("{name:<10} {count:>3} {file}\n"));
        let head = "# Names of methods and target classes outside their rooms: see names.rs.\n".to_owned();
        fs_err::write(table(), lines.fold(head, |text, line| text + &line)).expect("written");
        return;
    }
    let mut differences = Vec::new();
    for key in found.keys().chain(allowed.keys()) {
        let (now, before) = (found.get(key).unwrap_or(&0), allowed.get(key).unwrap_or(&0));
        if now != before {
            differences.push(format!("{}: {now} names of {}, names.txt has {before}", key.1, key.0));
        }
    }
    differences.sort();
    differences.dedup();
    assert!(
        differences.is_empty(),
        "{}\nhint: a method's name belongs in src/methods/, a class's in src/target/; if there are fewer in all, renew the \
         table: GQA2MLA_RENEW_NAMES=1 cargo test --release --test suite names",
        differences.join("\n")
    );
}

#[test]
fn names_are_counted_where_they_are_code() {
    let files = [
        ("src/methods/mod.rs", "pub mod fast; pub mod slow; const METHODS: &[Entry] = &[fast::ENTRY, slow::ENTRY];"),
        ("src/methods/fast.rs", "pub const ENTRY: Entry = Entry { name: \"fast-one\" };"),
        ("src/methods/slow/mod.rs", "pub const ENTRY: Entry = Entry { name: \"slow\" };"),
        ("src/methods/shared.rs", "pub fn f() { \"slow\"; }"),
        (
            "src/x.rs",
            "// slow::f\nuse m::methods::{fast::A, slow, shared}; fn f() { if name == \"slow\" {} slow::f(); fast; \"slow one\"; }",
        ),
        ("src/y.rs", "#[cfg(test)] mod tests { fn f() { slow::f(); \"slow\"; } } fn g() { shared::f(); \"fast\"; }"),
        ("src/z.rs", "use crate::methods::*;"),
    ];
    let files: Vec<SourceFile> = files.iter().map(|(path, text)| SourceFile::new(path, text)).collect();
    let registry =
        Registry { room: "methods", folder: &["methods"], line: "ENTRY", names: vec!["fast-one", "slow"] };
    assert_eq!(registry.modules(&files), ["fast", "slow"]);
    assert_eq!(registry.outside(&files), parse("methods 4 src/x.rs\nmethods 1 src/z.rs"));
}
