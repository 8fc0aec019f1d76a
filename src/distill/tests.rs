//! Gradients of whole models against finite differences in f64.

use std::borrow::Cow;
use std::ops::Range;

use ndarray::{Array2, s};

use super::head::StudentHead;
use super::layer::LayerShape;
use super::network::{Batch, Frozen, Network};
use super::optimiser::{Optimiser, schedule};
use super::tensors::{Role, Tensors};
use crate::arch::{Activation, Rope, RopeLayout};
use crate::gradient::Heads;
use crate::runtime::{Rotation, RuntimeError};

const HIDDEN: usize = 10;
const HEADS: usize = 3;
const NOPE: usize = 4;
const ROPE: usize = 6;
const VALUE: usize = 5;
const RANK: usize = 7;
const QUERY_RANK: usize = 8;
const INNER: usize = 12;
const VOCAB: usize = 17;
const LAYERS: usize = 2;
/// One window shorter than a tile of queries, one longer.
const WINDOWS: [usize; 2] = [70, 9];

struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        2.0 * crate::random::uniform(&mut self.0) - 1.0
    }

    /// Outputs of unit inputs have variance 1.
    fn matrix(&mut self, rows: usize, columns: usize) -> Array2<f64> {
        let size = (3.0 / columns as f64).sqrt();
        Array2::from_shape_simple_fn((rows, columns), || size * self.next())
    }

    fn bias(&mut self, n: usize) -> Array2<f64> {
        Array2::from_shape_simple_fn((1, n), || 0.3 * self.next())
    }

    fn gain(&mut self, n: usize) -> Array2<f64> {
        Array2::from_shape_simple_fn((1, n), || 1.0 + 0.5 * self.next())
    }
}

/// What some families have and others have not.
#[derive(Debug, Clone, Copy)]
struct Kind {
    query_latent: bool,
    /// Norms of latents, before attention and MLP, and behind them.
    norms: [bool; 3],
    biases: bool,
    gated: bool,
    activation: Activation,
    cap: Option<f64>,
    window: Option<usize>,
    layout: RopeLayout,
    factor: f64,
}

const KINDS: [Kind; 4] = [
    Kind {
        query_latent: false,
        norms: [false, true, false],
        biases: false,
        gated: true,
        activation: Activation::Silu,
        cap: None,
        window: None,
        layout: RopeLayout::Interleaved,
        factor: 1.0,
    },
    Kind {
        query_latent: true,
        norms: [true, true, false],
        biases: true,
        gated: true,
        activation: Activation::GeluTanh,
        cap: None,
        window: None,
        layout: RopeLayout::Half,
        factor: 0.7,
    },
    Kind {
        query_latent: false,
        norms: [true, true, true],
        biases: true,
        gated: true,
        activation: Activation::Gelu,
        cap: Some(1.5),
        window: Some(11),
        layout: RopeLayout::Interleaved,
        factor: 1.0,
    },
    Kind {
        query_latent: true,
        norms: [false, false, true],
        biases: false,
        gated: false,
        activation: Activation::Relu2,
        cap: None,
        window: None,
        layout: RopeLayout::Interleaved,
        factor: 1.0,
    },
];

fn layer(kind: Kind, random: &mut Random) -> Tensors<f64> {
    use Role::*;
    let mut t = Tensors::none();
    let input = if kind.query_latent { QUERY_RANK } else { HIDDEN };
    if kind.query_latent {
        t[QueryDown] = random.matrix(QUERY_RANK, HIDDEN);
    }
    for (role, rows, columns) in [
        (QueryNope, HEADS * NOPE, input),
        (QueryRope, HEADS * ROPE, input),
        (Latent, RANK, HIDDEN),
        (KeyRope, ROPE, HIDDEN),
        (KeyUp, HEADS * NOPE, RANK),
        (ValueUp, HEADS * VALUE, RANK),
        (Output, HIDDEN, HEADS * VALUE),
        (Up, INNER, HIDDEN),
        (Down, HIDDEN, INNER),
    ] {
        t[role] = random.matrix(rows, columns);
    }
    if kind.gated {
        t[Gate] = random.matrix(INNER, HIDDEN);
    }
    for bias in Role::ALL {
        if let Some(weight) = bias.weight_of_bias().filter(|w| kind.biases && t.has(*w)) {
            t[bias] = random.bias(t[weight].nrows());
        }
    }
    let [latents, before, behind] = kind.norms;
    let mut gain = |role: Role, n: usize, has: bool| {
        if has {
            t[role] = random.gain(n);
        }
    };
    gain(QueryGain, QUERY_RANK, latents && kind.query_latent);
    gain(LatentGain, RANK, latents);
    gain(InputGain, HIDDEN, before);
    gain(PostGain, HIDDEN, before);
    gain(AttentionOutGain, HIDDEN, behind);
    gain(MlpOutGain, HIDDEN, behind);
    t
}

