//! The phases of a conversion at the sizes of SmolLM2-135M: `cargo bench`.

use divan::{Bencher, black_box};
use gqa2mla::calibrate::{Moments, attend};
use gqa2mla::factor::decompose::{BACKENDS, Decompose};
use gqa2mla::factor::joint::joint_low_rank;
use gqa2mla::factor::linalg::{eigh, matmul, matmul_f32};
use gqa2mla::runtime::{AttentionShape, Backend, Device, HeadColumns, Qkv, Span};
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
    let matrix = || sample(4096, 4096).mapv(|v| v as f32);
    let (x, w) = (device.upload(matrix()), device.upload_weight(matrix().into()));
    // Reading waits for the product.
    bencher.bench(|| device.download(device.rows(&device.linear(&x, &w, None), 0..1)));
}

/// Thirty times, as many as layers, one operation of decoding `batch` sequences, on an NVIDIA card: what it takes with the
/// time to give it to the card, which is all there is to small ones.
#[divan::bench(args = ["add", "norm", "linear", "absorb", "unabsorb"], consts = [1, 16], sample_count = 20)]
fn small_steps_on_cuda<const BATCH: usize>(bencher: Bencher<'_, '_>, name: &str) {
    let Some(device) = "cuda".parse().ok().and_then(|choice| Device::open(choice).ok()) else { return };
    let matrix = |rows, columns| device.upload(sample(rows, columns).mapv(|v| v as f32));
    let weight = |rows, columns| device.upload_weight(sample(rows, columns).mapv(|v| v as f32).into());
    let (mut x, y, gain) = (matrix(BATCH, HIDDEN), matrix(BATCH, HIDDEN), matrix(1, HIDDEN));
    let (up, q, mixed) = (weight(1536, HIDDEN), matrix(BATCH, 9 * 128), matrix(BATCH, 9 * RANK));
    let kv_b = weight(9 * 128, RANK);
    let of = |start| HeadColumns { start, stride: 128, width: 64 };
    bencher.bench_local(|| {
        for _ in 0..30 {
            match name {
                "add" => device.add(&mut x, &y),
                "norm" => drop(device.rms_norm(&x, &gain, 1e-5)),
                "linear" => drop(device.linear(&x, &up, None)),
                "absorb" => drop(device.absorb(&q, &kv_b, of(0), 9)),
                _ => drop(device.head_linear(&mixed, &kv_b, of(64), 9, false)),
            }
        }
        device.download(device.rows(&x, 0..1))
    });
}

/// Attention of thirty layers in decoding: over keys and values of three heads of 64, as SmolLM2 has them, and over a
/// latent of half the size; of eight heads, and over a latent of half that.
#[divan::bench(args = ["3 of 64", "128 + 64", "8 of 64", "448 + 64"], consts = [1, 16], sample_count = 10)]
fn decoding_attention_on_cuda<const BATCH: usize>(bencher: Bencher<'_, '_>, name: &str) {
    let Some(device) = "cuda".parse().ok().and_then(|choice| Device::open(choice).ok()) else { return };
    let keys = if BATCH == 1 { 32768 } else { 8192 };
    let (heads, kv_heads, key, value) = match name {
        "3 of 64" => (9, 3, 64, 64),
        "128 + 64" => (9, 1, 192, 128),
        "8 of 64" => (32, 8, 64, 64),
        _ => (32, 1, 512, 448),
    };
    let matrix =
        |rows, columns| device.upload(Array2::from_shape_fn((rows, columns), |(i, j)| ((i + 3 * j) % 17) as f32));
    let q = matrix(BATCH, heads * key);
    let k = matrix(BATCH * keys, kv_heads * key);
    let v = if kv_heads == 1 { None } else { Some(matrix(BATCH * keys, kv_heads * value)) };
    let (keys_at, values_at) = match v {
        None => (HeadColumns { start: 0, stride: 0, width: key }, HeadColumns { start: 0, stride: 0, width: value }),
        Some(_) => (HeadColumns::dense(key), HeadColumns::dense(value)),
    };
    let shape = AttentionShape { heads, kv_heads, keys: keys_at, values: values_at, scale: 0.1, sliding_window: None };
    let spans: Vec<Span> = (0..BATCH).map(|i| Span { queries: i..i + 1, keys: i * keys..(i + 1) * keys }).collect();
    bencher.bench_local(|| {
        for _ in 1..30 {
            drop(device.attention(&q, &k, v.as_ref().unwrap_or(&k), &shape, &spans));
        }
        device.download(device.attention(&q, &k, v.as_ref().unwrap_or(&k), &shape, &spans))
    });
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

/// Each backend of decompositions that is in this build, and the other one is left out.
fn decompositions(name: &str) -> Option<&'static dyn Decompose> {
    BACKENDS.iter().copied().find(|b| b.name() == name)
}

/// Of the keys of one layer, and of keys and values stacked.
#[divan::bench(args = ["faer", "lapack"], consts = [192, 384], sample_count = 20)]
fn singular_vectors<const ROWS: usize>(bencher: Bencher<'_, '_>, name: &str) {
    let (Some(backend), w) = (decompositions(name), sample(ROWS, HIDDEN)) else { return };
    bencher.bench(|| backend.thin_svd(black_box(&w)));
}

/// Of the second moments of one layer's inputs, and of two.
#[divan::bench(args = ["faer", "lapack"], consts = [HIDDEN, 2 * HIDDEN], sample_count = 10)]
fn eigenvectors_of_moments<const N: usize>(bencher: Bencher<'_, '_>, name: &str) {
    let (Some(backend), m) = (decompositions(name), moment(N)) else { return };
    bencher.bench(|| backend.eigh(black_box(&m)));
}

#[divan::bench(args = ["faer", "lapack"], sample_count = 20)]
fn eigenvalues_of_moments(bencher: Bencher<'_, '_>, name: &str) {
    let (Some(backend), m) = (decompositions(name), moment(HIDDEN)) else { return };
    bencher.bench(|| backend.eigvalsh(black_box(&m)));
}

/// The refit of keys and values to the inputs.
#[divan::bench(args = ["faer", "lapack"], sample_count = 20)]
fn refit_solutions(bencher: Bencher<'_, '_>, name: &str) {
    let (Some(backend), m, b) = (decompositions(name), moment(HIDDEN), sample(384, HIDDEN)) else { return };
    bencher.bench(|| backend.solve_right(black_box(&m), 1.0, &b));
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
    let (v, qk_dim, v_dim) = (k.clone(), RANK, RANK);
    let qkv =
        Qkv { q, k, v, heads: 1, kv_heads: 1, qk_dim, v_dim, scale: 0.125, sliding_window: None, score_softcap: None };
    bencher.bench(|| attend(black_box(&qkv), &windows, false));
}
