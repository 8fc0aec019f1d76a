//! Energy of groups of layers against rank.

use ndarray::Array1;
use serde::Serialize;

/// Shares of the energy for which the rank is told.
pub const LEVELS: [f64; 3] = [0.90, 0.95, 0.99];

/// The rank that keeps a share of the energy, and what the cache then costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EnergyRank {
    /// Share of the energy, of [`LEVELS`].
    pub energy: f64,
    /// Least rank of the whole group at which the mean over groups and windows reaches it.
    pub rank: usize,
    /// Values of `A [T, r]` and `B [r, G w]` over those of the group's matrices `[T, G w]`, for the tokens measured.
    pub cache_share: f64,
    /// `r / (G w)`: the same for a prompt so long that `B` does not count, if its rank were no larger.
    pub cache_share_long: f64,
}

/// One group of layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OneGroup {
    /// First layer.
    pub first: usize,
    /// Layers: as many as asked, or what is left at the end.
    pub layers: usize,
    /// Least rank for each of [`LEVELS`], of the mean over windows.
    pub ranks: Vec<usize>,
}

/// Energy against rank for one group size.
///
/// The energy that rank `r` keeps is `sum_{i <= r} s_i^2 / sum_i s_i^2` with `s_i` the singular values of the group's
/// matrices side by side: the share of their squared norm that the best rank-`r` approximation keeps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupSpectrum {
    /// Layers per group, `G`.
    pub group: usize,
    /// `min(T, G w)`.
    pub max_rank: usize,
    /// Ranks for [`LEVELS`].
    pub ranks: Vec<EnergyRank>,
    /// Energy kept at ranks `1 ..= max_rank`, mean over windows and the groups that have `G` layers.
    pub energy: Vec<f64>,
    /// Each group by itself.
    pub each: Vec<OneGroup>,
}

/// Sums of shares over windows, group after group.
pub(super) struct SpectrumSum {
    pub group: usize,
    tokens: usize,
    width: usize,
    layers: usize,
    windows: usize,
    /// Groups so far: first layer, layers, sum over windows of the shares at every rank, windows summed.
    groups: Vec<(usize, usize, Array1<f64>, usize)>,
}

impl SpectrumSum {
    pub fn new(group: usize, (tokens, width): (usize, usize), (layers, windows): (usize, usize)) -> Self {
        debug_assert!(group >= 1 && group <= layers);
        Self { group, tokens, width, layers, windows, groups: Vec::new() }
    }

    /// Take in one window of the group whose last layer is `last`: squared singular values, descending, `[T]`.
    pub fn add(&mut self, last: usize, squares: &Array1<f64>) {
        let first = last / self.group * self.group;
        let count = last + 1 - first;
        let shares = energy(squares, self.tokens.min(count * self.width));
        match self.groups.last_mut() {
            Some(g) if g.0 == first => {
                g.2 += &shares;
                g.3 += 1;
            }
            _ => self.groups.push((first, count, shares, 1)),
        }
    }

    pub fn finish(self) -> GroupSpectrum {
        debug_assert!(self.groups.iter().all(|g| g.3 == self.windows));
        debug_assert_eq!(self.groups.iter().map(|g| g.1).sum::<usize>(), self.layers);
        let max_rank = self.tokens.min(self.group * self.width);
        let mut mean = Array1::<f64>::zeros(max_rank);
        let whole = self.groups.iter().filter(|g| g.1 == self.group);
        let mut count = 0.0;
        for g in whole {
            mean += &(&g.2 / g.3 as f64);
            count += 1.0;
        }
        mean /= f64::max(count, 1.0);
        let columns = self.group * self.width;
        let rank = |&level: &f64| {
            let rank = least_rank(&mean, level);
            EnergyRank {
                energy: level,
                rank,
                cache_share: (rank * (self.tokens + columns)) as f64 / (self.tokens * columns) as f64,
                cache_share_long: rank as f64 / columns as f64,
            }
        };
        let one = |(first, layers, sum, windows): &(usize, usize, Array1<f64>, usize)| {
            let shares = sum / *windows as f64;
            let ranks = LEVELS.iter().map(|&level| least_rank(&shares, level)).collect();
            OneGroup { first: *first, layers: *layers, ranks }
        };
        GroupSpectrum {
            group: self.group,
            max_rank,
            ranks: LEVELS.iter().map(rank).collect(),
            each: self.groups.iter().map(one).collect(),
            energy: mean.to_vec(),
        }
    }
}

/// Share of the sum that the first `1 ..= max_rank` values hold. Rounding leaves eigenvalues a little below zero: those are
/// zeros. A matrix of zeros has nothing to lose.
fn energy(squares: &Array1<f64>, max_rank: usize) -> Array1<f64> {
    let squares: Vec<f64> = squares.iter().take(max_rank).map(|s| s.max(0.0)).collect();
    let total: f64 = squares.iter().sum();
    if total <= 0.0 {
        return Array1::ones(max_rank);
    }
    let mut kept = 0.0;
    squares
        .iter()
        .map(|s| {
            kept += s;
            kept / total
        })
        .collect()
}

/// The least rank whose share reaches `level`.
fn least_rank(shares: &Array1<f64>, level: f64) -> usize {
    shares.iter().position(|s| *s >= level).map_or(shares.len(), |i| i + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_adds_up_to_one_and_zeros_have_nothing_to_lose() {
        let shares = energy(&Array1::from(vec![6.0, 3.0, 1.0, -1e-17]), 4);
        assert_eq!(shares.to_vec(), [0.6, 0.9, 1.0, 1.0]);
        assert_eq!((least_rank(&shares, 0.9), least_rank(&shares, 0.91)), (2, 3));
        assert_eq!(energy(&Array1::zeros(3), 2).to_vec(), [1.0, 1.0]);
    }

    #[test]
    fn a_group_left_at_the_end_is_told_but_not_in_the_mean() {
        let mut sum = SpectrumSum::new(2, (3, 2), (3, 1));
        sum.add(1, &Array1::from(vec![9.0, 1.0, 0.0]));
        sum.add(2, &Array1::from(vec![1.0, 1.0, 0.0]));
        let found = sum.finish();
        assert_eq!(found.energy, [0.9, 1.0, 1.0]);
        assert_eq!(found.ranks.iter().map(|r| r.rank).collect::<Vec<_>>(), [1, 2, 2]);
        let each: Vec<_> = found.each.iter().map(|g| (g.first, g.layers, g.ranks.clone())).collect();
        assert_eq!(each, [(0, 2, vec![1, 2, 2]), (2, 1, vec![2, 2, 2])]);
        // Rank 1 of 3 tokens and 4 columns: 7 values instead of 12.
        assert_eq!(found.ranks[0].cache_share, 7.0 / 12.0);
    }
}
