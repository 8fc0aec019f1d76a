//! How much of the calibration text `attention-aware` uses, in windows of which lengths and in which order.
//!
//! On a small model the last of many windows gain nothing that would not drown in the noise of which windows were drawn (figures:
//! docs/methods.md), and each costs as much as the first. The widest fit has [`PER_VALUE`] tokens for every one of its unknowns.

use super::{CalibrationSettings, Job, Method, scores};

/// Tokens per value of the hidden state.
const PER_VALUE: usize = 28;
/// Tokens for the narrowest models.
const LEAST: usize = 16_384;
/// How many times as long as the longest calibration window the one is that splits are compared on; the first that the model
/// has positions for.
const BEYOND: [usize; 2] = [4, 2];

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

/// Tokens of the window on which splits show what they are worth beyond all that was fitted, where more than one is open.
pub(super) fn longer_window(job: &Job<'_>) -> Option<usize> {
    if job.settings.method != Method::AttentionAware || job.splits.len() == 1 {
        return None;
    }
    let calibration = &job.settings.calibration;
    // A survey is to take less than the conversion.
    let most = job.arch.max_position.min(samples(job, calibration).saturating_mul(calibration.seq_len) / 2);
    BEYOND.map(|times| times * longest_window(job)).into_iter().find(|length| *length <= most)
}

/// Windows of `seq_len` tokens that all the tokens used would fill, where the text holds them. Published methods use what they
/// are given; gradient steps too, for time is not what they save.
pub(super) fn samples(job: &Job<'_>, calibration: &CalibrationSettings) -> usize {
    let tokens = match job.settings.fit_tokens {
        _ if job.settings.method != Method::AttentionAware => usize::MAX,
        Some(tokens) => tokens,
        None if job.settings.refine > 0 => usize::MAX,
        None => (PER_VALUE * job.arch.hidden).max(LEAST),
    };
    calibration.samples.min(tokens.div_ceil(calibration.seq_len.max(1)))
}

/// `windows` in another order: in front those that refits on scores look at, evenly spread, then the others; both in order.
pub(super) fn in_front(windows: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
    let queries: usize = windows.iter().map(|window| scores::queries(window.len())).sum();
    let every = queries.div_ceil(scores::QUERIES).max(1);
    let (mut front, mut others) = (Vec::with_capacity(windows.len()), Vec::new());
    for (i, window) in windows.into_iter().enumerate() {
        (if i % every == 0 { &mut front } else { &mut others }).push(window);
    }
    front.append(&mut others);
    front
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_that_scores_look_at_come_first() {
        // 80 windows of 512 tokens: scores look at every fifth.
        let windows: Vec<Vec<u32>> = (0..80).map(|i| vec![i; 512]).collect();
        let first = |windows: &[Vec<u32>]| windows.iter().map(|w| w[0]).collect::<Vec<_>>();
        let ordered = in_front(windows.clone());
        assert_eq!(first(&ordered[..16]), (0..16).map(|i| 5 * i).collect::<Vec<_>>());
        assert!(first(&ordered[16..]).is_sorted());
        let mut all = first(&ordered);
        all.sort_unstable();
        assert_eq!(all, (0..80).collect::<Vec<_>>());
        assert_eq!(in_front(windows[..16].to_vec()), windows[..16]);
        assert!(in_front(Vec::new()).is_empty());
    }
}
