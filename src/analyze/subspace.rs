//! How alike the leading left singular subspaces of layers are.

use ndarray::Array2;
use rayon::prelude::*;
use serde::Serialize;

/// Overlap of the leading token-space subspaces of every two layers.
///
/// With `U_i [T, r]` the leading left singular vectors of layer `i`'s matrix, the overlap of layers `i` and `j` is
/// `|U_i^T U_j|_F^2 / r`: the mean of the squared cosines of the `r` principal angles between the subspaces. It is 1 where
/// they are the same and 0 where they are orthogonal; two subspaces that have nothing to do with each other overlap by
/// `r / T`, the chance level. Unlike the centred kernel alignment (CKA) that xKV's paper shows, it does not weigh
/// directions by their energy, so that the first direction alone, which most layers share, does not decide it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Alignment {
    /// Singular vectors compared, `r`.
    pub rank: usize,
    /// Overlap of unrelated subspaces, `r / T`.
    pub chance: f64,
    /// Mean overlap of a layer with the next.
    pub neighbours: f64,
    /// Mean overlap of any two different layers.
    pub pairs: f64,
    /// `[layers][layers]`, symmetric, means over windows.
    pub overlap: Vec<Vec<f64>>,
}

/// Leading left singular vectors of every layer seen so far.
pub(super) struct Bases {
    pub rank: usize,
    tokens: usize,
    /// `[layer][window]`, each `[T, r]`.
    layers: Vec<Vec<Array2<f32>>>,
}

impl Bases {
    pub fn new(rank: usize, tokens: usize) -> Self {
        Self { rank, tokens, layers: Vec::new() }
    }

    /// Take in the next layer: one basis per window.
    pub fn add(&mut self, bases: Vec<Array2<f32>>) {
        self.layers.push(bases);
    }

    pub fn alignment(&self) -> Alignment {
        let n = self.layers.len();
        let pairs: Vec<(usize, usize)> = (0..n).flat_map(|i| (0..=i).map(move |j| (i, j))).collect();
        let values: Vec<f64> = pairs.par_iter().map(|&(i, j)| self.overlap(i, j)).collect();
        let mut overlap = vec![vec![0.0; n]; n];
        for ((i, j), value) in pairs.into_iter().zip(values) {
            overlap[i][j] = value;
            overlap[j][i] = value;
        }
        let mean = |of: Vec<f64>| if of.is_empty() { 1.0 } else { of.iter().sum::<f64>() / of.len() as f64 };
        Alignment {
            rank: self.rank,
            chance: self.rank as f64 / self.tokens as f64,
            neighbours: mean((1..n).map(|i| overlap[i][i - 1]).collect()),
            pairs: mean((0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| overlap[i][j]).collect()),
            overlap,
        }
    }

    fn overlap(&self, i: usize, j: usize) -> f64 {
        let windows = self.layers[i].iter().zip(&self.layers[j]);
        let one = |(a, b): (&Array2<f32>, &Array2<f32>)| {
            let product = crate::factor::linalg::matmul_f32_sequential(a.t(), b.view());
            product.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / self.rank as f64
        };
        windows.map(one).sum::<f64>() / self.layers[i].len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Columns `columns` of the identity.
    fn axes(columns: &[usize]) -> Array2<f32> {
        Array2::from_shape_fn((6, columns.len()), |(t, c)| f32::from(u8::from(columns[c] == t)))
    }

    #[test]
    fn the_overlap_is_the_mean_squared_cosine() {
        let mut bases = Bases::new(2, 6);
        bases.add(vec![axes(&[0, 1]), axes(&[0, 1])]);
        // The same plane, turned; a plane that shares one axis.
        let (sin, cos) = 0.7f32.sin_cos();
        let turned = axes(&[0, 1]).dot(&ndarray::arr2(&[[cos, -sin], [sin, cos]]));
        bases.add(vec![turned, axes(&[1, 2])]);
        bases.add(vec![axes(&[3, 4]), axes(&[4, 5])]);
        let a = bases.alignment();
        // Rounded sines of magnitude below 1: a few times 2^-24.
        let close = |x: f64, y: f64| assert!((x - y).abs() < 1e-6, "{x} {y}");
        close(a.overlap[0][0], 1.0);
        close(a.overlap[0][1], 0.75);
        close(a.overlap[1][0], 0.75);
        close(a.overlap[2][0], 0.0);
        close(a.neighbours, 0.375);
        close(a.pairs, 0.25);
        close(a.chance, 1.0 / 3.0);
    }
}
