//! Neutralising the mandatory `kv_a_layernorm` and `q_a_layernorm` (`docs/maths.md`, "Neutralising the latent norm").
//!
//! Every stock MLA class applies an RMSNorm to the latent, and none can be told not to. With the latent rows scaled by a small
//! `s`, the epsilon dominates the mean square, and the norm becomes a multiplication by `w / sqrt(eps)`:
//!
//! ```text
//! RMSNorm(s c) = s c w / sqrt(s^2 ms(c) + eps) = c (s w / sqrt(eps)) (1 - s^2 ms(c) / (2 eps) + ...)
//! ```
//!
//! Sound in bf16 and f32, whose exponents hold the scaled values; never in f16, where they underflow.

/// Scales that turn an RMSNorm over a latent into the identity: multiply the latent's rows by `down`, set the norm's
/// weight to `weight`, multiply the up-projection by `up`, and `down * weight * up = sqrt(eps)`.
///
/// `down` is a power of two (lossless in any binary float), `weight` is exact in bf16, and `up` is so near a bf16 value
/// (2^-13) that an up-projection of zeros and ones survives being stored in bf16.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormScales {
    /// Factor on the latent rows of the down-projection (and its bias).
    pub down: f64,
    /// The norm's gain.
    pub weight: f64,
    /// Factor on the up-projection.
    pub up: f64,
}

/// Scales for a latent whose root mean square never exceeds `rms_max`, with the runtime's epsilon `eps`.
///
/// `down` is chosen so that the relative error `down^2 rms_max^2 / (2 eps)` stays below 2^-24, the rounding of f32, and
/// is never larger than 2^-20.
pub fn neutral_scales(rms_max: f64, eps: f64) -> NormScales {
    scales_by_error(rms_max, eps, -24, -20.0)
}

/// Scales for a latent whose root mean square is `rms` for ordinary inputs, with an error of at most `2^-15` for those: for
/// what is an approximation anyway. The rows are a thousand times as large as [`neutral_scales`] leaves them, large enough
/// for f16 and for block scales in f16 where the input is scaled as well (docs/maths.md, (5.4)). `down` is at most `2^-15`, so
/// that the gain stands out.
pub fn small_scales(rms: f64, eps: f64) -> NormScales {
    scales_by_error(rms, eps, -15, -15.0)
}

/// The largest power of two `down`, at most `2^most`, with `down^2 rms^2 / (2 eps) <= 2^error`, and what belongs to it.
fn scales_by_error(rms: f64, eps: f64, error: i32, most: f64) -> NormScales {
    let bound = (2.0 * eps * 2.0_f64.powi(error)).sqrt() / rms.max(f64::MIN_POSITIVE);
    let exponent = bound.log2().floor().clamp(-60.0, most);
    let down = exponent.exp2();
    // The rest, sqrt(eps) / down, as a product of two bf16 values (8 bits of mantissa each).
    let rest = eps.sqrt() / down;
    let scale = rest.log2().floor().exp2();
    let mantissa = rest / scale;
    let (mut best, mut error) = ((1.0, 1.0), f64::INFINITY);
    for a in 128..256 {
        let a = f64::from(a) / 128.0;
        // The nearest bf16 partner, in [1/2, 2).
        let wanted = mantissa / a;
        let unit = if wanted < 1.0 { 1.0 / 256.0 } else { 1.0 / 128.0 };
        let b = (wanted / unit).round() * unit;
        let e = (a * b / mantissa - 1.0).abs();
        if e < error {
            (best, error) = ((a, b), e);
        }
    }
    let weight = best.0 * scale;
    NormScales { down, weight, up: eps.sqrt() / (down * weight) }
}

/// Least ratio of a constant coordinate to the length that any input gives the others: an error of at most `2^-15`, and of
/// `2^-23` or less for a latent of ordinary inputs, which is shorter than the bound by a factor of about `D^(1/2)`.
pub const CONSTANT_RATIO: f64 = 128.0;
/// Powers of two that a constant lies between: far above every epsilon, and within f16.
const CONSTANTS: (f64, f64) = (8.0, 15.0);

/// Scales that turn an RMSNorm over a latent into the identity by a constant coordinate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ConstantScales {
    /// For the other coordinates.
    pub coordinates: NormScales,
    /// The constant `K`, a power of two.
    pub constant: f64,
    /// The norm's gain for the constant where something reads it: a power of two that makes it about one.
    pub read_weight: f64,
    /// Factor on the column that reads it.
    pub read_up: f64,
}

