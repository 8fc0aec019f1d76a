//! Latents of the output: two linear maps with a norm between them that a class may apply and that must not act.
//!
//! The form in which the norm is made the identity is a decision of the plan ([`LatentNorm`], in the spec). Everything else sees
//! only what it makes of a latent's two maps ([`Carried`]).

use ndarray::{Array1, Array2, s};
use serde::{Deserialize, Serialize};

use super::Target;
use crate::factor::norm::{
    ConstantScales, NormScales, constant_scales, neutral_scales, rms_bound, rms_of_ordinary, small_scales,
};

/// Epsilon of the latent norms: transformers fixes it, other engines read `rms_norm_eps`. Where the norm is neutralised by it
/// ([`LatentNorm::TinyRows`], [`LatentNorm::SmallRows`]) every norm of the output has it.
pub const LATENT_EPS: f64 = 1e-6;
/// How the norm that a class applies to latents is neutralised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LatentNorm {
    /// Rows of the latent are so small that the norm's epsilon dominates (docs/maths.md, section 5).
    TinyRows,
    /// The same for what is an approximation anyway: rows are small enough for ordinary inputs, and the gain of the layer's
    /// input norm takes a part of what makes them small, so that f16 and its block scales hold them.
    SmallRows,
    /// One coordinate of the latent is a constant that outweighs the others, which keep their size (docs/maths.md, section 5).
    /// It needs a bias on the map to the latent.
    Constant {
        /// Coordinates of the key/value latent that the method does not use; the first of them is the constant.
        slots: usize,
    },
}

impl LatentNorm {
    /// The form for a class; `None` for one that norms no latents. A constant needs biases: `biases` says whether the engines
    /// that the output is written for take them. `exact`: whether the output is to equal the source.
    pub fn of(class: Target, biases: bool, exact: bool) -> Option<Self> {
        let small = if exact { Self::TinyRows } else { Self::SmallRows };
        class.norms_latents().then_some(if biases { Self::Constant { slots: 1 } } else { small })
    }

    /// Whether the gain of the norm before attention takes a part of what makes the rows small.
    pub fn scales_input(self) -> bool {
        self == Self::SmallRows
    }

    /// Coordinates of the key/value latent that the method does not use.
    pub fn slots(self) -> usize {
        match self {
            Self::TinyRows | Self::SmallRows => 0,
            Self::Constant { slots } => slots,
        }
    }

    /// Whether it needs biases on the maps to the latents.
    pub fn needs_bias(self) -> bool {
        self.slots() > 0
    }

    /// Why the form does not survive f16; `None`: it does.
    pub fn f16_obstacle(self) -> Option<&'static str> {
        match self {
            Self::TinyRows => {
                Some("its latent norm is neutralised by weights scaled to 2^-20, which f16 rounds to zero")
            }
            Self::SmallRows | Self::Constant { .. } => None,
        }
    }

    /// Epsilon that every norm of the output has to have, for a source with `source_eps`. A constant outweighs any.
    pub fn eps(self, source_eps: f64) -> f64 {
        match self {
            Self::TinyRows | Self::SmallRows => LATENT_EPS,
            Self::Constant { .. } => source_eps,
        }
    }

    /// Factor on the residual stream that makes up for another epsilon of the source (docs/maths.md, (5.6)).
    pub fn stream_scale(self, source_eps: f64) -> f64 {
        let eps = self.eps(source_eps);
        // An epsilon that is the same up to how it was printed needs no scaling.
        if (source_eps / eps - 1.0).abs() < 1e-6 { 1.0 } else { (eps / source_eps).sqrt() }
    }
}

/// Largest weight that the maps from the input may get, a quarter of what f16 holds.
const LARGEST: f64 = 16384.0;
/// What the gain is multiplied by at least: latent rows are then about `2^-5` of what they were.
const LEAST_INPUT_SCALE: f64 = 1.0 / 4096.0;

/// What the gain of the norm before attention is multiplied by for [`LatentNorm::SmallRows`], and the maps that read it are
/// divided by: a power of two from `2^-12` to one, as small as leaves their largest weight, `largest` now, within f16.
pub(super) fn input_scale(largest: f64) -> f64 {
    (largest / LARGEST).max(f64::MIN_POSITIVE).log2().ceil().exp2().clamp(LEAST_INPUT_SCALE, 1.0)
}

