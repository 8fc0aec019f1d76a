//! What sharing an MLA model's latents out over ranks costs.

use ndarray::{Array2, Axis, s};
use rayon::prelude::*;
use serde::Serialize;

use super::compare::{Sums, max_abs_dlogit};
use super::error::same_vocabulary;
use super::perplexity::{BLOCK, Evaluation};
use super::rows::{RowPair, next_tokens};
use super::{Comparison, VerifyError};
use crate::latent::{LatentMoments, LatentWeights, Sharing, Transform, transform_of};
use crate::observe::{Event, Observer};
use crate::runtime::{AttentionTensors, Backend, Layer, LayerTensors, Model, RankTensors, RuntimeError};
use crate::source::ModelSource;

/// Tokens of the first window that are also decoded one by one.
const DECODED_TOKENS: usize = 48;

/// One way to share latents out.
#[derive(Debug, Clone)]
pub struct SharedOut {
    /// What turned the latents.
    pub transform: Transform,
    /// How they are shared out.
    pub sharing: Sharing,
    /// What the ranks of every layer hold, where it was fitted (`latent::refitted_ranks`); else slices as they are.
    pub refitted: Option<Vec<Vec<RankTensors>>>,
}

/// What one way of sharing out costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SlicedFigures {
    /// Against the source, on decoded tokens.
    #[serde(flatten)]
    pub against_source: Comparison,
    /// `ln(ppl / ppl of the same model, whole)`, nats per decoded token.
    pub cost_nats_per_token: f64,
    /// Mean `KL(whole || sliced)` of next-token distributions, nats per decoded token.
    pub kl_whole_nats_per_token: f64,
    /// Share of decoded tokens at which whole and sliced model prefer the same token.
    pub top1_whole: f64,
    /// Largest difference of a logit to the whole model's.
    pub max_abs_dlogit_whole: f64,
    /// Values that one rank caches per token and layer.
    pub cache_values_per_rank: usize,
    /// Bytes that were allocated for one rank's cache in the token-by-token run, per token and layer, in f32.
    pub allocated_bytes_per_token: f64,
}

/// The model whole and shared out, on the same windows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SlicedComparison {
    /// Tokens of each window that are prefilled, by whole attention.
    pub prefill: usize,
    /// The model as it is, on decoded tokens.
    pub whole: Comparison,
    /// One entry per way of sharing out.
    pub cases: Vec<SlicedFigures>,
}

