//! RMSNorm, forwards and backwards.
//!
//! With `r = (mean(x^2) + eps)^(-1/2)`, row by row:
//!
//! ```text
//! y = r g * x        dx = r (g * dy) - (r^3 / n) <x, g * dy> x        dg = sum over tokens of r x * dy
//! ```

use ndarray::{Array1, Array2, Axis};
use rayon::prelude::*;

use super::product::Real;

/// Rows of a gain's gradient that are summed in one task.
const ROWS: usize = 64;

/// `1 / sqrt(mean(x^2) + eps)` of a row; the mean is taken in f64.
fn inverse_root<T: Real>(row: &[T], eps: f64) -> f64 {
    let square: f64 = row.iter().map(|x| x.to_f64() * x.to_f64()).sum();
    1.0 / (square / row.len().max(1) as f64 + eps).sqrt()
}

/// `x [T, n]`, every row by itself, with gain `[n]`.
pub(crate) fn rms_norm<T: Real>(x: &Array2<T>, gain: &[T], eps: f64) -> Array2<T> {
    let mut out = x.clone();
    out.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| {
        let Some(row) = row.as_slice_mut() else { return };
        let factor = T::from_f64(inverse_root(row, eps));
        row.iter_mut().zip(gain).for_each(|(x, g)| *x = *x * factor * *g);
    });
    out
}

/// Gradients by the input, `[T, n]`, and by the gain, `[n]`, of [`rms_norm`] of `x`; `gradient` `[T, n]` is that by its output.
pub(crate) fn rms_norm_backward<T: Real>(
    x: &Array2<T>,
    gain: &[T],
    eps: f64,
    gradient: &Array2<T>,
) -> (Array2<T>, Array1<T>) {
    let n = x.ncols();
    let mut out = Array2::zeros(x.dim());
    let blocks = out.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter();
    let inputs = x.axis_chunks_iter(Axis(0), ROWS).into_par_iter().zip(gradient.axis_chunks_iter(Axis(0), ROWS));
    let parts: Vec<Vec<f64>> = blocks
        .zip(inputs)
        .map(|(mut out, (x, d))| {
            let mut of_gain = vec![0.0; n];
            for ((mut out, x), d) in out.rows_mut().into_iter().zip(x.rows()).zip(d.rows()) {
                let (Some(out), Some(x), Some(d)) = (out.as_slice_mut(), x.as_slice(), d.as_slice()) else { continue };
                let r = inverse_root(x, eps);
                let dot: f64 = x.iter().zip(d).zip(gain).map(|((x, d), g)| x.to_f64() * (*d * *g).to_f64()).sum();
                let (factor, along) = (T::from_f64(r), T::from_f64(r * r * r * dot / n.max(1) as f64));
                for (i, ((x, d), g)) in x.iter().zip(d).zip(gain).enumerate() {
                    out[i] = factor * *g * *d - along * *x;
                    of_gain[i] += r * x.to_f64() * d.to_f64();
                }
            }
            of_gain
        })
        .collect();
    let mut of_gain = Array1::<f64>::zeros(n);
    for part in parts {
        of_gain += &Array1::from(part);
    }
    (out, of_gain.mapv(T::from_f64))
}
