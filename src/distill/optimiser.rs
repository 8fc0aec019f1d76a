//! AdamW without decay, with steps relative to the size of each kind of row.
//!
//! Everything is measured in sizes: a full step moves an element by the step size times the root mean square of its kind of
//! row, and gradients are clipped by what they say of moves of that length. So no scale that a class stores its weights in
//! changes what training does.

use std::f64::consts::PI;

use rayon::prelude::*;

use super::tensors::{COUNT, Role, Tensors};
use crate::gradient::Real;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
/// Of the root mean square of a tensor's gradients: far below any that matters, far above rounding.
const EPSILON: f64 = 1e-6;
/// Share of the steps in which the step size grows to its full value.
const WARMUP: f64 = 0.05;
/// What the step size decays to.
const FLOOR: f64 = 0.1;
/// Gradients longer than this many times their running length are shortened to it.
const CLIP: f64 = 2.0;
/// Share of the steps that the average of the weights reaches back over.
const AVERAGED: f64 = 0.15;
/// Elements per task.
const CHUNK: usize = 1 << 14;

/// Share of the full step size at `step` of `steps`, counted from 0: linear warm-up, then cosine decay.
pub(super) fn schedule(step: usize, steps: usize) -> f64 {
    let warmup = (steps as f64 * WARMUP).ceil();
    let done = (step + 1) as f64;
    if done <= warmup {
        return done / warmup;
    }
    let along = (done - warmup) / (steps as f64 - warmup).max(1.0);
    FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + (PI * along.min(1.0)).cos())
}

/// Root mean square of what is not zero, in f64: what a class pads weights with has no say. Zero of nothing.
fn size<'a>(values: impl Iterator<Item = &'a f32>) -> f64 {
    let (sum, count) =
        values.filter(|v| **v != 0.0).fold((0.0, 0usize), |(s, n), v| (s + f64::from(*v).powi(2), n + 1));
    (sum / count.max(1) as f64).sqrt()
}

/// Moments of the gradients of one set of tensors, and the sizes of their steps.
#[derive(Debug, Clone)]
struct Moments {
    first: Tensors<f32>,
    second: Tensors<f32>,
    /// Size of the elements of a tensor.
    sizes: [f64; COUNT],
    /// Row of [`Role::Latent`] that does not move.
    fixed: Option<usize>,
}

/// Moments, sizes and the average of everything that is trained.
#[derive(Debug)]
pub(super) struct Optimiser {
    moments: Vec<Moments>,
    /// Average of the latest weights.
    pub average: Vec<Tensors<f32>>,
    averaged: usize,
    /// Steps since the moments were zero.
    steps: i32,
    /// Running length of the gradient, in sizes.
    length: Option<f64>,
}

impl Optimiser {
    /// For `trained`, with the row of each layer's latent that stays as it is.
    pub fn new(trained: &[Tensors<f32>], fixed: &[Option<usize>]) -> Self {
        let one = |(tensors, fixed): (&Tensors<f32>, &Option<usize>)| Moments {
            first: Tensors::zeros_like(tensors),
            second: Tensors::zeros_like(tensors),
            sizes: std::array::from_fn(|i| {
                let role = Role::ALL[i];
                let own = size(tensors[role].iter());
                // A bias may be zero at the start; it moves at least as far as the weight of an input of one.
                role.weight_of_bias().filter(|_| tensors.has(role)).map_or(own, |w| own.max(size(tensors[w].iter())))
            }),
            fixed: *fixed,
        };
        Self {
            moments: trained.iter().zip(fixed).map(one).collect(),
            average: trained.to_vec(),
            averaged: 0,
            steps: 0,
            length: None,
        }
    }

    /// Forget what was learnt of gradients; weights that came before go on from `trained`.
    pub fn reset(&mut self, trained: &[Tensors<f32>]) {
        for m in &mut self.moments {
            m.first.parts_mut().chain(m.second.parts_mut()).for_each(|part| part.fill(0.0));
        }
        (self.steps, self.averaged, self.length) = (0, 0, None);
        self.average = trained.to_vec();
    }