/// Weights of a whole model, those behind the layers last.
fn model(kind: Kind, random: &mut Random) -> Vec<Tensors<f64>> {
    let mut out: Vec<Tensors<f64>> = (0..LAYERS).map(|_| layer(kind, random)).collect();
    let mut behind = Tensors::none();
    behind[Role::FinalGain] = random.gain(HIDDEN);
    out.push(behind);
    out
}

struct Held(Vec<Tensors<f64>>);

impl Frozen<f64> for Held {
    fn layer(&self, index: usize) -> Result<Cow<'_, Tensors<f64>>, RuntimeError> {
        Ok(Cow::Borrowed(&self.0[index]))
    }
}

fn network<'a>(kind: Kind, frozen: &'a Held, random: &mut Random) -> Network<'a, f64> {
    let rope = Rope {
        inv_freq: (0..ROPE / 2).map(|p| 0.7 / (1 + 3 * p) as f64).collect(),
        amplitude: 1.1,
        layout: kind.layout,
        theta: 0.0,
        kind: String::new(),
        long: None,
    };
    let shape = LayerShape {
        heads: Heads { heads: HEADS, scale: 0.4, window: kind.window, cap: kind.cap },
        norm_eps: 1e-2,
        latent_eps: 1e-3,
        activation: kind.activation,
    };
    Network {
        layers: vec![shape; LAYERS],
        rotation: Rotation::new(&rope, 0..WINDOWS[0]),
        head: StudentHead {
            weight: random.matrix(VOCAB, HIDDEN),
            factor: kind.factor,
            cap: kind.cap.map(|c| 3.0 * c),
            norm_eps: 1e-2,
        },
        frozen,
    }
}

fn batch(random: &mut Random) -> Batch<f64> {
    let tokens = WINDOWS.iter().sum();
    Batch { input: Array2::from_shape_simple_fn((tokens, HIDDEN), || 1.7 * random.next()), windows: WINDOWS.to_vec() }
}

#[test]
fn every_gradient_of_a_whole_model_agrees_with_finite_differences() {
    for kind in KINDS {
        let mut random = Random(2);
        let mut trained = model(kind, &mut random);
        let none = Held(vec![Tensors::none(); LAYERS + 1]);
        let network = network(kind, &none, &mut random);
        let batch = batch(&mut random);
        let logits = Array2::from_shape_simple_fn((batch.input.nrows(), VOCAB), || 2.0 * random.next());
        let source = |rows: Range<usize>| Ok(logits.slice(s![rows, ..]).to_owned());
        let scale = 0.1;
        let loss = |trained: &[Tensors<f64>]| {
            scale * network.losses(trained, batch.clone(), &source).unwrap().iter().sum::<f64>()
        };
        let mut sums: Vec<Tensors<f64>> = trained.iter().map(Tensors::zeros_like).collect();
        let losses = network.gradients(&trained, batch.clone(), &source, scale, &mut sums).unwrap();
        let value = loss(&trained);
        // A KL divergence is positive, and both passes say the same of it.
        assert!(losses.iter().all(|l| *l > 0.0) && (scale * losses.iter().sum::<f64>() / value - 1.0).abs() < 1e-12);
        for index in 0..=LAYERS {
            for role in Role::ALL.into_iter().filter(|role| sums[index].has(*role)) {
                let analytic: Vec<f64> = sums[index][role].iter().copied().collect();
                let size = analytic.iter().fold(0.0_f64, |m, g| m.max(g.abs()));
                // The tolerance has to be far below what it checks.
                assert!(size > 1e-3, "{kind:?} {role:?} of {index}: {size}");
                for i in (0..analytic.len()).step_by(1 + analytic.len() / 12) {
                    let eps = 1e-5;
                    let mut at = |delta: f64| {
                        trained[index][role].as_slice_mut().unwrap()[i] += delta;
                        let value = loss(&trained);
                        trained[index][role].as_slice_mut().unwrap()[i] -= delta;
                        value
                    };
                    // Central differences: rounding of the loss over eps, and a third derivative times eps^2.
                    let numeric = (at(eps) - at(-eps)) / (2.0 * eps);
                    let tolerance = 1e3 * f64::EPSILON * value / eps + 1e3 * eps * eps * size.max(1.0);
                    let off = (numeric - analytic[i]).abs();
                    assert!(
                        off <= tolerance,
                        "{kind:?} {role:?}[{i}] of {index}: {numeric}, not {}: {tolerance}",
                        analytic[i]
                    );
                }
            }
        }
    }
}