/// Two linear maps with a latent between them: `up down x + constant`, for normed inputs `x`.
pub(super) struct Latent<'a> {
    /// `[n, D]`.
    pub down: &'a Array2<f64>,
    /// `[m, n]`.
    pub up: Array2<f64>,
    /// `[m]`; a constant coordinate of the latent carries it.
    pub constant: Option<Array1<f64>>,
    /// Coordinates of `down` that are used, at most `n`; the others are zero.
    pub used: usize,
    /// Coordinates in the output: those that are used, one for a constant, and zeros.
    pub width: usize,
    /// Weight of the norm that `x` comes from, `[D]`; it bounds what the latent norm can meet.
    pub gain: &'a [f64],
    /// Which of the maps keeps its digits: the factor that no power of two holds goes to the other.
    pub plain: Plain,
}

/// One of the maps of a [`Latent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plain {
    /// To the latent.
    Down,
    /// From it.
    Up,
}

/// A latent as it is stored: `up (weight * norm(down x + bias))` is what [`Latent`] says.
pub(super) struct Carried {
    /// `[width, D]`.
    pub down: Array2<f64>,
    /// `[width]`; zeros but for a constant coordinate.
    pub bias: Array1<f64>,
    /// Weight of the norm, `[width]`; of no meaning where there is none.
    pub weight: Vec<f64>,
    /// `[m, width]`.
    pub up: Array2<f64>,
}

