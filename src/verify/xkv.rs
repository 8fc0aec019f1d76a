//! Perplexity after a prompt whose cache is compressed across layers.

use ndarray::{Array2, s};
use serde::Serialize;

use super::perplexity::{Evaluation, negative_log_likelihood};
use super::{VerifyError, windows_of};
use crate::observe::{Event, Observer};
use crate::runtime::{Cpu, GroupCache, Layer, Model, RawKv, Rotation, RuntimeError, XkvBytes, XkvSettings};

/// How well a model goes on with texts whose first part it has only by the factors of xKV, and how well with its own cache.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct XkvEvaluation {
    /// Over the compressed prompt.
    #[serde(flatten)]
    pub compressed: Evaluation,
    /// On the same tokens with the exact cache.
    pub exact: Evaluation,
    /// Tokens of the prompt in each window.
    pub prompt_tokens: usize,
    /// Bytes of the prompt's caches, of one window.
    pub prompt_cache_bytes: XkvBytes,
}

/// Perplexity of every token that is predicted by a token after the first `prompt` ones of its window: the prompt goes
/// through the model exactly, then its cache is replaced by factors, and the rest attends to these and to itself. The
/// first token after the prompt is predicted by the prompt's own prefill, which is exact, so it does not count.
///
/// Streams groups of layers: memory is `settings.group` layers, the residual streams, and the rows of one group for all
/// windows. Phases reported: `layers` (one step per layer), `logits`.
///
/// # Errors
/// [`VerifyError::Prompt`] where less than two tokens are left behind the prompt, [`VerifyError::TooShort`] without windows,
/// [`VerifyError::Run`], with [`RuntimeError::Xkv`] for groups and ranks that are not possible.
pub fn xkv_perplexity(
    model: &Model<'_, Cpu>,
    windows: &[Vec<u32>],
    prompt: usize,
    settings: &XkvSettings,
    observer: &dyn Observer,
) -> Result<XkvEvaluation, VerifyError> {
    let run = |error: RuntimeError| VerifyError::Run { model: "evaluated", error: Box::new(error) };
    let shortest = windows.iter().map(Vec::len).min().ok_or(VerifyError::TooShort { windows: 0 })?;
    if prompt == 0 || prompt + 2 > shortest {
        return Err(VerifyError::Prompt { prompt, window: shortest });
    }
    settings.check(model.architecture(), prompt).map_err(|e| run(e.into()))?;
    let (exact, compressed, bytes) = streams(model, windows, prompt, settings, observer).map_err(run)?;
    let rest: Vec<Vec<u32>> = windows.iter().map(|w| w[prompt..].to_vec()).collect();
    let head = model.head().map_err(run)?;
    let evaluate = |hidden: &Array2<f32>| -> Result<Evaluation, VerifyError> {
        negative_log_likelihood(&head, hidden.view(), &rest, observer)
    };
    Ok(XkvEvaluation {
        compressed: evaluate(&compressed)?,
        exact: evaluate(&exact)?,
        prompt_tokens: prompt,
        prompt_cache_bytes: bytes,
    })
}

/// Final hidden states of what is after the prompts, with exact and with compressed caches.
fn streams(
    model: &Model<'_, Cpu>,
    windows: &[Vec<u32>],
    prompt: usize,
    settings: &XkvSettings,
    observer: &dyn Observer,
) -> Result<(Array2<f32>, Array2<f32>, XkvBytes), RuntimeError> {
    let layers = model.architecture().layers;
    observer.event(Event::Phase { name: "layers", steps: Some(layers as u64) });
    let (mut hidden, lengths) = model.start(windows)?;
    let starts = windows_of(&lengths);
    let mut rest: Vec<Array2<f32>> =
        starts.iter().map(|rows| hidden.slice(s![rows.start + prompt..rows.end, ..]).to_owned()).collect();
    let rotations: Vec<Rotation> =
        lengths.iter().map(|&n| Rotation::for_length(&model.architecture().rope, 0..n, n)).collect();
    let mut bytes = XkvBytes::default();
    for first in (0..layers).step_by(settings.group) {
        let group: Vec<Layer<'_, Cpu>> =
            (first..layers.min(first + settings.group)).map(|i| model.layer(i)).collect::<Result<_, _>>()?;
        let mut raws: Vec<Vec<RawKv>> = windows.iter().map(|_| Vec::with_capacity(group.len())).collect();
        for (index, layer) in group.iter().enumerate() {
            let input = layer.attention_input(hidden.view())?;
            for (raws, rows) in raws.iter_mut().zip(&starts) {
                raws.push(layer.raw_kv(input.slice(s![rows.start..rows.start + prompt, ..]))?);
            }
            layer.forward(&mut hidden, &lengths)?;
            model.check_layer(first + index, hidden.view())?;
            bytes.exact += layer.cache_bytes(prompt);
            observer.event(Event::Step { done: (first + index) as u64 + 1, tokens: hidden.nrows() as u64 });
        }
        let views: Vec<&Layer<'_, Cpu>> = group.iter().collect();
        for (window, (raws, rest)) in raws.into_iter().zip(&mut rest).enumerate() {
            let (rotation, length) = (&rotations[window], lengths[window]);
            let mut cache = GroupCache::new(first, raws, &views, settings, rotation, length - prompt)?;
            for (index, layer) in group.iter().enumerate() {
                cache.decode(index, layer, rest, (rotation, prompt..length))?;
                model.check_layer(first + index, rest.view())?;
            }
            if window == 0 {
                bytes.compressed += cache.prompt_bytes();
            }
        }
    }
    let compressed: Vec<_> = rest.iter().map(|x| x.view()).collect();
    let exact: Vec<_> = starts.iter().map(|rows| hidden.slice(s![rows.start + prompt..rows.end, ..])).collect();
    let join = |parts: &[ndarray::ArrayView2<'_, f32>]| {
        ndarray::concatenate(ndarray::Axis(0), parts).map_err(|_| RuntimeError::NoTokens)
    };
    Ok((join(&exact)?, join(&compressed)?, bytes))
}
