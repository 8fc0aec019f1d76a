//! What has to hold on every device: its operations and models against those of the CPU, the same bits twice.

// Every device's tests use most of these; a build may have neither.
#![allow(dead_code)]

use std::io::Write as _;

use gqa2mla::arch::{Activation, Architecture, Rope, RopeLayout};
use gqa2mla::convert::{CalibrationSettings, ConvertSettings, convert};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{
    AttentionShape, Backend, Cpu, DeviceChoice, HeadColumns, HeadPart, Model, Resident, Rotation, Session, SessionSize,
    Span,
};
use ndarray::{Array2, s};

use crate::common::logits::{golden_fixtures, tolerance};
use crate::common::models::{fixture, method, open};

/// A device, or a line that tests which need it were skipped. Where the variable is set it has to be there.
pub fn or_skip<B>(found: Option<&'static B>, what: &str, required: &str) -> Option<&'static B> {
    let required_here = std::env::var_os(required).is_some_and(|v| !v.is_empty());
    assert!(found.is_some() || !required_here, "{required} is set and there is no {what}");
    if found.is_none() {
        // Past the harness, which keeps what passing tests print to itself.
        let _ = writeln!(std::io::stderr(), "skipped: there is no {what}");
    }
    found
}

/// Values of size 1 without structure.
pub fn noise(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    let value = |(i, j): (usize, usize)| (((i * columns + j + seed * 7717) * 7919 % 10_007) as f32 * 0.613).sin();
    Array2::from_shape_fn((rows, columns), value)
}

/// The same with values that are bf16.
pub fn bf16(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    noise(rows, columns, seed).mapv(|v| f32::from_bits(v.to_bits() & 0xffff_0000))
}

/// Both sides sum up to `terms` products of size `size`, in other orders; a division or exponential may be off by some
/// bits (the latter by 3 + 2 |x| ulp, |x| below 16 here).
pub fn assert_close(what: &str, found: &Array2<f32>, expected: &Array2<f32>, terms: usize, size: f32) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let bound = (2.0 * (terms as f32).sqrt() * 4.0 + 40.0) * f32::EPSILON * size;
    for ((at, a), b) in found.indexed_iter().zip(expected) {
        assert!((a - b).abs() <= bound, "{what}: {a} instead of {b} at {at:?}, allowed {bound}");
    }
}

pub fn both<B: Backend>(device: &B, host: &Array2<f32>) -> (Array2<f32>, B::Tensor) {
    (host.clone(), device.upload(host.clone()))
}

pub fn products_of_any_size_are_those_of_the_cpu<B: Backend>(device: &B) {
    for (rows, inner, outs) in
        [(1, 33, 70), (3, 64, 5), (8, 20, 129), (9, 31, 33), (16, 24, 40), (17, 31, 33), (70, 50, 65), (131, 40, 200)]
    {
        for packed in [false, true] {
            let weight = if packed { bf16(outs, inner, 1) } else { noise(outs, inner, 1) };
            let (x, on_there) = both(device, &noise(rows, inner, 2));
            let (bias, bias_there) = both(device, &noise(1, outs, 3));
            let w = device.upload_weight(weight.clone().into());
            for with_bias in [false, true] {
                let expected = Cpu.linear(&x, &weight.clone().into(), with_bias.then_some(&bias));
                let found = device.download(device.linear(&on_there, &w, with_bias.then_some(&bias_there))).unwrap();
                let what = format!("{rows} x {inner} x {outs}, packed {packed}, bias {with_bias}");
                assert_close(&what, &found, &expected, inner, (inner as f32).sqrt());
            }
        }
    }
}

pub fn head_products_are_those_of_the_cpu<B: Backend>(device: &B) {
    let (heads, nope, value, r) = (3, 12, 10, 20);
    for rows in [1, 13, 70] {
        for weight in [noise(heads * (nope + value), r, 1), bf16(heads * (nope + value), r, 1)] {
            let w = device.upload_weight(weight.clone().into());
            for (start, width, absorb) in [(0, nope, true), (nope, value, false)] {
                let of = HeadColumns { start, stride: nope + value, width };
                let (x, x_there) = both(device, &noise(rows, heads * if absorb { width } else { r }, 2));
                let expected = Cpu.head_linear(&x, &weight.clone().into(), of, heads, absorb);
                let found = device.download(device.head_linear(&x_there, &w, of, heads, absorb)).unwrap();
                assert_close("head_linear", &found, &expected, r, (r as f32).sqrt());
            }
        }
    }
}

