//! Products of a few rows with many: bound by reading the many once, so a packed gemm would lose. The many may be bf16, of
//! which half as many bytes are read; they are widened in registers, so sums are those of f32 rows with the same values.
//!
//! Vectors are as wide as the processor's (pulp chooses at run time), so the last bits of a sum differ between kinds of
//! processors, never between runs on one.

use half::bf16;
use pulp::{Arch, Simd, WithSimd};

use crate::runtime::weight::widened;

/// What the many rows are stored as.
pub(super) trait Element: Copy + Send + Sync {
    /// One value in f32.
    fn wide(self) -> f32;

    /// A vector of `S::F32_LANES` values in f32.
    fn load<S: Simd>(values: &[Self]) -> S::f32s;
}

impl Element for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn load<S: Simd>(values: &[Self]) -> S::f32s {
        S::as_simd_f32s(values).0[0]
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        widened(self)
    }

    #[inline(always)]
    fn load<S: Simd>(values: &[Self]) -> S::f32s {
        // As many as any vector has; compilers make a load, a widening and a shift of it.
        let mut wide = [0.0; 16];
        for (wide, value) in wide.iter_mut().zip(&values[..S::F32_LANES]) {
            *wide = widened(*value);
        }
        S::as_simd_f32s(&wide).0[0]
    }
}

/// `to[i] = from[i]`.
pub(super) fn widen(to: &mut [f32], from: &[bf16]) {
    Arch::new().dispatch(Widen { to, from });
}

struct Widen<'a> {
    to: &'a mut [f32],
    from: &'a [bf16],
}

impl WithSimd for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (to, from) in self.to.iter_mut().zip(self.from) {
            *to = widened(*from);
        }
    }
}

/// Rows of a row-major matrix: row `i` is `data[i * stride..][..width]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a, E = f32> {
    pub data: &'a [E],
    pub stride: usize,
    pub width: usize,
    pub count: usize,
}

impl<'a, E> Rows<'a, E> {
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [E] {
        &self.data[i * self.stride..][..self.width]
    }
}

/// Rows of `w` at a time: few stay in the nearest cache while all rows of `x` pass over them.
const WIDE: usize = 4;
/// Bytes that a cache takes at a time.
const LINE: usize = 64;

/// Asks for memory that is needed soon. The processor sees by itself where a long row goes on, not where the next ones
/// begin: rows of a kilobyte, as bf16 makes them, take a third less time with this.
#[inline(always)]
fn prefetch<E>(at: *const E) {
    // SAFETY: a hint, for whatever address.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// `out[i][j] = scale * <x_i, w_j>`, row `i` of the result at `out[i * out_stride..]`.
pub(super) fn dots<E: Element>(out: &mut [f32], out_stride: usize, x: Rows<'_>, w: Rows<'_, E>, scale: f32) {
    Arch::new().dispatch(Dots { out, out_stride, x, w, scale });
}

struct Dots<'a, E> {
    out: &'a mut [f32],
    out_stride: usize,
    x: Rows<'a>,
    w: Rows<'a, E>,
    scale: f32,
}

impl<E: Element> WithSimd for Dots<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let whole = self.w.count - self.w.count % WIDE;
        for j in (0..whole).step_by(WIDE) {
            self.column::<S, WIDE>(simd, j);
        }
        for j in whole..self.w.count {
            self.column::<S, 1>(simd, j);
        }
    }
}

impl<E: Element> Dots<'_, E> {
    #[inline(always)]
    fn column<S: Simd, const W: usize>(&mut self, simd: S, j: usize) {
        let mut i = 0;
        while i < self.x.count {
            match self.x.count - i {
                1 => i += self.block::<S, 1, W>(simd, i, j),
                2 => i += self.block::<S, 2, W>(simd, i, j),
                _ => i += self.block::<S, 3, W>(simd, i, j),
            }
        }
    }

    /// `X` rows of `x` by `W` rows of `w`, in registers. Returns `X`.
    #[inline(always)]
    fn block<S: Simd, const X: usize, const W: usize>(&mut self, simd: S, i: usize, j: usize) -> usize {
        let x: [_; X] = std::array::from_fn(|a| S::as_simd_f32s(self.x.row(i + a)));
        let length = x[0].0.len();
        let xs = x.map(|x| &x.0[..length]);
        let w: [_; W] = std::array::from_fn(|b| self.w.row(j + b).split_at(length * S::F32_LANES));
        let mut sums = [[simd.splat_f32s(0.0); W]; X];
        #[allow(clippy::needless_range_loop, reason = "`l` is a place in rows of `x` and of `w`, of other types")]
        for l in 0..length {
            let at = l * S::F32_LANES;
            // The same place of the rows that come next, by the first rows of `x` alone.
            if i == 0 && (at * size_of::<E>()).is_multiple_of(LINE) {
                w.iter().for_each(|w| prefetch(w.0.as_ptr().wrapping_add(at + WIDE * self.w.stride)));
            }
            let ws: [_; W] = std::array::from_fn(|b| E::load::<S>(&w[b].0[at..][..S::F32_LANES]));
            for a in 0..X {
                for b in 0..W {
                    sums[a][b] = simd.mul_add_f32s(xs[a][l], ws[b], sums[a][b]);
                }
            }
        }
        for a in 0..X {
            for b in 0..W {
                let tail: f32 = x[a].1.iter().zip(w[b].1).map(|(x, w)| x * w.wide()).sum();
                self.out[(i + a) * self.out_stride + j + b] = self.scale * (simd.reduce_sum_f32s(sums[a][b]) + tail);
            }
        }
        X
    }
}

