//! Which windows of the calibration text the converted layers are fitted on.
//!
//! All of them pass through the source, which tells how far its heads look. The converted stream and what is fitted on it cost
//! more than that, and on a small model the last windows gain nothing that would not drown in the noise of which windows were
//! drawn (figures: docs/methods.md). The widest fit has a row of [`PER_VALUE`] tokens for every one of its unknowns.

use super::Job;

/// Tokens per value of the hidden state that the layers are fitted on.
const PER_VALUE: usize = 40;
/// Tokens for the narrowest models.
const LEAST: usize = 16_384;

/// Tokens to fit on, at most, as the settings have it. Gradient steps get all: time is not what they save.
pub(super) fn tokens(job: &Job<'_>) -> usize {
    match job.settings.fit_tokens {
        Some(tokens) => tokens,
        None if job.settings.refine > 0 => usize::MAX,
        None => (PER_VALUE * job.arch.hidden).max(LEAST),
    }
}

/// Windows to fit on, of windows of these lengths: evenly spread, as few as hold `tokens`, one at least.
fn chosen(lengths: &[usize], tokens: usize) -> Vec<bool> {
    let (count, total) = (lengths.len(), lengths.iter().sum::<usize>());
    if tokens >= total {
        return vec![true; count];
    }
    let wanted = (count * tokens).div_ceil(total).max(1);
    (0..count).map(|i| (i + 1) * wanted / count > i * wanted / count).collect()
}

/// `windows` with those to fit on in front, each part in order, and how many those are.
pub(super) fn in_front(windows: Vec<Vec<u32>>, tokens: usize) -> (Vec<Vec<u32>>, usize) {
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let chosen = chosen(&lengths, tokens);
    let count = chosen.iter().filter(|c| **c).count();
    let (mut front, mut rest) = (Vec::with_capacity(windows.len()), Vec::new());
    for (window, chosen) in windows.into_iter().zip(chosen) {
        (if chosen { &mut front } else { &mut rest }).push(window);
    }
    front.append(&mut rest);
    (front, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_to_fit_on_are_spread_and_hold_the_tokens() {
        let windows: Vec<Vec<u32>> = (0..10).map(|i| vec![i; 4]).collect();
        for (tokens, want) in [(1, vec![9]), (12, vec![3, 6, 9]), (13, vec![2, 4, 7, 9]), (20, vec![1, 3, 5, 7, 9])] {
            let (ordered, count) = in_front(windows.clone(), tokens);
            assert_eq!(ordered[..count].iter().map(|w| w[0]).collect::<Vec<_>>(), want, "{tokens}");
            assert!(count * 4 >= tokens);
            let mut all: Vec<u32> = ordered.iter().map(|w| w[0]).collect();
            assert!(all[count..].is_sorted());
            all.sort_unstable();
            assert_eq!(all, (0..10).collect::<Vec<_>>());
        }
        for tokens in [40, 41, usize::MAX] {
            assert_eq!(in_front(windows.clone(), tokens), (windows.clone(), 10));
        }
        assert_eq!(in_front(Vec::new(), 5), (Vec::new(), 0));
    }
}
