//! Rooms (folders and top-level files of `src/`) import each other without circles.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::source_text::{SourceFile, Token, outside_tests, sources};

/// Imports that close circles, and are still to be taken out. Nothing may be added.
const ALLOWED: [(&str, &str); 4] =
    [("calibrate", "convert"), ("calibrate", "methods"), ("methods", "convert"), ("target", "convert")];

/// From a room to a room it imports: `file:line` of each import.
type Graph = BTreeMap<(String, String), Vec<String>>;

/// The rooms that a file imports from, each with a line. Both `use` and paths within code count.
fn imports(file: &SourceFile) -> Vec<(&str, usize)> {
    let tokens = &file.tokens;
    let text = |at: usize| tokens.get(at).map_or("", |t| t.text.as_str());
    let mut out = Vec::new();
    // Modules written within the file, each with the depth of its braces.
    let (mut inline, mut depth) = (Vec::new(), 0);
    for at in 0..tokens.len() {
        match text(at) {
            "{" => {
                depth += 1;
                if at >= 2 && text(at - 2) == "mod" {
                    inline.push(depth);
                }
            }
            "}" => {
                inline.pop_if(|d| *d == depth);
                depth -= 1;
            }
            // The binary's view of the library.
            "crate" | "gqa2mla" if text(at + 1) == "::" => out.extend(heads(tokens, at + 2)),
            "super" if text(at + 1) == "::" && (at == 0 || text(at - 1) != "::") => {
                let up = (0..).take_while(|n| text(at + 2 * n) == "super" && text(at + 2 * n + 1) == "::").count();
                if up == file.module.len() + inline.len() {
                    out.extend(heads(tokens, at + 2 * up));
                }
            }
            _ => {}
        }
    }
    out
}

/// The first words of a path that goes on at `at`, or of each in braces.
fn heads(tokens: &[Token], at: usize) -> Vec<(&str, usize)> {
    let Some(first) = tokens.get(at) else { return Vec::new() };
    if first.text != "{" {
        return vec![(&first.text, first.line)];
    }
    let (mut out, mut depth) = (Vec::new(), 0);
    for (i, token) in tokens.iter().enumerate().skip(at) {
        match token.text.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ if depth == 1 && matches!(tokens[i - 1].text.as_str(), "{" | ",") => out.push((&*token.text, token.line)),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    out
}

/// The graph of imports between rooms.
fn graph(files: &[SourceFile]) -> Graph {
    let rooms: BTreeSet<&str> = files.iter().filter_map(|f| f.module.first()).map(String::as_str).collect();
    let mut out = Graph::new();
    for file in files {
        let Some(from) = file.module.first() else { continue };
        for (to, line) in imports(file) {
            assert!(rooms.contains(to), "{}:{line}: `{to}` is no room", file.path);
            if to != from {
                out.entry((from.clone(), to.to_owned())).or_default().push(format!("{}:{line}", file.path));
            }
        }
    }
    out
}

/// The shortest way from one room to another, as the rooms on it.
fn way(graph: &Graph, from: &str, to: &str) -> Option<Vec<String>> {
    let mut before: BTreeMap<&str, &str> = BTreeMap::new();
    let mut queue = VecDeque::from([from]);
    while let Some(room) = queue.pop_front() {
        if room == to {
            let mut rooms = vec![to.to_owned()];
            let mut at = to;
            while at != from {
                at = before[at];
                rooms.push(at.to_owned());
            }
            rooms.reverse();
            return Some(rooms);
        }
        for (_, next) in graph.keys().filter(|(a, _)| a == room) {
            if next != from && !before.contains_key(next.as_str()) {
                before.insert(next, room);
                queue.push_back(next);
            }
        }
    }
    None
}

/// The shortest circle, a line for each import that makes it.
fn circle(graph: &Graph) -> Option<String> {
    let circles = graph.keys().filter_map(|(a, b)| way(graph, b, a));
    let mut rooms = circles.min_by_key(Vec::len)?;
    rooms.push(rooms[0].clone());
    let line = |pair: &[String]| {
        let places = &graph[&(pair[0].clone(), pair[1].clone())];
        format!("{} imports {}: {} ({} in all)", pair[0], pair[1], places[0], places.len())
    };
    Some(rooms.windows(2).map(line).collect::<Vec<_>>().join("\n"))
}

#[test]
fn rooms_do_not_import_each_other_in_circles() {
    let mut graph = graph(&sources());
    for (from, to) in ALLOWED {
        let edge = (from.to_owned(), to.to_owned());
        let needed = graph.contains_key(&edge) && way(&graph, to, from).is_some();
        assert!(
            needed,
            "{from} no longer imports {to} in a circle: take ({from:?}, {to:?}) out of ALLOWED in {}",
            file!()
        );
    }
    graph.retain(|(from, to), _| !ALLOWED.contains(&(from, to)));
    if let Some(circle) = circle(&graph) {
        panic!("rooms import each other in a circle:\n{circle}");
    }
}

/// Files of a package that exists here only, and its graph.
fn of(files: &[(&str, &str)]) -> Graph {
    graph(&outside_tests(files.iter().map(|(path, text)| SourceFile::new(path, text)).collect()))
}

#[test]
fn a_circle_that_is_put_in_is_found() {
    let line = [("src/a/mod.rs", "use crate::b::X;"), ("src/b.rs", "use crate::c::{Y, Z};"), ("src/c/mod.rs", "")];
    assert_eq!(circle(&of(&line)), None);
    for closing in [
        "\nuse crate::a::W;",
        "\nuse crate::{d::V, a::{self, W}};",
        "\nfn f() -> crate::a::W { todo!() }",
        "\nuse super::a::W;",
        "\nmod inner { use super::super::a::W; }",
        "\nmacro_rules! m { () => { $crate::a::W }; }",
    ] {
        let mut files = [&line[..], &[("src/d.rs", ""), ("src/lib.rs", "mod a; mod b; mod c; mod d;")]].concat();
        files[2].1 = closing;
        let found = circle(&of(&files)).unwrap_or_else(|| panic!("not found: {closing}"));
        let (first, last) = ("a imports b: src/a/mod.rs:1 (1 in all)", "c imports a: src/c/mod.rs:2 (1 in all)");
        assert!(found.contains(first) && found.contains(last) && found.lines().count() == 3, "{found}");
    }
    // Deeper in the room, `super` is the room itself, and what only tests import closes nothing.
    for (path, open) in [
        ("src/c/deep.rs", "use super::a::W; pub(super) fn f() {}"),
        ("src/c/mod.rs", "#[cfg(test)] mod tests { use crate::a::W; }"),
        ("src/c/mod.rs", "/// See [`crate::a::W`].\nfn f() {} // crate::a"),
        ("src/c/mod.rs", "mod a { } use self::a::W; use super::c::V;"),
    ] {
        assert_eq!(circle(&of(&[&line[..2], &[(path, open)]].concat())), None, "{open}");
    }
    // Two rooms are enough.
    let two = circle(&of(&[("src/a.rs", "use crate::b;"), ("src/b.rs", "use crate::a;")])).expect("a circle");
    assert_eq!(two.lines().count(), 2, "{two}");
}

#[test]
fn the_binary_imports_the_library_and_not_the_other_way_round() {
    let found = of(&[("src/cli/mod.rs", "use gqa2mla::a::X;"), ("src/a.rs", "")]);
    assert_eq!(found.keys().cloned().collect::<Vec<_>>(), [("cli".to_owned(), "a".to_owned())]);
    assert!(graph(&sources()).keys().all(|(_, to)| to != "cli"));
}
