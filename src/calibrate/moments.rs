//! Second moments of the attention input, and what follows from them.
//!
//! Everything a method calibrates on is linear in the layer's normed input `x`, so one Gram matrix of `x^ = [x; 1]` holds
//! it all: `E[y z^T] = W^_y E[x^ x^T] W^_z^T` (algorithms.md 0.5).

use faer::Accum;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use crate::factor::linalg::{gemm, matmul, matmul_f32_into, symmetrise};

/// Rows per f32 product: each product's rounding stays that of a few hundred additions, sums run on in f64.
const BLOCK: usize = 512;

/// `sum += a^T b` for tokens in rows: `a` `[T, A]`, `b` `[T, B]`, `sum` `[A, B]`. Products in f32, sums in f64, in row order
/// whatever the thread count.
pub(crate) fn add_products(mut sum: ArrayViewMut2<'_, f64>, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) {
    let mut product = Array2::zeros(sum.raw_dim());
    for (a, b) in a.axis_chunks_iter(Axis(0), BLOCK).zip(b.axis_chunks_iter(Axis(0), BLOCK)) {
        matmul_f32_into(&mut product, a.reversed_axes(), b);
        ndarray::Zip::from(&mut sum).and(&product).par_for_each(|s, &p| *s += f64::from(p));
    }
}

/// Columns per block of a Gram matrix of `width` columns: some blocks for every thread, each wide enough for a product to run
/// at full speed.
fn gram_block(width: usize) -> usize {
    const STEP: usize = 96;
    (width.div_ceil(6).div_ceil(STEP) * STEP).clamp(STEP, 8 * STEP)
}

/// `sum += a^T a` for tokens in rows, `a` `[T, A]`, `sum` `[A, A]`: as [`add_products`], but only the blocks on and above the
/// diagonal are multiplied out.
pub(crate) fn add_gram(mut sum: ArrayViewMut2<'_, f64>, a: ArrayView2<'_, f32>) {
    let width = a.ncols();
    let block = gram_block(width);
    let range = |i: usize| i * block..((i + 1) * block).min(width);
    let count = width.div_ceil(block);
    let pairs: Vec<(usize, usize)> = (0..count).flat_map(|i| (i..count).map(move |j| (i, j))).collect();
    let of_pair = |&(i, j): &(usize, usize)| {
        let (rows, columns) = (range(i), range(j));
        let mut out = Array2::<f64>::zeros((rows.len(), columns.len()));
        let mut product = Array2::<f32>::zeros(out.raw_dim());
        for a in a.axis_chunks_iter(Axis(0), BLOCK) {
            let (left, right) = (a.slice(s![.., rows.clone()]), a.slice(s![.., columns.clone()]));
            gemm(product.view_mut(), Accum::Replace, left.reversed_axes(), right, 1.0);
            ndarray::Zip::from(&mut out).and(&product).for_each(|s, &p| *s += f64::from(p));
        }
        out
    };
    let parts: Vec<Array2<f64>> = pairs.par_iter().map(of_pair).collect();
    for ((i, j), part) in pairs.into_iter().zip(parts) {
        let mut upper = sum.slice_mut(s![range(i), range(j)]);
        upper += &part;
        if i != j {
            let mut lower = sum.slice_mut(s![range(j), range(i)]);
            lower += &part.t();
        }
    }
}

/// Second moments of a layer's input, `[D + 1, D + 1]`, the last row and column belonging to the constant 1.
#[derive(Debug, Clone)]
pub struct Moments {
    sum: Array2<f64>,
    tokens: usize,
}

impl Moments {
    /// No token seen yet, for inputs of width `hidden`.
    pub fn new(hidden: usize) -> Self {
        Self { sum: Array2::zeros((hidden + 1, hidden + 1)), tokens: 0 }
    }

    /// Add tokens, one per row of `x` `[T, D]`. Products in f32, sums in f64, in row order whatever the thread count.
    pub fn add(&mut self, x: ArrayView2<'_, f32>) {
        let hidden = x.ncols();
        add_gram(self.sum.slice_mut(s![..hidden, ..hidden]), x);
        for block in x.axis_chunks_iter(Axis(0), BLOCK) {
            let mut mean = Array1::<f64>::zeros(hidden);
            for row in block.rows() {
                ndarray::Zip::from(&mut mean).and(&row).for_each(|m, &v| *m += f64::from(v));
            }
            for i in 0..hidden {
                self.sum[[i, hidden]] += mean[i];
                self.sum[[hidden, i]] += mean[i];
            }
            self.sum[[hidden, hidden]] += block.nrows() as f64;
        }
        self.tokens += x.nrows();
    }

    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// `E[x^ x^^T]`, `[D + 1, D + 1]`.
    pub fn augmented(&self) -> Array2<f64> {
        symmetrise(&(&self.sum / self.tokens.max(1) as f64))
    }

