//! What cuBLAS has to be told so that its column-major products are ours, row-major.

/// A product per head: `y = x W^T` with `W [n, k]`, or `y = x W` with `W [k, n]`; `x [m, k]`, `y [m, n]`, all row-major.
/// Strides are in elements from one row to the next, batches from one head to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Whether `W` is `[k, n]`. Its rows lie close together.
    pub(super) absorb: bool,
    pub(super) x_stride: usize,
    pub(super) x_batch: usize,
    pub(super) w_batch: usize,
    pub(super) y_stride: usize,
    pub(super) y_batch: usize,
    pub(super) heads: usize,
}

/// Arguments of `cublasGemmStridedBatchedEx`: `C [m, n] = op(A) op(B)`, column-major. `A` is our `W`, `B` our `x`, `C`
/// our `y`; `B` is never transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gemm {
    pub(super) transpose_a: bool,
    pub(super) m: i32,
    pub(super) n: i32,
    pub(super) k: i32,
    pub(super) lda: i32,
    pub(super) stride_a: i64,
    pub(super) ldb: i32,
    pub(super) stride_b: i64,
    pub(super) ldc: i32,
    pub(super) stride_c: i64,
    pub(super) batches: i32,
}

impl Product {
    /// The arguments, unless a size is beyond what cuBLAS counts to.
    ///
    /// A row-major matrix read column by column is its transpose, so `y^T = W x^T` is what cuBLAS computes. `x` and `y`
    /// are then `[k, m]` and `[n, m]` as wanted. `W [k, n]` becomes the `[n, k]` that stands left; `W [n, k]` becomes
    /// `[k, n]` and has to be transposed.
    pub(super) fn gemm(&self) -> Option<Gemm> {
        let int = |v: usize| i32::try_from(v).ok();
        let long = |v: usize| i64::try_from(v).ok();
        Some(Gemm {
            transpose_a: !self.absorb,
            m: int(self.n)?,
            n: int(self.m)?,
            k: int(self.k)?,
            lda: int(if self.absorb { self.n } else { self.k })?,
            stride_a: long(self.w_batch)?,
            ldb: int(self.x_stride)?,
            stride_b: long(self.x_batch)?,
            ldc: int(self.y_stride)?,
            stride_c: long(self.y_batch)?,
            batches: int(self.heads)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What cuBLAS documents: element `(i, j)` of a column-major matrix lies at `i + j ld`.
    fn cublas(g: &Gemm, a: &[f64], b: &[f64], c: &mut [f64]) {
        let (m, n, k) = (g.m as usize, g.n as usize, g.k as usize);
        // What cuBLAS refuses.
        assert!(g.lda as usize >= if g.transpose_a { k } else { m });
        assert!(g.ldb as usize >= k && g.ldc as usize >= m);
        for batch in 0..g.batches as i64 {
            let [a0, b0, c0] = [g.stride_a, g.stride_b, g.stride_c].map(|s| (batch * s) as usize);
            for i in 0..m {
                for j in 0..n {
                    let sum: f64 = (0..k)
                        .map(|l| {
                            let at = if g.transpose_a { l + i * g.lda as usize } else { i + l * g.lda as usize };
                            a[a0 + at] * b[b0 + l + j * g.ldb as usize]
                        })
                        .sum();
                    c[c0 + i + j * g.ldc as usize] = sum;
                }
            }
        }
    }

    /// Integers, so that sums are exact in any order.
    fn integers(n: usize, seed: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 37 + seed * 11) % 19) as f64 - 9.0).collect()
    }

    #[test]
    fn products_of_rows_are_what_cublas_makes_of_columns() {
        for (m, n, k, heads, gap) in
            [(1, 1, 1, 1, 0), (3, 5, 4, 1, 0), (7, 2, 9, 3, 0), (4, 6, 5, 2, 3), (2, 8, 3, 4, 1)]
        {
            for absorb in [false, true] {
                // Heads of x and y lie side by side, those of W under each other, with unused rows between.
                let row = if absorb { n } else { k };
                let w_batch = n * k + gap * row;
                let product = Product {
                    m,
                    n,
                    k,
                    absorb,
                    x_stride: heads * k + gap,
                    x_batch: k,
                    w_batch,
                    y_stride: heads * n + 2 * gap,
                    y_batch: n,
                    heads,
                };
                let x = integers(m * product.x_stride, 1);
                let w = integers(heads * w_batch, 2);
                let mut y = vec![77.0; m * product.y_stride];
                let mut expected = y.clone();
                for h in 0..heads {
                    for i in 0..m {
                        for j in 0..n {
                            let weight = |l: usize| w[h * w_batch + if absorb { l * n + j } else { j * k + l }];
                            expected[i * product.y_stride + h * n + j] =
                                (0..k).map(|l| x[i * product.x_stride + h * k + l] * weight(l)).sum();
                        }
                    }
                }
                cublas(&product.gemm().unwrap(), &w, &x, &mut y);
                // Also what lies between is as it was.
                assert_eq!(y, expected, "{product:?}");
            }
        }
    }

    #[test]
    fn sizes_that_cublas_cannot_count_are_told() {
        let small = Product {
            m: 1,
            n: 1,
            k: 1,
            absorb: false,
            x_stride: 1,
            x_batch: 1,
            w_batch: 1,
            y_stride: 1,
            y_batch: 1,
            heads: 1,
        };
        assert!(small.gemm().is_some());
        assert!(Product { n: 1 << 31, ..small }.gemm().is_none());
    }
}
