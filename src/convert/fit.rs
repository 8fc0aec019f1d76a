//! Which windows of the calibration text the converted layers are fitted on.
//!
//! All of them pass through the source, which tells how far its heads look. The converted stream and what is fitted on it cost
//! more than that, and on a small model the last windows gain nothing that would not drown in the noise of which windows were
//! drawn (figures: docs/methods.md). The widest fit has [`PER_VALUE`] tokens for every one of its unknowns.

use super::{CalibrationSettings, Job, Method, scores};

/// Tokens per value of the hidden state that the layers are fitted on.
const PER_VALUE: usize = 28;
/// Tokens for the narrowest models.
const LEAST: usize = 16_384;

/// Tokens of the longest calibration windows, at most. Far into a document distances are longer and each key has more rivals:
/// what `attention-aware` fits has to see some of it. Published methods take windows of one length, as published.
pub(super) fn longest_window(job: &Job<'_>) -> usize {
    let calibration = &job.settings.calibration;
    let longest = match job.settings.method {
        Method::AttentionAware => calibration.max_seq_len.unwrap_or(CalibrationSettings::LONGEST),
        _ => 0,
    };
    longest.max(calibration.seq_len).min(job.arch.max_position)
}

/// Tokens to fit on, at most, as the settings have it. Gradient steps get all: time is not what they save.
pub(super) fn tokens(job: &Job<'_>) -> usize {
    match job.settings.fit_tokens {
        Some(tokens) => tokens,
        None if job.settings.refine > 0 => usize::MAX,
        None => (PER_VALUE * job.arch.hidden).max(LEAST),
    }
}

/// `windows` in another order, and how many of them to fit on: in front those that refits on scores look at, evenly spread,
/// then more to fit on, evenly spread among the others, then the rest; each part in order. Those to fit on are as few as hold
/// `tokens` if all were of one length, but at least those in front.
pub(super) fn in_front(windows: Vec<Vec<u32>>, tokens: usize) -> (Vec<Vec<u32>>, usize) {
    let queries: usize = windows.iter().map(|window| scores::queries(window.len())).sum();
    let every = queries.div_ceil(scores::QUERIES).max(1);
    let (mut front, mut others) = (Vec::with_capacity(windows.len()), Vec::new());
    for (i, window) in windows.into_iter().enumerate() {
        (if i % every == 0 { &mut front } else { &mut others }).push(window);
    }
    let missing = tokens.saturating_sub(front.iter().map(Vec::len).sum());
    let (count, of_others) = (others.len(), others.iter().map(Vec::len).sum::<usize>());
    let wanted = if missing >= of_others { count } else { (count * missing).div_ceil(of_others) };
    let mut rest = Vec::new();
    for (i, window) in others.into_iter().enumerate() {
        (if (i + 1) * wanted / count > i * wanted / count { &mut front } else { &mut rest }).push(window);
    }
    let fitted = front.len();
    front.append(&mut rest);
    (front, fitted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_to_fit_on_are_spread_and_hold_the_tokens() {
        // 80 windows of 512 tokens: scores look at every fifth.
        let windows: Vec<Vec<u32>> = (0..80).map(|i| vec![i; 512]).collect();
        let first = |windows: &[Vec<u32>]| windows.iter().map(|w| w[0]).collect::<Vec<_>>();
        for (tokens, fitted) in [(1, 16), (8192, 16), (8193, 17), (24 * 1024, 48), (79 * 512, 79)] {
            let (ordered, count) = in_front(windows.clone(), tokens);
            assert_eq!(count, fitted, "{tokens}");
            assert_eq!(first(&ordered[..16]), (0..16).map(|i| 5 * i).collect::<Vec<_>>());
            assert!(first(&ordered[16..count]).is_sorted() && first(&ordered[count..]).is_sorted());
            let mut all = first(&ordered);
            all.sort_unstable();
            assert_eq!(all, (0..80).collect::<Vec<_>>());
        }
        for tokens in [80 * 512, usize::MAX] {
            assert_eq!(in_front(windows.clone(), tokens).1, 80);
        }
        assert_eq!(in_front(windows[..16].to_vec(), 5), (windows[..16].to_vec(), 16));
        assert_eq!(in_front(Vec::new(), 5), (Vec::new(), 0));
    }
}
