//! Row kernels, written so that the compiler vectorises them.

use pulp::{Arch, Simd, WithSimd};

use crate::arch::Activation;

/// `e^x` within 2 ulp for `x` in [-87, 88], clamped outside; NaN stays NaN.
///
/// Written out rather than taken from the C library: that one is scalar, and its last bit differs between systems.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // The high part has 10 significant bits, so `n * LN2_HIGH` is exact.
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    // Taylor series: |r| <= ln(2)/2, so the first term left out is below 6e-9.
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    p * f32::from_bits(exponent << 23)
}

/// `gate = silu(gate) * up`.
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    Arch::new().dispatch(SiluMul { gate, up });
}

struct SiluMul<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl WithSimd for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (g, u) in self.gate.iter_mut().zip(self.up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
}

/// `up = silu(gate) * up`.
pub(crate) fn silu_times(up: &mut [f32], gate: &[f32]) {
    Arch::new().dispatch(SiluTimes { up, gate });
}

struct SiluTimes<'a> {
    up: &'a mut [f32],
    gate: &'a [f32],
}

impl WithSimd for SiluTimes<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (u, g) in self.up.iter_mut().zip(self.gate) {
            *u *= *g / (1.0 + exp(-*g));
        }
    }
}

/// The gradients of `silu(gate) * up` by `gate` and by `up`, in their place, from that by the product.
pub(crate) fn silu_mul_backward(gate: &mut [f32], up: &mut [f32], gradient: &[f32]) {
    Arch::new().dispatch(SiluMulBackward { gate, up, gradient });
}

struct SiluMulBackward<'a> {
    gate: &'a mut [f32],
    up: &'a mut [f32],
    gradient: &'a [f32],
}

impl WithSimd for SiluMulBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for ((g, u), d) in self.gate.iter_mut().zip(self.up.iter_mut()).zip(self.gradient) {
            let sigmoid = 1.0 / (1.0 + exp(-*g));
            let value = *g * sigmoid;
            let slope = sigmoid + value * (1.0 - sigmoid);
            (*g, *u) = (d * *u * slope, d * value);
        }
    }
}

/// `gate = act(gate) * up`.
pub(super) fn gated(gate: &mut [f32], up: &[f32], activation: Activation) {
    if activation == Activation::Silu {
        return silu_mul(gate, up);
    }
    for (g, u) in gate.iter_mut().zip(up) {
        *g = activate(*g, activation) * u;
    }
}

/// `tanh x` in f32, accurate near zero.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    f64::from(x).tanh() as f32
}

/// An activation of one value. The error function is not in the standard library: its complement comes from the continued
/// fraction and series in [`erf`].
pub(super) fn activate(x: f32, activation: Activation) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + exp(-x)),
        Activation::Gelu => (f64::from(x) * 0.5 * (1.0 + erf(f64::from(x) * std::f64::consts::FRAC_1_SQRT_2))) as f32,
        Activation::GeluTanh => {
            let inner =
                std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2 * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + tanh(inner))
        }
        Activation::Relu => x.max(0.0),
        Activation::Relu2 => x.max(0.0) * x.max(0.0),
    }
}

/// The error function: its Maclaurin series up to 3, Lentz's continued fraction of the complement beyond. Error below
/// 1e-12, far under f32's.
pub(crate) fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return x;
    }
    if a < 3.0 {
        let (mut term, mut sum) = (a, a);
        for n in 1..80 {
            let n = f64::from(n);
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        return (sum * std::f64::consts::FRAC_2_SQRT_PI).copysign(x);
    }
    let mut fraction = 0.0;
    for n in (1..60).rev() {
        fraction = f64::from(n) / 2.0 / (a + fraction);
    }
    let complement = (-a * a).exp() / (std::f64::consts::PI.sqrt() * (a + fraction));
    (1.0 - complement).copysign(x)
}

/// `cap tanh(x / cap)` in place.
pub(super) fn softcap(row: &mut [f32], cap: f64) {
    let cap = cap as f32;
    row.iter_mut().for_each(|x| *x = cap * tanh(*x / cap));
}

