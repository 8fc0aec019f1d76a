//! How much of the calibration text `attention-aware` uses, in windows of which lengths and in which order.
//!
//! On a small model the last of many windows gain nothing that would not drown in the noise of which windows were drawn (figures:
//! docs/methods.md), and each costs as much as the first. The widest fit has [`PER_VALUE`] tokens for every one of its unknowns.

use super::{AttentionAware, scores};
use crate::calibrate::CalibrationSettings;
use crate::error::ConvertError;
use crate::methods::{Candidates, Case, Split, TextNeed};

/// Tokens per value of the hidden state.
const PER_VALUE: usize = 28;
/// Tokens for the narrowest models.
const LEAST: usize = 16_384;
/// How many times as long as the longest calibration window the one is that splits are compared on; the first that the model
/// has positions for.
const BEYOND: [usize; 2] = [4, 2];

/// Tokens of the longest calibration windows, at most. Far into a document distances are longer and each key has more rivals:
/// what is fitted has to see some of it.
pub(super) fn longest_window(case: &Case<'_>) -> usize {
    let calibration = &case.settings.calibration;
    let longest = calibration.max_seq_len.unwrap_or(CalibrationSettings::LONGEST);
    longest.max(calibration.seq_len).min(case.arch.max_position)
}

/// The text that is calibrated on.
///
/// # Errors
/// `--fit-tokens` of less than four for each value of the cache.
pub(super) fn need(
    method: &AttentionAware,
    case: &Case<'_>,
    candidates: &Candidates,
) -> Result<TextNeed, ConvertError> {
    let Split { rope, rank } = candidates.splits[0];
    let least = 4 * (rope + rank);
    if let Some(tokens) = method.fit_tokens.filter(|n| *n < least) {
        return Err(ConvertError::refused(
            format!(
                "--fit-tokens {tokens} is too few: at least {least} are needed, four for each of the {} cached values",
                rope + rank
            ),
            "leave it out, or allow more",
        ));
    }
    let calibration = &case.settings.calibration;
    let samples = |seq_len| samples(method, case, calibration, seq_len);
    let longest = longest_window(case);
    // The window on which splits show what they are worth beyond all that was fitted, where more than one is open.
    let longer = (candidates.splits.len() > 1).then(|| {
        // A survey is to take less than the conversion.
        let most = case.arch.max_position.min(samples(calibration.seq_len).saturating_mul(calibration.seq_len) / 2);
        BEYOND.map(|times| times * longest).into_iter().find(|length| *length <= most)
    });
    Ok(TextNeed {
        longest,
        samples: samples(calibration.seq_len.min(case.arch.max_position)),
        longer: longer.flatten(),
        least,
        measures: false,
    })
}

/// Windows of `seq_len` tokens that all the tokens used would fill, where the text holds them. Gradient steps use what they
/// are given, for time is not what they save.
fn samples(method: &AttentionAware, case: &Case<'_>, calibration: &CalibrationSettings, seq_len: usize) -> usize {
    let tokens = match method.fit_tokens {
        Some(tokens) => tokens,
        None if method.refine > 0 => usize::MAX,
        None => (PER_VALUE * case.arch.hidden).max(LEAST),
    };
    calibration.samples.min(tokens.div_ceil(seq_len.max(1)))
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
