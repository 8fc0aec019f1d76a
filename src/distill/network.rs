//! The whole student: losses of windows, and gradients by everything that is trained.
//!
//! A forward pass keeps three matrices of each layer; the backward pass computes the rest again, layer by layer. Weights that
//! are not trained are read when a layer's turn comes, so that memory is what is trained, and one layer.

use std::borrow::Cow;

use ndarray::Array2;

use super::head::{SourceLogits, StudentHead};
use super::layer::{Layer, LayerShape};
use super::tensors::{Role, Tensors, Weights};
use crate::gradient::Real;
use crate::runtime::{Rotation, RuntimeError};

/// Where weights are that are not trained.
pub(super) trait Frozen<T: Clone>: Sync {
    /// Those of layer `index`; after the last layer, the final norm's.
    ///
    /// # Errors
    /// Whatever keeps them from being read.
    fn layer(&self, index: usize) -> Result<Cow<'_, Tensors<T>>, RuntimeError>;
}

/// A student.
pub(super) struct Network<'a, T: Clone> {
    pub layers: Vec<LayerShape>,
    /// Over the longest window.
    pub rotation: Rotation,
    pub head: StudentHead<T>,
    pub frozen: &'a dyn Frozen<T>,
}

/// Some windows of text as they enter the first layer.
#[derive(Debug, Clone)]
pub(super) struct Batch<T> {
    /// Embedded tokens, `[T, D]`.
    pub input: Array2<T>,
    /// Lengths of the windows.
    pub windows: Vec<usize>,
}

impl<T: Real> Network<'_, T> {
    /// The loss of every token. `trained` has a set of tensors for each layer, and one for what is behind them.
    ///
    /// # Errors
    /// Weights that cannot be read, or what `source` fails with.
    pub fn losses(
        &self,
        trained: &[Tensors<T>],
        batch: Batch<T>,
        source: SourceLogits<'_, T>,
    ) -> Result<Vec<f64>, RuntimeError> {
        let mut x = batch.input;
        for (index, trained) in trained[..self.layers.len()].iter().enumerate() {
            let frozen = self.frozen.layer(index)?;
            x = self.layer(index, trained, &frozen, &batch.windows).forward(x, None);
        }
        let gain = self.final_gain(trained)?;
        Ok(self.head.pass(&x, &gain, source, None)?.losses)
    }

    /// The same; gradients of `scale` times the sum of the losses are added to `sums`, by the tensors that it has.
    ///
    /// # Errors
    /// As [`Network::losses`].
    pub fn gradients(
        &self,
        trained: &[Tensors<T>],
        batch: Batch<T>,
        source: SourceLogits<'_, T>,
        scale: f64,
        sums: &mut [Tensors<T>],
    ) -> Result<Vec<f64>, RuntimeError> {
        let mut x = batch.input;
        let mut kept = Vec::with_capacity(self.layers.len());
        for (index, trained) in trained[..self.layers.len()].iter().enumerate() {
            let frozen = self.frozen.layer(index)?;
            x = self.layer(index, trained, &frozen, &batch.windows).forward(x, Some(&mut kept));
        }
        let gain = self.final_gain(trained)?;
        let pass = self.head.pass(&x, &gain, source, Some(scale))?;
        drop(x);
        let Some((mut d, of_gain)) = pass.gradients else { return Ok(pass.losses) };
        let after = &mut sums[self.layers.len()];
        if after.has(Role::FinalGain) {
            after[Role::FinalGain].iter_mut().zip(of_gain).for_each(|(sum, d)| *sum += d);
        }
        for index in (0..self.layers.len()).rev() {
            let Some(kept) = kept.pop() else { break };
            let frozen = self.frozen.layer(index)?;
            d = self.layer(index, &trained[index], &frozen, &batch.windows).backward(&kept, d, &mut sums[index]);
        }
        Ok(pass.losses)
    }

    fn layer<'l>(
        &'l self,
        index: usize,
        trained: &'l Tensors<T>,
        frozen: &'l Tensors<T>,
        windows: &'l [usize],
    ) -> Layer<'l, T> {
        let weights = Weights { trained, frozen };
        Layer { shape: self.layers[index], weights, rotation: &self.rotation, windows }
    }

    fn final_gain(&self, trained: &[Tensors<T>]) -> Result<Vec<T>, RuntimeError> {
        let index = self.layers.len();
        let frozen = self.frozen.layer(index)?;
        let weights = Weights { trained: &trained[index], frozen: &frozen };
        Ok(weights.vector(Role::FinalGain).unwrap_or_default().to_vec())
    }
}
