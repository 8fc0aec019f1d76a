//! Folding a rotation of the latent and the gain of its norm into an MLA layer's weights (docs/maths.md, 11).
//!
//! An RMSNorm without its gain commutes with an orthogonal `U`: `ms(U^T c) = ms(c)`, so `norm(U^T c) = U^T norm(c)`. Hence
//!
//! ```text
//! kv_a[latent rows] <- U^T W_a          (the bias likewise; the rows of the RoPE key stay)
//! kv_a_layernorm    <- g                 one number for all coordinates
//! kv_b              <- W_b diag(gamma / g) U
//! ```
//!
//! is the same function (TPLA, arXiv 2508.15881, where `g = 1`). Here `g` is the gain itself where it is one number already:
//! in the neutralised norm of our own conversions, whose gain lifts the latent to the scale that low-precision caches want.
//! Otherwise it is the power of two nearest to the gain's root mean square, so that what is cached keeps its scale.

use ndarray::{Array1, Array2, ArrayView2, s};

use super::LatentTransform;
use crate::arch::MlaShape;
use crate::factor::linalg::matmul;
use crate::factor::norm::{CONSTANT_RATIO, neutral_scales};

/// The weights of one MLA layer that touch the latent, with `r` the width of the latent, `d_R` of the RoPE key, `D` of the
/// hidden state.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentWeights {
    /// `kv_a_proj_with_mqa`, `[r + d_R, D]`, rows `[latent | RoPE key]`.
    pub kv_a: Array2<f64>,
    /// Its bias, `[r + d_R]`.
    pub bias: Option<Array1<f64>>,
    /// `kv_a_layernorm`, `[r]`; `None` in a class that does not norm the latent.
    pub gain: Option<Array1<f64>>,
    /// `kv_b_proj`, `[H (d_N + d_V), r]`.
    pub kv_b: Array2<f64>,
}

/// A norm does nothing where the mean square of its latents is at most this part of its epsilon: scaling coordinates changes its
/// output by less than half of this.
const NEUTRAL: f64 = 1e-3;

impl LatentWeights {
    /// Whether the norm of these latents does nothing, whatever the input: there is none, or its epsilon `eps` outweighs every
    /// latent that an RMSNorm with gain `input` `[D]` on the layer's input allows. Such an input `x` is shorter than `sqrt(D)`
    /// before its gain, so that `ms(W x + b) <= (|W diag(input)| sqrt(D) + |b|)^2 / r`; on average over directions it is
    /// `|W diag(input)|^2 / r`, which is what is compared. An empty `input` bounds nothing.
    pub fn is_neutral(&self, input: &[f32], eps: f64) -> bool {
        if self.gain.is_none() {
            return true;
        }
        if input.len() != self.kv_a.ncols() {
            return false;
        }
        let r = self.rank();
        let rows = self.kv_a.slice(s![..r, ..]);
        let weights: f64 = rows
            .rows()
            .into_iter()
            .flat_map(|row| row.into_iter().zip(input))
            .map(|(w, g)| (w * f64::from(*g)).powi(2))
            .sum();
        let bias: f64 = self.bias.iter().flat_map(|b| b.slice(s![..r]).to_vec()).map(|b| b * b).sum();
        (weights + bias) / r as f64 <= NEUTRAL * eps
    }

    /// The coordinate of the latent that is a constant and outweighs the others, so that the norm does nothing
    /// (docs/maths.md, section 5): its row of `kv_a` and its column of `kv_b` are zero, as is its gain, and it alone has a bias.
    pub fn constant_slot(&self) -> Option<usize> {
        let (bias, gain) = (self.bias.as_ref()?, self.gain.as_ref()?);
        let slot = (0..self.rank()).find(|i| bias[*i] != 0.0)?;
        let alone = (slot + 1..self.rank()).all(|i| bias[i] == 0.0);
        let unread = gain[slot] == 0.0 && self.kv_b.column(slot).iter().all(|v| *v == 0.0);
        (alone && unread && self.kv_a.row(slot).iter().all(|v| *v == 0.0)).then_some(slot)
    }

