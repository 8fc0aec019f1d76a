//! One stored tensor, viewed in place.

use half::{bf16, f16};
use rayon::prelude::*;

use super::Dtype;

/// A tensor as it lies in its file: borrowed bytes, little endian, row-major.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the checkpoint.
    pub name: &'a str,
    /// Stored element type.
    pub dtype: Dtype,
    /// Shape, outermost first; `[out, in]` for the weight of a linear layer.
    pub shape: &'a [usize],
    /// `shape.product() * dtype.size()` bytes.
    pub bytes: &'a [u8],
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

    fn map<T: Send>(&self, f: impl Fn(f64) -> T + Sync + Send + Copy) -> Vec<T> {
        let b = self.bytes;
        match self.dtype {
            Dtype::F32 => b
                .par_chunks_exact(4)
                .with_min_len(1 << 14)
                .map(|c| f(f64::from(f32::from_le_bytes([c[0], c[1], c[2], c[3]]))))
                .collect(),
            Dtype::Bf16 => b
                .par_chunks_exact(2)
                .with_min_len(1 << 14)
                .map(|c| f(f64::from(bf16::from_le_bytes([c[0], c[1]]))))
                .collect(),
            Dtype::F16 => b
                .par_chunks_exact(2)
                .with_min_len(1 << 14)
                .map(|c| f(f64::from(f16::from_le_bytes([c[0], c[1]]))))
                .collect(),
            Dtype::F64 => b
                .par_chunks_exact(8)
                .with_min_len(1 << 14)
                .map(|c| f(f64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]])))
                .collect(),
            other => panic!("tensor `{}` has dtype {other}, which is not a float type", self.name),
        }
    }
}
