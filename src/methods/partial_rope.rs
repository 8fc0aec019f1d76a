//! Pairs that keep their rotation, and pairs that lose it, with the rows on both sides of the score in step.
//!
//! X-EcoMLA and MHA2MLA rotate a part of each head and leave the rest without positions. Which part is a choice of pairs
//! `(j, j + d/2)`: a kept pair goes, real and imaginary row, to a slot of the shared rotated key and turns there at its own
//! frequency; the rows of the other pairs, of queries and keys alike, meet through the latent.

use ndarray::{Array1, Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use crate::arch::AttentionSource;

/// Which pairs of a head keep their rotation (MHA2MLA, arXiv 2502.14837, section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PartialRope {
    /// The fastest.
    High,
    /// The slowest.
    Low,
    /// Evenly spread, beginning with the fastest.
    Uniform,
    /// Those with the largest `sum_h mean |q_{h,j}| mean |k_j|` on calibration text.
    #[serde(rename = "2-norm")]
    TwoNorm,
}

impl PartialRope {
    /// Every rule.
    pub const ALL: [PartialRope; 4] = [PartialRope::High, PartialRope::Low, PartialRope::Uniform, PartialRope::TwoNorm];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            PartialRope::High => "high",
            PartialRope::Low => "low",
            PartialRope::Uniform => "uniform",
            PartialRope::TwoNorm => "2-norm",
        }
    }

    /// `count` of the first `turned` pairs of a head, ascending. `scores` holds one number per pair, for
    /// [`PartialRope::TwoNorm`]; ties go to the faster pair.
    pub fn choose(self, turned: usize, count: usize, scores: &[f64]) -> Vec<usize> {
        let count = count.min(turned);
        match self {
            PartialRope::High => (0..count).collect(),
            PartialRope::Low => (turned - count..turned).collect(),
            PartialRope::Uniform => (0..count).map(|i| i * turned / count).collect(),
            PartialRope::TwoNorm => {
                let score = |j: usize| scores.get(j).copied().unwrap_or(0.0);
                let mut pairs: Vec<usize> = (0..turned).collect();
                pairs.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
                pairs.truncate(count);
                pairs.sort_unstable();
                pairs
            }
        }
    }
}

/// One pair of the shared rotated key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Pair of the source.
    pub pair: usize,
    /// KV head whose key it holds, read by that head's queries alone; `None`: the mean of all KV heads, read by all.
    pub head: Option<usize>,
}

/// Rotated queries and the shared rotated key of a choice of pairs.
#[derive(Debug, Clone)]
pub struct Rotated {
    /// `[H d_R, columns of the queries]`.
    pub q: Array2<f64>,
    /// `[H d_R]`.
    pub q_bias: Option<Array1<f64>>,
    /// `[d_R, D]`.
    pub k: Array2<f64>,
    /// `[d_R]`.
    pub k_bias: Option<Array1<f64>>,
    /// Radians per token of each slot, `[d_R / 2]`.
    pub frequencies: Vec<f64>,
}

/// Place kept pairs in their slots: pair `j` of slot `p` becomes rows `(2p, 2p + 1)`. `queries` `[H d, any]` is the query
/// projection, or what is left of it after a query latent.
pub fn rotate(source: &AttentionSource, slots: &[Slot], queries: ArrayView2<'_, f64>) -> Rotated {
    let (heads, g, d, n) = (source.heads, source.kv_heads, source.head_dim, source.group());
    let row = |i: usize| (slots[i / 2].head, slots[i / 2].pair + i % 2 * (d / 2));
    let width = 2 * slots.len();
    let query_rows: Vec<Option<usize>> = (0..heads * width)
        .map(|i| {
            let (h, (head, row)) = (i / width, row(i % width));
            head.is_none_or(|a| a == h / n).then_some(h * d + row)
        })
        .collect();
    let mut k = Array2::zeros((width, source.hidden()));
    let mut k_bias = source.bk.as_ref().map(|_| Array1::zeros(width));
    for i in 0..width {
        let (head, row) = row(i);
        let from = head.map_or(0..g, |a| a..a + 1);
        let share = 1.0 / from.len() as f64;
        for a in from {
            k.row_mut(i).scaled_add(share, &source.wk.row(a * d + row));
            if let (Some(out), Some(bk)) = (&mut k_bias, &source.bk) {
                out[i] += share * bk[a * d + row];
            }
        }
    }
    Rotated {
        q: gather(queries, &query_rows),
        q_bias: source.bq.as_ref().map(|b| gather_entries(b, &query_rows)),
        k,
        k_bias,
        frequencies: slots.iter().map(|s| source.inv_freq[s.pair]).collect(),
    }
}

/// Rows of each KV head that no slot holds, in the order of the source: `[g]` lists of rows below `d`.
pub fn still_rows(source: &AttentionSource, slots: &[Slot]) -> Vec<Vec<usize>> {
    let half = source.head_dim / 2;
    let held = |a: usize, j: usize| slots.iter().any(|s| s.pair == j && s.head.is_none_or(|own| own == a));
    (0..source.kv_heads).map(|a| (0..source.head_dim).filter(|i| !held(a, i % half)).collect()).collect()
}

/// Rows of queries without rotation, `width` per head: those of [`still_rows`] of its KV head, then zeros.
pub fn still_queries(source: &AttentionSource, still: &[Vec<usize>], width: usize) -> Vec<Option<usize>> {
    let (d, n) = (source.head_dim, source.group());
    let row = |i: usize| still[i / width / n].get(i % width).map(|row| i / width * d + row);
    (0..source.heads * width).map(row).collect()
}

/// Rows of `m`, zeros where there is none.
pub fn gather(m: ArrayView2<'_, f64>, rows: &[Option<usize>]) -> Array2<f64> {
    let mut out = Array2::zeros((rows.len(), m.ncols()));
    for (mut to, from) in out.rows_mut().into_iter().zip(rows) {
        if let Some(from) = from {
            to.assign(&m.row(*from));
        }
    }
    out
}

/// Entries of `b`, zeros where there is none.
pub fn gather_entries(b: &Array1<f64>, rows: &[Option<usize>]) -> Array1<f64> {
    rows.iter().map(|from| from.map_or(0.0, |i| b[i])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_choose_what_they_say() {
        let scores = [1.0, 5.0, 2.0, 5.0, 0.0, 3.0, 9.0, 9.0];
        for (rule, pairs) in [
            (PartialRope::High, [0, 1, 2]),
            (PartialRope::Low, [3, 4, 5]),
            (PartialRope::Uniform, [0, 2, 4]),
            (PartialRope::TwoNorm, [1, 3, 5]),
        ] {
            // The last two pairs do not turn.
            assert_eq!(rule.choose(6, 3, &scores), pairs, "{}", rule.name());
            assert_eq!(rule.choose(6, 6, &scores), [0, 1, 2, 3, 4, 5]);
        }
    }
}
