//! A latent as it is stored, and the same without the norm that its class applies.

use ndarray::{Array1, Array2};

/// Largest relative error, for an ordinary input, at which a norm still counts as one that does nothing.
const NEUTRAL: f64 = 1e-3;
/// Part of all that is read of a latent below which a coordinate is left out: the rounding of f32.
const NEGLIGIBLE: f64 = 1.0 / (1 << 24) as f64;

/// A latent as it is stored: `up (gain * norm(down x + bias))`, for normed inputs `x`.
pub(super) struct Stored {
    /// `[r, D]`.
    pub down: Array2<f64>,
    /// `[r]`.
    pub bias: Option<Array1<f64>>,
    /// `[r]`; `None` where the class norms no latent.
    pub gain: Option<Array1<f64>>,
    /// `[m, r]`.
    pub up: Array2<f64>,
}

/// The same function without a norm: `up (down x) + constant`.
pub(super) struct Plain {
    /// `[r, D]`, without the coordinates at the end that nothing reads.
    pub down: Array2<f64>,
    /// `[m, r]`.
    pub up: Array2<f64>,
    /// `[m]`; zeros where the latent has no bias.
    pub constant: Array1<f64>,
}

impl Stored {
    /// Relative error of taking the norm, of epsilon `eps`, for a division by one number, on inputs `input * n` with `n` of mean
    /// square one in every direction alike (`input` `[D]`: the gain of the norm before). With `z` what varies,
    ///
    /// ```text
    /// ms(b + z) + eps = den^2 (1 + 2 <b, z> / (r den^2) + |z|^2 / (r den^2)),      den^2 = |b|^2 / r + eps
    /// ```
    ///
    /// and half of the two terms is the error. It is small where the epsilon outweighs the latent, and where a constant does.
    pub fn error_without_norm(&self, input: &[f64], eps: f64) -> f64 {
        if self.gain.is_none() {
            return 0.0;
        }
        let (r, den) = (self.down.nrows() as f64, self.divisor(eps));
        let mut along = Array1::<f64>::zeros(self.down.ncols());
        let mut size = 0.0;
        for (i, row) in self.down.rows().into_iter().enumerate() {
            let b = self.bias.as_ref().map_or(0.0, |b| b[i]);
            for ((sum, w), g) in along.iter_mut().zip(row).zip(input) {
                *sum += b * w * g;
                size += (w * g).powi(2);
            }
        }
        (along.dot(&along).sqrt() + 0.5 * size) / (r * den * den)
    }

    /// Whether the norm does nothing, to [`NEUTRAL`].
    pub fn is_neutral(&self, input: &[f64], eps: f64) -> bool {
        self.error_without_norm(input, eps) <= NEUTRAL
    }

    /// `(|b|^2 / r + eps)^(1/2)`.
    fn divisor(&self, eps: f64) -> f64 {
        let bias = self.bias.as_ref().map_or(0.0, |b| b.dot(b));
        (bias / self.down.nrows().max(1) as f64 + eps).sqrt()
    }

    /// The same without the norm. Factors that are powers of two go to `down`, which keeps its digits; the rest goes to `up`.
    pub fn plain(self, input: &[f64], eps: f64) -> Plain {
        let den = self.divisor(eps);
        let Self { mut down, bias, gain, mut up } = self;
        for (i, mut row) in down.rows_mut().into_iter().enumerate() {
            let factor = gain.as_ref().map_or(1.0, |g| g[i] / den);
            let power = if factor == 0.0 { 1.0 } else { factor.abs().log2().round().exp2() };
            row *= power;
            up.column_mut(i).mapv_inplace(|v| v * (factor / power));
        }
        let constant = match &bias {
            None => Array1::zeros(up.nrows()),
            Some(bias) => {
                let factor = |i: usize| gain.as_ref().map_or(1.0, |g: &Array1<f64>| g[i] / den);
                let power = |f: f64| if f == 0.0 { 1.0 } else { f.abs().log2().round().exp2() };
                let scaled = Array1::from_shape_fn(bias.len(), |i| bias[i] * power(factor(i)));
                up.dot(&scaled)
            }
        };
        let used = used(&down, &up, input);
        down = down.slice(ndarray::s![..used, ..]).to_owned();
        up = up.slice(ndarray::s![.., ..used]).to_owned();
        Plain { down, up, constant }
    }
}

