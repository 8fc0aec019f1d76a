//! Perplexity on windows of text.

use ndarray::{ArrayView2, s};
use rayon::prelude::*;
use serde::Serialize;

use super::VerifyError;
use super::rows::{log_sum_exp, next_tokens};
use crate::observe::{Event, Observer};
use crate::runtime::{Backend, Head, Model, RuntimeError};

/// Rows of logits held at a time.
pub(super) const BLOCK: usize = 256;

/// How well a model predicts text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// `exp(nll_nats_per_token)`.
    pub perplexity: f64,
    /// Mean of `-ln p(token | tokens before it in its window)`, pooled over all windows.
    pub nll_nats_per_token: f64,
    /// Tokens predicted: one less than its length per window.
    pub tokens: usize,
    /// Windows.
    pub windows: usize,
}

impl Evaluation {
    pub(super) fn new(nll: f64, tokens: usize, windows: usize) -> Self {
        let nll_nats_per_token = nll / tokens as f64;
        Self { perplexity: nll_nats_per_token.exp(), nll_nats_per_token, tokens, windows }
    }
}

/// Next-token perplexity: in each window every token but the first is predicted from those before it.
///
/// Phases reported: `layers` (one step per layer), `logits` (one step per block of rows).
///
/// # Errors
/// [`VerifyError::TooShort`], [`VerifyError::Run`].
pub fn perplexity<B: Backend>(
    model: &Model<'_, B>,
    windows: &[Vec<u32>],
    observer: &dyn Observer,
) -> Result<Evaluation, VerifyError> {
    let run = |error: RuntimeError| VerifyError::Run { model: "evaluated", error: Box::new(error) };
    if next_tokens(windows).iter().flatten().count() == 0 {
        return Err(VerifyError::TooShort { windows: windows.len() });
    }
    observer.event(Event::Phase { name: "layers", steps: Some(model.architecture().layers as u64) });
    let hidden = model.final_hidden(windows, observer).map_err(run)?;
    let head = model.head().map_err(run)?;
    negative_log_likelihood(&head, hidden.view(), windows, observer)
}

/// Perplexity of windows from the residual stream after the last layer, `[T, D]`, windows under each other.
///
/// Phase reported: `logits` (one step per block of rows).
pub(super) fn negative_log_likelihood<B: Backend>(
    head: &Head<'_, B>,
    hidden: ArrayView2<'_, f32>,
    windows: &[Vec<u32>],
    observer: &dyn Observer,
) -> Result<Evaluation, VerifyError> {
    let run = |error: RuntimeError| VerifyError::Run { model: "evaluated", error: Box::new(error) };
    let next = next_tokens(windows);
    let tokens = next.iter().flatten().count();
    observer.event(Event::Phase { name: "logits", steps: Some(next.len().div_ceil(BLOCK) as u64) });
    let mut nll = 0.0;
    for (block, next) in next.chunks(BLOCK).enumerate() {
        let first = block * BLOCK;
        let logits = head.logits(hidden.slice(s![first..first + next.len(), ..])).map_err(run)?;
        let row = |i: usize| {
            let row = logits.row(i);
            let row = row.as_slice()?;
            next[i].map(|t| log_sum_exp(row) - f64::from(row[t as usize]))
        };
        let rows: Vec<Option<f64>> = (0..next.len()).into_par_iter().map(row).collect();
        nll += rows.iter().flatten().sum::<f64>();
        observer.event(Event::Step { done: block as u64 + 1, tokens: (first + next.len()) as u64 });
    }
    Ok(Evaluation::new(nll, tokens, windows.len()))
}
