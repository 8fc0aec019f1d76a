use ndarray::{Array1, Array2};

use super::*;
use crate::mla::Query;
use crate::mla::{LatentAttention, output_projection};

/// Uniform in [-1, 1], from a SplitMix64 stream.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        2.0 * crate::random::uniform(&mut self.0) - 1.0
    }

    fn matrix(&mut self, rows: usize, columns: usize) -> Array2<f64> {
        // Outputs of unit inputs have variance 1.
        let size = (3.0 / columns as f64).sqrt();
        Array2::from_shape_simple_fn((rows, columns), || size * self.next())
    }

    fn vector(&mut self, len: usize) -> Option<Array1<f64>> {
        Some(Array1::from_shape_simple_fn(len, || 0.3 * self.next()))
    }
}

struct Shape {
    hidden: usize,
    heads: usize,
    nope: usize,
    rope: usize,
    rank: usize,
    value: usize,
}

const TINY: Shape = Shape { hidden: 10, heads: 3, nope: 4, rope: 6, rank: 7, value: 5 };

fn layer(shape: &Shape, query_latent: Option<usize>, random: &mut Random) -> MlaLayer {
    let Shape { hidden, heads, nope, rope, rank, value } = *shape;
    let inner = query_latent.unwrap_or(hidden);
    MlaLayer {
        heads,
        query: Query {
            down: query_latent.map(|r| random.matrix(r, hidden)),
            nope: random.matrix(heads * nope, inner),
            nope_bias: random.vector(heads * nope),
            rope: random.matrix(heads * rope, inner),
            rope_bias: random.vector(heads * rope),
        },
        latent: random.matrix(rank, hidden),
        k_rope: random.matrix(rope, hidden),
        k_rope_bias: random.vector(rope),
        k_up: random.matrix(heads * nope, rank),
        v_up: random.matrix(heads * value, rank),
        wo: random.matrix(hidden, heads * value),
        wo_bias: random.vector(hidden),
        rope_freq: (0..rope / 2).map(|p| 0.7 / (1 + 3 * p) as f64).collect(),
        score_scale: 1.0 / ((nope + rope) as f64).sqrt(),
    }
}

fn tokens(rows: usize, hidden: usize, random: &mut Random) -> Array2<f32> {
    Array2::from_shape_simple_fn((rows, hidden), || (1.7 * random.next()) as f32)
}

fn output(layer: &MlaLayer, x: &Array2<f32>, windows: &[usize]) -> Array2<f32> {
    output_projection(layer, &LatentAttention::new(layer, x.view(), windows).outputs())
}

/// `layer` with every tensor off by uniform noise of `share` of its size.
fn perturbed(layer: &MlaLayer, share: f64, random: &mut Random) -> MlaLayer {
    let mut tensors = Tensors::<f64>::new(layer, true);
    for part in tensors.parts_mut() {
        let size = (part.iter().map(|v| v * v).sum::<f64>() / part.len() as f64).sqrt();
        part.iter_mut().for_each(|v| *v += share * size * random.next());
    }
    tensors.to_layer(layer)
}

#[test]
fn the_forward_pass_is_the_layers_own() {
    for query_latent in [None, Some(8)] {
        let mut random = Random(1);
        let layer = layer(&TINY, query_latent, &mut random);
        // One window shorter than a tile of queries, one longer.
        let windows = [3, 150];
        let x = tokens(153, TINY.hidden, &mut random);
        let want = output(&layer, &x, &windows);
        let data = Data::new(&layer, x.view(), want.view(), &windows, usize::MAX);
        let got = forward(&data.block, &Tensors::<f32>::new(&layer, true), &data.batch(&[0, 1]).0).output;
        // Two orders of the same f32 sums of a few dozen terms of order 1.
        let worst = (&got - &want).iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        assert!(worst < 100.0 * f32::EPSILON, "{worst}");
    }
}