/// Queries with and without a rotated part, of which devices may take both in one pass.
pub fn absorbed_queries_are_those_of_the_cpu<B: Backend>(device: &B) {
    let (heads, nope, value) = (3, 12, 10);
    for (rows, rope, r) in [(1, 0, 20), (1, 6, 20), (13, 6, 35), (70, 8, 64)] {
        for weight in [noise(heads * (nope + value), r, 1), bf16(heads * (nope + value), r, 1)] {
            let w = device.upload_weight(weight.clone().into());
            let of = HeadColumns { start: 0, stride: nope + value, width: nope };
            let (x, x_there) = both(device, &noise(rows, heads * (nope + rope), 2));
            let expected = Cpu.absorb(&x, &weight.clone().into(), of, heads);
            let found = device.download(device.absorb(&x_there, &w, of, heads)).unwrap();
            assert_eq!(found.dim(), (rows, heads * (r + rope)));
            assert_close("absorb", &found, &expected, nope, (nope as f32).sqrt());
            // What is not multiplied is copied.
            let each = nope + rope;
            for h in 0..heads {
                let tail = x.slice(s![.., h * each + nope..(h + 1) * each]);
                assert_eq!(found.slice(s![.., h * (r + rope) + r..(h + 1) * (r + rope)]), tail);
            }
        }
    }
}

pub fn row_and_column_operations_are_those_of_the_cpu<B: Backend>(device: &B) {
    let (rows, heads, width) = (67, 5, 12);
    let (x, x_there) = both(device, &noise(rows, heads * width, 1));
    let (y, y_there) = both(device, &noise(rows, heads * width, 2));
    let (gain, gain_there) = both(device, &noise(1, heads * width, 3));
    let close = |what: &str, found: B::Tensor, expected: &Array2<f32>| {
        assert_close(what, &device.download(found).unwrap(), expected, heads * width, 3.0);
    };
    close("rms_norm", device.rms_norm(&x_there, &gain_there, 1e-5), &Cpu.rms_norm(&x, &gain, 1e-5));
    close("silu_mul", device.silu_mul(device.upload(x.clone()), &y_there), &Cpu.silu_mul(x.clone(), &y));
    let mut sum = device.upload(x.clone());
    device.add(&mut sum, &y_there);
    close("add", sum, &(&x + &y));
    assert_eq!(device.download(device.rows(&x_there, 3..29)).unwrap(), x.slice(s![3..29, ..]));
    assert_eq!(device.download(device.zeros(3, 7)).unwrap(), Array2::<f32>::zeros((3, 7)));

    let to: Vec<usize> = (0..rows).map(|i| i * 29 % 101).collect();
    let (mut into, mut into_there) = both(device, &noise(101, heads * width, 4));
    Cpu.write_rows(&mut into, &to, &x);
    device.write_rows(&mut into_there, &to, &x_there);
    assert_eq!(device.download(into_there).unwrap(), into);

    let columns = [HeadColumns { start: 2, stride: width, width: 7 }, HeadColumns { start: 40, stride: 0, width: 3 }];
    let parts = [HeadPart { from: &x, columns: columns[0] }, HeadPart { from: &y, columns: columns[1] }];
    let parts_there =
        [HeadPart { from: &x_there, columns: columns[0] }, HeadPart { from: &y_there, columns: columns[1] }];
    let expected = Cpu.gather_heads(&parts, heads);
    assert_eq!(device.download(device.gather_heads(&parts_there, heads)).unwrap(), expected);

    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        let rope = Rope { inv_freq: vec![1.0, 0.3, 0.01, 1e-4], amplitude: 1.1, layout, ..rope() };
        let rotation = Rotation::new(&rope, 5..5 + 2 * rows);
        let positions: Vec<usize> = (0..rows).map(|t| 5 + t * 2).collect();
        let columns = HeadColumns { start: 3, stride: width, width: 8 };
        let (mut turned, mut turned_there) = both(device, &x);
        Cpu.rope(&mut turned, &rotation, &positions, columns, heads);
        device.rope(&mut turned_there, &rotation, &positions, columns, heads);
        close("rope", turned_there, &turned);
    }
}

/// Any, for the fields that do not matter.
pub fn rope() -> Rope {
    let config = serde_json::json!({"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 80, "vocab_size": 50,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu"});
    Architecture::from_config(&config).unwrap().rope
}