    /// The same function without a constant in the latent, which could not be rotated or cut: the norm, of epsilon `eps`, is
    /// neutralised by small rows instead. Weights without a constant stay as they are.
    pub fn fold_constant(&mut self, eps: f64) {
        let (Some(slot), r) = (self.constant_slot(), self.rank() as f64) else { return };
        let (Some(bias), Some(gain)) = (&mut self.bias, &mut self.gain) else { return };
        let constant = bias[slot].abs();
        let scales = neutral_scales(constant / (CONSTANT_RATIO * r.sqrt()), eps);
        // What the norm multiplies a coordinate by, over what the small rows leave of it.
        let root = (constant * constant / r + eps).sqrt();
        for (mut column, g) in self.kv_b.columns_mut().into_iter().zip(gain.iter()) {
            column *= g / root * scales.up;
        }
        gain.fill(scales.weight);
        bias[slot] = 0.0;
        let mut rows = self.kv_a.slice_mut(s![..self.kv_b.ncols(), ..]);
        rows *= scales.down;
    }

    /// What the weights alone read of white latents, `[r, r]`: `sum_h (v_h / k_h) UK_h^T UK_h + UV_h^T O_h^T O_h UV_h`, with
    /// `k_h` and `v_h` the traces of the two terms, so that a head's scores weigh as much as its outputs. `output` is `o_proj`
    /// `[D, H d_V]`.
    pub fn read_by_weights(&self, shape: &MlaShape, output: ArrayView2<'_, f64>) -> Array2<f64> {
        let (nope, head) = (shape.qk_nope_head_dim, shape.qk_nope_head_dim + shape.v_head_dim);
        let mut out = Array2::zeros((self.rank(), self.rank()));
        for h in 0..self.kv_b.nrows() / head {
            let keys = self.kv_b.slice(s![h * head..h * head + nope, ..]);
            let keys = matmul(&keys.t(), &keys);
            add_reads(&mut out, &keys, &self.values_of_head(shape, h, output));
        }
        out
    }

    /// `UV_h^T O_h^T O_h UV_h` `[r, r]` of head `h`, without the gain.
    pub(super) fn values_of_head(&self, shape: &MlaShape, h: usize, output: ArrayView2<'_, f64>) -> Array2<f64> {
        let (nope, value) = (shape.qk_nope_head_dim, shape.v_head_dim);
        let first = h * (nope + value) + nope;
        let to_output =
            matmul(&output.slice(s![.., h * value..(h + 1) * value]), &self.kv_b.slice(s![first..first + value, ..]));
        matmul(&to_output.t(), &to_output)
    }

    /// Latent width `r`.
    pub fn rank(&self) -> usize {
        self.kv_b.ncols()
    }

    /// Rotate the latent by `transform`, and fold that and the gain into the weights around it.
    ///
    /// # Panics
    /// If `transform` has another width than the latent.
    pub fn fold(&mut self, transform: &LatentTransform) {
        if matches!(transform, LatentTransform::Identity) {
            return;
        }
        let r = self.rank();
        if let Some(gain) = &mut self.gain {
            let common = common_gain(gain.as_slice().unwrap_or(&[]));
            for (mut column, g) in self.kv_b.columns_mut().into_iter().zip(gain.iter()) {
                // A gain that is one number leaves every digit of `kv_b` as it is.
                column *= g / common;
            }
            gain.fill(common);
        }
        transform.apply_dual(self.kv_b.view_mut());
        transform.apply(self.kv_a.slice_mut(s![..r, ..]).reversed_axes());
        if let Some(bias) = &mut self.bias {
            transform.apply(bias.slice_mut(s![..r]).insert_axis(ndarray::Axis(0)));
        }
    }
}

/// Add what one head's scores and outputs read of a latent, the scores scaled to weigh as much as the outputs.
pub(super) fn add_reads(sum: &mut Array2<f64>, keys: &Array2<f64>, values: &Array2<f64>) {
    let (k, v) = (keys.diag().sum(), values.diag().sum());
    if k > 0.0 && v > 0.0 {
        sum.scaled_add(v / k, keys);
    }
    *sum += values;
}

