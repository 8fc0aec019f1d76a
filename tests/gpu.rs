//! The GPU backend against the CPU: every operation, every fixture, the same bits twice.
//!
//! Without an adapter the tests say so and pass, unless GQA2MLA_REQUIRE_GPU is set, as it is where they have to run.
#![cfg(feature = "gpu")]

use std::io::Write as _;
use std::path::Path;
use std::sync::OnceLock;

use gqa2mla::arch::{Architecture, Rope, RopeLayout};
use gqa2mla::convert::{CalibrationSettings, ConvertSettings, Method, convert};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::gpu::{Gpu, adapters, open, open_limited};
use gqa2mla::runtime::{
    AttentionShape, Backend, Cpu, DeviceChoice, HeadColumns, HeadPart, Model, Resident, Rotation, Session, SessionSize,
    Span,
};
use gqa2mla::source::{ModelSource, OpenOptions};
use ndarray::{Array2, s};

/// The first adapter, opened once.
fn gpu() -> Option<&'static Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    let found = GPU.get_or_init(|| {
        let found = adapters().unwrap();
        let usable = found.iter().position(|a| a.unusable.is_none())?;
        Some(open(usable).unwrap())
    });
    let required = std::env::var_os("GQA2MLA_REQUIRE_GPU").is_some_and(|v| !v.is_empty());
    assert!(found.is_some() || !required, "GQA2MLA_REQUIRE_GPU is set and there is no Vulkan, Metal or DX12 adapter");
    if found.is_none() {
        // Past the harness, which keeps what passing tests print to itself.
        let _ = writeln!(std::io::stderr(), "skipped: there is no Vulkan, Metal or DX12 adapter");
    }
    found.as_ref()
}

/// Values of size 1 without structure.
fn noise(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    let value = |(i, j): (usize, usize)| (((i * columns + j + seed * 7717) * 7919 % 10_007) as f32 * 0.613).sin();
    Array2::from_shape_fn((rows, columns), value)
}

/// The same with values that are bf16.
fn bf16(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    noise(rows, columns, seed).mapv(|v| f32::from_bits(v.to_bits() & 0xffff_0000))
}

/// Both sides sum up to `terms` products of size `size`, in other orders; a division or exponential may be off by some
/// bits (the latter by 3 + 2 |x| ulp, |x| below 16 here).
fn assert_close(what: &str, found: &Array2<f32>, expected: &Array2<f32>, terms: usize, size: f32) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let bound = (2.0 * (terms as f32).sqrt() * 4.0 + 40.0) * f32::EPSILON * size;
    for ((at, a), b) in found.indexed_iter().zip(expected) {
        assert!((a - b).abs() <= bound, "{what}: {a} instead of {b} at {at:?}, allowed {bound}");
    }
}

fn both(gpu: &Gpu, host: &Array2<f32>) -> (Array2<f32>, <Gpu as Backend>::Tensor) {
    (host.clone(), gpu.upload(host.clone()))
}

#[test]
fn products_of_any_size_are_those_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for (rows, inner, outs) in [(1, 33, 70), (3, 64, 5), (8, 20, 129), (9, 31, 33), (70, 50, 65), (131, 40, 200)] {
        for packed in [false, true] {
            let weight = if packed { bf16(outs, inner, 1) } else { noise(outs, inner, 1) };
            let (x, on_gpu) = both(gpu, &noise(rows, inner, 2));
            let (bias, bias_gpu) = both(gpu, &noise(1, outs, 3));
            let w = gpu.upload_weight(weight.clone());
            for with_bias in [false, true] {
                let expected = Cpu.linear(&x, &weight, with_bias.then_some(&bias));
                let found = gpu.download(gpu.linear(&on_gpu, &w, with_bias.then_some(&bias_gpu))).unwrap();
                let what = format!("{rows} x {inner} x {outs}, packed {packed}, bias {with_bias}");
                assert_close(&what, &found, &expected, inner, (inner as f32).sqrt());
            }
        }
    }
}