pub fn attention_is_that_of_the_cpu<B: Backend>(device: &B) {
    // Windows under each other, decoding over long caches, and a few rows at the end of one.
    let windows = Span::of_windows(&[1, 70, 17]);
    let decode = vec![Span { queries: 0..1, keys: 0..700 }, Span { queries: 1..2, keys: 700..709 }];
    let tail = vec![Span { queries: 0..40, keys: 13..320 }];
    for (name, heads, kv_heads, keys, values, sliding_window) in [
        ("gqa", 6, 2, (16, 16), None, None),
        ("window", 6, 2, (16, 16), None, Some(9)),
        ("latent", 9, 1, (28, 20), Some(0), None),
        ("wide", 2, 2, (40, 72), None, None),
        ("many heads", 37, 1, (12, 8), Some(0), None),
        ("wide latent", 9, 1, (148, 132), Some(0), None),
    ] {
        for spans in [&windows, &decode, &tail] {
            let rows = spans.last().unwrap().queries.end;
            let cached = spans.last().unwrap().keys.end;
            let q = noise(rows, heads * keys.0, 1).mapv(|v| 2.0 * v);
            let shape = AttentionShape {
                heads,
                kv_heads,
                keys: HeadColumns::dense(keys.0),
                // Absorbed MLA reads the values from the keys.
                values: HeadColumns { start: values.unwrap_or(3), stride: keys.1, width: keys.1 },
                scale: (keys.0 as f64).powf(-0.5),
                sliding_window,
            };
            let k = noise(cached, kv_heads * keys.0, 2);
            let v = if values.is_some() { k.clone() } else { noise(cached, kv_heads * keys.1 + 5, 3) };
            let expected = Cpu.attention(&q, &k, &v, &shape, spans);
            let (q, k, v) = (device.upload(q), device.upload(k), device.upload(v));
            let found = device.download(device.attention(&q, &k, &v, &shape, spans)).unwrap();
            assert_close(name, &found, &expected, cached, 1.0);
        }
    }
}

/// As between any two f32 implementations, and as much again for divisions, roots and exponentials, which a device may round
/// worse than a processor.
fn assert_logits(what: &str, arch: &Architecture, found: &Array2<f32>, expected: &Array2<f32>) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let bound = 2.0 * tolerance(arch, expected.iter().fold(0.0f32, |m, x| m.max(x.abs())));
    let error = found.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(error <= bound, "{what}: off by {error}, allowed {bound}");
}

pub fn every_fixture_has_the_logits_of_the_cpu_and_the_same_bits_twice<B: Backend>(device: &B) {
    for dir in golden_fixtures() {
        let name = dir.display().to_string();
        let (source, arch) = open(&dir);
        let on_cpu = Resident::load(Model::new(&source, &arch, &Cpu)).unwrap();
        let on_there = Resident::load(Model::new(&source, &arch, device)).unwrap();
        let text = |n: usize, s: usize| (0..n).map(|i| ((i * 31 + s * 17) % arch.vocab) as u32).collect::<Vec<_>>();
        let windows = [text(37, 0), text(1, 1), text(20, 2)];
        let expected = on_cpu.logits(&windows).unwrap();
        let found = on_there.logits(&windows).unwrap();
        assert_logits(&name, &arch, &found, &expected);
        assert!(found == on_there.logits(&windows).unwrap(), "{name}: other bits the second time");

        // Two sequences over their caches: expanded, then absorbed.
        let size = SessionSize { sequences: 2, capacity: 24, beyond_context: false };
        let mut sessions = (Session::with(&on_cpu, size).unwrap(), Session::with(&on_there, size).unwrap());
        for fed in [[text(20, 0), text(3, 1)], [text(2, 5), text(1, 6)], [text(1, 7), text(1, 8)]] {
            let fed: Vec<&[u32]> = fed.iter().map(Vec::as_slice).collect();
            assert_logits(&name, &arch, &sessions.1.feed(&fed).unwrap(), &sessions.0.feed(&fed).unwrap());
        }
        assert_eq!(sessions.0.cache_bytes(), sessions.1.cache_bytes());
    }
}

pub fn a_conversion_calibrated_there_is_that_of_the_cpu_to_rounding(choice: DeviceChoice) {
    let (source, arch) = open(&fixture("pico-trained"));
    let dir = tempfile::tempdir().unwrap();
    let errors = [DeviceChoice::Cpu, choice].map(|device| {
        let calibration = CalibrationSettings { samples: 16, seq_len: 64, ..CalibrationSettings::default() };
        let settings =
            ConvertSettings { method: method("transmla"), device, calibration, ..ConvertSettings::default() };
        let output = dir.path().join(device.to_string().replace(':', "-"));
        let report = convert(&source, &arch, &settings, &output, &|_| Vec::new(), &Silent).unwrap();
        report.layers.iter().map(|l| l.calibration_error).collect::<Vec<_>>()
    });
    for (cpu, there) in errors[0].iter().zip(&errors[1]) {
        // Smooth functions of sums that agree to some 1e-6.
        assert!((cpu - there).abs() <= 1e-4 * cpu, "{cpu} {there}");
    }
}