/// `out_i = sum_k p[i][k] v_k`: row `i` of `p` at `p[i * p_stride..][..v.count]`, of `out` at `out[i * v.width..]`.
pub(super) fn mix(out: &mut [f32], p: &[f32], p_stride: usize, v: Rows<'_>) {
    Arch::new().dispatch(Mix { out, p, p_stride, v });
}

struct Mix<'a> {
    out: &'a mut [f32],
    p: &'a [f32],
    p_stride: usize,
    v: Rows<'a>,
}

impl WithSimd for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        const WIDE: usize = 4;
        let vectors = self.v.width / S::F32_LANES;
        let mut c = 0;
        while c + WIDE <= vectors {
            self.columns::<S, WIDE>(simd, c);
            c += WIDE;
        }
        while c < vectors {
            self.columns::<S, 1>(simd, c);
            c += 1;
        }
        // What fills no vector.
        let rows = self.out.len() / self.v.width;
        for i in 0..rows {
            let p = &self.p[i * self.p_stride..][..self.v.count];
            for c in vectors * S::F32_LANES..self.v.width {
                self.out[i * self.v.width + c] = p.iter().enumerate().map(|(k, p)| p * self.v.row(k)[c]).sum();
            }
        }
    }
}

impl Mix<'_> {
    #[inline(always)]
    fn columns<S: Simd, const C: usize>(&mut self, simd: S, c: usize) {
        let rows = self.out.len() / self.v.width;
        let mut i = 0;
        while i < rows {
            match rows - i {
                1 => i += self.block::<S, 1, C>(simd, i, c),
                2 => i += self.block::<S, 2, C>(simd, i, c),
                _ => i += self.block::<S, 3, C>(simd, i, c),
            }
        }
    }

    /// `R` rows of the result, `C` vectors wide. Returns `R`.
    #[inline(always)]
    fn block<S: Simd, const R: usize, const C: usize>(&mut self, simd: S, i: usize, c: usize) -> usize {
        let p: [_; R] = std::array::from_fn(|a| &self.p[(i + a) * self.p_stride..][..self.v.count]);
        let mut sums = [[simd.splat_f32s(0.0); C]; R];
        for k in 0..self.v.count {
            let v = &S::as_simd_f32s(self.v.row(k)).0[c..c + C];
            for a in 0..R {
                let p = simd.splat_f32s(p[a][k]);
                for b in 0..C {
                    sums[a][b] = simd.mul_add_f32s(p, v[b], sums[a][b]);
                }
            }
        }
        for (a, sums) in sums.iter().enumerate() {
            let row = &mut self.out[(i + a) * self.v.width..][..self.v.width];
            S::as_mut_simd_f32s(row).0[c..c + C].copy_from_slice(sums);
        }
        R
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of size 1 without structure.
    fn noise(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 7919 % 10_007) as f32 * 0.613).sin()).collect()
    }

    #[test]
    fn any_size_gives_the_product_by_its_definition() {
        for (rows, width, count) in
            [(1, 1, 1), (2, 7, 5), (3, 16, 4), (5, 33, 9), (9, 192, 67), (1, 576, 3), (4, 100, 1)]
        {
            let stride = width + 3;
            let (x, w) = (noise(rows * width, 1), noise(count * stride, 5));
            let x_rows = Rows { data: &x, stride: width, width, count: rows };
            let w_rows = Rows { data: &w, stride, width, count };
            let mut out = vec![f32::NAN; rows * count];
            dots(&mut out, count, x_rows, w_rows, 0.5);
            // Sums of `width` terms of size 1, in any order.
            let bound = 4.0 * f64::from(f32::EPSILON) * width as f64;
            for i in 0..rows {
                for j in 0..count {
                    let exact: f64 =
                        (0..width).map(|l| f64::from(x[i * width + l]) * f64::from(w[j * stride + l])).sum();
                    assert!((f64::from(out[i * count + j]) - 0.5 * exact).abs() <= bound, "{rows} {width} {count}");
                }
            }
            // The same matrices the other way: `count` weights per row mix rows of `w`.
            let p = noise(rows * count, 9);
            let mut mixed = vec![f32::NAN; rows * width];
            mix(&mut mixed, &p, count, w_rows);
            let bound = 4.0 * f64::from(f32::EPSILON) * count as f64;
            for i in 0..rows {
                for c in 0..width {
                    let exact: f64 =
                        (0..count).map(|k| f64::from(p[i * count + k]) * f64::from(w[k * stride + c])).sum();
                    assert!((f64::from(mixed[i * width + c]) - exact).abs() <= bound, "{rows} {width} {count}");
                }
            }
        }
    }
}