#[test]
fn head_products_are_those_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let (heads, nope, value, r) = (3, 12, 10, 20);
    for rows in [1, 70] {
        for weight in [noise(heads * (nope + value), r, 1), bf16(heads * (nope + value), r, 1)] {
            let w = gpu.upload_weight(weight.clone());
            for (start, width, absorb) in [(0, nope, true), (nope, value, false)] {
                let of = HeadColumns { start, stride: nope + value, width };
                let (x, x_gpu) = both(gpu, &noise(rows, heads * if absorb { width } else { r }, 2));
                let expected = Cpu.head_linear(&x, &weight, of, heads, absorb);
                let found = gpu.download(gpu.head_linear(&x_gpu, &w, of, heads, absorb)).unwrap();
                assert_close("head_linear", &found, &expected, r, (r as f32).sqrt());
            }
        }
    }
}

#[test]
fn row_and_column_operations_are_those_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let (rows, heads, width) = (67, 5, 12);
    let (x, x_gpu) = both(gpu, &noise(rows, heads * width, 1));
    let (y, y_gpu) = both(gpu, &noise(rows, heads * width, 2));
    let (gain, gain_gpu) = both(gpu, &noise(1, heads * width, 3));
    let close = |what: &str, found: <Gpu as Backend>::Tensor, expected: &Array2<f32>| {
        assert_close(what, &gpu.download(found).unwrap(), expected, heads * width, 3.0);
    };
    close("rms_norm", gpu.rms_norm(&x_gpu, &gain_gpu, 1e-5), &Cpu.rms_norm(&x, &gain, 1e-5));
    close("silu_mul", gpu.silu_mul(gpu.upload(x.clone()), &y_gpu), &Cpu.silu_mul(x.clone(), &y));
    let mut sum = gpu.upload(x.clone());
    gpu.add(&mut sum, &y_gpu);
    close("add", sum, &(&x + &y));
    assert_eq!(gpu.download(gpu.rows(&x_gpu, 3..29)).unwrap(), x.slice(s![3..29, ..]));
    assert_eq!(gpu.download(gpu.zeros(3, 7)).unwrap(), Array2::<f32>::zeros((3, 7)));

    let to: Vec<usize> = (0..rows).map(|i| i * 29 % 101).collect();
    let (mut into, mut into_gpu) = both(gpu, &noise(101, heads * width, 4));
    Cpu.write_rows(&mut into, &to, &x);
    gpu.write_rows(&mut into_gpu, &to, &x_gpu);
    assert_eq!(gpu.download(into_gpu).unwrap(), into);

    let columns = [HeadColumns { start: 2, stride: width, width: 7 }, HeadColumns { start: 40, stride: 0, width: 3 }];
    let parts = [HeadPart { from: &x, columns: columns[0] }, HeadPart { from: &y, columns: columns[1] }];
    let parts_gpu = [HeadPart { from: &x_gpu, columns: columns[0] }, HeadPart { from: &y_gpu, columns: columns[1] }];
    let expected = Cpu.gather_heads(&parts, heads);
    assert_eq!(gpu.download(gpu.gather_heads(&parts_gpu, heads)).unwrap(), expected);

    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        let rope = Rope { inv_freq: vec![1.0, 0.3, 0.01, 1e-4], amplitude: 1.1, layout, ..rope() };
        let rotation = Rotation::new(&rope, 5..5 + 2 * rows);
        let positions: Vec<usize> = (0..rows).map(|t| 5 + t * 2).collect();
        let columns = HeadColumns { start: 3, stride: width, width: 8 };
        let (mut turned, mut turned_gpu) = both(gpu, &x);
        Cpu.rope(&mut turned, &rotation, &positions, columns, heads);
        gpu.rope(&mut turned_gpu, &rotation, &positions, columns, heads);
        close("rope", turned_gpu, &turned);
    }
}

/// Any, for the fields that do not matter.
fn rope() -> Rope {
    let config = serde_json::json!({"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 80, "vocab_size": 50,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu"});
    Architecture::from_config(&config).unwrap().rope
}

#[test]
fn attention_is_that_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    // Windows under each other, decoding over long caches, and a few rows at the end of one.
    let windows = Span::of_windows(&[1, 70, 17]);
    let decode = vec![Span { queries: 0..1, keys: 0..700 }, Span { queries: 1..2, keys: 700..709 }];
    let tail = vec![Span { queries: 0..40, keys: 13..320 }];
    for (name, heads, kv_heads, keys, values, sliding_window) in [
        ("gqa", 6, 2, (16, 16), None, None),
        ("window", 6, 2, (16, 16), None, Some(9)),
        ("latent", 9, 1, (28, 20), Some(0), None),
        ("wide", 2, 2, (40, 72), None, None),
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
            let (q, k, v) = (gpu.upload(q), gpu.upload(k), gpu.upload(v));
            let found = gpu.download(gpu.attention(&q, &k, &v, &shape, spans)).unwrap();
            assert_close(name, &found, &expected, cached, 1.0);
        }
    }
}