    /// `E[x x^T]`, `[D, D]`.
    pub fn second(&self) -> Array2<f64> {
        let d = self.hidden();
        self.augmented().slice(s![..d, ..d]).to_owned()
    }

    /// `E[x]`, `[D]`.
    pub fn mean(&self) -> Array1<f64> {
        let d = self.hidden();
        self.sum.slice(s![..d, d]).to_owned() / self.tokens.max(1) as f64
    }

    /// `E[(x - mean)(x - mean)^T]`, `[D, D]`.
    pub fn covariance(&self) -> Array2<f64> {
        let mean = self.mean().insert_axis(Axis(1));
        self.second() - matmul(&mean, &mean.t())
    }

    /// `D`.
    pub fn hidden(&self) -> usize {
        self.sum.nrows() - 1
    }

    /// `E[y y^T]` of `y = W x + b`, for `W` `[m, D]`.
    pub fn output_moment(&self, weight: &Array2<f64>, bias: Option<&Array1<f64>>) -> Array2<f64> {
        let c = self.second();
        let mut out = matmul(&matmul(weight, &c), &weight.t());
        if let Some(b) = bias {
            let wm = weight.dot(&self.mean());
            let (b, wm) = (b.view().insert_axis(Axis(1)), wm.insert_axis(Axis(1)));
            out = out + matmul(&wm, &b.t()) + matmul(&b, &wm.t()) + matmul(&b, &b.t());
        }
        symmetrise(&out)
    }

    /// `W C~ W^T` with `C~ = (1 - a) C + a mean(diag C) I`.
    pub fn shrunk_output_moment(&self, weight: &Array2<f64>, a: f64) -> Array2<f64> {
        let mut c = self.second() * (1.0 - a);
        let level = a * self.second().diag().mean().unwrap_or(0.0);
        c.diag_mut().mapv_inplace(|x| x + level);
        symmetrise(&matmul(&matmul(weight, &c), &weight.t()))
    }
}

/// Moments of attention-pooled features against a target, for one linear refit: `[f; 1]` and `y`.
#[derive(Debug, Clone)]
pub struct PooledMoments {
    gram: Array2<f64>,
    cross: Array2<f64>,
    tokens: usize,
}

impl PooledMoments {
    /// For features of width `features` and targets of width `targets`.
    pub fn new(features: usize, targets: usize) -> Self {
        Self {
            gram: Array2::zeros((features + 1, features + 1)),
            cross: Array2::zeros((targets, features + 1)),
            tokens: 0,
        }
    }

    /// Add tokens: features `[T, F]`, targets `[T, Y]`.
    pub fn add(&mut self, features: ArrayView2<'_, f32>, targets: ArrayView2<'_, f32>) {
        let (f, rows) = (features.ncols(), features.nrows());
        add_gram(self.gram.slice_mut(s![..f, ..f]), features);
        add_products(self.cross.slice_mut(s![.., ..f]), targets, features);
        for start in (0..rows).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(rows);
            let (x, y) = (features.slice(s![range.clone(), ..]), targets.slice(s![range, ..]));
            let sum = x.fold_axis(Axis(0), 0.0_f64, |a, &b| a + f64::from(b));
            for i in 0..f {
                self.gram[[i, f]] += sum[i];
                self.gram[[f, i]] += sum[i];
            }
            self.gram[[f, f]] += x.nrows() as f64;
            let sum = y.fold_axis(Axis(0), 0.0_f64, |a, &b| a + f64::from(b));
            let mut last = self.cross.slice_mut(s![.., f]);
            last += &sum;
        }
        self.tokens += rows;
    }

    /// `E[[f; 1] [f; 1]^T]`.
    pub fn gram(&self) -> Array2<f64> {
        symmetrise(&(&self.gram / self.tokens.max(1) as f64))
    }

    /// `E[y [f; 1]^T]`.
    pub fn cross(&self) -> Array2<f64> {
        &self.cross / self.tokens.max(1) as f64
    }

    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}