#[test]
fn every_gradient_agrees_with_finite_differences() {
    for query_latent in [None, Some(8)] {
        let mut random = Random(2);
        let layer = layer(&TINY, query_latent, &mut random);
        let windows = vec![70, 9];
        let x = tokens(79, TINY.hidden, &mut random);
        let data = Data::new(&layer, x.view(), x.view(), &windows, usize::MAX);
        let (narrow, _) = data.batch(&[0, 1]);
        let batch = Batch {
            x: narrow.x.mapv(f64::from),
            query: narrow.query.map(|q| q.mapv(f64::from)),
            windows: narrow.windows,
        };
        let mut tensors = Tensors::<f64>::new(&layer, true);
        // The loss is 0.5 |y - target|^2 with another random target, so its gradient by y is y - target.
        let target = Array2::from_shape_simple_fn(batch.x.dim(), || random.next());
        let loss = |tensors: &Tensors<f64>| {
            let y = forward(&data.block, tensors, &batch).output;
            0.5 * (&y - &target).iter().map(|v| v * v).sum::<f64>()
        };
        let trace = forward(&data.block, &tensors, &batch);
        let gradients = backward(&data.block, &tensors, &batch, &trace, &(&trace.output - &target));
        let value = loss(&tensors);
        for part in 0..tensors::COUNT {
            let analytic = gradients.parts()[part].to_vec();
            let size = analytic.iter().fold(0.0_f64, |m, g| m.max(g.abs()));
            assert_eq!(analytic.len(), tensors.parts()[part].len());
            assert!(size > 0.0, "part {part} has no gradient");
            // A spread of elements of each tensor keeps the test quick.
            for i in (0..analytic.len()).step_by(1 + analytic.len() / 40) {
                // Central differences: rounding of the loss over eps, and a third derivative times eps^2.
                let eps = 1e-4;
                let original = tensors.parts()[part][i];
                let mut at = |delta: f64| {
                    tensors.parts_mut()[part][i] = original + delta;
                    loss(&tensors)
                };
                let numeric = (at(eps) - at(-eps)) / (2.0 * eps);
                tensors.parts_mut()[part][i] = original;
                let tolerance = 1e3 * f64::EPSILON * value / eps + 100.0 * eps * eps * size.max(1.0);
                let off = (numeric - analytic[i]).abs();
                assert!(off <= tolerance, "part {part}[{i}]: {numeric} against {}, {tolerance}", analytic[i]);
            }
            // The tolerance has to be far below what it checks.
            assert!(size > 1e4 * 100.0 * 1e-8, "part {part}: {size}");
        }
    }
}

#[test]
fn a_perturbed_layer_gets_better_on_windows_it_has_not_seen() {
    let mut random = Random(3);
    let shape = Shape { hidden: 24, heads: 3, nope: 8, rope: 4, rank: 12, value: 8 };
    let good = layer(&shape, None, &mut random);
    let windows = [40; 24];
    let x = tokens(40 * 24, 24, &mut random);
    let target = output(&good, &x, &windows);
    let start = perturbed(&good, 0.1, &mut random);
    let settings = RefineSettings { tokens_per_step: 240, ..RefineSettings::default() };
    let refined = refine(&start, x.view(), target.view(), &windows, true, &settings);
    assert!(refined.kept);
    assert!(refined.error_after < 0.5 * refined.error_before, "{} {}", refined.error_before, refined.error_after);
    // The reported error is that of the returned layer on the held-out windows, by the converter's own forward pass.
    let (_, held) = split(windows.len(), &settings);
    let data = Data::new(&refined.layer, x.view(), target.view(), &windows, usize::MAX);
    let (batch, want) = data.batch(&held);
    let measured = relative_error(output(&refined.layer, &batch.x, &batch.windows).view(), want.view());
    assert!((measured / refined.error_after - 1.0).abs() < 1e-3, "{measured} {}", refined.error_after);
}