/// Coordinates up to the last one that is read.
fn used(down: &Array2<f64>, up: &Array2<f64>, input: &[f64]) -> usize {
    let read: Vec<f64> = (0..down.nrows())
        .map(|i| {
            let row: f64 = down.row(i).iter().zip(input).map(|(w, g)| (w * g).powi(2)).sum();
            let column: f64 = up.column(i).iter().map(|v| v * v).sum();
            (row * column).sqrt()
        })
        .collect();
    let most = read.iter().copied().fold(0.0, f64::max);
    read.iter().rposition(|v| *v > NEGLIGIBLE * most).map_or(1, |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    fn random(rows: usize, columns: usize, state: &mut u64) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns), |_| uniform(state) - 0.5)
    }

    fn computed(s: &Stored, x: &Array1<f64>, eps: f64) -> Array1<f64> {
        let mut latent = s.down.dot(x);
        if let Some(bias) = &s.bias {
            latent += bias;
        }
        if let Some(gain) = &s.gain {
            let ms = latent.dot(&latent) / latent.len() as f64;
            latent = latent * gain / (ms + eps).sqrt();
        }
        s.up.dot(&latent)
    }

    /// A latent of `n` coordinates and one more, the last: a constant, small rows, or neither.
    fn stored(constant: f64, scale: f64, state: &mut u64) -> Stored {
        let (n, d, m) = (6, 12, 9);
        let mut down = random(n + 1, d, state) * scale;
        down.row_mut(n).fill(0.0);
        let mut bias = Array1::zeros(n + 1);
        bias[n] = constant;
        let gain = Array1::from_shape_fn(n + 1, |i| if i == n { 0.0 } else { 1.0 + uniform(state) });
        let up = random(m, n + 1, state);
        Stored { down, bias: Some(bias), gain: Some(gain), up }
    }

    #[test]
    fn a_norm_that_does_nothing_is_folded_away_to_the_error_it_has() {
        let (mut state, eps) = (5, 1e-6);
        for (constant, scale) in [(4096.0, 1.0), (512.0, 0.25), (0.0, 1e-6), (0.0, 1e-8)] {
            let s = stored(constant, scale, &mut state);
            let input = vec![1.5; 12];
            let error = s.error_without_norm(&input, eps);
            assert!(error < 1e-3 && s.is_neutral(&input, eps), "{constant} {scale}: {error}");
            let mut x = random(1, 12, &mut state).row(0).to_owned();
            x *= 1.5 * (12.0 / x.dot(&x)).sqrt();
            let want = computed(&s, &x, eps);
            let plain = s.plain(&input, eps);
            assert_eq!((plain.down.nrows(), plain.up.ncols()), (6, 6));
            let got = plain.up.dot(&plain.down.dot(&x)) + &plain.constant;
            let worst = (&got - &want).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
            let largest = want.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
            // The error is that of an ordinary input in an ordinary direction: an order of magnitude for this one.
            assert!(worst <= 10.0 * error * largest + 1e-13, "{constant} {scale}: {worst} of {largest}, {error}");
        }
    }

    #[test]
    fn a_norm_that_does_something_is_not_taken_for_none() {
        let mut state = 9;
        for (constant, scale) in [(0.0, 1.0), (1.0, 1.0), (8.0, 1.0), (0.0, 1e-3)] {
            assert!(!stored(constant, scale, &mut state).is_neutral(&[1.5; 12], 1e-6), "{constant} {scale}");
        }
    }

    #[test]
    fn what_training_makes_of_a_constant_is_still_a_constant() {
        // A step moves every number by about 1e-4, those of the constant's row, column and gain too.
        let (mut state, eps) = (11, 1e-6);
        let mut s = stored(4096.0, 1.0, &mut state);
        let mut moved = |v: &mut f64| *v += 2e-4 * (uniform(&mut state) - 0.5);
        s.down.iter_mut().for_each(&mut moved);
        s.up.iter_mut().for_each(&mut moved);
        s.gain.iter_mut().flatten().for_each(&mut moved);
        s.bias.iter_mut().flatten().for_each(&mut moved);
        let input = [1.5; 12];
        assert!(s.is_neutral(&input, eps), "{}", s.error_without_norm(&input, eps));
        let mut x = random(1, 12, &mut 3).row(0).to_owned();
        x *= 1.5 * (12.0 / x.dot(&x)).sqrt();
        let want = computed(&s, &x, eps);
        let plain = s.plain(&input, eps);
        let got = plain.up.dot(&plain.down.dot(&x)) + &plain.constant;
        let worst = (&got - &want).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        assert!(worst < 1e-4, "{worst}");
    }
}
