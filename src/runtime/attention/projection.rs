//! Weights of known shapes on a backend.

use ndarray::Array2;

use crate::runtime::tensors::Linear;
use crate::runtime::{Backend, HostWeight, LinearWeights, RuntimeError};

/// A linear layer on a backend.
pub(in crate::runtime) struct Projection<B: Backend> {
    /// `[out, in]`.
    pub(super) weight: B::Weight,
    bias: Option<B::Tensor>,
}

impl<B: Backend> Projection<B> {
    /// Check the shape and move the weights over.
    pub(in crate::runtime) fn new(
        backend: &B,
        role: &'static str,
        linear: Linear<HostWeight>,
        out: usize,
        inner: usize,
    ) -> Result<Self, RuntimeError> {
        check(role, &[out, inner], &<[usize; 2]>::from(linear.weight.shape()))?;
        let bias = match linear.bias {
            Some(bias) => Some(vector(backend, role, bias, out)?),
            None => None,
        };
        Ok(Self { weight: backend.upload_weight(linear.weight), bias })
    }

    /// As backends take it.
    pub(in crate::runtime) fn weights(&self) -> LinearWeights<'_, B::Weight, B::Tensor> {
        LinearWeights { weight: &self.weight, bias: self.bias.as_ref() }
    }

    pub(in crate::runtime) fn apply(&self, backend: &B, x: &B::Tensor) -> B::Tensor {
        backend.linear(x, &self.weight, self.bias.as_ref())
    }
}

/// Refuses a shape that is not the one expected.
pub(super) fn check(role: &'static str, expected: &[usize], found: &[usize]) -> Result<(), RuntimeError> {
    if expected == found {
        return Ok(());
    }
    Err(RuntimeError::Shape { role, expected: expected.to_vec(), found: found.to_vec() })
}

/// A vector of a known length.
pub(in crate::runtime) fn vector_of(
    role: &'static str,
    values: Vec<f32>,
    len: usize,
) -> Result<Vec<f32>, RuntimeError> {
    check(role, &[len], &[values.len()])?;
    Ok(values)
}

/// A vector on a backend, `[1, len]`.
pub(in crate::runtime) fn vector<B: Backend>(
    backend: &B,
    role: &'static str,
    values: Vec<f32>,
    len: usize,
) -> Result<B::Tensor, RuntimeError> {
    check(role, &[len], &[values.len()])?;
    let found = values.len();
    let row = Array2::from_shape_vec((1, len), values);
    row.map(|row| backend.upload(row)).map_err(|_| RuntimeError::Shape {
        role,
        expected: vec![len],
        found: vec![found],
    })
}
