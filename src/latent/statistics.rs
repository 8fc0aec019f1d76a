//! Second moments of every layer's latents on calibration text, through the reference runtime, one layer in memory at a
//! time.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};

use super::LatentWeights;
use super::fold::add_reads;
use super::weights::need_mla;
use crate::arch::{Architecture, MlaShape};
use crate::calibrate::CalibrationSettings;
use crate::calibrate::{CorpusError, Moments, add_gram, calibration_windows, read_texts};
use crate::error::ConvertError;
use crate::factor::linalg::matmul;
use crate::observe::{Event, Observer};
use crate::runtime::{AttentionTensors, Backend, LayerTensors, Model, Qkv};
use crate::source::ModelSource;

/// Moments of one layer's latents `n = norm(c)`, before the norm's gain; where the class norms no latent, of `c` itself. And
/// of the queries that meet them, absorbed: the score of a head is `<q~, n>` plus the rotated key's, `q~ = diag(gain) UK^T q`.
#[derive(Debug, Clone)]
pub struct LatentMoments {
    /// `E[n]`, `[r]`.
    pub mean: Array1<f64>,
    /// `E[n n^T]`, `[r, r]`.
    pub second: Array2<f64>,
    /// `sum_h (v_h / k_h) E[q~_h q~_h^T] + UV~_h^T O_h^T O_h UV~_h`, `[r, r]`, with `UV~ = UV diag(gain)` and `k_h`, `v_h` the
    /// traces: what scores and outputs read of white latents, each head's scores weighing what its outputs do.
    pub reads: Array2<f64>,
    /// `E[n n^T] - E[n] E[n]^T`, which alone tells scores apart: a softmax does not see what all its scores share.
    pub covariance: Array2<f64>,
}

/// Calibration windows for a latent of `rank` values.
///
/// # Errors
/// A text that cannot be read or is too short.
pub fn latent_windows(
    source: &ModelSource,
    arch: &Architecture,
    settings: &CalibrationSettings,
    rank: usize,
) -> Result<Vec<Vec<u32>>, ConvertError> {
    let mut settings = settings.clone();
    settings.max_seq_len = None;
    settings.seq_len = settings.seq_len.min(arch.max_position);
    let texts = read_texts(&settings.files)?;
    let why = format!(", four for each of the {rank} values of the latent");
    let windows: Result<_, CorpusError> = calibration_windows(&source.tokenizer()?, &texts, &settings, 4 * rank, &why);
    Ok(windows?)
}

/// Run the windows through the model and take each layer's moments on the way. Phase reported: `calibrate`.
///
/// # Errors
/// A GQA model; [`ConvertError::Runtime`].
pub fn latent_moments<B: Backend>(
    source: &ModelSource,
    arch: &Architecture,
    backend: &B,
    windows: &[Vec<u32>],
    observer: &dyn Observer,
) -> Result<Vec<LatentMoments>, ConvertError> {
    let shape = need_mla(source, arch)?;
    let rank = shape.kv_lora_rank;
    let model = Model::new(source, arch, backend);
    observer.event(Event::Phase { name: "calibrate", steps: Some(arch.layers as u64) });
    let (mut hidden, lengths) = model.start(windows)?;
    let mut out = Vec::with_capacity(arch.layers);
    for index in 0..arch.layers {
        let mut tensors = LayerTensors::load(source, arch, index)?;
        let weights = LatentWeights::of(&tensors.attention);
        if let (Some(weights), AttentionTensors::Mla(t)) = (&weights, &mut tensors.attention) {
            weights.install(t);
        }
        let gain = tensors.latent_gain().to_vec();
        let output = match &tensors.attention {
            AttentionTensors::Mla(t) => t.o.weight.mapv(f64::from),
            AttentionTensors::Gqa(_) => Array2::zeros((0, 0)),
        };
        let layer = crate::runtime::Layer::new(backend, arch, tensors)?;
        let x = layer.attention_input(hidden.view())?;
        let latents = layer.latents(x.view(), &lengths)?;
        let reads = weights.map_or_else(
            || Ok(Array2::zeros((rank, rank))),
            |w| layer.project_qkv(x.view(), &lengths).map(|qkv| reads_of(&qkv, w, shape, output.view())),
        )?;
        let (mean, second) = moments_of(latents.slice(s![.., ..rank]), &gain);
        let outer = mean.view().insert_axis(Axis(1)).dot(&mean.view().insert_axis(Axis(0)));
        out.push(LatentMoments { covariance: &second - &outer, mean, second, reads });
        layer.forward(&mut hidden, &lengths)?;
        model.check_layer(index, hidden.view())?;
        let tokens = (hidden.nrows() * (index + 1)) as u64;
        observer.event(Event::Step { done: index as u64 + 1, tokens });
    }
    Ok(out)
}

/// Moments of latents `[T, r]`, with their gain taken out again. Where a gain is zero nothing is read, and the moments are 0.
fn moments_of(latents: ArrayView2<'_, f32>, gain: &[f32]) -> (Array1<f64>, Array2<f64>) {
    let mut moments = Moments::new(latents.ncols());
    moments.add(latents);
    let (mut mean, mut second) = (moments.mean(), moments.second());
    let inverse = |i: usize| match gain.get(i) {
        None => 1.0,
        Some(0.0) => 0.0,
        Some(g) => 1.0 / f64::from(*g),
    };
    mean.iter_mut().enumerate().for_each(|(i, m)| *m *= inverse(i));
    second.indexed_iter_mut().for_each(|((i, j), m)| *m *= inverse(i) * inverse(j));
    (mean, second)
}

/// [`LatentMoments::reads`] of queries before RoPE's part and of `o_proj` `[D, H d_V]`.
fn reads_of(qkv: &Qkv, mut weights: LatentWeights, shape: &MlaShape, output: ArrayView2<'_, f64>) -> Array2<f64> {
    let (nope, head) = (shape.qk_nope_head_dim, shape.qk_nope_head_dim + shape.v_head_dim);
    if let Some(gain) = &weights.gain {
        weights.kv_b *= gain;
    }
    let mut out = Array2::zeros((weights.rank(), weights.rank()));
    for h in 0..qkv.heads {
        let first = qkv.query_columns(h).start;
        let q = qkv.q.slice(s![.., first..first + nope]);
        let mut moment = Array2::zeros((nope, nope));
        add_gram(moment.view_mut(), q);
        let keys = weights.kv_b.slice(s![h * head..h * head + nope, ..]);
        let keys = matmul(&keys.t(), &matmul(&moment, &keys)) / qkv.q.nrows().max(1) as f64;
        add_reads(&mut out, &keys, &weights.values_of_head(shape, h, output));
    }
    out
}