#[test]
fn frozen_weights_get_no_gradient_and_change_none_of_the_others() {
    let kind = KINDS[2];
    let mut random = Random(5);
    let all = model(kind, &mut random);
    let attention = |role: Role| !role.is_mlp() && !role.is_gain();
    let some: Vec<Tensors<f64>> = all.iter().map(|t| t.only(attention)).collect();
    let (nothing, held) = (Held(vec![Tensors::none(); LAYERS + 1]), Held(all.clone()));
    let source =
        |rows: Range<usize>| Ok(Array2::from_shape_fn((rows.len(), VOCAB), |(i, j)| ((i * 7 + j) as f64).sin()));
    let run = |trained: &[Tensors<f64>], frozen: &Held| {
        let mut random = Random(6);
        let network = network(kind, frozen, &mut random);
        let batch = batch(&mut random);
        let mut sums: Vec<Tensors<f64>> = trained.iter().map(Tensors::zeros_like).collect();
        network.gradients(trained, batch, &source, 1.0, &mut sums).unwrap();
        sums
    };
    let (whole, part) = (run(&all, &nothing), run(&some, &held));
    for (whole, part) in whole.iter().zip(&part) {
        assert_eq!(&whole.only(attention), part);
    }
}

#[test]
fn a_student_that_is_its_source_has_no_loss_and_no_gradient() {
    let kind = KINDS[1];
    let mut random = Random(9);
    let trained = model(kind, &mut random);
    let none = Held(vec![Tensors::none(); LAYERS + 1]);
    let network = network(kind, &none, &mut random);
    let batch = batch(&mut random);
    let hidden = {
        let mut x = batch.input.clone();
        for tensors in &trained[..LAYERS] {
            let weights = super::tensors::Weights { trained: tensors, frozen: &none.0[0] };
            let rotation = &network.rotation;
            x = super::layer::Layer { shape: network.layers[0], weights, rotation, windows: &WINDOWS }.forward(x, None);
        }
        crate::gradient::rms_norm(&x, trained[LAYERS][Role::FinalGain].as_slice().unwrap(), 1e-2)
    };
    let logits = hidden.dot(&network.head.weight.t()) * kind.factor;
    let source = |rows: Range<usize>| Ok(logits.slice(s![rows, ..]).to_owned());
    let mut sums: Vec<Tensors<f64>> = trained.iter().map(Tensors::zeros_like).collect();
    let losses = network.gradients(&trained, batch, &source, 1.0, &mut sums).unwrap();
    assert!(losses.iter().all(|l| l.abs() < 1e-12), "{losses:?}");
    assert!(sums.iter().flat_map(Tensors::parts).flatten().all(|g| g.abs() < 1e-10));
}

/// Forward passes of stored models are the runtime's, whatever the class has.
#[test]
fn the_students_forward_pass_is_the_runtimes() {
    use crate::arch::Architecture;
    use crate::observe::Silent;
    use crate::runtime::{Cpu, Model};
    use crate::source::{ModelSource, OpenOptions};

    let dir = tempfile::tempdir().unwrap();
    let fixture = |name: &str| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    let open = |dir: &std::path::Path| {
        let source = ModelSource::open(&dir.display().to_string(), &OpenOptions::default(), &Silent).unwrap();
        let arch = Architecture::from_config(&source.config).unwrap();
        (source, arch)
    };
    let mut folders: Vec<_> =
        ["pico-deepseek-v3-bias", "pico-minicpm3", "pico-plm", "pico-youtu"].map(fixture).into_iter().collect();
    // What only our own class holds: norms behind attention, capped scores and logits, windows, factors, other activations.
    for name in ["pico-gemma2", "pico-granite", "pico-mistral"] {
        let (source, arch) = open(&fixture(name));
        let settings = crate::methods::ConvertSettings {
            method: crate::methods::MethodChoice::named("exact").unwrap(),
            target: crate::target::TargetChoice::all().find(|t| t.name() == "hf-remote").unwrap(),
            ..Default::default()
        };
        let to = dir.path().join(name);
        crate::convert::convert(&source, &arch, &settings, &to, &|_| Vec::new(), &Silent).unwrap();
        folders.push(to);
    }
    for folder in folders {
        let (source, arch) = open(&folder);
        let student = super::student::Student::new(&source, &arch).unwrap();
        let token = |i: usize| (i * 37 + i * i) as u32 % arch.vocab as u32;
        let windows: Vec<Vec<u32>> = [0..40, 40..47].into_iter().map(|range| range.map(token).collect()).collect();
        let model = Model::new(&source, &arch, &Cpu);
        let hidden = model.final_hidden(&windows, &Silent).unwrap();
        let head = model.head().unwrap();
        let logits = |rows: Range<usize>| head.logits(hidden.slice(s![rows, ..]));
        let (input, windows) = model.start(&windows).unwrap();
        for train in super::Train::ALL {
            let trained: Vec<_> = (0..=arch.layers).map(|i| student.chosen(i, train).unwrap().tensors).collect();
            let frozen = super::student::StoredLayers::new(&student, &trained).unwrap();
            let network = student.network(40, &frozen).unwrap();
            let batch = Batch { input: input.clone(), windows: windows.clone() };
            let losses = network.losses(&trained, batch, &logits).unwrap();
            // Two orders of the same f32 sums: logits differ by some 1e-5, and a divergence is of their square. What remains is
            // the rounding of logarithms of sums of up to 300 terms.
            let worst = losses.iter().fold(0.0_f64, |m, l| m.max(l.abs()));
            assert!(worst < 2e-6, "{} {train}: {worst}", folder.display());
            for (index, trained) in trained.iter().enumerate() {
                let names = student.trained_names(index, trained);
                let written = student.written(index, trained).unwrap();
                assert_eq!(
                    written.iter().map(|(name, _)| name.clone()).collect::<std::collections::BTreeSet<_>>(),
                    names
                );
                for (name, values) in written {
                    let stored =
                        crate::arch::StoredPart::find(&source.tensors, &crate::arch::Part::whole(&name)).unwrap();
                    // A factor on the residual stream is multiplied in, rounded, and divided out again.
                    let same = |(a, b): (&f64, f64)| (a - b).abs() <= 2.0 * f64::from(f32::EPSILON) * b.abs().max(1e-3);
                    let stored = stored.to_f64();
                    assert!(values.len() == stored.len() && values.iter().zip(stored).all(same), "{name}");
                }
            }
        }
    }
}

