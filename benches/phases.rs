//! The phases of a conversion at the sizes of SmolLM2-135M: `cargo bench`.

use divan::{Bencher, black_box};
use gqa2mla::calibrate::{Moments, pool};
use gqa2mla::factor::joint::joint_low_rank;
use gqa2mla::factor::linalg::{eigh, matmul, matmul_f32};
use gqa2mla::runtime::{Backend, Device};
use ndarray::{Array2, s};

/// Hidden size, one KV head's width times heads, tokens.
const HIDDEN: usize = 576;
const KEYS: usize = 128;
const VALUES: usize = 192;
const TOKENS: usize = 4096;
const RANK: usize = 128;

fn main() {
    divan::main();
}

fn sample(rows: usize, cols: usize) -> Array2<f64> {
    Array2::from_shape_fn((rows, cols), |(i, j)| ((i * i + 3 * i * j + 7 * j) as f64 * 0.613).sin())
}

fn moment(n: usize) -> Array2<f64> {
    let a = sample(2 * n, n);
    matmul(&a.t(), &a) + Array2::<f64>::eye(n)
}

#[divan::bench]
fn product_f32(bencher: Bencher<'_, '_>) {
    let x = sample(TOKENS, HIDDEN).mapv(|v| v as f32);
    let w = sample(1536, HIDDEN).mapv(|v| v as f32);
    bencher.bench(|| matmul_f32(black_box(&x), &w.t()));
}

/// 4096^3 in f32: 137 GFLOP. A device that is not there, or is software, is left out.
#[divan::bench(args = ["cpu", "gpu", "cuda"], sample_count = 10)]
fn product_on_device(bencher: Bencher<'_, '_>, name: &str) {
    let Some(device) = name.parse().ok().and_then(|choice| Device::open(choice).ok()) else { return };
    if device.is_software_gpu() {
        return;
    }
    let matrix = || device.upload(sample(4096, 4096).mapv(|v| v as f32));
    let (x, w) = (matrix(), matrix());
    // Reading waits for the product.
    bencher.bench(|| device.download(device.rows(&device.linear(&x, &w, None), 0..1)));
}

#[divan::bench]
fn moments_of_a_layer_input(bencher: Bencher<'_, '_>) {
    let x = sample(TOKENS, HIDDEN).mapv(|v| v as f32);
    bencher.bench(|| {
        let mut m = Moments::new(HIDDEN);
        m.add(black_box(x.view()));
        m
    });
}

#[divan::bench]
fn eigenvectors(bencher: Bencher<'_, '_>) {
    let m = moment(KEYS + VALUES);
    bencher.bench(|| eigh(black_box(&m), "bench"));
}

#[divan::bench]
fn joint_factorisation(bencher: Bencher<'_, '_>) {
    let (c, k, v) = (moment(KEYS + VALUES), moment(KEYS), moment(VALUES));
    bencher.bench(|| joint_low_rank(black_box(&c), &k, &v, 1.75, RANK));
}

#[divan::bench]
fn pooling_of_one_head(bencher: Bencher<'_, '_>) {
    let x = sample(TOKENS, 2 * RANK).mapv(|v| v as f32);
    let (q, k) = (x.slice(s![.., ..RANK]).to_owned(), x.slice(s![.., RANK..]).to_owned());
    let windows = [256; TOKENS / 256];
    bencher.bench(|| pool(q.clone(), k.clone(), 0.125, None, &windows, black_box(k.view())));
}
