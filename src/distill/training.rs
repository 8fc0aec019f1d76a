//! The loop: steps, evaluations on the held-out windows, and the best state so far.

use ndarray::{Array2, s};

use super::network::{Batch, Network};
use super::optimiser::{Optimiser, schedule};
use super::report::{CurvePoint, DistillSettings, HeldOutPoint, Train};
use super::student::Student;
use super::tensors::Tensors;
use super::text::{Order, Text, runs};
use crate::observe::{Event, Observer, Silent};
use crate::runtime::{Cpu, Head, Model, RuntimeError};

/// How often the held-out windows are evaluated.
const CHECKS: usize = 5;
/// Tokens that are worked on at once, in whole windows.
const PART: usize = 2048;
/// How often a step that went wrong is undone and the step size halved.
const HALVINGS: usize = 3;
/// A held-out loss of this many times the one of the beginning is one that went wrong.
const DIVERGED: f64 = 1.5;

/// The model that is learnt from.
pub(super) struct Teacher<'a> {
    model: Model<'a, Cpu>,
    head: Head<'a, Cpu>,
}

impl<'a> Teacher<'a> {
    /// Weights stay where they are in their files.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn new(model: Model<'a, Cpu>) -> Result<Self, RuntimeError> {
        let model = model.in_place();
        Ok(Self { head: model.head()?, model })
    }

    /// The residual stream after the last layer, `[T, D]`.
    fn hidden(&self, windows: &[Vec<u32>]) -> Result<Array2<f32>, RuntimeError> {
        self.model.final_hidden(windows, &Silent)
    }
}

/// Held-out windows with what the source makes of them.
struct HeldOut {
    /// By text; parts of some windows.
    texts: Vec<Vec<(Batch<f32>, Array2<f32>)>>,
}

/// Means of the held-out loss.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HeldOutLoss {
    /// By text.
    pub texts: Vec<f64>,
    /// Over all tokens.
    pub all: f64,
}

/// What training came to.
pub(super) struct Outcome {
    /// The best weights, rounded as they are stored; `None`: those that came in.
    pub best: Option<Vec<Tensors<f32>>>,
    pub best_step: usize,
    pub averaged: bool,
    pub before: HeldOutLoss,
    pub after: HeldOutLoss,
    pub curve: Vec<CurvePoint>,
    pub held_out: Vec<HeldOutPoint>,
    /// Numbers that were trained.
    pub trained_values: usize,
    /// What went wrong, and what was done.
    pub notes: Vec<String>,
}

/// What is trained of every layer and after them, and rows of latents that stay.
pub(super) type Start = (Vec<Tensors<f32>>, Vec<Option<usize>>);

/// What is trained of `student`, as it is stored.
///
/// # Errors
/// Weights that cannot be read.
pub(super) fn start(student: &Student<'_>, train: Train) -> Result<Start, RuntimeError> {
    let mut out = (Vec::new(), Vec::new());
    for index in 0..=student.arch.layers {
        let chosen = student.chosen(index, train)?;
        out.0.push(chosen.tensors);
        out.1.push(chosen.fixed_latent_row);
    }
    Ok(out)
}

/// Everything that a run needs and does not change.
pub(super) struct Training<'a> {
    pub teacher: Teacher<'a>,
    pub student: &'a Student<'a>,
    pub network: Network<'a, f32>,
    pub start: Start,
    pub texts: &'a [Text],
    pub settings: &'a DistillSettings,
    pub observer: &'a dyn Observer,
}

/// What a run changes.
struct State {
    trained: Vec<Tensors<f32>>,
    /// As they were before the latest step.
    good: Vec<Tensors<f32>>,
    optimiser: Optimiser,
    /// What multiplies the step size.
    share: f64,
    halvings: usize,
    done: Outcome,
}

