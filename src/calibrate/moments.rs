//! Second moments of the attention input, and what follows from them.
//!
//! Everything a method calibrates on is linear in the layer's normed input `x`, so one Gram matrix of `x^ = [x; 1]` holds
//! it all: `E[y z^T] = W^_y E[x^ x^T] W^_z^T` (docs/maths.md, section 1).

use faer::Accum;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use crate::factor::linalg::{gemm, matmul, matmul_f32_into, symmetrise};

/// Rows per f32 product: each product's rounding stays that of a few hundred additions, sums run on in f64.
const BLOCK: usize = 512;
/// Rows per task where products are too small to be cut.
const PART: usize = 8 * BLOCK;
/// Elements of such products, at most.
const NARROW: usize = 1 << 17;

/// `sum += a^T b` for tokens in rows: `a` `[T, A]`, `b` `[T, B]`, `sum` `[A, B]`. Products in f32, sums in f64, in row order
/// whatever the thread count.
pub(crate) fn add_products(mut sum: ArrayViewMut2<'_, f64>, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) {
    let mut product = Array2::zeros(sum.raw_dim());
    for (a, b) in a.axis_chunks_iter(Axis(0), BLOCK).zip(b.axis_chunks_iter(Axis(0), BLOCK)) {
        matmul_f32_into(product.view_mut(), a.reversed_axes(), b);
        ndarray::Zip::from(&mut sum).and(&product).par_for_each(|s, &p| *s += f64::from(p));
    }
}

/// Sums of the columns of `x` `[T, A]`, in f64. Blocks are summed side by side and added up in order.
pub(super) fn column_sums(x: ArrayView2<'_, f32>) -> Array1<f64> {
    let of_block = |x: ArrayView2<'_, f32>| x.fold_axis(Axis(0), 0.0_f64, |sum, v| sum + f64::from(*v));
    let sums: Vec<Array1<f64>> = x.axis_chunks_iter(Axis(0), BLOCK).into_par_iter().map(of_block).collect();
    sums.iter().fold(Array1::zeros(x.ncols()), |total, sum| total + sum)
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

/// Add what belongs to the constant 1 of `rows` tokens: the last row and column of `sum` `[A + 1, A + 1]`.
fn add_border(sum: &mut Array2<f64>, of_columns: &Array1<f64>, rows: usize) {
    let last = of_columns.len();
    let mut row = sum.slice_mut(s![last, ..last]);
    row += of_columns;
    let mut column = sum.slice_mut(s![..last, last]);
    column += of_columns;
    sum[[last, last]] += rows as f64;
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
        add_border(&mut self.sum, &column_sums(x), x.nrows());
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

/// `x^T x` and `y^T x` of some rows, on the calling thread.
fn products(x: ArrayView2<'_, f32>, y: ArrayView2<'_, f32>) -> (Array2<f64>, Array2<f64>) {
    let mut of_blocks = [x, y].map(|left| Array2::<f32>::zeros((left.ncols(), x.ncols())));
    let mut sums = [x, y].map(|left| Array2::<f64>::zeros((left.ncols(), x.ncols())));
    for (x, y) in x.axis_chunks_iter(Axis(0), BLOCK).zip(y.axis_chunks_iter(Axis(0), BLOCK)) {
        for ((left, product), sum) in [x, y].into_iter().zip(&mut of_blocks).zip(&mut sums) {
            gemm(product.view_mut(), Accum::Replace, left.reversed_axes(), x, 1.0);
            ndarray::Zip::from(sum).and(&*product).for_each(|s, &p| *s += f64::from(p));
        }
    }
    sums.into()
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

    /// Add tokens: features `[T, F]`, targets `[T, Y]`. Products in f32, sums in f64, in row order whatever the thread count.
    pub fn add(&mut self, features: ArrayView2<'_, f32>, targets: ArrayView2<'_, f32>) {
        let (f, y) = (features.ncols(), targets.ncols());
        if f * (f + y) > NARROW {
            add_gram(self.gram.slice_mut(s![..f, ..f]), features);
            add_products(self.cross.slice_mut(s![.., ..f]), targets, features);
        } else {
            // Products too small to be cut: the rows are.
            let parts = features.axis_chunks_iter(Axis(0), PART).into_par_iter();
            let parts: Vec<_> =
                parts.zip(targets.axis_chunks_iter(Axis(0), PART)).map(|(x, y)| products(x, y)).collect();
            for (gram, cross) in parts {
                let mut to = self.gram.slice_mut(s![..f, ..f]);
                to += &gram;
                let mut to = self.cross.slice_mut(s![.., ..f]);
                to += &cross;
            }
        }
        add_border(&mut self.gram, &column_sums(features), features.nrows());
        let mut last = self.cross.slice_mut(s![.., f]);
        last += &column_sums(targets);
        self.tokens += features.nrows();
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