/// Run the source, the converted model, and the converted model shared out in every way of `cases`.
///
/// In each window the first `prefill` tokens are a prompt, run by whole attention in all layers; what follows is decoded by
/// ranks in all layers, so that hidden states, latents and caches of decoded tokens are those of a sliced decode. Since the
/// text is given, all tokens of a window go through a layer at once; the first tokens of the first window are also decoded one
/// by one over a cache per rank, and compared (`cached_vs_full_max_abs_dlogit`). Figures are over decoded tokens: those
/// after the prompt.
///
/// `moments` are the latents' on calibration text, one per layer; PCA needs them.
///
/// Phases reported: `source`, `converted` (one step per layer), `logits`.
///
/// # Errors
/// [`VerifyError`]: as [`super::compare`]; a window that is all prompt.
pub fn compare_sliced<S: Backend, C: Backend>(
    source: &Model<'_, S>,
    converted: (&Model<'_, C>, &ModelSource),
    cases: &[SharedOut],
    moments: Option<&[LatentMoments]>,
    (windows, prefill): (&[Vec<u32>], usize),
    observer: &dyn Observer,
) -> Result<SlicedComparison, VerifyError> {
    let (model, files) = converted;
    same_vocabulary(source.architecture(), model.architecture())?;
    // A decoded token is one that is fed after the prompt: its row predicts the next.
    let position = |w: &Vec<u32>| (0..w.len()).map(|i| i >= prefill).collect::<Vec<_>>();
    let decoded: Vec<usize> = windows.iter().flat_map(position).enumerate().filter(|p| p.1).map(|p| p.0).collect();
    let next = next_tokens(windows);
    let next: Vec<Option<u32>> = decoded.iter().map(|&i| next[i]).collect();
    let predicted = next.iter().flatten().count();
    if predicted == 0 {
        return Err(VerifyError::TooShort { windows: windows.len() });
    }
    let of_source = |error: RuntimeError| VerifyError::Run { model: "source", error: Box::new(error) };
    let of_converted = |error: RuntimeError| VerifyError::Run { model: "converted", error: Box::new(error) };

    observer.event(Event::Phase { name: "source", steps: Some(source.architecture().layers as u64) });
    let hidden = source.final_hidden(windows, observer).map_err(of_source)?;
    let hidden_source = hidden.select(Axis(0), &decoded);
    drop(hidden);
    let streams = Streams::run(model, files, cases, moments, (windows, prefill), observer)?;
    let whole = streams.whole.select(Axis(0), &decoded);
    let sliced: Vec<Array2<f32>> = streams.cases.iter().map(|h| h.select(Axis(0), &decoded)).collect();

    let head_source = source.head().map_err(of_source)?;
    let head = model.head().map_err(of_converted)?;
    observer.event(Event::Phase { name: "logits", steps: Some(next.len().div_ceil(BLOCK) as u64) });
    let mut to_source = vec![Sums::default(); cases.len() + 1];
    let mut to_whole = vec![Sums::default(); cases.len()];
    for (block, next) in next.chunks(BLOCK).enumerate() {
        let rows = s![block * BLOCK..block * BLOCK + next.len(), ..];
        let expected = head_source.logits(hidden_source.slice(rows)).map_err(of_source)?;
        let logits_whole = head.logits(whole.slice(rows)).map_err(of_converted)?;
        add(&mut to_source[0], &expected, &logits_whole, next);
        for (case, hidden) in sliced.iter().enumerate() {
            let logits = head.logits(hidden.slice(rows)).map_err(of_converted)?;
            add(&mut to_source[case + 1], &expected, &logits, next);
            add(&mut to_whole[case], &logits_whole, &logits, next);
        }
        let done = (block * BLOCK + next.len()) as u64;
        observer.event(Event::Step { done: block as u64 + 1, tokens: done });
    }
    let comparison = |sums: &Sums, cached: f64| sums.comparison(next.len(), predicted, windows.len(), cached);
    let whole_figures = comparison(&to_source[0], 0.0);
    let arch = model.architecture();
    let mut out = Vec::with_capacity(cases.len());
    for (i, case) in cases.iter().enumerate() {
        let (full, decoded) = (&streams.short[i], &streams.decoded[i]);
        let cached = max_abs_dlogit(&head, full.view(), decoded.view()).map_err(of_converted)?;
        let against_source = comparison(&to_source[i + 1], cached);
        let whole = comparison(&to_whole[i], cached);
        let values = arch.mla().map_or(0, |m| m.kv_lora_rank / case.sharing.ranks + m.qk_rope_head_dim);
        out.push(SlicedFigures {
            against_source,
            cost_nats_per_token: (against_source.ppl_converted / whole_figures.ppl_converted).ln(),
            kl_whole_nats_per_token: whole.kl_nats_per_token,
            top1_whole: whole.top1_agreement,
            max_abs_dlogit_whole: whole.max_abs_dlogit,
            cache_values_per_rank: values,
            allocated_bytes_per_token: streams.bytes[i] as f64 / (decoded.nrows() * arch.layers) as f64,
        });
    }
    Ok(SlicedComparison { prefill, whole: whole_figures, cases: out })
}

fn add(sums: &mut Sums, expected: &Array2<f32>, found: &Array2<f32>, next: &[Option<u32>]) {
    let pair = |i: usize| {
        let (a, b) = (expected.row(i), found.row(i));
        Some(RowPair::new(a.as_slice()?, b.as_slice()?, next[i]))
    };
    let pairs: Vec<Option<RowPair>> = (0..next.len()).into_par_iter().map(pair).collect();
    pairs.iter().flatten().for_each(|pair| sums.add(pair));
}

impl Sums {
    fn comparison(&self, rows: usize, predicted: usize, windows: usize, cached: f64) -> Comparison {
        Comparison {
            max_abs_dlogit: self.max_abs,
            kl_nats_per_token: self.kl / rows as f64,
            top1_agreement: self.same_top1 as f64 / rows as f64,
            ppl_source: Evaluation::new(self.nll_source, predicted, windows).perplexity,
            ppl_converted: Evaluation::new(self.nll_converted, predicted, windows).perplexity,
            tokens: rows,
            windows,
            cached_vs_full_max_abs_dlogit: cached,
        }
    }
}

/// Final hidden states.
struct Streams {
    /// Of the model as it is, `[T, D]`.
    whole: Array2<f32>,
    /// Of every case, `[T, D]`.
    cases: Vec<Array2<f32>>,
    /// Of every case, the first tokens of the first window, all at once, `[n, D]`.
    short: Vec<Array2<f32>>,
    /// The same tokens decoded one by one.
    decoded: Vec<Array2<f32>>,
    /// Bytes of one rank's caches of all layers in that.
    bytes: Vec<usize>,
}

impl Streams {
    fn run<B: Backend>(
        model: &Model<'_, B>,
        files: &ModelSource,
        cases: &[SharedOut],
        moments: Option<&[LatentMoments]>,
        (windows, prefill): (&[Vec<u32>], usize),
        observer: &dyn Observer,
    ) -> Result<Self, VerifyError> {
        let run = |error: RuntimeError| VerifyError::Run { model: "converted", error: Box::new(error) };
        let (arch, backend) = (model.architecture(), model.backend());
        let Some(shape) = arch.mla() else { return Err(run(RuntimeError::Variant { expected: "mla", found: "gqa" })) };
        let (start, lengths) = model.start(windows).map_err(run)?;
        let count = lengths.first().map_or(0, |n| DECODED_TOKENS.min(*n));
        // Of so few tokens some have to be decoded.
        let prompt = prefill.min(count / 2);
        let begin = start.slice(s![..count, ..]).to_owned();
        let mut out = Self {
            cases: vec![start.clone(); cases.len()],
            short: vec![begin.clone(); cases.len()],
            decoded: vec![begin; cases.len()],
            bytes: vec![0; cases.len()],
            whole: start,
        };
        observer.event(Event::Phase { name: "converted", steps: Some(arch.layers as u64) });
        for index in 0..arch.layers {
            let tensors = LayerTensors::load(files, arch, index).map_err(run)?;
            let layer = Layer::new(backend, arch, tensors.clone()).map_err(run)?;
            layer.forward(&mut out.whole, &lengths).map_err(run)?;
            model.check_layer(index, out.whole.view()).map_err(run)?;
            let mut turned: Option<(Transform, Layer<'_, B>, LatentWeights, Option<LatentMoments>)> = None;
            for (i, case) in cases.iter().enumerate() {
                let sharing = &case.sharing;
                let known = turned.as_ref().is_some_and(|t| t.0 == case.transform);
                if !known {
                    let Some(mut weights) = LatentWeights::of(&tensors.attention) else { continue };
                    let own = moments.and_then(|m| m.get(index));
                    let fault = |error| VerifyError::Turning { layer: index, error };
                    let transform = transform_of(case.transform, &tensors, &weights, shape, own).map_err(fault)?;
                    let Some(transform) = transform else { return Err(VerifyError::NoMoments) };
                    weights.fold(&transform);
                    let mut tensors = tensors.clone();
                    if let AttentionTensors::Mla(t) = &mut tensors.attention {
                        weights.install(t);
                    }
                    let layer = Layer::new(backend, arch, tensors).map_err(run)?;
                    turned = Some((case.transform, layer, weights, own.map(|m| m.transformed(&transform))));
                }
                let Some((_, layer, weights, moments)) = &turned else { continue };
                let ranks = match case.refitted.as_ref().and_then(|r| r.get(index)) {
                    Some(ranks) => ranks.clone(),
                    None => weights.ranks(shape, sharing, moments.as_ref()),
                };
                let ranks = layer.ranks(ranks, sharing.shared_rms).map_err(run)?;
                layer.forward_sliced(&mut out.cases[i], &lengths, prefill, &ranks).map_err(run)?;
                model.check_layer(index, out.cases[i].view()).map_err(run)?;
                layer.forward_sliced(&mut out.short[i], &[count], prompt, &ranks).map_err(run)?;
                out.bytes[i] += layer.decode_sliced(&mut out.decoded[i], prompt, &ranks).map_err(run)?;
            }
            observer.event(Event::Step { done: index as u64 + 1, tokens: out.whole.nrows() as u64 });
        }
        Ok(out)
    }
}
