//! Gradient refinement of one converted layer.
//!
//! After the closed form, Adam steps move all tensors of a layer so that its attention output comes closer to the
//! source's, on windows of calibration text. Windows it never trains on decide: the best tensors seen on them are
//! returned, or the layer as it came in where nothing got better. The backward pass is this module's own.

mod adam;
mod backward;
mod forward;
mod tensors;
#[cfg(test)]
mod tests;

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};

use crate::calibrate::{relative_error, shuffle};
use crate::factor::linalg::matmul_f32;
use crate::mla::MlaLayer;
use crate::runtime::Span;
use adam::{Adam, rms, schedule};
use backward::backward;
use forward::{Batch, Block, forward};
use tensors::Tensors;

/// How often the held-out windows are evaluated.
const CHECKS: usize = 5;
/// Share by which the held-out error has to fall for a refined layer to be kept: less is noise of the choice itself.
const WORTHWHILE: f64 = 1e-3;

/// Settings of [`refine`].
#[derive(Debug, Clone, PartialEq)]
pub struct RefineSettings {
    /// Gradient steps.
    pub steps: usize,
    /// Tokens per step, at least, in whole windows.
    pub tokens_per_step: usize,
    /// Size of a full step, as a share of each tensor's root mean square.
    pub learning_rate: f64,
    /// Decides which windows are held out and in what order the others come.
    pub seed: u64,
    /// Share of the windows that is never trained on; at least one window is.
    pub held_out: f64,
    /// Longer windows, in tokens, are left out: a step takes time and memory with the square of a window.
    pub longest: usize,
}

impl Default for RefineSettings {
    fn default() -> Self {
        Self { steps: 100, tokens_per_step: 2048, learning_rate: 0.003, seed: 42, held_out: 0.125, longest: 1024 }
    }
}

/// What [`refine`] returns.
#[derive(Debug, Clone)]
pub struct Refined {
    /// The refined layer, or the one that came in.
    pub layer: MlaLayer,
    /// Relative error of the attention output on the held-out windows before, as [`relative_error`] defines it.
    pub error_before: f64,
    /// The same for [`Refined::layer`].
    pub error_after: f64,
    /// Whether [`Refined::layer`] is a refined one.
    pub kept: bool,
    /// Steps after which the returned tensors were taken; 0 for the layer that came in.
    pub best_step: usize,
}

/// Refine `layer` so that its attention output on `x` comes closer to `target`.
///
/// `x` `[T, D]` are the normed inputs the converted layer sees, `target` `[T, D]` the source's attention output for the
/// same tokens; `windows` are the lengths of the windows of text that lie one under the other in them. With `bias` the
/// target has an output bias, which is trained too (from zero where the layer has none). A bias of another projection
/// is trained where the layer has it; the query's latent down-projection is not.
///
/// The result depends on the settings alone, not on the number of threads. A layer that does not get better by at least
/// a thousandth, a value that stops being finite or fewer than two windows give back the layer as it came in.
///
/// # Panics
/// If `x` and `target` differ in shape or `windows` do not add up to their rows.
pub fn refine(
    layer: &MlaLayer,
    x: ArrayView2<'_, f32>,
    target: ArrayView2<'_, f32>,
    windows: &[usize],
    bias: bool,
    settings: &RefineSettings,
) -> Refined {
    assert_eq!(x.dim(), target.dim(), "inputs and targets differ in shape");
    assert_eq!(windows.iter().sum::<usize>(), x.nrows(), "windows and rows differ");
    let data = Data::new(layer, x, target, windows, settings.longest);
    let (train, held) = split(data.spans.len(), settings);
    let mut tensors = Tensors::<f32>::new(layer, bias);
    let error_before = data.error(&tensors, &held, settings);
    let unrefined =
        || Refined { layer: layer.clone(), error_before, error_after: error_before, kept: false, best_step: 0 };
    if train.is_empty() || !error_before.is_finite() {
        return unrefined();
    }
    let energy = data.energy(&train);
    let output_rms = (energy / layer.hidden().max(1) as f64).sqrt();
    let mut adam = Adam::new(&tensors, settings.learning_rate, output_rms, bias);
    let mut order = Order::new(train, settings.seed);
    let mut best: Option<(Tensors<f32>, f64, usize)> = None;
    for step in 0..settings.steps {
        let (batch, target) = data.batch(&order.take(settings.tokens_per_step, |w| data.spans[w].len()));
        let gradients = gradients(&data.block, &tensors, &batch, &target, energy);
        if !adam.step(&mut tensors, &gradients, schedule(step, settings.steps)) {
            break;
        }
        let done = step + 1;
        if done % (settings.steps / CHECKS).max(1) == 0 || done == settings.steps {
            let error = data.error(&tensors, &held, settings);
            if !error.is_finite() {
                break;
            }
            if error < best.as_ref().map_or(error_before * (1.0 - WORTHWHILE), |b| b.1) {
                best = Some((tensors.clone(), error, done));
            }
        }
    }
    match best {
        Some((tensors, error_after, best_step)) => {
            Refined { layer: tensors.to_layer(layer), error_before, error_after, kept: true, best_step }
        }
        None => unrefined(),
    }
}

