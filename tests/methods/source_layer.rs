//! One layer of attention by its definition, in f64: what layers of methods that factorise weights are held against.

use gqa2mla::arch::AttentionSource;
use gqa2mla::mla::MlaLayer;
use gqa2mla::mla::{LatentAttention, output_projection};
use ndarray::{Array1, Array2, s};

use crate::common::random::split_mix;

/// Random attention: `heads` query heads of 8 values on `kv_heads`, hidden size 24, biases everywhere; the last `still` of 4
/// pairs do not turn.
pub fn attention(heads: usize, kv_heads: usize, still: usize) -> AttentionSource {
    let (d, hidden) = (8, 24);
    let mut state = 7;
    let mut value = || split_mix(&mut state) as f64 / u64::MAX as f64 - 0.5;
    let mut matrix = |rows: usize, columns: usize| Array2::from_shape_simple_fn((rows, columns), &mut value);
    let mut out = AttentionSource {
        heads,
        kv_heads,
        head_dim: d,
        wq: matrix(heads * d, hidden),
        wk: matrix(kv_heads * d, hidden),
        wv: matrix(kv_heads * d, hidden),
        wo: matrix(hidden, heads * d),
        bq: None,
        bk: None,
        bv: None,
        bo: None,
        inv_freq: (0..d / 2).map(|j| if j + still < d / 2 { 0.7_f64.powi(j as i32) } else { 0.0 }).collect(),
        score_scale: 0.9,
        score_softcap: None,
    };
    let mut vector = |n: usize| Some(matrix(n, 1).column(0).to_owned());
    (out.bq, out.bk) = (vector(heads * d), vector(kv_heads * d));
    (out.bv, out.bo) = (vector(kv_heads * d), vector(hidden));
    out
}

pub const TOKENS: usize = 9;

pub fn inputs() -> Array2<f32> {
    Array2::from_shape_fn((TOKENS, 24), |(t, i)| ((t * 24 + i) as f32 * 0.37).sin())
}

pub fn project(x: &Array2<f64>, w: &Array2<f64>, b: Option<&Array1<f64>>) -> Array2<f64> {
    let out = x.dot(&w.t());
    b.map_or(out.clone(), |b| out + b)
}

/// Causal attention of one source layer by its definition, in f64: pairs `(j, j + d/2)` turn by `freq(a, j)`. Keys are given by
/// KV head, so that an approximation of them can be put in their place.
pub fn by_definition(
    a: &AttentionSource,
    (q, k, v): (&Array2<f64>, &Array2<f64>, &Array2<f64>),
    freq: impl Fn(usize, usize) -> f64,
) -> Array2<f64> {
    let (d, n, half) = (a.head_dim, a.heads / a.kv_heads, a.head_dim / 2);
    let mut heads = Array2::zeros((TOKENS, a.heads * d));
    for h in 0..a.heads {
        let g = h / n;
        for m in 0..TOKENS {
            let score = |t: usize| {
                (0..half)
                    .map(|j| {
                        let (sin, cos) = (freq(g, j) * (m as f64 - t as f64)).sin_cos();
                        let (qr, qi) = (q[[m, h * d + j]], q[[m, h * d + half + j]]);
                        let (kr, ki) = (k[[t, g * d + j]], k[[t, g * d + half + j]]);
                        // Re(q conj(k) e^(i f (m - t)))
                        (qr * kr + qi * ki) * cos - (qi * kr - qr * ki) * sin
                    })
                    .sum::<f64>()
            };
            let weights: Vec<f64> = (0..=m).map(|t| (a.score_scale * score(t)).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (t, w) in weights.iter().enumerate() {
                let value = v.slice(s![t, g * d..(g + 1) * d]);
                heads.slice_mut(s![m, h * d..(h + 1) * d]).scaled_add(w / total, &value);
            }
        }
    }
    project(&heads, &a.wo, a.bo.as_ref())
}

pub fn source_output(a: &AttentionSource) -> Array2<f64> {
    let x = inputs().mapv(f64::from);
    let q = project(&x, &a.wq, a.bq.as_ref());
    let k = project(&x, &a.wk, a.bk.as_ref());
    let v = project(&x, &a.wv, a.bv.as_ref());
    by_definition(a, (&q, &k, &v), |_, j| a.inv_freq[j])
}

pub fn output(layer: &MlaLayer) -> Array2<f64> {
    let x = inputs();
    let heads = LatentAttention::new(layer, x.view(), &[TOKENS]).outputs();
    output_projection(layer, &heads).mapv(f64::from)
}

/// Values of order one through sums of at most 64 terms in f32, a few layers of them.
pub fn assert_close(found: &Array2<f64>, expected: &Array2<f64>) {
    let worst = (found - expected).iter().fold(0.0_f64, |m, e| m.max(e.abs()));
    assert!(worst < 2e-5, "{worst}");
}