#[test]
fn a_layer_that_cannot_get_better_comes_back_as_it_was() {
    let mut random = Random(4);
    let good = layer(&TINY, None, &mut random);
    let windows = [20, 30, 0, 25, 10];
    let x = tokens(85, TINY.hidden, &mut random);
    let target = output(&good, &x, &windows);
    // The perfect layer, and steps so large that they destroy it, and ones that overflow.
    for learning_rate in [0.003, 1.0, 1e30] {
        let settings = RefineSettings { steps: 20, learning_rate, ..RefineSettings::default() };
        for start in [good.clone(), perturbed(&good, 0.01, &mut random)] {
            let refined = refine(&start, x.view(), target.view(), &windows, true, &settings);
            assert!(refined.error_after <= refined.error_before);
            if learning_rate > 0.5 {
                assert!(!refined.kept && refined.best_step == 0);
                assert_eq!(refined.layer.k_up, start.k_up);
                assert_eq!(refined.error_after, refined.error_before);
            }
        }
    }
}

#[test]
fn poisoned_or_scarce_text_gives_the_layer_back() {
    let mut random = Random(5);
    let start = layer(&TINY, None, &mut random);
    let settings = RefineSettings { steps: 3, ..RefineSettings::default() };
    let mut x = tokens(40, TINY.hidden, &mut random);
    let target = tokens(40, TINY.hidden, &mut random);
    assert!(!refine(&start, x.view(), target.view(), &[40], false, &settings).kept);
    let none = Array2::zeros((0, TINY.hidden));
    assert!(!refine(&start, none.view(), none.view(), &[], false, &settings).kept);
    x.fill(f32::NAN);
    assert!(!refine(&start, x.view(), target.view(), &[10; 4], false, &settings).kept);
}

#[test]
fn without_an_output_bias_none_appears_and_a_constant_one_stays() {
    let mut random = Random(6);
    let good = layer(&TINY, None, &mut random);
    let windows = [30; 8];
    let x = tokens(240, TINY.hidden, &mut random);
    let target = output(&good, &x, &windows);
    let mut start = perturbed(&good, 0.2, &mut random);
    let settings = RefineSettings { steps: 20, ..RefineSettings::default() };
    let refined = refine(&start, x.view(), target.view(), &windows, false, &settings);
    assert!(refined.kept);
    let narrow = |b: &Option<Array1<f64>>| b.as_ref().map(|b| b.mapv(|v| v as f32));
    assert_eq!(narrow(&refined.layer.wo_bias), narrow(&start.wo_bias));
    start.wo_bias = None;
    assert!(refine(&start, x.view(), target.view(), &windows, false, &settings).layer.wo_bias.is_none());
    let with = refine(&start, x.view(), target.view(), &windows, true, &settings);
    assert!(with.kept && with.layer.wo_bias.is_some_and(|b| b.iter().all(|v| *v != 0.0)));
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let mut random = Random(7);
    let shape = Shape { hidden: 160, heads: 3, nope: 50, rope: 8, rank: 140, value: 44 };
    let start = layer(&shape, None, &mut random);
    let windows = [90, 31, 64, 77];
    let x = tokens(262, 160, &mut random);
    let target = output(&perturbed(&start, 0.1, &mut random), &x, &windows);
    let settings = RefineSettings { steps: 4, tokens_per_step: 120, ..RefineSettings::default() };
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let refined = pool.install(|| refine(&start, x.view(), target.view(), &windows, true, &settings));
        assert!(refined.kept);
        Tensors::<f32>::new(&refined.layer, true).parts().map(|p| p.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
    };
    let one = on(1);
    assert_eq!(one, on(2));
    assert_eq!(one, on(5));
}

#[test]
fn each_window_comes_once_before_any_comes_again() {
    let mut order = Order::new((0..7).collect(), 42);
    let mut taken: Vec<usize> = (0..7).flat_map(|_| order.take(17, |_| 6)).collect();
    assert_eq!(taken.len(), 21);
    for pass in taken.chunks_mut(7) {
        pass.sort_unstable();
        assert_eq!(pass, [0, 1, 2, 3, 4, 5, 6]);
    }
    let (mut train, held) = split(16, &RefineSettings::default());
    assert_eq!((train.len(), held.len()), (14, 2));
    train.extend(&held);
    train.sort_unstable();
    assert_eq!(train, (0..16).collect::<Vec<_>>());
}
