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
        let mut widths: Vec<usize> = self.columns.iter().map(|(h, _)| length(h)).collect();
        for row in &self.rows {
            for (w, cell) in widths.iter_mut().zip(row) {
                *w = (*w).max(length(cell));
            }
        }
        if let Some((last, fixed)) = widths.split_last_mut() {
            let taken: usize = fixed.iter().map(|w| w + GAP).sum();
            *last = (*last).min(width.saturating_sub(taken).max(NARROWEST));
        }
        let mut out = String::new();
        if self.columns.iter().any(|(h, _)| !h.is_empty()) {
            let headings: Vec<&str> = self.columns.iter().map(|(h, _)| h.as_str()).collect();
            self.line(&headings, &widths, &mut out);
            let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
            self.line(&rule.iter().map(String::as_str).collect::<Vec<_>>(), &widths, &mut out);
        }
        for row in &self.rows {
            let Some((last, fixed)) = row.split_last() else { continue };
            let wrapped = wrap(last, widths.last().copied().unwrap_or(width));
            for (i, piece) in wrapped.iter().enumerate() {
                let mut cells: Vec<&str> =
                    if i == 0 { fixed.iter().map(String::as_str).collect() } else { vec![""; fixed.len()] };
                cells.push(piece);
                self.line(&cells, &widths, &mut out);
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
