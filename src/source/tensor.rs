//! One stored tensor, as bytes.

use std::borrow::Cow;

use half::f16;
use rayon::prelude::*;

use super::Dtype;

/// A tensor as it lies in its file: little endian, row-major.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    /// Name in the checkpoint.
    pub name: &'a str,
    /// Stored element type.
    pub dtype: Dtype,
    /// Shape, outermost first; `[out, in]` for the weight of a linear layer.
    pub shape: &'a [usize],
    /// `shape.product() * dtype.byte_size()` bytes.
    pub bytes: Cow<'a, [u8]>,
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All elements as `f32`, row-major.
    ///
    /// # Panics
    /// If the dtype is not a float type; [`crate::source`] checks that when a model is opened.
    pub fn to_f32(&self) -> Vec<f32> {
        self.map(|x| x as f32)
    }

    /// All elements as `f64`, row-major. Exact for every supported dtype.
    ///
    /// # Panics
    /// As [`TensorView::to_f32`].
    pub fn to_f64(&self) -> Vec<f64> {
        self.map(|x| x)
    }

    fn map<T: Send + Copy + Default>(&self, f: impl Fn(f64) -> T + Sync + Send + Copy) -> Vec<T> {
        let b = &*self.bytes;
        match self.dtype {
            Dtype::F32 => decode(b, |x| f(f64::from(f32::from_le_bytes(x)))),
            // A bf16 is the upper half of an f32; said this way the loop becomes a shift over whole vectors, where
            // `bf16::to_f32` branches on NaN to keep it quiet.
            Dtype::BF16 => decode(b, |x| f(f64::from(f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16)))),
            Dtype::F16 => decode(b, |x| f(f16::from_le_bytes(x).to_f64())),
            Dtype::F64 => decode(b, |x| f(f64::from_le_bytes(x))),
            Dtype::F8_E4M3 => decode(b, |[x]: [u8; 1]| f(e4m3(x))),
            other => panic!("tensor `{}` has dtype {other}, which is not a float type", self.name),
        }
    }
}

/// The value of an e4m3 number (OCP FP8: bias 7, no infinity, NaN where all of exponent and mantissa are set).
fn e4m3(bits: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 0xf), f64::from(bits & 7));
    let magnitude = match exponent {
        _ if bits & 0x7f == 0x7f => f64::NAN,
        0 => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2.0_f64.powi(exponent - 7),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Converts elements of `N` bytes, in parallel over blocks that fit a first-level cache.
fn decode<const N: usize, T: Send + Copy + Default>(bytes: &[u8], f: impl Fn([u8; N]) -> T + Sync + Send) -> Vec<T> {
    const BLOCK: usize = 1 << 13;
    let elements = bytes.as_chunks::<N>().0;
    let mut out = vec![T::default(); elements.len()];
    out.par_chunks_mut(BLOCK).zip(elements.par_chunks(BLOCK)).with_min_len(4).for_each(|(to, from)| {
        for (t, &x) in to.iter_mut().zip(from) {
            *t = f(x);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn every_16_bit_pattern_converts_exactly() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let shape = [256, 256];
        for dtype in [Dtype::BF16, Dtype::F16] {
            let view = TensorView { name: "t", dtype, shape: &shape, bytes: Cow::Borrowed(&bytes) };
            let (narrow, wide) = (view.to_f32(), view.to_f64());
            assert_eq!(narrow.len(), view.len());
            for bits in 0..=u16::MAX {
                let expected = match dtype {
                    Dtype::BF16 => bf16::from_bits(bits).to_f64(),
                    _ => f16::from_bits(bits).to_f64(),
                };
                let (n, w) = (narrow[usize::from(bits)], wide[usize::from(bits)]);
                if expected.is_nan() {
                    assert!(n.is_nan() && w.is_nan(), "{dtype} {bits:#x}");
                } else {
                    assert_eq!(w.to_bits(), expected.to_bits(), "{dtype} {bits:#x}");
                    assert_eq!(f64::from(n).to_bits(), expected.to_bits(), "{dtype} {bits:#x}");
                }
            }
        }
    }

    #[test]
    fn wide_types_and_odd_lengths() {
        let values: Vec<f64> = (0..40_001).map(|i| f64::from(i) * 0.1 - 7.0).collect();
        let shape = [values.len()];
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = TensorView { name: "t", dtype: Dtype::F64, shape: &shape, bytes: Cow::Borrowed(&bytes) };
        assert_eq!(view.to_f64(), values);
        let narrow: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        assert_eq!(view.to_f32(), narrow);
        let bytes: Vec<u8> = narrow.iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = TensorView { name: "t", dtype: Dtype::F32, shape: &shape, bytes: Cow::Borrowed(&bytes) };
        assert_eq!(view.to_f32(), narrow);
    }
}