    /// One step of `rate` times each size against `gradients`. False, and nothing moved, where a gradient is not finite.
    pub fn step(&mut self, trained: &mut [Tensors<f32>], gradients: &mut [Tensors<f32>], rate: f64) -> bool {
        for (m, gradients) in self.moments.iter().zip(gradients.iter_mut()) {
            if let Some(row) = m.fixed.filter(|row| *row < gradients[Role::Latent].nrows()) {
                gradients[Role::Latent].row_mut(row).fill(0.0);
            }
        }
        let squares: Vec<[f64; COUNT]> = gradients.par_iter().map(squares).collect();
        let total: f64 =
            squares.iter().zip(&self.moments).flat_map(|(s, m)| s.iter().zip(m.sizes)).map(|(s, z)| s * z * z).sum();
        if !total.is_finite() {
            return false;
        }
        let factor = self.clip(total.sqrt());
        self.steps += 1;
        let unbias = [BETA1, BETA2].map(|beta| (1.0 / (1.0 - beta.powi(self.steps))) as f32);
        for (layer, m) in self.moments.iter_mut().enumerate() {
            for role in Role::ALL {
                let gradient = &gradients[layer][role];
                let rms = (squares[layer][role as usize] / gradient.len().max(1) as f64).sqrt() * factor;
                let (step, size) = (m.sizes[role as usize] * rate, m.sizes[role as usize]);
                if rms == 0.0 || size == 0.0 {
                    continue;
                }
                let update =
                    Update { step: step as f32, factor: factor as f32, epsilon: (EPSILON * rms) as f32, unbias };
                update.apply(&mut trained[layer], &mut m.first, &mut m.second, gradient, role);
            }
        }
        true
    }

    /// Take the weights after a step into the average; it reaches back over a share of `steps`.
    pub fn take(&mut self, trained: &[Tensors<f32>], steps: usize) {
        self.averaged += 1;
        let reach = (steps as f64 * AVERAGED).max(1.0);
        let share = (1.0 / (self.averaged as f64).min(reach)) as f32;
        for (average, trained) in self.average.iter_mut().zip(trained) {
            for (average, trained) in average.parts_mut().zip(trained.parts()) {
                average.iter_mut().zip(trained).for_each(|(a, w)| *a += share * (w - *a));
            }
        }
    }

    /// What multiplies a gradient of `length`.
    fn clip(&mut self, length: f64) -> f64 {
        let limit = self.length.map_or(length, |usual| CLIP * usual);
        let factor = if length > limit { limit / length } else { 1.0 };
        let seen = length * factor;
        self.length = Some(self.length.map_or(seen, |usual| 0.9 * usual + 0.1 * seen));
        factor
    }
}

/// Sums of squares of every tensor, in f64.
fn squares(of: &Tensors<f32>) -> [f64; COUNT] {
    std::array::from_fn(|i| of[Role::ALL[i]].iter().map(|v| v.to_f64().powi(2)).sum())
}

/// How one tensor moves.
struct Update {
    step: f32,
    factor: f32,
    epsilon: f32,
    unbias: [f32; 2],
}

impl Update {
    fn apply(
        &self,
        trained: &mut Tensors<f32>,
        first: &mut Tensors<f32>,
        second: &mut Tensors<f32>,
        gradient: &ndarray::Array2<f32>,
        role: Role,
    ) {
        let (Some(weights), Some(gradient)) = (trained[role].as_slice_mut(), gradient.as_slice()) else { return };
        let (Some(first), Some(second)) = (first[role].as_slice_mut(), second[role].as_slice_mut()) else { return };
        let weights = weights.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
        weights.zip(moments).for_each(|((weights, gradient), (first, second))| {
            for (((w, g), m), v) in weights.iter_mut().zip(gradient).zip(first).zip(second) {
                let g = g * self.factor;
                *m += (1.0 - BETA1 as f32) * (g - *m);
                *v += (1.0 - BETA2 as f32) * (g * g - *v);
                *w -= self.step * (*m * self.unbias[0]) / ((*v * self.unbias[1]).sqrt() + self.epsilon);
            }
        });
    }
}
