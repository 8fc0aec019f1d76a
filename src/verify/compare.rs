//! Logits of a source model and of a converted one, side by side.

use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;
use serde::Serialize;

use super::error::same_vocabulary;
use super::perplexity::{BLOCK, Evaluation};
use super::rows::{RowPair, next_tokens};
use super::{Thresholds, Verdict, VerifyError};
use crate::observe::{Event, Observer};
use crate::runtime::{Backend, Head, Model, RuntimeError};

/// Tokens of the first window that are also decoded one by one.
const CACHED_TOKENS: usize = 64;

/// How far a converted model is from its source.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparison {
    /// Largest absolute difference of two logits, over all positions.
    pub max_abs_dlogit: f64,
    /// Mean over all positions of `KL(source || converted)` of the next-token distributions.
    pub kl_nats_per_token: f64,
    /// Share of positions at which both prefer the same token.
    pub top1_agreement: f64,
    /// Perplexity of the source, as [`super::perplexity`] measures it.
    pub ppl_source: f64,
    /// Perplexity of the converted model.
    pub ppl_converted: f64,
    /// Positions compared. Perplexities are over the tokens predicted: one less per window.
    pub tokens: usize,
    /// Windows compared.
    pub windows: usize,
    /// Largest absolute difference between the converted model's logits with a cache, token by token, and without.
    pub cached_vs_full_max_abs_dlogit: f64,
}

impl Comparison {
    /// Which thresholds hold.
    pub fn verdict(&self, thresholds: &Thresholds) -> Verdict {
        Verdict::new(self, thresholds)
    }
}

/// Run both models on the same windows.
///
/// Phases reported: `source`, `converted` (one step per layer), `logits` (one step per block of rows).
///
/// # Errors
/// [`VerifyError::TooShort`], [`VerifyError::Vocabulary`], [`VerifyError::Run`].
pub fn compare<S: Backend, C: Backend>(
    source: &Model<'_, S>,
    converted: &Model<'_, C>,
    windows: &[Vec<u32>],
    observer: &dyn Observer,
) -> Result<Comparison, VerifyError> {
    same_vocabulary(source.architecture(), converted.architecture())?;
    let next = next_tokens(windows);
    let predicted = next.iter().flatten().count();
    if predicted == 0 {
        return Err(VerifyError::TooShort { windows: windows.len() });
    }
    let of_source = |error: RuntimeError| VerifyError::Run { model: "source", error: Box::new(error) };
    let of_converted = |error: RuntimeError| VerifyError::Run { model: "converted", error: Box::new(error) };

    observer.event(Event::Phase { name: "source", steps: Some(source.architecture().layers as u64) });
    let hidden_source = source.final_hidden(windows, observer).map_err(of_source)?;
    observer.event(Event::Phase { name: "converted", steps: Some(converted.architecture().layers as u64) });
    let (hidden, cached) = streams(converted, windows, observer).map_err(of_converted)?;

    let head_source = source.head().map_err(of_source)?;
    let head = converted.head().map_err(of_converted)?;
    observer.event(Event::Phase { name: "logits", steps: Some(next.len().div_ceil(BLOCK) as u64) });
    let mut sums = Sums::default();
    for (block, next) in next.chunks(BLOCK).enumerate() {
        let rows = s![block * BLOCK..block * BLOCK + next.len(), ..];
        let logits_source = head_source.logits(hidden_source.slice(rows)).map_err(of_source)?;
        let logits = head.logits(hidden.slice(rows)).map_err(of_converted)?;
        let pair = |i: usize| {
            let (source, converted) = (logits_source.row(i), logits.row(i));
            Some(RowPair::new(source.as_slice()?, converted.as_slice()?, next[i]))
        };
        let pairs: Vec<Option<RowPair>> = (0..next.len()).into_par_iter().map(pair).collect();
        pairs.iter().flatten().for_each(|pair| sums.add(pair));
        let done = (block * BLOCK + next.len()) as u64;
        observer.event(Event::Step { done: block as u64 + 1, tokens: done });
    }
    let cached_vs_full =
        max_abs_dlogit(&head, hidden.slice(s![..cached.nrows(), ..]), cached.view()).map_err(of_converted)?;
    let count = next.len() as f64;
    Ok(Comparison {
        max_abs_dlogit: sums.max_abs,
        kl_nats_per_token: sums.kl / count,
        top1_agreement: sums.same_top1 as f64 / count,
        ppl_source: Evaluation::new(sums.nll_source, predicted, windows.len()).perplexity,
        ppl_converted: Evaluation::new(sums.nll_converted, predicted, windows.len()).perplexity,
        tokens: next.len(),
        windows: windows.len(),
        cached_vs_full_max_abs_dlogit: cached_vs_full,
    })
}

/// Sums over rows, in order.
#[derive(Debug, Clone, Default)]
pub(super) struct Sums {
    pub max_abs: f64,
    pub kl: f64,
    pub same_top1: usize,
    pub nll_source: f64,
    pub nll_converted: f64,
}

impl Sums {
    pub fn add(&mut self, pair: &RowPair) {
        self.max_abs = self.max_abs.max(pair.max_abs);
        self.kl += pair.kl;
        self.same_top1 += usize::from(pair.same_top1);
        self.nll_source += pair.nll_source.unwrap_or(0.0);
        self.nll_converted += pair.nll_converted.unwrap_or(0.0);
    }
}

/// Final hidden states of all windows in one pass, and of the first tokens of the first window decoded one by one.
///
/// Both go through a layer while it is in memory: with a causal model, decoding can run layer by layer as well.
fn streams<B: Backend>(
    model: &Model<'_, B>,
    windows: &[Vec<u32>],
    observer: &dyn Observer,
) -> Result<(Array2<f32>, Array2<f32>), RuntimeError> {
    let (mut hidden, lengths) = model.start(windows)?;
    let count = lengths.first().map_or(0, |n| CACHED_TOKENS.min(*n));
    let mut cached = hidden.slice(s![..count, ..]).to_owned();
    for index in 0..model.architecture().layers {
        let layer = model.layer(index)?;
        layer.forward(&mut hidden, &lengths)?;
        model.check_layer(index, hidden.view())?;
        layer.forward_cached(&mut cached)?;
        observer.event(Event::Step { done: index as u64 + 1, tokens: hidden.nrows() as u64 });
    }
    Ok((hidden, cached))
}

pub(super) fn max_abs_dlogit<B: Backend>(
    head: &Head<'_, B>,
    full: ArrayView2<'_, f32>,
    cached: ArrayView2<'_, f32>,
) -> Result<f64, RuntimeError> {
    let (full, cached) = (head.logits(full)?, head.logits(cached)?);
    Ok(full.iter().zip(&cached).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max))
}