/// What two f32 implementations may differ by, as in `runtime_golden.rs`, and as much again for divisions, roots and
/// exponentials, which a GPU may round worse than a processor.
fn tolerance(arch: &Architecture, scale: f32) -> f32 {
    let widest = arch.hidden.max(arch.intermediate) as f32;
    2.0 * 2.0 * (8 * arch.layers + 2) as f32 * widest.sqrt() * f32::EPSILON * scale
}

fn assert_logits(what: &str, arch: &Architecture, found: &Array2<f32>, expected: &Array2<f32>) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let bound = tolerance(arch, expected.iter().fold(0.0f32, |m, x| m.max(x.abs())));
    let error = found.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(error <= bound, "{what}: off by {error}, allowed {bound}");
}

#[test]
fn every_fixture_has_the_logits_of_the_cpu_and_the_same_bits_twice() {
    let Some(gpu) = gpu() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut seen = 0;
    for dir in fs_err::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
        if !dir.join("golden.safetensors").exists() {
            continue;
        }
        seen += 1;
        let name = dir.display().to_string();
        let source = ModelSource::open(&name, &OpenOptions::default(), &Silent).unwrap();
        let arch = Architecture::from_config(&source.config).unwrap();
        let on_cpu = Resident::load(Model::new(&source, &arch, &Cpu)).unwrap();
        let on_gpu = Resident::load(Model::new(&source, &arch, gpu)).unwrap();
        let text = |n: usize, s: usize| (0..n).map(|i| ((i * 31 + s * 17) % arch.vocab) as u32).collect::<Vec<_>>();
        let windows = [text(37, 0), text(1, 1), text(20, 2)];
        let expected = on_cpu.logits(&windows).unwrap();
        let found = on_gpu.logits(&windows).unwrap();
        assert_logits(&name, &arch, &found, &expected);
        assert!(found == on_gpu.logits(&windows).unwrap(), "{name}: other bits the second time");

        // Two sequences over their caches: expanded, then absorbed.
        let size = SessionSize { sequences: 2, capacity: 24, beyond_context: false };
        let mut sessions = (Session::with(&on_cpu, size).unwrap(), Session::with(&on_gpu, size).unwrap());
        for fed in [[text(20, 0), text(3, 1)], [text(2, 5), text(1, 6)], [text(1, 7), text(1, 8)]] {
            let fed: Vec<&[u32]> = fed.iter().map(Vec::as_slice).collect();
            assert_logits(&name, &arch, &sessions.1.feed(&fed).unwrap(), &sessions.0.feed(&fed).unwrap());
        }
        assert_eq!(sessions.0.cache_bytes(), sessions.1.cache_bytes());
    }
    assert!(seen >= 5, "{seen} fixtures");
}

