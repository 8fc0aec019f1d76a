//! Rooms (folders and top-level files of `src/`) import each other without circles.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::source_text::{SourceFile, Token, outside_tests, sources};

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
    if let Some(circle) = circle(&graph(&sources())) {
        panic!("rooms import each other in a circle:\n{circle}");
    }
}

/// Rooms in the order of the table in docs/architecture.md.
fn documented(page: &str) -> Vec<String> {
    let rows = page.lines().skip_while(|line| !line.starts_with("| room |")).skip(2);
    let name = |line: &str| line.split('`').nth(1).map(|name| name.trim_end_matches('/').to_owned());
    rows.take_while(|line| line.starts_with('|')).filter_map(name).collect()
}

/// Imports that go down a table, and rooms that are missing from it or stand in it for nothing.
fn against(order: &[String], graph: &Graph) -> Vec<String> {
    let place = |room: &String| order.iter().position(|name| name == room);
    let mut out = Vec::new();
    let rooms: BTreeSet<&String> = graph.keys().flat_map(|(from, to)| [from, to]).collect();
    out.extend(rooms.iter().filter(|room| place(room).is_none()).map(|room| format!("`{room}` is not in the table")));
    for ((from, to), places) in graph {
        if place(from).zip(place(to)).is_some_and(|(from, to)| from < to) {
            out.push(format!("`{from}` stands above `{to}` and imports it: {}", places[0]));
        }
    }
    out
}

#[test]
fn the_table_of_rooms_is_the_one_that_the_imports_draw() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/architecture.md");
    let order = documented(&fs_err::read_to_string(page).expect("readable"));
    assert!(order.len() > 15, "{order:?}");
    let wrong = against(&order, &graph(&sources()));
    assert!(wrong.is_empty(), "docs/architecture.md:\n{}", wrong.join("\n"));
    // A table that is not in order is noticed.
    let graph = of(&[("src/a.rs", "use crate::b::X;"), ("src/b.rs", "")]);
    let order = ["b".to_owned(), "a".to_owned()];
    assert!(against(&order, &graph).is_empty());
    assert_eq!(against(&[order[1].clone(), order[0].clone()], &graph).len(), 1);
    assert_eq!(against(&order[..1], &graph).len(), 1);
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