/// The one number that replaces a gain: its own where all entries are the same, else the power of two nearest to its root mean
/// square.
pub fn common_gain(gain: &[f64]) -> f64 {
    let first = gain.first().copied().unwrap_or(1.0);
    if first != 0.0 && gain.iter().all(|g| *g == first) {
        return first;
    }
    let mean = gain.iter().map(|g| g * g).sum::<f64>() / gain.len().max(1) as f64;
    if mean > 0.0 && mean.is_finite() { (mean.log2() / 2.0).round().clamp(-100.0, 100.0).exp2() } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 37 + j * 101 + i * j * 7 + seed) % 97) as f64 / 48.5 - 1.0
        })
    }

    /// What attention sees of inputs in rows: `kv_b` of the normed latent, and the rotated key's projection.
    fn function(w: &LatentWeights, x: &Array2<f64>, eps: f64) -> Array2<f64> {
        let r = w.rank();
        let mut both = matmul(x, &w.kv_a.t());
        if let Some(bias) = &w.bias {
            both += bias;
        }
        let mut out = Array2::zeros((x.nrows(), w.kv_b.nrows() + both.ncols() - r));
        for (mut out, row) in out.rows_mut().into_iter().zip(both.rows()) {
            let mut c = row.slice(s![..r]).to_owned();
            if let Some(gain) = &w.gain {
                let rms = (c.mapv(|v| v * v).mean().unwrap() + eps).sqrt();
                c = &c / rms * gain;
            }
            out.slice_mut(s![..w.kv_b.nrows()]).assign(&w.kv_b.dot(&c));
            out.slice_mut(s![w.kv_b.nrows()..]).assign(&row.slice(s![r..]));
        }
        out
    }

    #[test]
    fn folding_leaves_the_function_as_it_was() {
        let (r, rope, d, rows) = (12, 4, 20, 30);
        let x = sample(9, d, 3);
        let gains = [
            None,
            Some(Array1::from_elem(r, 262.144)),
            Some(Array1::from_shape_fn(r, |i| 0.1 + (i as f64 * 0.7).sin().abs())),
        ];
        for gain in gains {
            for transform in [
                LatentTransform::Identity,
                LatentTransform::hadamard(r),
                LatentTransform::Dense(
                    crate::factor::linalg::eigh(
                        &{
                            let a = sample(30, r, 11);
                            matmul(&a.t(), &a)
                        },
                        "test",
                    )
                    .unwrap()
                    .1,
                ),
            ] {
                let before = LatentWeights {
                    kv_a: sample(r + rope, d, 1),
                    bias: Some(Array1::from_shape_fn(r + rope, |i| i as f64 * 0.1)),
                    gain: gain.clone(),
                    kv_b: sample(rows, r, 2),
                };
                let mut after = before.clone();
                after.fold(&transform);
                for eps in [1e-6, 1e6] {
                    let (a, b) = (function(&before, &x, eps), function(&after, &x, eps));
                    let scale = a.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
                    let error = (&a - &b).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
                    // Three products of inner length 20 or less, each with a rounding per term.
                    assert!(error <= 100.0 * f64::EPSILON * scale.max(1.0), "{error} of {scale}");
                }
                if !matches!(transform, LatentTransform::Identity) {
                    let same = after.gain.as_ref().is_none_or(|g| g.iter().all(|v| *v == g[0]));
                    assert!(same, "one gain for all");
                    assert_ne!(before.kv_b, after.kv_b);
                }
            }
        }
    }

    #[test]
    fn a_constant_is_folded_away() {
        let (r, rope, d, rows) = (12, 4, 20, 30);
        let x = sample(9, d, 3);
        let mut before = LatentWeights {
            kv_a: sample(r + rope, d, 1),
            bias: Some(Array1::from_shape_fn(r + rope, |i| if i < r { 0.0 } else { i as f64 * 0.1 })),
            gain: Some(Array1::from_elem(r, 2.0_f64.powi(14) / (r as f64).sqrt())),
            kv_b: sample(rows, r, 2),
        };
        assert_eq!(before.constant_slot(), None);
        let mut same = before.clone();
        same.fold_constant(1e-6);
        assert_eq!(same, before);
        before.kv_a.row_mut(9).fill(0.0);
        before.kv_b.column_mut(9).fill(0.0);
        for part in [&mut before.bias, &mut before.gain].into_iter().flatten() {
            part[9] = 0.0;
        }
        if let Some(bias) = &mut before.bias {
            bias[9] = 2.0_f64.powi(14);
        }
        assert_eq!(before.constant_slot(), Some(9));
        let mut after = before.clone();
        after.fold_constant(1e-6);
        assert_eq!(after.constant_slot(), None);
        assert!(after.is_neutral(&vec![1.0; d], 1e-6));
        let (a, b) = (function(&before, &x, 1e-6), function(&after, &x, 1e-6));
        let scale = a.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        let error = (&a - &b).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        assert!(error <= 1e-5 * scale, "{error} of {scale}");
    }

    #[test]
    fn a_common_gain_keeps_its_scale() {
        assert_eq!(common_gain(&[262.144; 5]), 262.144);
        assert_eq!(common_gain(&[0.9, 1.1, 1.3]), 1.0);
        assert_eq!(common_gain(&[0.1, 0.13, 0.12]), 0.125);
        assert_eq!(common_gain(&[0.0, 0.0]), 1.0);
        assert_eq!(common_gain(&[]), 1.0);
    }
}