/// Scales for a latent of `width` coordinates, the constant among them, whose others are never longer than `largest`, with the
/// runtime's epsilon `eps`.
///
/// `K` is a power of two from `2^8` to `2^15`, at least 128 times as long as the scaled latent. `down` is a power of two, one
/// unless `K` would have to lie elsewhere. `down * weight * up = (K^2 / width + eps)^(1/2)`, with `weight` exact in bf16.
pub fn constant_scales(largest: f64, width: usize, eps: f64) -> ConstantScales {
    let wanted = (CONSTANT_RATIO * largest.max(f64::MIN_POSITIVE)).log2().ceil();
    let exponent = wanted.clamp(CONSTANTS.0, CONSTANTS.1);
    // A latent of zeros needs no scale.
    let down = if largest > 0.0 { (exponent - wanted).clamp(-60.0, 60.0).exp2() } else { 1.0 };
    let constant = exponent.exp2();
    let root = (constant * constant / width as f64 + eps).sqrt();
    let (scale, wanted) = (root.log2().floor().exp2(), root / down);
    let weight = (root / scale * 128.0).round() / 128.0 * scale;
    let read_weight = (root / constant).log2().round().exp2();
    ConstantScales {
        coordinates: NormScales { down, weight, up: wanted / weight },
        constant,
        read_weight,
        read_up: root / (constant * read_weight),
    }
}

/// Upper bound on the root mean square of `W x` over every normed input `x = gain * n`, `|n|^2 <= D`:
/// `|W diag(gain)|_F sqrt(D / r)`, for `W` `[r, D]`, plus the bias's own.
pub fn rms_bound(weight: &ndarray::Array2<f64>, gain: &[f64], bias: Option<&ndarray::Array1<f64>>) -> f64 {
    let (rows, cols) = weight.dim();
    if rows == 0 {
        return 1.0;
    }
    let mut frobenius = 0.0;
    for row in weight.rows() {
        frobenius += row.iter().zip(gain).map(|(w, g)| (w * g).powi(2)).sum::<f64>();
    }
    let bias = bias.map_or(0.0, |b| b.iter().map(|x| x * x).sum::<f64>().sqrt());
    ((frobenius * cols as f64).sqrt() + bias) / (rows as f64).sqrt()
}

/// Root mean square of `W x + b` over inputs `x = gain * n` with `n` of mean square one in every direction alike:
/// `(|W diag(gain)|_F^2 + |b|^2)^(1/2) / r^(1/2)`, for `W` `[r, D]`.
pub fn rms_of_ordinary(weight: &ndarray::Array2<f64>, gain: &[f64], bias: Option<&ndarray::Array1<f64>>) -> f64 {
    let rows = weight.nrows();
    if rows == 0 {
        return 1.0;
    }
    let squares = weight.rows().into_iter().flat_map(|row| row.into_iter().zip(gain)).map(|(w, g)| (w * g).powi(2));
    let bias = bias.map_or(0.0, |b| b.dot(b));
    ((squares.sum::<f64>() + bias) / rows as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn the_norm_becomes_the_identity_to_its_predicted_error() {
        for rms in [0.01, 1.0, 7.0, 300.0] {
            let eps = 1e-6;
            let s = neutral_scales(rms, eps);
            assert_eq!(s.down.log2().fract(), 0.0);
            assert_eq!(f64::from(bf16::from_f64(s.weight)), s.weight);
            assert!((f64::from(bf16::from_f64(s.up)) / s.up - 1.0).abs() < 2.0_f64.powi(-13));
            let c: Vec<f64> = (0..64).map(|i| rms * ((i as f64) * 0.7).sin() * 2.0_f64.sqrt()).collect();
            let mean_square = c.iter().map(|x| (x * s.down).powi(2)).sum::<f64>() / c.len() as f64;
            for x in &c {
                let y = x * s.down / (mean_square + eps).sqrt() * s.weight * s.up;
                // 1.1: the sine's mean square over this window.
                assert!((y - x).abs() <= x.abs() * 1.1 * 2.0_f64.powi(-24), "{x} {y}");
            }
        }
    }

    #[test]
    fn the_bound_holds() {
        let w = ndarray::Array2::from_shape_fn((3, 5), |(i, j)| (i as f64 - j as f64) * 0.3);
        let gain = [1.0, 0.5, 2.0, 1.5, 0.1];
        let bound = rms_bound(&w, &gain, None);
        for k in 0..40 {
            let n: Vec<f64> = (0..5).map(|j| ((k * 5 + j) as f64 * 1.3).cos()).collect();
            let norm = (n.iter().map(|x| x * x).sum::<f64>() / 5.0).sqrt();
            let x = ndarray::Array1::from_iter(n.iter().zip(gain).map(|(v, g)| v / norm * g));
            let rms = (w.dot(&x).mapv(|v| v * v).mean().unwrap()).sqrt();
            assert!(rms <= bound * (1.0 + 1e-12));
        }
    }
}
