//! `KL(source || student)` over the whole vocabulary, and its gradient by what goes into the student's final norm.
//!
//! With `z` the logits of a token before their cap, `p` the source's distribution and `q` the student's:
//!
//! ```text
//! loss = sum_v p_v (ln p_v - ln q_v)        d loss / dz = (q - p) * (1 - (c tanh(z / c) / c)^2), the last factor where there is a cap
//! ```
//!
//! Logits exist for some hundred tokens at a time.

use std::ops::Range;

use ndarray::{Array2, Axis, s};
use rayon::prelude::*;

use crate::gradient::{Real, product, rms_norm, rms_norm_backward};
use crate::runtime::RuntimeError;

/// Logits held of each model, at most, unless that leaves fewer rows than [`ROWS`]`.0`.
const LOGITS: usize = 1 << 24;
/// Rows at a time: at least, and at most.
const ROWS: (usize, usize) = (128, 256);
/// Lanes of a sum over a row.
const LANES: usize = 16;

/// Final norm and output head of the student.
#[derive(Debug)]
pub(super) struct StudentHead<T> {
    /// `[V, D]`.
    pub weight: Array2<T>,
    /// What multiplies logits.
    pub factor: f64,
    /// Cap of the logits.
    pub cap: Option<f64>,
    pub norm_eps: f64,
}

/// The source's logits of some rows of the batch, `[rows, V]`.
pub(super) type SourceLogits<'a, T> = &'a dyn Fn(Range<usize>) -> Result<Array2<T>, RuntimeError>;

/// Losses of a batch, and gradients of their sum times a factor.
pub(super) struct HeadPass<T> {
    /// `KL` of every row, in nats.
    pub losses: Vec<f64>,
    /// By the residual stream after the last layer, `[T, D]`, and by the gain of the final norm, `[D]`.
    pub gradients: Option<(Array2<T>, Vec<T>)>,
}

impl<T: Real> StudentHead<T> {
    /// Losses of rows `hidden` `[T, D]`; with `scale`, gradients of `scale` times their sum. `gain` is the final norm's, `[D]`.
    ///
    /// # Errors
    /// What `source` fails with.
    pub fn pass(
        &self,
        hidden: &Array2<T>,
        gain: &[T],
        source: SourceLogits<'_, T>,
        scale: Option<f64>,
    ) -> Result<HeadPass<T>, RuntimeError> {
        let normed = rms_norm(hidden, gain, self.norm_eps);
        let mut losses = Vec::with_capacity(hidden.nrows());
        let mut d_normed = scale.map(|_| Array2::zeros(hidden.dim()));
        let rows = (LOGITS / self.weight.nrows().max(1)).clamp(ROWS.0, ROWS.1);
        for first in (0..hidden.nrows()).step_by(rows) {
            let range = first..hidden.nrows().min(first + rows);
            let mut theirs = source(range.clone())?;
            let part = normed.slice(s![range.clone(), ..]);
            let mut ours = product(part, self.weight.t());
            losses.extend(self.rows(&mut ours, &mut theirs, scale));
            if let Some(d) = &mut d_normed {
                d.slice_mut(s![range, ..]).assign(&product(ours.view(), self.weight.view()));
            }
        }
        let gradients = d_normed.map(|d| {
            let (d, of_gain) = rms_norm_backward(hidden, gain, self.norm_eps, &d);
            (d, of_gain.to_vec())
        });
        Ok(HeadPass { losses, gradients })
    }

    /// The loss of each row; `ours` `[rows, V]`, products with the head, become gradients by them.
    fn rows(&self, ours: &mut Array2<T>, theirs: &mut Array2<T>, scale: Option<f64>) -> Vec<f64> {
        let ours = ours.axis_iter_mut(Axis(0)).into_par_iter();
        let rows = ours.zip(theirs.axis_iter_mut(Axis(0)));
        let row = |(mut ours, mut theirs): (ndarray::ArrayViewMut1<'_, T>, ndarray::ArrayViewMut1<'_, T>)| {
            let (Some(ours), Some(theirs)) = (ours.as_slice_mut(), theirs.as_slice_mut()) else { return 0.0 };
            self.row(ours, theirs, scale)
        };
        rows.map(row).collect()
    }

    fn row(&self, ours: &mut [T], theirs: &mut [T], scale: Option<f64>) -> f64 {
        let factor = T::from_f64(self.factor);
        if self.factor != 1.0 {
            ours.iter_mut().for_each(|z| *z = *z * factor);
        }
        let slopes = self.cap.map(|cap| {
            let slope = |z: &mut T| {
                let t = (z.to_f64() / cap).tanh();
                *z = T::from_f64(cap * t);
                T::from_f64(1.0 - t * t)
            };
            ours.iter_mut().map(slope).collect::<Vec<T>>()
        });
        let differences: Vec<T> = theirs.iter().zip(ours.iter()).map(|(a, b)| *a - *b).collect();
        let (their_top, their_sum) = T::exponentials(theirs);
        let (our_top, our_sum) = T::exponentials(ours);
        // KL = E_p[a - b] - ln sum exp a + ln sum exp b.
        let mean = dot(theirs, &differences) / their_sum.to_f64();
        let loss = mean - (their_top.to_f64() + their_sum.to_f64().ln()) + our_top.to_f64() + our_sum.to_f64().ln();
        if let Some(scale) = scale {
            let scale = scale * self.factor;
            let (q, p) = (T::from_f64(scale / our_sum.to_f64()), T::from_f64(scale / their_sum.to_f64()));
            ours.iter_mut().zip(theirs.iter()).for_each(|(ours, theirs)| *ours = *ours * q - *theirs * p);
            if let Some(slopes) = slopes {
                ours.iter_mut().zip(slopes).for_each(|(d, slope)| *d = *d * slope);
            }
        }
        loss
    }
}

/// `<a, b>`, in f64.
fn dot<T: Real>(a: &[T], b: &[T]) -> f64 {
    let mut sums = [0.0f64; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(a, b)| (*a * *b).to_f64()).sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += (*a * *b).to_f64();
        }
    }
    rest + sums.iter().sum::<f64>()
}