pub fn what_only_some_families_need_is_that_of_the_cpu<B: Backend>(device: &B) {
    let (rows, heads, width) = (37, 3, 10);
    let (x, x_there) = both(device, &noise(rows, heads * width, 1).mapv(|v| 3.0 * v));
    let (y, y_there) = both(device, &noise(rows, heads * width, 2));
    let close = |what: &str, found: B::Tensor, expected: &Array2<f32>| {
        assert_close(what, &device.download(found).unwrap(), expected, heads * width, 9.0);
    };
    for (activation, names) in Activation::NAMES {
        let expected = Cpu.gated(x.clone(), &y, activation).unwrap();
        close(names[0], device.gated(device.upload(x.clone()), &y_there, activation).unwrap(), &expected);
        let expected = Cpu.activated(x.clone(), activation).unwrap();
        close(names[0], device.activated(device.upload(x.clone()), activation).unwrap(), &expected);
    }
    close("softcap", device.softcap(device.upload(x.clone()), 1.7).unwrap(), &Cpu.softcap(x.clone(), 1.7).unwrap());
    let gain = noise(1, 6, 3);
    for columns in [HeadColumns { start: 2, stride: width, width: 6 }, HeadColumns { start: 4, stride: 8, width: 6 }] {
        let (mut normed, mut normed_there) = both(device, &x);
        Cpu.rms_norm_heads(&mut normed, &gain, 1e-5, columns, heads).unwrap();
        device.rms_norm_heads(&mut normed_there, &device.upload(gain.clone()), 1e-5, columns, heads).unwrap();
        close("rms_norm_heads", normed_there, &normed);
    }
    let keys = HeadColumns::dense(width);
    let shape = AttentionShape { heads, kv_heads: heads, keys, values: keys, scale: 0.7, sliding_window: Some(20) };
    let spans = Span::of_windows(&[30, 7]);
    let expected = Cpu.capped_attention(&x, &y, &y, &shape, 1.5, &spans).unwrap();
    close("capped", device.capped_attention(&x_there, &y_there, &y_there, &shape, 1.5, &spans).unwrap(), &expected);
    for many in [3, rows] {
        let list: Vec<usize> = (0..many).map(|i| (i * 23 + 5) % rows).collect();
        let gathered = device.gather_rows(&x_there, &list).unwrap();
        assert_eq!(device.copy_to_host(&gathered).unwrap(), x.select(ndarray::Axis(0), &list));
        let weights: Vec<f32> = (0..many).map(|i| 0.3 + i as f32).collect();
        let (mut into, mut into_there) = both(device, &y);
        Cpu.scatter_add_rows(&mut into, &list, &weights, &x.select(ndarray::Axis(0), &list)).unwrap();
        device.scatter_add_rows(&mut into_there, &list, &weights, &gathered).unwrap();
        assert_close("scatter_add_rows", &device.download(into_there).unwrap(), &into, 2, 3.0 * many as f32);
    }
}

/// A device of its own, since the first failure stays.
pub fn what_does_not_fit_is_an_error_that_says_what_to_do<B: Backend>(device: &B) {
    let huge = device.zeros(1 << 20, 1 << 22);
    let error = device.download(device.rows(&huge, 0..1)).unwrap_err().to_string();
    assert!(error.contains("out of memory") && error.contains("--device cpu"), "{error}");
    // Whatever is asked of it now is told the same.
    let x = device.upload(noise(9, 20, 1));
    let w = device.upload_weight(noise(5, 20, 2).into());
    assert!(device.download(device.linear(&x, &w, None)).unwrap_err().to_string().contains("out of memory"));
}

/// Tests of the operations and models of the device that a function gives, if it gives one.
macro_rules! on_every_device {
    ($device:ident) => {
        on_every_device!($device:
            products_of_any_size_are_those_of_the_cpu,
            head_products_are_those_of_the_cpu,
            absorbed_queries_are_those_of_the_cpu,
            row_and_column_operations_are_those_of_the_cpu,
            attention_is_that_of_the_cpu,
            every_fixture_has_the_logits_of_the_cpu_and_the_same_bits_twice,
            what_only_some_families_need_is_that_of_the_cpu
        );
    };
    ($device:ident: $($property:ident),*) => {
        $(
            #[test]
            fn $property() {
                if let Some(device) = $device() {
                    super::properties::$property(device);
                }
            }
        )*
    };
}
pub(crate) use on_every_device;
