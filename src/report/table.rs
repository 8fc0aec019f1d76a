//! Tables of plain text that fit a width.

/// Which side of its column a cell keeps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Rows of text under headings. Widths are counted in characters.
#[derive(Debug, Clone, Default)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

/// Blanks between two columns.
const GAP: usize = 2;
/// A column is never wrapped to less than this.
const NARROWEST: usize = 16;

impl Table {
    /// A table with these headings. A heading that starts with `>` is that of a column of numbers.
    pub fn new(headings: &[&str]) -> Self {
        let columns = headings.iter().map(|h| match h.strip_prefix('>') {
            Some(h) => (h.to_owned(), Align::Right),
            None => ((*h).to_owned(), Align::Left),
        });
        Self { columns: columns.collect(), rows: Vec::new() }
    }

    /// A table of `key  value` lines without headings.
    pub fn pairs() -> Self {
        Self::new(&["", ""])
    }

    /// Append a row; missing cells are empty, surplus ones are dropped.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) -> &mut Self {
        let mut row: Vec<String> = cells.into_iter().map(Into::into).take(self.columns.len()).collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
        self
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Text of at most `width` characters a line where words allow; the last column wraps, others never do.
    /// Every line ends with a newline and has no trailing blanks.
    pub fn render(&self, width: usize) -> String {
        self.render_wrapping(width, self.columns.len().saturating_sub(1))
    }

    /// As [`Table::render`], where the columns from `first` on wrap: those that are wider than their share of the room give
    /// way. Headings never wrap.
    pub fn render_wrapping(&self, width: usize, first: usize) -> String {
        let mut widths: Vec<usize> = self.columns.iter().map(|(h, _)| length(h)).collect();
        for row in &self.rows {
            for (w, cell) in widths.iter_mut().zip(row) {
                *w = (*w).max(length(cell));
            }
        }
        let taken: usize = widths.iter().take(first).map(|w| w + GAP).sum();
        let mut wrapping: Vec<usize> = (first..widths.len()).collect();
        let mut room = width.saturating_sub(taken + GAP * wrapping.len().saturating_sub(1));
        // The narrowest first: what it leaves of its share is the others'.
        wrapping.sort_by_key(|i| widths[*i]);
        for (done, &i) in wrapping.iter().enumerate() {
            let share = room / (wrapping.len() - done);
            widths[i] = widths[i].min(share.max(NARROWEST).max(length(&self.columns[i].0)));
            room = room.saturating_sub(widths[i]);
        }
        let mut out = String::new();
        if self.columns.iter().any(|(h, _)| !h.is_empty()) {
            let headings: Vec<&str> = self.columns.iter().map(|(h, _)| h.as_str()).collect();
            self.line(&headings, &widths, &mut out);
            let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
            self.line(&rule.iter().map(String::as_str).collect::<Vec<_>>(), &widths, &mut out);
        }
        for row in &self.rows {
            let cells: Vec<Vec<String>> = row
                .iter()
                .zip(&widths)
                .enumerate()
                .map(|(i, (cell, width))| if i < first { vec![cell.clone()] } else { wrap(cell, *width) })
                .collect();
            for i in 0..cells.iter().map(Vec::len).max().unwrap_or(0) {
                let line: Vec<&str> = cells.iter().map(|c| c.get(i).map_or("", String::as_str)).collect();
                self.line(&line, &widths, &mut out);
            }
        }
        out
    }

    /// The same rows as a Markdown table. Bars in cells are escaped.
    pub fn markdown(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let mut out = line(self.columns.iter().map(|(h, _)| h.clone()).collect());
        out += &line(
            self.columns.iter().map(|(_, a)| if *a == Align::Right { "---:".into() } else { "---".into() }).collect(),
        );
        for row in &self.rows {
            out += &line(row.iter().map(|c| c.replace('|', "\\|").replace('\n', " ")).collect());
        }
        out
    }

    fn line(&self, cells: &[&str], widths: &[usize], out: &mut String) {
        let mut text = String::new();
        for (i, (cell, width)) in cells.iter().zip(widths).enumerate() {
            if i > 0 {
                text.push_str(&" ".repeat(GAP));
            }
            let fill = " ".repeat(width.saturating_sub(length(cell)));
            match self.columns[i].1 {
                Align::Left => {
                    text.push_str(cell);
                    text.push_str(&fill);
                }
                Align::Right => {
                    text.push_str(&fill);
                    text.push_str(cell);
                }
            }
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
}

fn length(s: &str) -> usize {
    s.chars().count()
}

/// Break `text` at blanks into lines of at most `width` characters; a longer word stays whole. At least one line.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.split('\n') {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            if !line.is_empty() && length(&line) + 1 + length(word) > width {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_end_in_one_column_and_the_last_column_wraps() {
        let mut t = Table::new(&["name", ">n", "why"]);
        t.row(["a", "1", "short"]).row(["bb", "1000", "a reason of several words that does not fit"]);
        let text = t.render(40);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.iter().all(|l| l.chars().count() <= 40), "{text}");
        assert!(lines.len() > 4, "the long cell wraps: {text}");
        assert_eq!(lines[2].find('1').map(|i| i + 1), lines[3].find("1000").map(|i| i + 4));
        assert!(lines.iter().all(|l| !l.ends_with(' ')));
    }

    #[test]
    fn several_columns_share_the_room() {
        let mut t = Table::new(&["", "a", "b", "c"]);
        t.row([
            "key",
            "short",
            "a cell of many words that does not fit in its share",
            "another one of several words too",
        ]);
        let text = t.render_wrapping(60, 1);
        assert!(text.lines().all(|l| l.chars().count() <= 60), "{text}");
        // The short column leaves its room to the others.
        assert!(text.lines().count() <= 5, "{text}");
        for word in ["key", "short", "share", "another", "too"] {
            assert!(text.contains(word), "{text}");
        }
        assert_eq!(t.render(1000), t.render_wrapping(1000, 1));
    }

    #[test]
    fn wrapping_loses_no_word() {
        let text = "one two three four five sixsixsixsixsixsixsix seven";
        for width in 1..60 {
            assert_eq!(wrap(text, width).join(" "), text);
        }
        assert_eq!(wrap("", 10), [""]);
    }

    #[test]
    fn markdown_escapes_bars() {
        let mut t = Table::new(&["a", ">b"]);
        t.row(["x|y", "1"]);
        assert_eq!(t.markdown(), "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n");
    }
}