impl Latent<'_> {
    /// The maps as they are stored for a norm of form `norm`, or for none.
    pub fn carry(self, norm: Option<LatentNorm>) -> Carried {
        let (scales, slot) = match norm {
            None => (NormScales { down: 1.0, weight: 1.0, up: 1.0 }, None),
            Some(LatentNorm::TinyRows) => {
                let one = self.constant.as_ref().map(|_| Array1::from_elem(1, 1.0));
                (neutral_scales(rms_bound(self.down, self.gain, one.as_ref()), LATENT_EPS), None)
            }
            Some(LatentNorm::SmallRows) => {
                let one = self.constant.as_ref().map(|_| Array1::from_elem(1, 1.0));
                (small_scales(rms_of_ordinary(self.down, self.gain, one.as_ref()), LATENT_EPS), None)
            }
            Some(LatentNorm::Constant { .. }) => {
                let largest = rms_bound(self.down, self.gain, None) * (self.down.nrows() as f64).sqrt();
                let scales = constant_scales(largest, self.width, LATENT_EPS);
                (scales.coordinates, Some(scales))
            }
        };
        let (down_scale, up_scale) = match self.plain {
            Plain::Down => (scales.down, scales.up),
            Plain::Up => (scales.down * scales.up, 1.0),
        };
        let (inner, hidden) = self.down.dim();
        let mut down = Array2::zeros((self.width, hidden));
        down.slice_mut(s![..inner, ..]).assign(&(self.down * down_scale));
        let used = self.used;
        let mut up = self.up;
        if up_scale != 1.0 {
            up *= up_scale;
        }
        let (mut bias, mut weight) = (Array1::zeros(self.width), vec![scales.weight; self.width]);
        if self.width > inner {
            let narrow = up;
            up = Array2::zeros((narrow.nrows(), self.width));
            up.slice_mut(s![.., ..inner]).assign(&narrow);
        }
        match (slot, &self.constant) {
            (None, None) => {}
            (None, Some(constant)) => {
                bias[used] = down_scale;
                up.column_mut(used).assign(&(constant * up_scale));
            }
            // Nothing reads the constant: it only outweighs the other coordinates.
            (Some(ConstantScales { constant: k, .. }), None) => (bias[used], weight[used]) = (k, 0.0),
            (Some(ConstantScales { constant: k, read_weight, read_up, .. }), Some(constant)) => {
                (bias[used], weight[used]) = (k, read_weight);
                up.column_mut(used).assign(&(constant * read_up));
            }
        }
        Carried { down, bias, weight, up }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    fn random(shape: (usize, usize), state: &mut u64) -> Array2<f64> {
        Array2::from_shape_fn(shape, |_| uniform(state) - 0.5)
    }

    /// What a class computes, with an RMSNorm of epsilon `eps` between the maps or without one.
    fn computed(carried: &Carried, x: &Array1<f64>, eps: Option<f64>) -> Array1<f64> {
        let mut latent = carried.down.dot(x) + &carried.bias;
        if let Some(eps) = eps {
            let mean_square = latent.iter().map(|v| v * v).sum::<f64>() / latent.len() as f64;
            latent /= (mean_square + eps).sqrt();
            latent *= &Array1::from(carried.weight.clone());
        }
        carried.up.dot(&latent)
    }

    #[test]
    fn a_neutral_norm_changes_nothing_for_any_input() {
        let mut state = 7;
        let (n, m, d) = (6, 9, 16);
        let forms = [LatentNorm::TinyRows, LatentNorm::SmallRows, LatentNorm::Constant { slots: 1 }];
        for norm in [None].into_iter().chain(forms.map(Some)) {
            let allowed = match norm {
                None | Some(LatentNorm::TinyRows) => -23,
                // Half the square of the least ratio of the constant to the latent is 2^-15.
                Some(LatentNorm::Constant { .. }) => -14,
                // 2^-15 for ordinary inputs; these, of few directions, are up to the root of 16 times as long.
                Some(LatentNorm::SmallRows) => -11,
            };
            for (plain, constant) in [(Plain::Down, false), (Plain::Up, false), (Plain::Up, true), (Plain::Down, true)]
            {
                let down = random((n, d), &mut state);
                let gain: Vec<f64> = (0..d).map(|_| 4.0 * uniform(&mut state)).collect();
                let up = random((m, n), &mut state);
                let carried_constant = constant.then(|| random((1, m), &mut state).row(0).to_owned());
                let latent = Latent {
                    down: &down,
                    up: up.clone(),
                    constant: carried_constant.clone(),
                    used: n,
                    width: n + if constant { 10 } else { norm.map_or(0, LatentNorm::slots) },
                    gain: &gain,
                    plain,
                };
                let carried = latent.carry(norm);
                for _ in 0..20 {
                    // Any normed input: a vector of mean square one, times the gain.
                    let mut x = random((1, d), &mut state).row(0).to_owned();
                    x *= (d as f64 / x.dot(&x)).sqrt();
                    x *= &Array1::from(gain.clone());
                    let mut wanted = up.dot(&down.dot(&x));
                    if let Some(constant) = &carried_constant {
                        wanted += constant;
                    }
                    let got = computed(&carried, &x, norm.map(|_| LATENT_EPS));
                    let largest = wanted.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
                    let error = (&got - &wanted).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
                    assert!(
                        error <= 2.0_f64.powi(allowed) * largest,
                        "{norm:?} {plain:?} {constant}: {error} of {largest}"
                    );
                }
            }
        }
    }

    /// What `change` of every stored number does to the output, relative to its largest value; the mean over some inputs.
    fn disturbed(norm: LatentNorm, width: usize, change: &dyn Fn(f64, usize) -> f64) -> f64 {
        let mut state = 17;
        let (n, m, d) = (12, 9, 32);
        let (down, up) = (random((n, d), &mut state), random((m, n), &mut state));
        let constant = random((1, m), &mut state).row(0).to_owned();
        let gain = [0.5; 32];
        let latent = Latent {
            down: &down,
            up: up.clone(),
            constant: Some(constant.clone()),
            used: n,
            width,
            gain: &gain,
            plain: Plain::Down,
        };
        let mut carried = latent.carry(Some(norm));
        let stored = carried.down.iter_mut().chain(&mut carried.bias).chain(&mut carried.weight).chain(&mut carried.up);
        stored.enumerate().for_each(|(i, v)| *v = change(*v, i));
        let mut sum = 0.0;
        for _ in 0..20 {
            let mut x = random((1, d), &mut state).row(0).to_owned();
            x *= (d as f64 / x.dot(&x)).sqrt() * 0.5;
            let wanted = up.dot(&down.dot(&x)) + &constant;
            let got = computed(&carried, &x, Some(LATENT_EPS));
            let largest = wanted.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
            let error = (&got - &wanted).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
            // Infinity where a comparison would pass over NaN.
            sum += if error.is_finite() { error / largest } else { f64::INFINITY };
        }
        sum / 20.0
    }

    #[test]
    fn small_rows_lie_where_f16_holds_them_once_the_input_is_scaled() {
        let mut state = 23;
        for size in [0.01, 0.1, 1.0, 10.0] {
            let (down, up) = (random((8, 64), &mut state) * size, random((5, 8), &mut state));
            let latent =
                Latent { down: &down, up, constant: None, used: 8, width: 8, gain: &[1.0; 64], plain: Plain::Down };
            let carried = latent.carry(Some(LatentNorm::SmallRows));
            let largest = |m: &Array2<f64>| m.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
            // Queries of a usual size.
            let scale = input_scale(1.0);
            assert_eq!(scale, LEAST_INPUT_SCALE);
            let rows = largest(&carried.down) / scale;
            // Q8_0 divides by 127; 2^-20 is sixteen steps of f16's smallest numbers.
            assert!(rows / 127.0 > 2.0_f64.powi(-20) && rows < 16.0, "{size}: {rows}");
            assert!(carried.weight.iter().all(|w| *w > 16.0), "{size}: {:?}", carried.weight);
        }
    }

    #[test]
    fn the_input_is_scaled_as_far_as_f16_holds_the_weights() {
        for exponent in -30..30 {
            let largest = 1.3 * 2.0_f64.powi(exponent);
            let scale = input_scale(largest);
            assert!(scale.log2().fract() == 0.0 && (LEAST_INPUT_SCALE..=1.0).contains(&scale), "{scale}");
            assert!(largest / scale <= LARGEST || scale == 1.0, "{largest}: {scale}");
            assert!(
                largest / scale > 0.5 * LARGEST || scale == LEAST_INPUT_SCALE || scale == 1.0,
                "{largest}: {scale}"
            );
        }
    }

    #[test]
    fn a_constant_survives_f16_and_tiny_rows_do_not() {
        let f16 = |v: f64, _: usize| half::f16::from_f64(v).to_f64();
        let (new, old) =
            (disturbed(LatentNorm::Constant { slots: 1 }, 16, &f16), disturbed(LatentNorm::TinyRows, 16, &f16));
        assert!(new < 2e-3, "{new}");
        assert!(old > 0.1, "{old}");
    }

    #[test]
    fn a_step_of_an_optimiser_changes_little_where_a_constant_neutralises_the_norm() {
        // As Adam's first step: every number by the same amount, in a direction of its own.
        let step = |v: f64, i: usize| v + if (i * 7 + i / 3) % 5 < 2 { 1e-4 } else { -1e-4 };
        let (new, old) =
            (disturbed(LatentNorm::Constant { slots: 1 }, 16, &step), disturbed(LatentNorm::TinyRows, 16, &step));
        assert!(new < 5e-3, "{new}");
        assert!(old > 0.1, "{old}");
    }

    #[test]
    fn constants_lie_where_f16_holds_them_whatever_the_latent() {
        for exponent in -40..40 {
            let s = constant_scales(3.0 * 2.0_f64.powi(exponent), 48, LATENT_EPS);
            assert!((256.0..=32768.0).contains(&s.constant) && s.constant.log2().fract() == 0.0, "{s:?}");
            assert!(s.constant >= 127.9 * 3.0 * 2.0_f64.powi(exponent) * s.coordinates.down, "{s:?}");
            let c = s.coordinates;
            let root = (s.constant * s.constant / 48.0 + LATENT_EPS).sqrt();
            assert!((c.down * c.weight * c.up / root - 1.0).abs() < 1e-14, "{s:?}");
            assert!((s.constant * s.read_weight * s.read_up / root - 1.0).abs() < 1e-14, "{s:?}");
        }
    }

    #[test]
    fn the_map_that_is_to_stay_plain_keeps_its_digits() {
        let mut state = 3;
        let (down, up) = (random((4, 8), &mut state), random((5, 4), &mut state));
        let carried = |plain| {
            let latent =
                Latent { down: &down, up: up.clone(), constant: None, used: 4, width: 4, gain: &[1.0; 8], plain };
            latent.carry(Some(LatentNorm::TinyRows))
        };
        assert_eq!(carried(Plain::Up).up, up);
        let rows = carried(Plain::Down).down;
        let factor = rows[[0, 0]] / down[[0, 0]];
        assert!(factor.log2().fract() == 0.0 && rows == &down * factor);
    }
}
