//! Text windows for measuring.

use std::ops::Range;

/// Cut `tokens` into windows of exactly `seq_len`, dropping the rest; keep windows `0, every, 2 every, ...`, of those at
/// most `limit`.
///
/// Empty when the text is shorter than one window, or `seq_len` is 0. `every` 0 counts as 1.
pub fn windows_from_text(tokens: &[u32], seq_len: usize, every: usize, limit: Option<usize>) -> Vec<Vec<u32>> {
    if seq_len == 0 {
        return Vec::new();
    }
    let windows = tokens.chunks_exact(seq_len).step_by(every.max(1)).map(<[u32]>::to_vec);
    windows.take(limit.unwrap_or(usize::MAX)).collect()
}

/// Rows of windows that lie under each other.
pub(super) fn windows_of(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut first = 0;
    let rows = |&length: &usize| {
        let rows = first..first + length;
        first += length;
        rows
    };
    lengths.iter().map(rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_whole_and_evenly_spaced() {
        let tokens: Vec<u32> = (0..47).collect();
        let all = windows_from_text(&tokens, 10, 1, None);
        assert_eq!(all.concat(), (0..40).collect::<Vec<_>>());
        let some = windows_from_text(&tokens, 10, 3, None);
        assert_eq!(some, [all[0].clone(), all[3].clone()]);
        assert_eq!(windows_from_text(&tokens, 10, 1, Some(2)), all[..2]);
        assert!(windows_from_text(&tokens, 48, 1, None).is_empty());
        assert!(windows_from_text(&tokens, 0, 1, None).is_empty());
    }
}
