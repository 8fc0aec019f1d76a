use ndarray::Array2;

use super::*;
use crate::arch::Activation;

#[test]
fn activations_and_their_slopes_are_those_of_the_runtime() {
    use crate::runtime::{Backend, Cpu};
    for (activation, _) in Activation::NAMES {
        let x = Array2::from_shape_fn((1, 401), |(_, i)| (i as f32 - 200.0) * 0.04 + 0.001);
        let want = Cpu.activated(x.clone(), activation).unwrap();
        for (x, want) in x.iter().zip(&want) {
            let (value, slope) = f64::activation(f64::from(*x), activation);
            assert!(
                (value - f64::from(*want)).abs() <= 4.0 * f64::from(f32::EPSILON) * value.abs().max(1.0),
                "{activation:?} {x}"
            );
            let eps = 1e-5;
            let at = |d: f64| f64::activation(f64::from(*x) + d, activation).0;
            let numeric = (at(eps) - at(-eps)) / (2.0 * eps);
            assert!((numeric - slope).abs() < 1e-8 * value.abs().max(1.0), "{activation:?} {x}: {numeric} {slope}");
        }
    }
}

#[test]
fn f32_does_what_f64_does() {
    let sample = |rows: usize, seed: f64| {
        Array2::from_shape_fn((rows, 37), |(i, j)| (seed + (i * 37 + j) as f64 * 0.61).sin() * 3.0)
    };
    let (gate, up, d) = (sample(5, 0.1), sample(5, 0.2), sample(5, 0.3));
    let narrow = |a: &Array2<f64>| a.mapv(|v| v as f32);
    let near = |a: &Array2<f32>, b: &Array2<f64>| {
        // A handful of roundings of values up to 30.
        let off = a.iter().zip(b).fold(0.0_f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
        assert!(off < 30.0 * 10.0 * f64::from(f32::EPSILON), "{off}");
    };
    for activation in [Activation::Silu, Activation::GeluTanh] {
        for gated in [true, false] {
            let wide = activated(gated.then_some(&gate), &up, activation);
            near(&activated(gated.then(|| narrow(&gate)).as_ref(), &narrow(&up), activation), &wide);
            let (mut g, mut u, mut gn, mut un) = (gate.clone(), up.clone(), narrow(&gate), narrow(&up));
            activated_backward(gated.then_some(&mut g), &mut u, &d, activation);
            activated_backward(gated.then_some(&mut gn), &mut un, &narrow(&d), activation);
            near(&gn, &g);
            near(&un, &u);
        }
    }
    let gain: Vec<f64> = (0..37).map(|i| 1.0 + 0.01 * f64::from(i)).collect();
    let gain_narrow: Vec<f32> = gain.iter().map(|g| *g as f32).collect();
    near(&rms_norm(&narrow(&up), &gain_narrow, 1e-5), &rms_norm(&up, &gain, 1e-5));
    let (wide, of_gain) = rms_norm_backward(&up, &gain, 1e-5, &d);
    let (got, of_gain_narrow) = rms_norm_backward(&narrow(&up), &gain_narrow, 1e-5, &narrow(&d));
    near(&got, &wide);
    near(&of_gain_narrow.insert_axis(ndarray::Axis(0)), &of_gain.insert_axis(ndarray::Axis(0)));
}

#[test]
fn turning_back_is_the_transpose() {
    use crate::arch::{Rope, RopeLayout};
    use crate::runtime::Rotation;
    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        let inv_freq = vec![0.9, 0.2, 0.01];
        let rope = Rope { inv_freq, amplitude: 1.2, layout, theta: 0.0, kind: String::new(), long: None };
        let rotation = Rotation::new(&rope, 0..5);
        let x = Array2::from_shape_fn((8, 12), |(i, j)| ((i * 12 + j) as f32 * 0.37).sin());
        let y = Array2::from_shape_fn((8, 12), |(i, j)| ((i * 12 + j) as f32 * 0.23).cos());
        let windows = [5, 3];
        let (mut turned, mut back, mut runtimes) = (x.clone(), y.clone(), x.clone());
        turn_windows(&rotation, &mut turned, &windows, false);
        turn_windows(&rotation, &mut back, &windows, true);
        rotation.turn_windows(&mut runtimes, &windows);
        assert_eq!(turned, runtimes);
        let dot = |a: &Array2<f32>, b: &Array2<f32>| (a * b).iter().map(|v| f64::from(*v)).sum::<f64>();
        assert!((dot(&turned, &y) - dot(&x, &back)).abs() < 96.0 * 4.0 * f64::from(f32::EPSILON));
    }
}