#[test]
fn what_a_kernel_may_not_see_at_once_is_worked_on_in_tiles() {
    if gpu().is_none() {
        return;
    }
    // The driver checks that nothing larger is bound.
    let limit = 64 << 10;
    let index = adapters().unwrap().iter().position(|a| a.unusable.is_none()).unwrap();
    let gpu = open_limited(index, limit).unwrap();
    let (x, x_gpu) = both(&gpu, &noise(300, 100, 1));
    let (y, y_gpu) = both(&gpu, &noise(300, 100, 2));
    assert!(size_of_val(x.as_slice().unwrap()) as u64 > limit);
    for weight in [noise(250, 100, 3), bf16(400, 100, 3)] {
        let outs = weight.nrows().min(250);
        let weight = weight.slice(s![..outs, ..]).to_owned();
        let w = gpu.upload_weight(weight.clone());
        for rows in [3, 300] {
            let part = gpu.rows(&x_gpu, 0..rows);
            let expected = Cpu.linear(&x.slice(s![..rows, ..]).to_owned(), &weight, None);
            assert_close("linear", &gpu.download(gpu.linear(&part, &w, None)).unwrap(), &expected, 100, 10.0);
        }
    }
    let gain = noise(1, 100, 4);
    let normed = gpu.download(gpu.rms_norm(&x_gpu, &gpu.upload(gain.clone()), 1e-5)).unwrap();
    assert_close("rms_norm", &normed, &Cpu.rms_norm(&x, &gain, 1e-5), 100, 3.0);
    let mut sum = gpu.upload(x.clone());
    gpu.add(&mut sum, &y_gpu);
    assert_eq!(gpu.download(sum).unwrap(), &x + &y);
    let to: Vec<usize> = (0..300).map(|i| i * 7 % 300).collect();
    let (mut into, mut into_gpu) = both(&gpu, &y);
    Cpu.write_rows(&mut into, &to, &x);
    gpu.write_rows(&mut into_gpu, &to, &x_gpu);
    assert_eq!(gpu.download(into_gpu).unwrap(), into);
    let columns = HeadColumns { start: 4, stride: 20, width: 8 };
    let expected = Cpu.gather_heads(&[HeadPart { from: &x, columns }], 4);
    assert_eq!(gpu.download(gpu.gather_heads(&[HeadPart { from: &x_gpu, columns }], 4)).unwrap(), expected);
    let rotation = Rotation::new(&rope(), 0..300);
    let positions: Vec<usize> = (0..300).collect();
    let (mut turned, mut turned_gpu) = both(&gpu, &x);
    Cpu.rope(&mut turned, &rotation, &positions, columns, 4);
    gpu.rope(&mut turned_gpu, &rotation, &positions, columns, 4);
    assert_close("rope", &gpu.download(turned_gpu).unwrap(), &turned, 2, 2.0);
    let dense = HeadColumns::dense(20);
    let shape = AttentionShape { heads: 5, kv_heads: 5, keys: dense, values: dense, scale: 0.2, sliding_window: None };
    for spans in [
        Span::of_windows(&[100, 70, 100]),
        (0..3).map(|i| Span { queries: i..i + 1, keys: i * 90..i * 90 + 80 }).collect(),
    ] {
        let expected = Cpu.attention(&x, &y, &y, &shape, &spans);
        let found = gpu.download(gpu.attention(&x_gpu, &y_gpu, &y_gpu, &shape, &spans)).unwrap();
        let rows = spans.last().unwrap().queries.end;
        let part = |m: &Array2<f32>| m.slice(s![..rows, ..]).to_owned();
        assert_close("attention", &part(&found), &part(&expected), 130, 1.0);
    }
    // The keys of one query are never cut in two.
    let long = [Span { queries: 0..1, keys: 0..200 }];
    let error = gpu.download(gpu.attention(&x_gpu, &y_gpu, &y_gpu, &shape, &long)).unwrap_err().to_string();
    assert!(error.contains("200 tokens") && error.contains("--device cpu"), "{error}");
}

#[test]
fn a_conversion_calibrated_on_a_gpu_is_that_of_the_cpu_to_rounding() {
    if gpu().is_none() {
        return;
    }
    let trained = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico-trained");
    let source = ModelSource::open(&trained.display().to_string(), &OpenOptions::default(), &Silent).unwrap();
    let arch = Architecture::from_config(&source.config).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let errors = [DeviceChoice::Cpu, DeviceChoice::Gpu(None)].map(|device| {
        let calibration = CalibrationSettings { samples: 16, seq_len: 64, ..CalibrationSettings::default() };
        let settings = ConvertSettings { method: Method::Transmla, device, calibration, ..ConvertSettings::default() };
        let output = dir.path().join(device.to_string());
        let report = convert(&source, &arch, &settings, &output, &|_| Vec::new(), &Silent).unwrap();
        report.layers.iter().map(|l| l.predicted_error).collect::<Vec<_>>()
    });
    for (cpu, gpu) in errors[0].iter().zip(&errors[1]) {
        // Smooth functions of sums that agree to some 1e-6.
        assert!((cpu - gpu).abs() <= 1e-4 * cpu, "{cpu} {gpu}");
    }
}

#[test]
fn what_does_not_fit_is_an_error_that_says_what_to_do() {
    if gpu().is_none() {
        return;
    }
    // A device of its own: the first failure stays.
    let index = adapters().unwrap().iter().position(|a| a.unusable.is_none()).unwrap();
    let gpu = open(index).unwrap();
    let huge = gpu.zeros(1 << 20, 1 << 22);
    let error = gpu.download(gpu.rows(&huge, 0..1)).unwrap_err().to_string();
    assert!(error.contains("out of memory") && error.contains("--device cpu"), "{error}");
    assert!(open(99).unwrap_err().to_string().contains("no such adapter"));
}
