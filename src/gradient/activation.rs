//! What lies between the products of an MLP.

use ndarray::Array2;
use rayon::prelude::*;

use super::product::Real;
use crate::arch::Activation;

/// Elements per task.
const CHUNK: usize = 1 << 14;
const LAYOUT: &str = "made in standard layout";

/// `act(gate) * up`, or `act(up)` without a gate; all `[T, I]`.
pub(crate) fn activated<T: Real>(gate: Option<&Array2<T>>, up: &Array2<T>, activation: Activation) -> Array2<T> {
    let mut out = up.clone();
    let to = out.as_slice_mut().expect(LAYOUT).par_chunks_mut(CHUNK);
    match gate.map(|gate| gate.as_slice().expect(LAYOUT)) {
        Some(gate) => to.zip(gate.par_chunks(CHUNK)).for_each(|(up, gate)| T::gated(up, gate, activation)),
        None => to.for_each(|up| up.iter_mut().for_each(|up| *up = T::activation(*up, activation).0)),
    }
    out
}

/// The gradients by `gate` and `up` of [`activated`], in their place; `gradient` `[T, I]` is that by its result.
pub(crate) fn activated_backward<T: Real>(
    gate: Option<&mut Array2<T>>,
    up: &mut Array2<T>,
    gradient: &Array2<T>,
    activation: Activation,
) {
    let gradient = gradient.as_slice().expect(LAYOUT).par_chunks(CHUNK);
    let up = up.as_slice_mut().expect(LAYOUT).par_chunks_mut(CHUNK);
    match gate {
        Some(gate) => {
            let gate = gate.as_slice_mut().expect(LAYOUT).par_chunks_mut(CHUNK);
            gate.zip(up).zip(gradient).for_each(|((gate, up), d)| T::gated_backward(gate, up, d, activation));
        }
        None => up.zip(gradient).for_each(|(up, d)| {
            up.iter_mut().zip(d).for_each(|(up, d)| *up = *d * T::activation(*up, activation).1);
        }),
    }
}
