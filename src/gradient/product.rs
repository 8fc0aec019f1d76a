//! Matrix products in f32 or f64, cut into fixed tiles.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::AddAssign;

use faer::Accum;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, LinalgScalar, ScalarOperand};
use rayon::prelude::*;

use crate::arch::Activation;
use crate::factor::linalg;
use crate::runtime;

/// Output tile per task. Fixed, so that sums are cut the same way for any number of threads.
const TILE: (usize, usize) = (128, 256);

/// f32 or f64.
pub(crate) trait Real: LinalgScalar + ScalarOperand + AddAssign + Sum + Debug + Send + Sync {
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
    /// Replace a row by `exp(x - max)`: the largest element, and the sum of what was put.
    fn exponentials(row: &mut [Self]) -> (Self, Self);
    /// Softmax of a row in place.
    fn softmax(row: &mut [Self]);
    /// `act(x)` and its derivative.
    fn activation(x: Self, activation: Activation) -> (Self, Self);
    /// `up = act(gate) * up`.
    fn gated(up: &mut [Self], gate: &[Self], activation: Activation) {
        up.iter_mut().zip(gate).for_each(|(up, gate)| *up = Self::activation(*gate, activation).0 * *up);
    }
    /// From `gate` and `up` of a gated MLP and the gradient by `act(gate) * up`: the gradients by `gate` and `up`, in their place.
    fn gated_backward(gate: &mut [Self], up: &mut [Self], gradient: &[Self], activation: Activation) {
        for ((gate, up), d) in gate.iter_mut().zip(up).zip(gradient) {
            let (value, slope) = Self::activation(*gate, activation);
            (*gate, *up) = (*d * *up * slope, *d * value);
        }
    }
    /// `out = scale * a b`, or `out += scale * a b`, on the calling thread, for views of any layout.
    fn gemm(out: ArrayViewMut2<'_, Self>, accum: Accum, a: ArrayView2<'_, Self>, b: ArrayView2<'_, Self>, scale: Self);
}

impl Real for f32 {
    fn from_f64(value: f64) -> Self {
        value as f32
    }

    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    fn exponentials(row: &mut [f32]) -> (f32, f32) {
        runtime::exponentials(row)
    }

    fn softmax(row: &mut [f32]) {
        runtime::softmax(row);
    }

    fn activation(x: f32, activation: Activation) -> (f32, f32) {
        let (value, slope) = f64::activation(f64::from(x), activation);
        (value as f32, slope as f32)
    }

    fn gated(up: &mut [f32], gate: &[f32], activation: Activation) {
        if activation == Activation::Silu {
            return runtime::silu_times(up, gate);
        }
        up.iter_mut().zip(gate).for_each(|(up, gate)| *up *= Self::activation(*gate, activation).0);
    }

    fn gated_backward(gate: &mut [f32], up: &mut [f32], gradient: &[f32], activation: Activation) {
        if activation == Activation::Silu {
            return runtime::silu_mul_backward(gate, up, gradient);
        }
        for ((gate, up), d) in gate.iter_mut().zip(up).zip(gradient) {
            let (value, slope) = Self::activation(*gate, activation);
            (*gate, *up) = (d * *up * slope, d * value);
        }
    }

    fn gemm(out: ArrayViewMut2<'_, f32>, accum: Accum, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, scale: f32) {
        linalg::gemm(out, accum, a, b, scale);
    }
}

/// Functions as their definitions have them: gradients are checked against finite differences of these.
impl Real for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }

    fn to_f64(self) -> f64 {
        self
    }

    fn exponentials(row: &mut [f64]) -> (f64, f64) {
        let peak = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        row.iter_mut().for_each(|x| *x = (*x - peak).exp());
        (peak, row.iter().sum())
    }

    fn softmax(row: &mut [f64]) {
        let (_, sum) = Self::exponentials(row);
        row.iter_mut().for_each(|x| *x /= sum);
    }

    fn activation(x: f64, activation: Activation) -> (f64, f64) {
        use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};
        match activation {
            Activation::Silu => {
                let s = 1.0 / (1.0 + (-x).exp());
                (x * s, s * (1.0 + x * (1.0 - s)))
            }
            Activation::Gelu => {
                let below = 0.5 * (1.0 + runtime::erf(x * FRAC_1_SQRT_2));
                let density = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * (-0.5 * x * x).exp();
                (x * below, below + x * density)
            }
            Activation::GeluTanh => {
                let factor = FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
                let t = (factor * (x + 0.044_715 * x * x * x)).tanh();
                let inner = factor * (1.0 + 3.0 * 0.044_715 * x * x);
                (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
            }
            Activation::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
            Activation::Relu2 => (x.max(0.0).powi(2), 2.0 * x.max(0.0)),
        }
    }

    fn gemm(out: ArrayViewMut2<'_, f64>, accum: Accum, a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>, scale: f64) {
        linalg::gemm(out, accum, a, b, scale);
    }
}

/// `out = a b` or `out += a b` on the rayon pool.
pub(crate) fn product_into<T: Real>(out: &mut Array2<T>, accum: Accum, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) {
    let strips: Vec<_> = out.axis_chunks_iter_mut(Axis(0), TILE.0).zip(a.axis_chunks_iter(Axis(0), TILE.0)).collect();
    strips.into_par_iter().for_each(|(mut strip, a)| {
        let tiles = strip.axis_chunks_iter_mut(Axis(1), TILE.1).into_par_iter();
        tiles.zip(b.axis_chunks_iter(Axis(1), TILE.1)).for_each(|(out, b)| T::gemm(out, accum, a, b, T::one()));
    });
}

/// `a b` on the rayon pool, in standard layout.
pub(crate) fn product<T: Real>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
    let mut out = Array2::zeros((a.nrows(), b.ncols()));
    product_into(&mut out, Accum::Replace, a, b);
    out
}

/// Sum over rows, `[columns]`, row after row.
pub(crate) fn column_sums<T: Real>(a: &Array2<T>) -> Array1<T> {
    let mut sums = Array1::zeros(a.ncols());
    for row in a.rows() {
        sums += &row;
    }
    sums
}