/// Gradients of `sum |y - target|^2 / (tokens * energy)`: a relative error, so that neither the width nor the scale of
/// the activations moves them towards the ends of f32.
fn gradients(
    block: &Block,
    tensors: &Tensors<f32>,
    batch: &Batch<f32>,
    target: &Array2<f32>,
    energy: f64,
) -> Tensors<f32> {
    let trace = forward(block, tensors, batch);
    let scale = (2.0 / (target.nrows().max(1) as f64 * energy.max(f64::from(f32::MIN_POSITIVE)))) as f32;
    let mut output = &trace.output - target;
    output *= scale;
    backward(block, tensors, batch, &trace, &output)
}

/// Calibration tokens of one layer.
struct Data<'a> {
    block: Block,
    x: ArrayView2<'a, f32>,
    /// The query latent where there is one, `[T, r_q]`.
    query: Option<Array2<f32>>,
    target: ArrayView2<'a, f32>,
    /// Rows of each window that has any, and not too many.
    spans: Vec<Range<usize>>,
}

impl<'a> Data<'a> {
    fn new(
        layer: &MlaLayer,
        x: ArrayView2<'a, f32>,
        target: ArrayView2<'a, f32>,
        windows: &[usize],
        longest: usize,
    ) -> Self {
        let query = layer.query.down.as_ref().map(|down| matmul_f32(&x, &down.mapv(|v| v as f32).t()));
        let spans = Span::of_windows(windows).into_iter().map(|span| span.queries);
        let spans: Vec<_> = spans.filter(|span| !span.is_empty() && span.len() <= longest).collect();
        let longest = spans.iter().map(Range::len).max().unwrap_or(0);
        Self { block: Block::new(layer, longest), x, query, target, spans }
    }

    /// Inputs and targets of some windows.
    fn batch(&self, chosen: &[usize]) -> (Batch<f32>, Array2<f32>) {
        let windows = chosen.iter().map(|&w| self.spans[w].len()).collect();
        let query = self.query.as_ref().map(|q| self.rows(q.view(), chosen));
        (Batch { x: self.rows(self.x, chosen), query, windows }, self.rows(self.target, chosen))
    }

    fn rows(&self, from: ArrayView2<'_, f32>, chosen: &[usize]) -> Array2<f32> {
        let total = chosen.iter().map(|&w| self.spans[w].len()).sum();
        let mut out = Array2::zeros((total, from.ncols()));
        let mut row = 0;
        for &w in chosen {
            let span = self.spans[w].clone();
            let end = row + span.len();
            out.slice_mut(s![row..end, ..]).assign(&from.slice(s![span, ..]));
            row = end;
        }
        out
    }

    /// Mean squared norm of the targets of some windows, over tokens.
    fn energy(&self, chosen: &[usize]) -> f64 {
        let target = self.rows(self.target, chosen);
        target.as_slice().map_or(0.0, rms).powi(2) * target.ncols() as f64
    }

    /// Relative error of the block on some windows, a step's worth of them at a time.
    fn error(&self, tensors: &Tensors<f32>, chosen: &[usize], settings: &RefineSettings) -> f64 {
        let target = self.rows(self.target, chosen);
        let mut output = Array2::zeros(target.dim());
        let mut row = 0;
        let mut rest = chosen;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = rest.iter().take_while(|w| {
                tokens += self.spans[**w].len();
                tokens <= settings.tokens_per_step
            });
            let (part, others) = rest.split_at(fits.count().max(1));
            rest = others;
            let trace = forward(&self.block, tensors, &self.batch(part).0);
            let end = row + trace.output.nrows();
            output.slice_mut(s![row..end, ..]).assign(&trace.output);
            row = end;
        }
        relative_error(output.view(), target.view())
    }
}

/// Windows to train on and windows to hold out. With a single window there is nothing to train on.
fn split(windows: usize, settings: &RefineSettings) -> (Vec<usize>, Vec<usize>) {
    let mut train: Vec<usize> = (0..windows).collect();
    shuffle(&mut train, &mut settings.seed.clone());
    let wanted = (windows as f64 * settings.held_out).round() as usize;
    let held = wanted.max(1).min(windows.saturating_sub(1).max(1)).min(windows);
    let mut held = train.split_off(windows - held);
    held.sort_unstable();
    (train, held)
}

/// Training windows in a random order; each comes once before any comes again.
struct Order {
    windows: Vec<usize>,
    next: usize,
    state: u64,
}

impl Order {
    fn new(windows: Vec<usize>, seed: u64) -> Self {
        // Another stream than the one that chose the held-out windows.
        Self { next: windows.len(), windows, state: !seed }
    }

    /// The next windows, as many as have `tokens` by their `length`, or as there are.
    fn take(&mut self, tokens: usize, length: impl Fn(usize) -> usize) -> Vec<usize> {
        let (mut taken, mut total) = (Vec::new(), 0);
        while taken.len() < self.windows.len() && (taken.is_empty() || total < tokens) {
            if self.next == self.windows.len() {
                shuffle(&mut self.windows, &mut self.state);
                self.next = 0;
            }
            taken.push(self.windows[self.next]);
            total += length(self.windows[self.next]);
            self.next += 1;
        }
        taken
    }
}
