//! Tensors on their way out.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::source::{Dtype, DtypeExt};

/// A tensor with its values, not yet rounded.
#[derive(Debug, Clone)]
pub struct OutTensor {
    /// Name in the output.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub values: Vec<f64>,
}

/// Round values to `dtype`, to nearest even, little endian.
///
/// # Panics
/// For a dtype that is not a float type.
pub fn encode(values: &[f64], dtype: Dtype) -> Vec<u8> {
    const CHUNK: usize = 1 << 14;
    let mut out = vec![0_u8; values.len() * dtype.byte_size()];
    let work = out.par_chunks_mut(CHUNK * dtype.byte_size()).zip(values.par_chunks(CHUNK));
    match dtype {
        Dtype::F32 => work.for_each(|(o, v)| {
            o.chunks_exact_mut(4).zip(v).for_each(|(o, v)| o.copy_from_slice(&(*v as f32).to_le_bytes()));
        }),
        // Through f64, not f32, so that a value is rounded once.
        Dtype::BF16 => work.for_each(|(o, v)| {
            o.chunks_exact_mut(2).zip(v).for_each(|(o, v)| o.copy_from_slice(&bf16::from_f64(*v).to_le_bytes()));
        }),
        Dtype::F16 => work.for_each(|(o, v)| {
            o.chunks_exact_mut(2).zip(v).for_each(|(o, v)| o.copy_from_slice(&f16::from_f64(*v).to_le_bytes()));
        }),
        Dtype::F64 => work.for_each(|(o, v)| {
            o.chunks_exact_mut(8).zip(v).for_each(|(o, v)| o.copy_from_slice(&v.to_le_bytes()));
        }),
        other => panic!("cannot encode weights as {other}"),
    }
    out
}
