//! Matrix products over ndarray views: by faer, and by dot products where there are few rows.
//!
//! A bf16 weight gives the bits that its widened copy would give: dot products widen it in registers, in the same order of
//! sums; faer gets it in tiles, widened one at a time into a buffer of the thread.

use std::cell::Cell;
use std::ops::Range;

use faer::Accum;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

use super::simd::{self, Element, Rows};
use crate::factor::linalg;
use crate::runtime::weight::WeightView;

/// Up to this many rows, a product is bound by reading the weight, and dot products beat a packed gemm.
const FEW_ROWS: usize = 16;
/// Elements of the weight per task of a thin product: half a megabyte.
const THIN: usize = 1 << 17;
/// Output tile per task of a wide product. Fixed, so that sums are cut the same way for any number of threads.
const TILE: (usize, usize) = (256, 512);
/// Elements that are widened at once, and outputs at least: half a megabyte, to stay in a core's cache. Which outputs faer
/// computes together does not change their bits.
const WIDENED: (usize, usize) = (1 << 17, 64);

/// `out = scale * a b` on the calling thread.
pub(super) fn serial(out: ArrayViewMut2<'_, f32>, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, scale: f32) {
    linalg::gemm(out, Accum::Replace, a, b, scale);
}

thread_local! {
    /// Where this thread widens tiles of weights.
    static WIDE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// What `f` makes of some rows of a weight in f32: of the weight itself, or of a copy in the buffer of the thread. `f` must not
/// wait for other tasks, which would need the buffer too.
pub(super) fn with_wide<R>(weight: WeightView<'_>, f: impl FnOnce(ArrayView2<'_, f32>) -> R) -> R {
    let narrow = match weight {
        WeightView::F32(weight) => return f(weight),
        WeightView::Bf16(weight) => weight,
    };
    let mut buffer = WIDE.take();
    if buffer.len() < narrow.len() {
        buffer.resize(narrow.len(), 0.0);
    }
    let mut wide = ArrayViewMut2::from_shape(narrow.dim(), &mut buffer[..narrow.len()]).expect("as long as the tile");
    match (wide.as_slice_mut(), narrow.as_slice()) {
        (Some(wide), Some(narrow)) => simd::widen(wide, narrow),
        _ => {
            for (mut wide, narrow) in wide.rows_mut().into_iter().zip(narrow.rows()) {
                if let (Some(wide), Some(narrow)) = (wide.as_slice_mut(), narrow.as_slice()) {
                    simd::widen(wide, narrow);
                }
            }
        }
    }
    let made = f(wide.view());
    WIDE.set(buffer);
    made
}

/// `out = x W^T`, or `out += x W^T`, on the calling thread.
pub(super) fn serial_linear(
    mut out: ArrayViewMut2<'_, f32>,
    accum: Accum,
    x: ArrayView2<'_, f32>,
    weight: WeightView<'_>,
) {
    if let WeightView::F32(weight) = weight {
        return linalg::gemm(out, accum, x, weight.reversed_axes(), 1.0);
    }
    let (outs, inner) = weight.dim();
    let count = (WIDENED.0 / inner.max(1)).max(WIDENED.1);
    for (part, out) in out.axis_chunks_iter_mut(Axis(1), count).enumerate() {
        let outs = part * count..outs.min((part + 1) * count);
        with_wide(weight.rows(outs), |weight| linalg::gemm(out, accum, x, weight.reversed_axes(), 1.0));
    }
}

/// `x W^T`: `x [T, in]`, `weight [out, in]`, both in standard layout, to `[T, out]`.
pub(super) fn linear(x: ArrayView2<'_, f32>, weight: WeightView<'_>) -> Array2<f32> {
    let (rows, outs) = (x.nrows(), weight.dim().0);
    let mut out = Array2::zeros((rows, outs));
    if rows == 0 || outs == 0 {
        return out;
    }
    if let (true, Some(x)) = (rows <= FEW_ROWS, x.as_slice()) {
        match weight {
            WeightView::F32(w) => w.as_slice().map(|w| thin(&mut out, x, w)),
            WeightView::Bf16(w) => w.as_slice().map(|w| thin(&mut out, x, w)),
        }
        .expect("weights are in standard layout");
        return out;
    }
    let strips: Vec<_> = out.axis_chunks_iter_mut(Axis(0), TILE.0).zip(x.axis_chunks_iter(Axis(0), TILE.0)).collect();
    strips.into_par_iter().for_each(|(mut strip, x)| {
        strip.axis_chunks_iter_mut(Axis(1), TILE.1).into_par_iter().enumerate().for_each(|(tile, out)| {
            let outs: Range<usize> = tile * TILE.1..tile * TILE.1 + out.ncols();
            serial_linear(out, Accum::Replace, x, weight.rows(outs));
        });
    });
    out
}