#[test]
fn steps_have_the_size_that_is_asked_for_whatever_the_scale_of_a_tensor() {
    let weights = |scale: f32| {
        let mut t = Tensors::none();
        t[Role::Latent] = Array2::from_shape_fn((4, 6), |(i, j)| scale * (1.0 + ((i * 6 + j) as f32 * 0.7).sin()));
        // Padding: neither counted nor moved.
        t[Role::Latent].row_mut(2).fill(0.0);
        vec![t]
    };
    let run = |scale: f32, fixed: Option<usize>| {
        let mut trained = weights(scale);
        let start = trained[0][Role::Latent].clone();
        let mut optimiser = Optimiser::new(&trained, &[fixed]);
        for step in 0..5 {
            let mut gradients = vec![Tensors::zeros_like(&trained[0])];
            let slope = |(i, j): (usize, usize)| ((i + 2 * j + step) as f32).cos() / scale;
            gradients[0][Role::Latent] = Array2::from_shape_fn((4, 6), slope);
            gradients[0][Role::Latent].row_mut(2).fill(0.0);
            assert!(optimiser.step(&mut trained, &mut gradients, 1e-3));
        }
        (&trained[0][Role::Latent] - &start) / scale
    };
    // A power of two, as of a latent whose norm has been made to do nothing: the same digits.
    let (plain, tiny) = (run(1.0, None), run(2.0_f32.powi(-20), None));
    let off = (&plain - &tiny).iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    // The changes of weights of order one are rounded to 2^-24.
    assert!(off <= 5.0 * f32::EPSILON, "{off}");
    let largest = plain.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    assert!(largest > 1e-3 && largest < 5.0 * 1e-3 * 2.0, "{largest}");
    assert!(plain.row(2).iter().all(|v| *v == 0.0));
    let fixed = run(1.0, Some(1));
    assert!(fixed.row(1).iter().all(|v| *v == 0.0) && fixed.row(0).iter().all(|v| *v != 0.0));
}

#[test]
fn a_gradient_that_is_not_finite_moves_nothing() {
    let mut t = Tensors::none();
    t[Role::Output] = Array2::from_elem((3, 3), 0.5_f32);
    let (mut trained, before) = (vec![t.clone()], t);
    let mut optimiser = Optimiser::new(&trained, &[None]);
    let mut gradients = vec![Tensors::zeros_like(&before)];
    gradients[0][Role::Output][[1, 1]] = f32::NAN;
    assert!(!optimiser.step(&mut trained, &mut gradients, 1e-3));
    assert_eq!(trained[0], before);
}

#[test]
fn the_schedule_warms_up_and_decays_to_a_tenth() {
    let rates: Vec<f64> = (0..100).map(|step| schedule(step, 100)).collect();
    assert!(rates[0] < 0.3 && (rates[4] - 1.0).abs() < 1e-12 && (rates[99] - 0.1).abs() < 1e-12);
    assert!(rates[5..].windows(2).all(|pair| pair[1] < pair[0]));
    assert_eq!(schedule(0, 1), 1.0);
}
