//! The GPU backend against the CPU: every operation, every fixture, the same bits twice.
//!
//! Without an adapter the tests say so and pass, unless GQA2MLA_REQUIRE_GPU is set, as it is where they have to run.

use std::sync::OnceLock;

use gqa2mla::runtime::gpu::{Gpu, adapters, open, open_limited};
use gqa2mla::runtime::{AttentionShape, Backend, Cpu, DeviceChoice, HeadColumns, HeadPart, Rotation, Span};
use ndarray::{Array2, s};

use super::properties::{self, assert_close, bf16, both, noise, on_every_device, or_skip, rope};

/// The first adapter, opened once.
fn gpu() -> Option<&'static Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    let found = GPU.get_or_init(|| {
        let found = adapters().unwrap();
        let usable = found.iter().position(|a| a.unusable.is_none())?;
        Some(open(usable).unwrap())
    });
    or_skip(found.as_ref(), "Vulkan, Metal or DX12 adapter", "GQA2MLA_REQUIRE_GPU")
}

on_every_device!(gpu);

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
        let w = gpu.upload_weight(weight.clone().into());
        for rows in [3, 300] {
            let part = gpu.rows(&x_gpu, 0..rows);
            let expected = Cpu.linear(&x.slice(s![..rows, ..]).to_owned(), &weight.clone().into(), None);
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
    if gpu().is_some() {
        properties::a_conversion_calibrated_there_is_that_of_the_cpu_to_rounding(DeviceChoice::Gpu(None));
    }
}

#[test]
fn what_does_not_fit_is_an_error_that_says_what_to_do() {
    if gpu().is_none() {
        return;
    }
    // A device of its own: the first failure stays.
    let index = adapters().unwrap().iter().position(|a| a.unusable.is_none()).unwrap();
    properties::what_does_not_fit_is_an_error_that_says_what_to_do(&open(index).unwrap());
    assert!(open(99).unwrap_err().to_string().contains("no such adapter"));
}