/// `out [rows, outs] = x W^T` for few rows.
fn thin<E: Element>(out: &mut Array2<f32>, x: &[f32], weight: &[E]) {
    let (rows, outs) = out.dim();
    let width = x.len() / rows;
    let x = Rows { data: x, stride: width, width, count: rows };
    let count = (THIN / width.max(1)).clamp(1, outs);
    let of = |first: usize, count: usize| Rows { data: &weight[first * width..], stride: width, width, count };
    if let Some(out) = out.as_slice_mut().filter(|_| count == outs) {
        // Not worth waking another thread.
        return simd::dots(out, outs, x, of(0, outs), 1.0);
    }
    if rows == 1 {
        if let Some(out) = out.as_slice_mut() {
            let run = |(i, out): (usize, &mut [f32])| simd::dots(out, 0, x, of(i * count, out.len()), 1.0);
            out.par_chunks_mut(count).enumerate().for_each(run);
        }
        return;
    }
    out.axis_chunks_iter_mut(Axis(1), count).into_par_iter().enumerate().for_each(|(i, mut out)| {
        let mut tile = vec![0.0; rows * out.ncols()];
        simd::dots(&mut tile, out.ncols(), x, of(i * count, out.ncols()), 1.0);
        let columns = out.ncols();
        for (mut to, from) in out.rows_mut().into_iter().zip(tile.chunks_exact(columns)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
    });
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::arch::Activation;
    use crate::runtime::{Backend, Cpu, HeadColumns, HostWeight, LinearWeights, MlpWeights};

    /// Values of any sign and of sizes 2^-12 to 2^3, and some zeros.
    fn noise(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut state = seed;
        let mut uniform = move || crate::random::uniform(&mut state) as f32;
        Array2::from_shape_simple_fn((rows, columns), || match uniform() {
            x if x < 0.05 => 0.0,
            x => (x * 31.0).sin() * 2f32.powf(uniform() * 15.0 - 12.0),
        })
    }

    /// A weight in bf16, and its widened copy.
    fn both(rows: usize, columns: usize, seed: u64) -> [HostWeight; 2] {
        let narrow = noise(rows, columns, seed).mapv(bf16::from_f32);
        let wide = narrow.mapv(bf16::to_f32);
        [narrow.into(), wide.into()]
    }

    fn bits(x: &Array2<f32>) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(f)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Few rows and many, tiles that are full and not, any width.
        #[test]
        fn products_with_bf16_are_those_with_its_widened_copy(
            rows in prop_oneof![1..20usize, 250..270usize],
            outs in prop_oneof![1..40usize, 500..530usize],
            inner in 1..150usize,
            seed: u64,
        ) {
            let x = noise(rows, inner, seed);
            let [narrow, wide] = both(outs, inner, seed ^ 1);
            let bias = noise(1, outs, seed ^ 2);
            let want = bits(&Cpu.linear(&x, &wide, Some(&bias)));
            prop_assert_eq!(&bits(&Cpu.linear(&x, &narrow, Some(&bias))), &want);
            prop_assert_eq!(&bits(&on_threads(3, || Cpu.linear(&x, &narrow, Some(&bias)))), &want);
        }

        #[test]
        fn products_per_head_too(
            rows in 1..40usize,
            (heads, nope, value, rank) in (1..5usize, 1..20usize, 1..20usize, 1..70usize),
            seed: u64,
        ) {
            let [narrow, wide] = both(heads * (nope + value), rank, seed);
            for (start, width, absorb) in [(0, nope, true), (nope, value, false)] {
                let of = HeadColumns { start, stride: nope + value, width };
                let x = noise(rows, heads * if absorb { width } else { rank }, seed ^ 1);
                let want = bits(&Cpu.head_linear(&x, &wide, of, heads, absorb));
                prop_assert_eq!(bits(&Cpu.head_linear(&x, &narrow, of, heads, absorb)), want);
            }
        }
    }

    /// Wide enough for several tasks and tiles: the sizes of real layers.
    #[test]
    fn products_of_real_sizes_too() {
        for (rows, inner, outs) in [(1, 576, 1536), (4, 1536, 576), (16, 896, 4864), (40, 4864, 896), (600, 576, 1100)]
        {
            let x = noise(rows, inner, 1);
            let [narrow, wide] = both(outs, inner, 2);
            let want = bits(&Cpu.linear(&x, &wide, None));
            for threads in [1, 2, 5] {
                assert!(
                    bits(&on_threads(threads, || Cpu.linear(&x, &narrow, None))) == want,
                    "{rows} x {inner} x {outs}"
                );
            }
        }
    }

    #[test]
    fn the_mlp_of_long_windows_too() {
        let (d, i) = (40, 512 + 90);
        let x = noise(super::super::LONG_MLP + 70, d, 1);
        let (gate, up, down, bias) = (both(i, d, 2), both(i, d, 3), both(d, i, 4), noise(1, d, 5));
        let run = |n: usize, gated: bool| {
            let weights = MlpWeights {
                gate: gated.then_some(LinearWeights { weight: &gate[n], bias: None }),
                up: LinearWeights { weight: &up[n], bias: None },
                down: LinearWeights { weight: &down[n], bias: Some(&bias) },
                activation: Activation::Silu,
            };
            bits(&Cpu.mlp(&x, &weights).expect("runs"))
        };
        for gated in [true, false] {
            assert!(run(0, gated) == run(1, gated), "gated {gated}");
            assert!(on_threads(3, || run(0, gated)) == run(1, gated), "gated {gated}");
        }
    }

    /// A weight may be any bits: infinities and NaN, subnormal numbers, zeros of both signs.
    #[test]
    fn every_bf16_is_widened_exactly() {
        let narrow = Array2::from_shape_fn((256, 256), |(i, j)| bf16::from_bits((256 * i + j) as u16));
        let wide = with_wide(WeightView::Bf16(narrow.view()), |w| w.to_owned());
        for (narrow, wide) in narrow.iter().zip(&wide) {
            assert_eq!(u32::from(narrow.to_bits()) << 16, wide.to_bits());
        }
        // One times each, by dot products.
        let column = Array2::from_shape_vec((1 << 16, 1), narrow.into_raw_vec_and_offset().0).expect("as many");
        let found = Cpu.linear(&Array2::ones((1, 1)), &column.into(), None);
        for (found, wide) in found.iter().zip(&wide) {
            assert!(found.is_nan() && wide.is_nan() || found == wide, "{found} for {wide}");
        }
    }
}