impl Training<'_> {
    /// Train, and return the best state.
    ///
    /// # Errors
    /// Weights that cannot be read; a source that computes numbers that are not finite.
    pub fn run(&self) -> Result<Outcome, RuntimeError> {
        let settings = self.settings;
        let (trained, fixed) = self.start.clone();
        let held_out = self.held_out()?;
        let before = self.look(&trained, &held_out)?;
        let windows: Vec<&Vec<u32>> = self.texts.iter().flat_map(|text| &text.train).collect();
        let mut order = Order::new(windows.len(), settings.seed);
        let steps = settings.tokens.div_ceil(settings.batch_tokens.max(1)).max(1);
        let mut sums: Vec<Tensors<f32>> = trained.iter().map(Tensors::zeros_like).collect();
        let mut state = State {
            good: trained.clone(),
            optimiser: Optimiser::new(&trained, &fixed),
            share: 1.0,
            halvings: 0,
            done: Outcome {
                best: None,
                best_step: 0,
                averaged: false,
                after: before.clone(),
                curve: Vec::with_capacity(steps),
                held_out: vec![HeldOutPoint { step: 0, tokens: 0, averaged: false, kl: before.all }],
                trained_values: trained.iter().flat_map(Tensors::parts).map(<[f32]>::len).sum(),
                notes: Vec::new(),
                before,
            },
            trained,
        };
        self.observer.event(Event::Phase { name: "distill", steps: Some(steps as u64) });
        let mut tokens = 0;
        for step in 0..steps {
            let taken = order.take(settings.batch_tokens, |w| windows[w].len());
            let batch: Vec<Vec<u32>> = taken.iter().map(|w| windows[*w].clone()).collect();
            tokens += batch.iter().map(Vec::len).sum::<usize>();
            let loss = self.gradients(&state.trained, &batch, &mut sums)?;
            let rate = settings.step_size * schedule(step, steps) * state.share;
            if !(loss.is_finite() && state.step(&mut sums, rate)) {
                if !state.undo(&format!("the loss of step {} is not finite", step + 1)) {
                    break;
                }
                continue;
            }
            state.done.curve.push(CurvePoint { step: step + 1, tokens, loss, rate });
            state.optimiser.take(&state.trained, steps);
            self.observer.event(Event::Step { done: step as u64 + 1, tokens: tokens as u64 });
            self.observer.event(Event::Loss { train: loss, held_out: state.done.after.all });
            let last = step + 1 == steps;
            if (last || (step + 1) % steps.div_ceil(CHECKS) == 0)
                && !self.check(&mut state, &held_out, (step + 1, tokens, last))?
            {
                break;
            }
        }
        Ok(state.done)
    }

    fn held_out(&self) -> Result<HeldOut, RuntimeError> {
        let text = |text: &Text| {
            let lengths: Vec<usize> = text.held_out.iter().map(Vec::len).collect();
            let part = |range: std::ops::Range<usize>| {
                let windows = &text.held_out[range];
                Ok((self.embedded(windows)?, self.teacher.hidden(windows)?))
            };
            runs(&lengths, PART).into_iter().map(part).collect()
        };
        let texts: Result<Vec<Vec<_>>, RuntimeError> = self.texts.iter().map(text).collect();
        Ok(HeldOut { texts: texts? })
    }

    fn embedded(&self, windows: &[Vec<u32>]) -> Result<Batch<f32>, RuntimeError> {
        let model = Model::new(self.student.source, self.student.arch, &Cpu);
        let (input, windows) = model.start(windows)?;
        Ok(Batch { input, windows })
    }

    /// Held-out loss of some weights.
    fn look(&self, trained: &[Tensors<f32>], held_out: &HeldOut) -> Result<HeldOutLoss, RuntimeError> {
        let (mut sum, mut count) = (0.0, 0);
        let mut texts = Vec::with_capacity(held_out.texts.len());
        for parts in &held_out.texts {
            let (mut of_text, mut tokens) = (0.0, 0);
            for (batch, hidden) in parts {
                let logits = |rows: std::ops::Range<usize>| self.teacher.head.logits(hidden.slice(s![rows, ..]));
                let losses = self.network.losses(trained, batch.clone(), &logits)?;
                of_text += losses.iter().sum::<f64>();
                tokens += losses.len();
            }
            texts.push(of_text / tokens.max(1) as f64);
            (sum, count) = (sum + of_text, count + tokens);
        }
        Ok(HeldOutLoss { texts, all: sum / f64::from(u32::try_from(count.max(1)).unwrap_or(u32::MAX)) })
    }

    /// Mean loss of a step's windows; `sums` become its gradients.
    fn gradients(
        &self,
        trained: &[Tensors<f32>],
        windows: &[Vec<u32>],
        sums: &mut [Tensors<f32>],
    ) -> Result<f64, RuntimeError> {
        sums.iter_mut().flat_map(Tensors::parts_mut).for_each(|part| part.fill(0.0));
        let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
        let tokens = lengths.iter().sum::<usize>().max(1) as f64;
        let mut sum = 0.0;
        for range in runs(&lengths, PART) {
            let part = &windows[range];
            let hidden = self.teacher.hidden(part)?;
            let logits = |rows: std::ops::Range<usize>| self.teacher.head.logits(hidden.slice(s![rows, ..]));
            let losses = self.network.gradients(trained, self.embedded(part)?, &logits, 1.0 / tokens, sums)?;
            sum += losses.iter().sum::<f64>();
        }
        Ok(sum / tokens)
    }

    /// Evaluate on the held-out windows. False where training should end.
    fn check(
        &self,
        state: &mut State,
        held_out: &HeldOut,
        (step, tokens, last): (usize, usize, bool),
    ) -> Result<bool, RuntimeError> {
        let mut candidates = vec![(true, state.optimiser.average.clone())];
        if last {
            candidates.push((false, state.trained.clone()));
        }
        let mut diverged = false;
        for (averaged, mut weights) in candidates {
            for (index, tensors) in weights.iter_mut().enumerate() {
                self.student.round(index, tensors);
            }
            let loss = self.look(&weights, held_out)?;
            let done = &mut state.done;
            done.held_out.push(HeldOutPoint { step, tokens, averaged, kl: loss.all });
            diverged |= !loss.all.is_finite() || loss.all > DIVERGED * done.before.all;
            if loss.is_better_than(&done.after, &done.before) {
                (done.after, done.best, done.best_step, done.averaged) = (loss, Some(weights), step, averaged);
            }
            self.observer
                .event(Event::Loss { train: done.curve.last().map_or(f64::NAN, |c| c.loss), held_out: done.after.all });
        }
        if !diverged || last {
            return Ok(true);
        }
        if let Some(best) = &state.done.best {
            state.good.clone_from(best);
        } else {
            state.good.clone_from(&self.start.0);
        }
        Ok(state.undo(&format!("the held-out loss after step {step} is far above that of the beginning")))
    }
}

impl HeldOutLoss {
    /// Whether it is lower over all, and no text is worse than it was `before`.
    fn is_better_than(&self, best: &Self, before: &Self) -> bool {
        self.all < best.all && self.texts.iter().zip(&before.texts).all(|(now, then)| now <= then)
    }
}

impl State {
    /// One step; false where its gradients are not finite.
    fn step(&mut self, sums: &mut [Tensors<f32>], rate: f64) -> bool {
        self.good.clone_from(&self.trained);
        self.optimiser.step(&mut self.trained, sums, rate)
    }

    /// Go back to the last good state with half the step size. False where that has been done often enough.
    fn undo(&mut self, why: &str) -> bool {
        self.trained.clone_from(&self.good);
        self.optimiser.reset(&self.trained);
        if self.halvings == HALVINGS {
            self.done.notes.push(format!("{why}: training ended, with the best state kept"));
            return false;
        }
        self.halvings += 1;
        self.share /= 2.0;
        self.done.notes.push(format!("{why}: the weights went back to the last good state, the step size was halved"));
        true
    }
}
