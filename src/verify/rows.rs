//! Statistics of rows of logits, in f64.

use std::cmp::Ordering;

/// `ln sum exp(row)`.
pub(super) fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + row.iter().map(|x| (f64::from(*x) - max).exp()).sum::<f64>().ln()
}

/// Index of the largest element, the first of equals.
pub(super) fn argmax(row: &[f32]) -> usize {
    let better = |best: usize, i: usize| if row[i].total_cmp(&row[best]) == Ordering::Greater { i } else { best };
    (0..row.len()).fold(0, better)
}

/// One row of both models.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RowPair {
    /// Largest `|converted - source|`.
    pub max_abs: f64,
    /// `KL(source || converted)` in nats.
    pub kl: f64,
    /// Whether both prefer the same token.
    pub same_top1: bool,
    /// `-ln p(next)` of the source, where there is a next token.
    pub nll_source: Option<f64>,
    /// `-ln p(next)` of the converted model.
    pub nll_converted: Option<f64>,
}

impl RowPair {
    pub(super) fn new(source: &[f32], converted: &[f32], next: Option<u32>) -> Self {
        let max = f64::from(source.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        // KL = E_p[zs - zc] - lse_s + lse_c, with p the source's softmax.
        let (mut sum, mut weighted, mut max_abs) = (0.0, 0.0, 0.0f64);
        for (s, c) in source.iter().zip(converted) {
            let weight = (f64::from(*s) - max).exp();
            let difference = f64::from(*s) - f64::from(*c);
            sum += weight;
            weighted += weight * difference;
            max_abs = max_abs.max(difference.abs());
        }
        let lse_source = max + sum.ln();
        let lse_converted = log_sum_exp(converted);
        let nll = |row: &[f32], lse: f64| next.map(|t| lse - f64::from(row[t as usize]));
        Self {
            max_abs,
            kl: weighted / sum - lse_source + lse_converted,
            same_top1: argmax(source) == argmax(converted),
            nll_source: nll(source, lse_source),
            nll_converted: nll(converted, lse_converted),
        }
    }
}

/// For each row of windows that lie under each other: the token that follows, if the window has one.
pub(super) fn next_tokens(windows: &[Vec<u32>]) -> Vec<Option<u32>> {
    windows.iter().flat_map(|w| w.iter().skip(1).copied().map(Some).chain([None]).take(w.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_is_zero_for_shifted_logits_and_matches_the_definition() {
        let a: Vec<f32> = (0..500).map(|i| ((i * 37) % 101) as f32 * 0.1).collect();
        let shifted: Vec<f32> = a.iter().map(|x| x + 2.0).collect();
        let same = RowPair::new(&a, &shifted, Some(3));
        // The shift rounds each logit by up to 2^-20.
        assert!(same.kl.abs() < 1e-6 && (same.max_abs - 2.0).abs() < 2e-6 && same.same_top1, "{same:?}");
        let b: Vec<f32> = (0..500).map(|i| ((i * 53) % 89) as f32 * 0.1).collect();
        let log_p =
            |row: &[f32], i: usize| f64::from(row[i]) - row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        let kl: f64 = (0..500).map(|i| log_p(&a, i).exp() * (log_p(&a, i) - log_p(&b, i))).sum();
        let pair = RowPair::new(&a, &b, Some(7));
        assert!((pair.kl - kl).abs() < 1e-12 * kl, "{} {kl}", pair.kl);
        assert!((pair.nll_converted.unwrap() + log_p(&b, 7)).abs() < 1e-12);
    }

    #[test]
    fn next_tokens_stop_at_window_ends() {
        let windows = [vec![1, 2, 3], vec![4], vec![], vec![5, 6]];
        assert_eq!(next_tokens(&windows), [Some(2), Some(3), None, None, Some(6), None]);
    }
}