/// RMSNorm of one row in place; the mean of squares is taken in f64.
pub(super) fn rms_norm(row: &mut [f32], gain: &[f32], eps: f64) {
    const LANES: usize = 8;
    let mut sums = [0.0f64; LANES];
    let blocks = row.chunks_exact(LANES);
    let tail: f64 = blocks.remainder().iter().map(|x| f64::from(*x).powi(2)).sum();
    for block in blocks {
        for (sum, x) in sums.iter_mut().zip(block) {
            *sum += f64::from(*x) * f64::from(*x);
        }
    }
    let mean = (sums.iter().sum::<f64>() + tail) / row.len() as f64;
    let factor = (1.0 / (mean + eps).sqrt()) as f32;
    for (x, g) in row.iter_mut().zip(gain) {
        *x = *x * factor * g;
    }
}

/// Weights of a softmax below `e^LEAST_WEIGHT` of the largest are put to zero. They are 2^-62 of a rounding of the sum, and
/// subnormal once they are multiplied, which makes products a hundred times slower.
const LEAST_WEIGHT: f32 = -60.0;

/// Replace a row by `exp(x - max)`, zero below [`LEAST_WEIGHT`]; the largest element and the sum of what was put.
pub(crate) fn exponentials(row: &mut [f32]) -> (f32, f32) {
    Arch::new().dispatch(Exponentials(row))
}

/// A type, since a closure would not be compiled for the wider vectors.
struct Exponentials<'a>(&'a mut [f32]);

impl WithSimd for Exponentials<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> (f32, f32) {
        let max = largest(self.0);
        // NaN stays NaN.
        let weight = |x: f32| if x - max < LEAST_WEIGHT { 0.0 } else { exp(x - max) };
        let mut sums = [0.0f32; 16];
        let mut blocks = self.0.chunks_exact_mut(16);
        for block in &mut blocks {
            for (sum, x) in sums.iter_mut().zip(block) {
                *x = weight(*x);
                *sum += *x;
            }
        }
        let mut total: f64 = 0.0;
        for x in blocks.into_remainder() {
            *x = weight(*x);
            total += f64::from(*x);
        }
        total += sums.iter().map(|s| f64::from(*s)).sum::<f64>();
        (max, total as f32)
    }
}

/// In lanes, since a chain of comparisons would wait for each.
#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let blocks = row.chunks_exact(16);
    let rest = blocks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.into_iter().fold(rest, f32::max)
}

/// Softmax of one row in place; returns nothing but leaves probabilities that sum to 1 within rounding.
pub(crate) fn softmax(row: &mut [f32]) {
    let (_, total) = exponentials(row);
    let inverse = 1.0 / total;
    row.iter_mut().for_each(|x| *x *= inverse);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000i32 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / (exact * f64::from(f32::EPSILON)));
        }
        assert!(worst < 2.0, "{worst} ulp");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn erf_has_its_known_values() {
        for (x, y) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (-2.0, -0.995_322_265_018_952_7),
        ] {
            assert!((erf(x) - y).abs() < 1e-14, "{x}");
        }
        // The two branches meet.
        // The series has terms of up to e^9 there, so it loses four digits.
        assert!((erf(3.0 - 1e-12) - erf(3.0)).abs() < 1e-12);
        assert!((erf(3.0) - 0.999_977_909_503_001_4).abs() < 1e-14);
    }

    #[test]
    fn softmax_leaves_nothing_subnormal() {
        let mut row: Vec<f32> = (0..2000).map(|i| -0.1 * i as f32).collect();
        softmax(&mut row);
        assert!(row.iter().all(|p| *p == 0.0 || p.is_normal()));
        // What was put to zero: the geometric sum of the rest is as good as whole.
        let exact = 1.0 - (-0.1f64).exp();
        assert!((f64::from(row[0]) - exact).abs() < 4.0 * f64::from(f32::EPSILON) * exact, "{} for {exact}", row[0]);
        assert!(row[590] > 0.0 && row[610..].iter().all(|p| *p == 0.0));
    }

    #[test]
    fn softmax_keeps_nan_and_sums_to_one() {
        let mut row: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 * 0.3 - 12.0).collect();
        softmax(&mut row);
        let total: f64 = row.iter().map(|x| f64::from(*x)).sum();
        assert!((total - 1.0).abs() < 1e-6, "{total}");
        row[3] = f32::NAN;
        softmax(&mut row);
        assert!(row.iter().all(|x| x.is_nan()));
    }
}
