//! Adam, with steps relative to the size of each tensor.

use std::f64::consts::PI;

use rayon::prelude::*;

use super::tensors::{COUNT, Tensors, WO_BIAS};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
/// Of the root mean square of a tensor's gradients: far below any that matters, far above rounding.
const EPSILON: f64 = 1e-6;
/// Share of the steps in which the step size grows to its full value.
const WARMUP: f64 = 0.05;
/// What the step size decays to.
const FLOOR: f64 = 0.1;
/// Elements per task.
const CHUNK: usize = 1 << 14;

/// Share of the full step size at `step` of `steps`, counted from 0: linear warmup, then cosine decay.
pub(super) fn schedule(step: usize, steps: usize) -> f64 {
    let warmup = (steps as f64 * WARMUP).ceil();
    let done = (step + 1) as f64;
    if done <= warmup {
        return done / warmup;
    }
    let along = (done - warmup) / (steps as f64 - warmup).max(1.0);
    FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + (PI * along.min(1.0)).cos())
}

/// Root mean square, in f64; zero of nothing.
pub(super) fn rms(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
    (sum / values.len().max(1) as f64).sqrt()
}

/// First and second moments of the gradients, and the size of a full step of each tensor.
#[derive(Debug)]
pub(super) struct Adam {
    first: [Vec<f32>; COUNT],
    second: [Vec<f32>; COUNT],
    size: [f64; COUNT],
    steps: i32,
}

impl Adam {
    /// A full step is `rate` times the root mean square of each tensor; of the output bias, which may start at zero, at
    /// least `rate` times `output_rms`. Without `bias` the output bias stays as it is.
    pub fn new(tensors: &Tensors<f32>, rate: f64, output_rms: f64, bias: bool) -> Self {
        let parts = tensors.parts();
        let mut size = parts.map(|p| rate * rms(p));
        size[WO_BIAS] = if bias { size[WO_BIAS].max(rate * output_rms) } else { 0.0 };
        Self { first: parts.map(|p| vec![0.0; p.len()]), second: parts.map(|p| vec![0.0; p.len()]), size, steps: 0 }
    }

    /// One step against `gradients`, `share` of the full size. False, and nothing moved, where a gradient is not finite.
    pub fn step(&mut self, tensors: &mut Tensors<f32>, gradients: &Tensors<f32>, share: f64) -> bool {
        let sizes = gradients.parts().map(rms);
        if sizes.iter().any(|s| !s.is_finite()) {
            return false;
        }
        self.steps += 1;
        let unbias1 = (1.0 / (1.0 - BETA1.powi(self.steps))) as f32;
        let unbias2 = (1.0 / (1.0 - BETA2.powi(self.steps))) as f32;
        let moments = self.first.iter_mut().zip(&mut self.second);
        let parts = tensors.parts_mut().into_iter().zip(gradients.parts());
        for (i, ((weights, gradient), (first, second))) in parts.zip(moments).enumerate() {
            if sizes[i] == 0.0 || self.size[i] == 0.0 {
                continue;
            }
            let size = (self.size[i] * share) as f32;
            let epsilon = (EPSILON * sizes[i]) as f32;
            let chunks = weights.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
            let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
            chunks.zip(moments).for_each(|((weights, gradient), (first, second))| {
                for (((w, g), m), v) in weights.iter_mut().zip(gradient).zip(first).zip(second) {
                    *m += (1.0 - BETA1 as f32) * (g - *m);
                    *v += (1.0 - BETA2 as f32) * (g * g - *v);
                    *w -= size * (*m * unbias1) / ((*v * unbias2).sqrt() + epsilon);
                }
            });
        }
        true
    }
}
